// The correlation of a 2-d layer with 3x3 taps, stride 1, by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308,
// for the weight gradient): outputs are taken in tiles of 2 x 2, both operands transformed, multiplied in 16 frequencies, each
// a product of matrices over the tiles, and the sums over all tiles transformed back: 16 multiplications a tile and pair of
// channels in the place of 36. Tiles of 4 x 2, which take 24 in the place of 72, were faster, but rounded more than twice as
// much as PyTorch does where few positions are summed up.
#pragma once

#include <algorithm>

#include "patches.h"
#include "vectors.h"

namespace localsgd {

struct WinogradArgs {
    PatchSource x, z; // z with output_geometry
};

constexpr int64_t kFrequencies = 16, kTilesAtOnce = 64; // the latter: a block

// How a layer's tiles are shared out. Only `parts` changes the order of additions, so it depends on the layer alone.
struct WinogradPlan {
    bool wide;      // registers of 64 bytes
    int64_t tiles;  // in the batch
    int64_t parts;  // with sums of their own
    int64_t blocks; // of tiles that are transformed before they are multiplied
    bool apart;     // whether each thread has parts of its own, or all threads share every block

    int64_t begin(int64_t part) const { // its first tile
        return std::min(tiles, ceil_div(tiles, kTilesAtOnce) * part / parts * kTilesAtOnce);
    }
};

bool winograd_fits(const Geometry& geometry);
WinogradPlan winograd_plan(const Geometry& geometry, int64_t threads);

// Elements of a transformed block, x behind z, and of a part's sums in the frequencies.
template <typename Acc>
int64_t winograd_block_elements(const Geometry& geometry);
template <typename Acc>
int64_t winograd_sum_elements(const Geometry& geometry);

// Task `task` of winograd_transforms: some channels of the tiles [first, first + kTilesAtOnce), brought into `block`.
int64_t winograd_transforms(const Geometry& geometry);
template <typename Acc>
void winograd_transform(const WinogradArgs& args, const WinogradPlan& plan, int64_t task, int64_t first, Acc* block);

// Task `task` of winograd_products: some sums of one frequency, over `count` tiles in as many blocks as that takes, added to
// those that are there already if `add`.
template <typename Acc>
int64_t winograd_products(const Geometry& geometry);
template <typename Acc>
void winograd_multiply(const WinogradArgs& args, const WinogradPlan& plan, int64_t task, int64_t count, const Acc* blocks,
                       bool add, Acc* sums);

// Task `task` of winograd_finishes: some rows of D [K, (C, taps)], or [K, (taps, C)] if `taps_first`, of the sums of all parts.
int64_t winograd_finishes(const Geometry& geometry);
template <typename Acc>
void winograd_finish(const Geometry& geometry, const WinogradPlan& plan, int64_t task, const Acc* sums, Acc* d,
                     bool taps_first);

} // namespace localsgd
