// The correlation Z^T X of any convolution as an implicit GEMM: X, the im2col matrix, exists a tile at a time, in the cache.
#pragma once

#include "patches.h"
#include "tiles.h"

namespace localsgd {

struct DirectArgs {
    PatchSource x, z; // z with output_geometry
};

Tasks direct_tasks(const Geometry& geometry, int64_t threads, Unit unit);

// Of a part's sums.
template <typename Acc>
int64_t direct_elements(const Geometry& geometry);

// Task `task`: a strip of the sums partials[part][group], which are [K/groups, (taps, C/groups)] in panels of columns.
template <typename Acc>
void direct_part(const DirectArgs& args, const Tasks& tasks, int64_t task, Acc* partials, Unit unit);

// Some rows of D [K, (C/groups, taps)], or (taps, C/groups) if `taps_first`, of one block: the parts added up in order.
int64_t direct_blocks(const Geometry& geometry);
template <typename Acc>
void finish_direct(const Geometry& geometry, int64_t parts, int64_t block, const Acc* partials, Acc* d, bool taps_first);

} // namespace localsgd
