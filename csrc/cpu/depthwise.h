// Depthwise correlation: groups == in_channels, any number of outputs per channel. Memory-bound: x and z are read once.
//
// Two loops, by what is contiguous: `planes` vectorises over an output row (NCHW and any other strides), `pixels` over the
// channels (channels_last). Both gather a padded tile of the accumulation type first, so that the inner loops have no
// boundaries and no conversions; their sums have a fixed order that does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "elements.h"

namespace localsgd {

struct DepthwiseArgs {
    Geometry geometry;
    const void* x;
    Kind x_kind;
    Strides x_strides;
    const void* z;
    Kind z_kind;
    Strides z_strides;
};

// D[k, taps] of the channels [channel_begin, channel_end) and their outputs, complete.
template <typename Acc>
void depthwise_planes(const DepthwiseArgs& args, int64_t channel_begin, int64_t channel_end, Acc* d);

// One output per channel, unit channel strides. The output rows (n, p0, p1) are cut into `pixel_blocks` parts; a part's sum
// [taps, C] goes to `partial`, and `reduce_pixels` adds the parts in order into D[C, taps].
int64_t pixel_blocks(const Geometry& geometry);
bool pixels_eligible(const DepthwiseArgs& args);
template <typename Acc>
void depthwise_pixels(const DepthwiseArgs& args, int64_t block, double* partial);
template <typename Acc>
void reduce_pixels(const Geometry& geometry, const double* partials, Acc* d);

} // namespace localsgd
