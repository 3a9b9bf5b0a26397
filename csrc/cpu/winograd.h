// The correlation of a 2-d layer with 3x3 taps, stride 1, by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308,
// for the weight gradient): outputs are taken in tiles, both operands transformed, multiplied in as many frequencies as a tile
// reads elements of x, each a product of matrices over the tiles, and the sums over all tiles transformed back.
#pragma once

#include <algorithm>

#include "patches.h"
#include "vectors.h"

namespace localsgd {

struct WinogradArgs {
    PatchSource x, z; // z with output_geometry
};

struct WinogradTile { // outputs, down and across
    int64_t height, width;
    int64_t least_positions; // of a layer

    int64_t frequencies() const { return (height + 2) * (width + 2); }
};

// 16 multiplications in the place of 36, 24 in the place of 72, 36 in the place of 144. Rounding is about twice and four times
// that of the first; it does not grow with the number of positions, as PyTorch's own does.
constexpr WinogradTile kWinogradTiles[] = {{2, 2, 0}, {2, 4, 512}, {4, 4, 4096}};

constexpr int64_t kTilesAtOnce = 64; // a block

// How a layer's tiles are shared out. Only `parts` changes the order of additions, so it depends on the layer alone.
struct WinogradPlan {
    bool wide; // registers of 64 bytes
    WinogradTile tile;
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
WinogradPlan winograd_plan(const Geometry& geometry, int64_t threads, WinogradTile tile);

// Elements of a transformed block, x behind z, and of a part's sums in the frequencies.
template <typename Acc>
int64_t winograd_block_elements(const Geometry& geometry, const WinogradPlan& plan);
template <typename Acc>
int64_t winograd_sum_elements(const Geometry& geometry, const WinogradPlan& plan);

// Task `task` of winograd_transforms: some channels of the tiles [first, first + kTilesAtOnce), brought into `block`.
int64_t winograd_transforms(const Geometry& geometry);
template <typename Acc>
void winograd_transform(const WinogradArgs& args, const WinogradPlan& plan, int64_t task, int64_t first, Acc* block);

// Task `task` of winograd_products: some sums of one frequency, over `count` tiles in as many blocks as that takes, added to
// those that are there already if `add`.
template <typename Acc>
int64_t winograd_products(const Geometry& geometry, const WinogradPlan& plan);
template <typename Acc>
void winograd_multiply(const WinogradArgs& args, const WinogradPlan& plan, int64_t task, int64_t count, const Acc* blocks,
                       bool add, Acc* sums);

// Task `task` of winograd_finishes: some rows of D [K, (C, taps)], or [K, (taps, C)] if `taps_first`, of the sums of all parts.
int64_t winograd_finishes(const Geometry& geometry);
template <typename Acc>
void winograd_finish(const Geometry& geometry, const WinogradPlan& plan, int64_t task, const Acc* sums, Acc* d,
                     bool taps_first);

} // namespace localsgd
