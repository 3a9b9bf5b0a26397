// What a tiled matrix product costs, and into how many runs of its summed index it is best split: for direct kernels and both
// products of the Gram form. Pure arithmetic, for comparing configurations, not for promises.
#pragma once

#include <algorithm>
#include <limits>

#include "operand.h"

namespace localsgd::cuda {

// A sum over more positions than that in one go would lose too much to the rounding of fp32.
constexpr int64_t kMostSummed = 16384;

constexpr double kBarrierClocks = 6000; // a grid barrier, and fetching the instructions of the phase behind it

// A main loop on a chip. Of the tile's two strips of operands, the first has kM columns, the second kN.
struct MainLoop {
    Core core;
    int tile_m, tile_n, threads;
    int step; // positions; splits are multiples of it
    Access first, second;
    double first_share;            // of tiles that read their first strip; the others' is the second
    int multiprocessors, resident; // blocks alive at once on each
    int compute;
};

struct Split {
    int64_t tiles, splits;
    int64_t positions; // of a split, at most
    double clocks;

    int64_t units() const { return tiles * splits; }
};

inline const char* core_name(Core core) {
    switch (core) {
    case Core::mma_bf16:
        return "mma_bf16";
    case Core::mma_f16:
        return "mma_f16";
    case Core::mma_tf32:
        return "mma_tf32";
    case Core::ffma:
        return "ffma";
    }
    return "?";
}

// Multiply-adds a clock and multiprocessor: of an A100, or of sm_75 for fp16 without cp.async.
inline double multiplies(Core core, int compute) {
    if (core == Core::ffma) return 128;
    if (core == Core::mma_tf32) return 512;
    return compute >= 80 ? 1024 : 512;
}

// Clocks of the busiest multiprocessor. Counted: multiply-adds (of which a good kernel gets 85 %, from matrix units 60 %, less
// with few warps), reading the operands from the second-level cache (32 bytes a clock) where it is not hidden, the instructions
// that gather operands (some 16 a load, 128 lanes a clock; element by element it is latency that counts, as measured on an
// H200; from segments each element is a load from shared memory), partial tiles out and in.
inline double estimate(const MainLoop& l, const Split& s) {
    constexpr double kBytesPerClock = 32, kUnitClocks = 1500, kLoadClocks = 16.0 / 128, kScalarClocks = 0.75,
                     kSegmentClocks = 1.0 / 32, kSegmentFfmaClocks = 0.25;
    const double length = double(s.positions), first = l.tile_m * l.first_share, second = l.tile_n;
    const double each = std::max<double>(1, double(ceil_div(s.units(), l.multiprocessors)));
    const double alive = std::min<double>(each, l.resident);
    const double share = (l.core == Core::ffma ? 0.85 : 0.6) * std::min(1.0, alive * l.threads / 256.0);
    const double multiply = length * l.tile_m * l.tile_n / multiplies(l.core, l.compute) / share;
    const double element = l.core == Core::mma_bf16 || l.core == Core::mma_f16 ? 2 : 4;
    const double from_memory = by_segments(l.second) ? first : first + second; // hardly anything, of segments
    const double read = length * from_memory * element / kBytesPerClock;
    const auto load = [&](Access access) { // of an element
        if (access == Access::scalar) return kScalarClocks;
        if (by_segments(access) && l.core == Core::ffma) return kSegmentFfmaClocks; // 4 or 8 lanes read the same one
        if (by_segments(access)) return kSegmentClocks * (l.tile_n <= 64 ? 2 : 1);  // by warps that share columns
        return kLoadClocks / (access == Access::chunks16 ? 16 / element : 4);
    };
    const double gather = length * (first * load(l.first) + second * load(l.second));
    const double partials = double(s.units()) * l.tile_m * l.tile_n * 4 * 2 / (kBytesPerClock * l.multiprocessors);
    const double most = std::max(std::max(multiply, read), gather), rest = std::min(multiply, std::max(read, gather));
    return each * (most + 0.25 * rest + kUnitClocks / alive) + partials;
}

// `adding`: clocks of a phase that is only there to add up the splits' partial tiles.
inline Split best_split(const MainLoop& l, int64_t tiles, int64_t length, double adding) {
    const int64_t steps = ceil_div(length, l.step);
    // One, two or three rounds of blocks at most: further ones only add partial tiles.
    const int64_t rounds = 3 * int64_t{l.multiprocessors} * l.resident;
    const int64_t least = std::max<int64_t>(1, ceil_div(length, kMostSummed));
    const int64_t most = std::max(least, std::min(steps, tiles ? ceil_div(rounds, tiles) : 1));
    Split best{tiles, 1, 0, std::numeric_limits<double>::infinity()};
    for (int64_t wanted = least; wanted <= most; ++wanted) {
        const int64_t split_steps = std::max<int64_t>(1, ceil_div(steps, wanted));
        const int64_t splits = std::max<int64_t>(1, ceil_div(steps, split_steps)); // fewer where the last ones would be empty
        if (splits != wanted && wanted != least) continue;
        Split s{tiles, splits, split_steps * l.step, 0};
        s.clocks = estimate(l, s) + (splits > 1 ? adding : 0);
        if (s.clocks < best.clocks) best = s;
    }
    return best;
}

// Lanes that share a quad's sum, see TileGrid, in a grid of so many threads.
inline int sharers_of(int64_t tile_elements, int64_t tiles, int64_t splits, int64_t threads) {
    const int64_t quads = tiles * tile_elements / 4;
    int sharers = 1;
    while (sharers < 32 && sharers * 2 <= splits && quads * sharers * 2 <= threads) sharers *= 2;
    return sharers;
}

inline TileGrid tile_grid(int64_t groups, int64_t tiles_m, int64_t tiles_n, int splits, int split_positions, int sharers) {
    TileGrid grid{};
    grid.groups = static_cast<int>(groups);
    grid.tiles_m = static_cast<int>(tiles_m);
    grid.tiles_n = static_cast<int>(tiles_n);
    grid.splits = splits;
    grid.split_positions = split_positions;
    grid.units = static_cast<int>(groups * tiles_m * tiles_n * splits);
    grid.sharers = sharers;
    grid.by_splits = fast_div(splits);
    grid.by_tiles_n = fast_div(std::max<int64_t>(1, tiles_n));
    grid.by_tiles_m = fast_div(std::max<int64_t>(1, tiles_m));
    return grid;
}

} // namespace localsgd::cuda
