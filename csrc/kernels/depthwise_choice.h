// Which depthwise kernel takes a problem, and in which tiles and splits. Pure arithmetic, for comparing configurations, not for
// promises.
#pragma once

#include <algorithm>
#include <limits>

#include "depthwise.cuh"
#include "depthwise.h"
#include "estimate.h"

namespace localsgd::cuda {

struct Walk {
    int rows; // of a walker's tile; 0: tiles in shared memory
    int input_rows, kept;
    Kind kind;
    int stride;
};

struct DepthwiseVariant {
    int rows, columns;
    void (*kernel)(DepthwiseParams);
    Walk walk;
};

// Shared memory of a block: half of what sm_75 has for a multiprocessor, the least of all, so that while one block loads its
// tile another computes. And positions of x and z that fit.
constexpr size_t kSharedBytes = 32 << 10;
constexpr int64_t kSharedPositions = kSharedBytes / (kPitch * sizeof(float));

// A row of taps of every warp, on its way to the partial sums; that is all that walkers need.
constexpr size_t kWalkSharedBytes = sizeof(float) * kDepthwiseWarps * 3 * kSlice;

// Positions of x that a tile of z reads.
inline int64_t span(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
    return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

inline bool quads(const Operand& o, const Geometry& g, const Triple& size) {
    bool strides = o.strides.channel == 1 && multiple_of_4(g.out_channels) && (g.batch <= 1 || multiple_of_4(o.strides.batch));
    for (int d = 0; d < 3; ++d) strides = strides && (size[d] == 1 || multiple_of_4(o.strides.space[d]));
    return strides && aligned(o);
}

inline Gather gather_of(const Operand& o, const Geometry& g, const Triple& size, bool own_channels) {
    if (own_channels && quads(o, g, size)) return Gather::channels4;
    return o.strides.channel <= o.strides.space[2] ? Gather::channels : Gather::positions;
}

// Clocks that a tile keeps a multiprocessor busy: its instructions (4 a clock, rows dealt to 8 warps) or its bytes (14 of each
// clock), whichever are more.
inline double tile_clocks(const DepthwiseProblem& problem, const DepthwiseVariant& v, int64_t rows, int64_t columns,
                          double loads) {
    const Geometry& g = problem.geometry;
    const int64_t x_rows = span(rows, g.stride[1], v.rows, g.dilation[1]),
                  x_columns = span(columns, g.stride[2], v.columns, g.dilation[2]);
    const bool adjacent = g.stride[2] == 1 && g.dilation[2] == 1;
    const double steps = adjacent ? double(columns + v.columns - 1) : double(columns);
    const double each = v.rows * v.columns + (adjacent ? 2 * v.rows + v.columns : 2 * v.rows * v.columns) + 4;
    const double positions = double(x_rows * x_columns) + double(rows * columns);
    const double issue = 2 * double(ceil_div(rows, kDepthwiseWarps)) * steps * each + positions * loads / 4;
    const double memory = (double(rows * columns) * kSlice * kind_size(problem.z.kind) +
                           double(x_rows * x_columns) * kSlice * kind_size(problem.x.kind)) /
                          14;
    return std::max(issue, memory) + 0.25 * std::min(issue, memory) + 300;
}

struct TileChoice {
    int64_t rows, columns, count;
    double clocks; // of one
};

// Widths and heights that divide the plane evenly; for each width the largest height that shared memory has room for.
inline TileChoice best_tile(const DepthwiseProblem& problem, const DepthwiseVariant& v, double loads) {
    const Geometry& g = problem.geometry;
    const int64_t height = std::max<int64_t>(1, g.output[1]), width = std::max<int64_t>(1, g.output[2]);
    TileChoice best{0, 0, 0, std::numeric_limits<double>::infinity()};
    for (int64_t widest = std::min(width, kSharedPositions), last = 0; widest > 0; --widest) {
        const int64_t columns = ceil_div(width, ceil_div(width, widest));
        if (columns == last) continue;
        last = columns;
        const int64_t x_columns = span(columns, g.stride[2], v.columns, g.dilation[2]);
        int64_t rows = 0;
        while (rows < height &&
               span(rows + 1, g.stride[1], v.rows, g.dilation[1]) * x_columns + (rows + 1) * columns <= kSharedPositions)
            ++rows;
        if (rows == 0) continue;
        rows = ceil_div(height, ceil_div(height, rows));
        const int64_t count = g.batch * g.output[0] * ceil_div(g.output[1], rows) * ceil_div(g.output[2], columns);
        const double clocks = tile_clocks(problem, v, rows, columns, loads);
        if (best.rows == 0 || double(count) * clocks < double(best.count) * best.clocks) best = {rows, columns, count, clocks};
    }
    return best;
}

inline size_t shared_bytes(const DepthwiseConfig& c, const Walk& walk, const Geometry& g) {
    if (walk.rows > 0) return kWalkSharedBytes;
    const int64_t tile = span(c.tile_rows, g.stride[1], c.chunk_rows, g.dilation[1]) *
                             span(c.tile_columns, g.stride[2], c.chunk_columns, g.dilation[2]) +
                         int64_t{c.tile_rows} * c.tile_columns;
    // A row of taps of every warp as well, as above.
    return sizeof(float) * static_cast<size_t>(std::max<int64_t>(tile * kPitch, kDepthwiseWarps * c.chunk_columns * kSlice));
}

// Whether pairs of channels are neighbours in memory, aligned, within 32-bit distances from a row and a column to the next.
inline bool pairs(const Operand& o, const Geometry& g) {
    const auto even = [](int64_t n) { return n % 2 == 0; };
    const Strides& s = o.strides;
    for (int d = 1; d < 3; ++d)
        if (!even(s.space[d]) || s.space[d] < 0 || s.space[d] > kMaxInt / kind_size(o.kind)) return false;
    return s.channel == 1 && (g.batch <= 1 || even(s.batch)) &&
           reinterpret_cast<uintptr_t>(o.data) % (2 * kind_size(o.kind)) == 0;
}

inline bool can_walk(const DepthwiseProblem& problem, const Walk& walk) {
    const Geometry& g = problem.geometry;
    if (walk.rows == 0 || problem.x.kind != walk.kind || problem.z.kind != walk.kind) return false;
    if (g.out_per_group() != 1 || g.out_channels % 2 != 0) return false;
    if (g.kernel != Triple{1, 3, 3} || g.input[0] != 1 || g.output[0] != 1 || g.pad[0] != 0) return false;
    for (int d = 1; d < 3; ++d)
        if (g.stride[d] != walk.stride || g.dilation[d] != 1) return false;
    return pairs(problem.x, g) && pairs(problem.z, g);
}

// Calls visit(splits, tiles of each) for what gives blocks at most two units.
template <class Visit>
void for_splits(int64_t places, int64_t tiles, int64_t slots, const Visit& visit) {
    const int64_t most = std::clamp<int64_t>(ceil_div(2 * slots, places), 1, std::max<int64_t>(1, tiles));
    for (int64_t splits = 1; splits <= most; ++splits) {
        const int64_t run = std::max<int64_t>(1, ceil_div(tiles, splits));
        if (splits == 1 || ceil_div(tiles, run) == splits) visit(splits, run); // otherwise the last ones would be empty
    }
}

// Clocks to write and read the partial sums.
inline double partial_clocks(double units, double taps, double multiprocessors) {
    return units * taps * kSlice * 8 / (32 * multiprocessors);
}

// A tile and the splits for blocks that stage it in shared memory, if its taps are not too far apart.
inline void choose_tiles(DepthwiseConfig& best, DepthwiseConfig c, const DepthwiseProblem& problem, const DepthwiseVariant& v,
                         int64_t multiprocessors, int64_t resident) {
    constexpr double kStaging = 2000; // clocks until a tile is there, during which other blocks compute
    const Geometry& g = problem.geometry;
    const double loads = c.x_gather == Gather::channels4 ? 5 : 12; // instructions for each position and lane
    const TileChoice tile = best_tile(problem, v, loads);
    if (tile.rows == 0) return;
    const int64_t chunks = g.kernel[0] * ceil_div(g.kernel[1], v.rows) * ceil_div(g.kernel[2], v.columns);
    const int64_t places = std::max<int64_t>(1, c.slices * chunks);
    c.tap_chunks = static_cast<int>(chunks);
    c.tile_rows = static_cast<int>(tile.rows);
    c.tile_columns = static_cast<int>(tile.columns);
    c.tiles = static_cast<int>(tile.count);
    for_splits(places, tile.count, multiprocessors * resident, [&](int64_t splits, int64_t run) {
        const int64_t units = places * splits, each = ceil_div(units, multiprocessors), alive = std::min(each, resident);
        c.splits = static_cast<int>(splits);
        c.split_tiles = static_cast<int>(run);
        c.estimated_clocks = double(each) * (double(run) * (tile.clocks + kStaging / double(alive)) + 1500 / double(alive)) +
                             partial_clocks(double(units), v.rows * v.columns, double(multiprocessors)) + 2 * kBarrierClocks;
        if (c.estimated_clocks < best.estimated_clocks) best = c;
    });
}

// The run of columns and the splits for walkers: all of them at work, and for as long.
inline void choose_walk(DepthwiseConfig& best, DepthwiseConfig c, const DepthwiseProblem& problem, const Walk& walk,
                        int64_t multiprocessors, int64_t resident) {
    constexpr int64_t kLeastColumns = 14;           // each run reads 2 columns more
    constexpr double kStart = 1500, kLatency = 300; // clocks: of a tile; of a step that waits
    const Geometry& g = problem.geometry;
    const double instructions = 18 * walk.rows + 7 * (walk.rows + walk.stride * walk.input_rows); // of a step
    const double bytes = kind_size(walk.kind) * double(g.batch) * double(g.out_channels) *
                         (double(product(g.input)) + double(product(g.output)));
    const int64_t width = std::max<int64_t>(1, g.output[2]), places = std::max(1, c.slices);
    for (int64_t across = 1; across == 1 || width / across >= kLeastColumns; ++across) {
        c.tile_rows = walk.rows;
        c.tile_columns = static_cast<int>(ceil_div(width, across));
        c.tiles = static_cast<int>(g.batch * ceil_div(g.output[1], walk.rows) * ceil_div(g.output[2], c.tile_columns));
        const int64_t steps = ceil_div(c.tile_columns + walk.kept - 1, walk.kept) * walk.kept;
        for_splits(places, c.tiles, multiprocessors * resident, [&](int64_t splits, int64_t run) {
            const int64_t units = places * splits, alive = std::min(ceil_div(units, multiprocessors), resident);
            const double step = double(alive * kDepthwiseWarps) * instructions / 2.5 + kLatency;
            const double issue =
                double(ceil_div(units, multiprocessors * alive) * ceil_div(run, kWalkers)) * (double(steps) * step + kStart);
            const double loading = double(std::min(units, multiprocessors) * alive) / double(resident); // enough at a time
            const double memory = bytes / (14 * loading);
            c.splits = static_cast<int>(splits);
            c.split_tiles = static_cast<int>(run);
            c.estimated_clocks = std::max(issue, memory) + 0.25 * std::min(issue, memory) +
                                 partial_clocks(double(units), 9, double(multiprocessors)) + 2 * kBarrierClocks;
            if (c.estimated_clocks < best.estimated_clocks) best = c;
        });
    }
}

} // namespace localsgd::cuda
