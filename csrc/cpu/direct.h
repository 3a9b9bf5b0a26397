// The correlation Z^T X of any convolution as an implicit GEMM: X, the im2col matrix, exists a tile at a time, in the cache.
#pragma once

#include "patches.h"
#include "vectors.h"

namespace localsgd {

struct DirectArgs {
    PatchSource x, z; // z with output_geometry
};

Tasks direct_tasks(const Geometry& geometry, int64_t threads);

// Task `task`: a strip of the columns of partials[part][group] [K/groups, (taps, C/groups)].
template <typename Acc>
void direct_part(const DirectArgs& args, const Tasks& tasks, int64_t task, Acc* partials, bool wide = has_wide_registers());

// Row k of D [K, (C/groups, taps)]: the parts added up in order. `d` may be `partials` where there is one tap.
template <typename Acc>
void finish_direct(const Geometry& geometry, int64_t parts, int64_t k, const Acc* partials, Acc* d);

} // namespace localsgd
