// Depthwise correlation: groups == in_channels, any number of outputs per channel. Memory-bound: x and z are read once.
//
// Two loops, by what is contiguous: `planes` vectorises over columns (NCHW and any other strides), `pixels` over the channels
// (channels_last). Both read the tensors where they lie, unless they must be converted or their elements have gaps. The sums
// have a fixed order that does not depend on the number of threads.
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
    bool dots; // x and z of bf16 by AVX-512's dot products, which the CPU must have, where they fit (depthwise_dots.h,
               // plane_runs.h)
};

// D[k, taps] of the channels [channel_begin, channel_end) and their outputs, complete.
template <typename Acc>
void depthwise_planes(const DepthwiseArgs& args, int64_t channel_begin, int64_t channel_end, Acc* d);

// One output per channel, unit channel strides. The output rows (n, p0, p1) are cut into parts, the channels into blocks: a
// task is a part and a block. A part's sum [taps, C] lies at part * taps * C in `partials`, of which a task writes its block's
// columns; `reduce_pixels` adds the parts in order into D[C, taps].
struct PixelTasks {
    int64_t parts, blocks, block_channels;
    int64_t count() const { return parts * blocks; }
};
PixelTasks pixel_tasks(const Geometry& geometry);
bool pixels_eligible(const DepthwiseArgs& args);
template <typename Acc>
void depthwise_pixels(const DepthwiseArgs& args, int64_t task, double* partials);
template <typename Acc>
void reduce_pixels(const Geometry& geometry, const double* partials, int64_t channel_begin, int64_t channel_end, Acc* d);

} // namespace localsgd
