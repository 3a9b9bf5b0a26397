// What follows the main loop, for every core: partial tiles to the workspace, their sum in a fixed order, norm, write.
//
// Not by the usual ticket, where a tile's last block adds its partials: D is small and the chip large, so that a tile is split
// over up to a hundred blocks, and one block would read megabytes while all others idle. Here the whole grid adds.
#pragma once

#include "geometry.cuh"
#include "norm_apply.cuh"

namespace localsgd::cuda {

struct TilePlace {
    int group, m, n; // first row and column of the tile
};

// Whether the tiles of a group are those on and below the diagonal of a symmetric matrix, row by row. `tiles_n` then counts
// all of them and `tiles_m` is 1.
template <class T>
constexpr bool kTriangle = false;

LOCALSGD_DEVICE unsigned triangle_row(unsigned tile) { // the largest with row (row + 1) / 2 <= tile
    auto row = static_cast<unsigned>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) / 2.0f);
    while (row * (row + 1) / 2 > tile) --row; // fp32 may be one off
    while ((row + 1) * (row + 2) / 2 <= tile) ++row;
    return row;
}

template <class T>
LOCALSGD_DEVICE TilePlace place_of(const TileGrid& grid, unsigned tile) {
    if constexpr (kTriangle<T>) {
        unsigned n = tile;
        const unsigned group = divide(n, grid.by_tiles_n), m = triangle_row(n);
        return {static_cast<int>(group), static_cast<int>(m) * T::kM, static_cast<int>(n - m * (m + 1) / 2) * T::kN};
    }
    unsigned n = tile;
    unsigned m = divide(n, grid.by_tiles_n);
    const unsigned group = divide(m, grid.by_tiles_m);
    return {static_cast<int>(group), static_cast<int>(m) * T::kM, static_cast<int>(n) * T::kN};
}

struct Unit {
    TilePlace place;
    int split, begin, end; // positions
};

template <class T>
LOCALSGD_DEVICE Unit unit_of(const TileGrid& grid, int positions, unsigned unit) {
    unsigned split = unit;
    const TilePlace place = place_of<T>(grid, divide(split, grid.by_splits));
    const int begin = static_cast<int>(split) * grid.split_positions;
    return {place, static_cast<int>(split), begin, min(begin + grid.split_positions, positions)};
}

template <class T>
LOCALSGD_DEVICE float4* partial_quad(const Workspace& w, const TileGrid& grid, int64 tile, int split, int slot, int thread) {
    return reinterpret_cast<float4*>(w.partials) + ((tile * grid.splits + split) * T::kSlots + slot) * T::kThreads + thread;
}

// A thread's sums, by quads of neighbouring columns as T::m_of and T::n_of place them.
template <class T>
LOCALSGD_DEVICE void store_partial(const Workspace& w, const TileGrid& grid, unsigned tile, int split,
                                   const typename T::Sum& sum) {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot)
        *partial_quad<T>(w, grid, tile, split, slot, threadIdx.x) = T::quad_of(sum, slot);
}

// The main loop of the units that fall to this block; their partial tiles go to the workspace.
template <class Path>
LOCALSGD_DEVICE void correlate_units(const Workspace& w, const TileGrid& grid, const Patches& z, const Patches& x,
                                     typename Path::Storage& shared) {
    for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(grid.units); unit += gridDim.x) {
        const auto [place, split, begin, end] = unit_of<typename Path::Tile>(grid, x.positions, unit);
        typename Path::Tile::Sum sum;
        Path::correlate(sum, shared, z, x, place.group, place.m, place.n, begin, end);
        LOCALSGD_FORGET(unit); // two registers less in the main loop
        unsigned again = unit;
        const unsigned tile = divide(again, grid.by_splits);
        store_partial<typename Path::Tile>(w, grid, tile, static_cast<int>(again), sum);
    }
}

LOCALSGD_DEVICE int64 target_offset(const Target& target, const Patches& x, int64 out_channel, int column) {
    unsigned channel, tap[3];
    split_column(x, column, channel, tap);
    return out_channel * target.out_stride + channel * target.channel_stride + tap[0] * target.tap_stride[0] +
           tap[1] * target.tap_stride[1] + tap[2] * target.tap_stride[2];
}

// Calls visit(quad in the workspace, sums over the splits or not, out channel, first column, columns) for the quads that this
// thread owns: the same ones in every phase, so what it left in the workspace needs no barrier. Warp-uniform loop: lanes
// meet in the shuffles.
template <class T, bool kSum, class Visit>
LOCALSGD_DEVICE void for_owned_quads(const Workspace& w, const TileGrid& grid, int m_size, int n_size, const Visit& visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32,
              warp = static_cast<int>(blockIdx.x * (T::kThreads / 32) + threadIdx.x / 32);
    const int warps = static_cast<int>(gridDim.x) * (T::kThreads / 32);
    const int quads_a_warp = 32 / grid.sharers, sharer = lane / quads_a_warp;
    constexpr int kTileQuads = T::kElements / 4;
    const int64 quads = static_cast<int64>(grid.groups) * grid.tiles_m * grid.tiles_n * kTileQuads;
    const int run = (grid.splits + grid.sharers - 1) / grid.sharers;
    const int first_split = min(sharer * run, grid.splits), last_split = min(first_split + run, grid.splits);
    for (int64 base = static_cast<int64>(warp) * quads_a_warp; base < quads; base += static_cast<int64>(warps) * quads_a_warp) {
        const int64 quad = base + lane % quads_a_warp;
        const unsigned tile = static_cast<unsigned>(quad / kTileQuads);
        const int within = static_cast<int>(quad % kTileQuads), slot = within / T::kThreads, thread = within % T::kThreads;
        float4* first = partial_quad<T>(w, grid, tile, 0, slot, thread);
        float4 sum = make_float4(0, 0, 0, 0);
        if constexpr (kSum) {
            const float4* p = partial_quad<T>(w, grid, tile, first_split, slot, thread);
#pragma unroll 4
            for (int split = first_split; split < last_split; ++split, p += kTileQuads) {
                const float4 v = __ldcg(p);
                sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
            }
            for (int apart = quads_a_warp; apart < 32; apart *= 2) {
                sum.x += __shfl_xor_sync(0xffffffffu, sum.x, apart);
                sum.y += __shfl_xor_sync(0xffffffffu, sum.y, apart);
                sum.z += __shfl_xor_sync(0xffffffffu, sum.z, apart);
                sum.w += __shfl_xor_sync(0xffffffffu, sum.w, apart);
            }
        }
        if (sharer != 0) continue;
        const TilePlace place = place_of<T>(grid, tile);
        const int m = place.m + T::m_of(thread, slot), n = place.n + T::n_of(thread, slot);
        if (m < m_size && n < n_size) visit(first, sum, static_cast<int64>(place.group) * m_size + m, n, min(4, n_size - n));
    }
}

LOCALSGD_DEVICE float component(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// `rows`: of D per group, its columns are those of x.

// D into the first split's place, its squares' sum for this block; or D to the target, if that is all that is wanted.
template <class T>
LOCALSGD_DEVICE void reduce_partials(const Workspace& w, const TileGrid& grid, int rows, const Patches& x, const Target& target,
                                     bool to_target) {
    double squares = 0;
    for_owned_quads<T, true>(w, grid, rows, x.columns, [&](float4* quad, const float4& sum, int64 k, int n, int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i >= count) break;
            const float d = component(sum, i);
            squares += static_cast<double>(d) * static_cast<double>(d);
            if (to_target) static_cast<float*>(target.data)[target_offset(target, x, k, n + i)] = d;
        }
        if (!to_target) *quad = sum;
    });
    if (to_target) return;
    squares = block_sum<T::kThreads>(squares);
    if (threadIdx.x == 0) w.squares[blockIdx.x] = squares;
}

template <class T>
LOCALSGD_DEVICE void norm_and_write(const Workspace& w, const TileGrid& grid, int rows, const Patches& x, const Target& target,
                                    const Step& step) {
    const double squares = block_sum<T::kThreads>(w.squares, static_cast<int>(gridDim.x));
    if (!usable(step, squares)) {
        if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(step.skipped);
        return;
    }
    const double scale = step_scale(step, squares);
    for_owned_quads<T, false>(w, grid, rows, x.columns, [&](const float4* quad, const float4&, int64 k, int n, int count) {
        const float4 d = __ldcg(quad);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count)
                add_scaled_at(target.data, target_offset(target, x, k, n + i), target.element, scale, component(d, i));
    });
}

} // namespace localsgd::cuda
