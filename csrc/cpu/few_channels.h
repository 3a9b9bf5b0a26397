// The correlation of 2-d layers of few input channels whose columns are neighbours in memory: a network's first layer, in NCHW.
// Its sums run over columns, a vector at a time: z is read where it lies, and of x only rows are copied, once, not a patch of
// them for each position.
#pragma once

#include "direct.h"

namespace localsgd {

// By shape, and by what z is stored as; by where the operands lie, too.
bool has_few_channels(const Geometry& geometry, Kind z, bool in_double);
template <typename Acc>
bool few_channels_fit(const DirectArgs& args);

// Parts of the output rows, whose sums are `partials` [parts][K, (C, taps)]. Their number depends on the layer alone. `wide`:
// whether to use registers of 64 bytes.
int64_t few_channels_parts(const Geometry& geometry);
template <typename Acc>
void few_channels_part(const DirectArgs& args, int64_t parts, int64_t part, bool wide, double* partials);

// Row k of D [K, (C, taps)], or [K, (taps, C)] if `taps_first`: the parts added up in order.
template <typename Acc>
void finish_few_channels(const Geometry& geometry, int64_t parts, int64_t k, const double* partials, Acc* d, bool taps_first);

} // namespace localsgd
