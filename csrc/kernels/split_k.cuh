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

// `within`: slot * threads + thread, a quad's place in its tile.
template <class T>
LOCALSGD_DEVICE float4* partial_quad(const Workspace& w, const TileGrid& grid, unsigned tile, int split, unsigned within) {
    const unsigned unit = tile * static_cast<unsigned>(grid.splits) + static_cast<unsigned>(split);
    return reinterpret_cast<float4*>(w.partials) + static_cast<int64>(unit) * (T::kSlots * T::kThreads) + within;
}

// A thread's sums, by quads of neighbouring columns as T::m_of and T::n_of place them.
template <class T>
LOCALSGD_DEVICE void store_partial(const Workspace& w, const TileGrid& grid, unsigned tile, int split,
                                   const typename T::Sum& sum) {
#pragma unroll
    for (int slot = 0; slot < T::kSlots; ++slot)
        *partial_quad<T>(w, grid, tile, split, slot * T::kThreads + threadIdx.x) = T::quad_of(sum, slot);
}

LOCALSGD_DEVICE float component(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

LOCALSGD_DEVICE double squares_of(const float4& v) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(component(v, i)) * static_cast<double>(component(v, i));
    return sum;
}

template <class T>
LOCALSGD_DEVICE void put_squares(const Workspace& w, double squares) {
    squares = block_sum<T::kThreads>(squares);
    if (threadIdx.x == 0) w.squares[blockIdx.x] = squares;
}

// The main loop of the units that fall to this block; their partial tiles go to the workspace.
template <class Path, class X> // x: Patches, or Segments
LOCALSGD_DEVICE void correlate_units(const Workspace& w, const TileGrid& grid, const Patches& z, const X& x,
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

// Whether the phase that adds up partial tiles has nothing to do.
LOCALSGD_DEVICE bool is_whole(const TileGrid& grid, bool to_target) { return grid.splits == 1 && !to_target; }

// That phase's other half, where units are tiles of D: each thread reads back what it has written itself, as in the main loop
// even one number more to keep may be spilled.
template <class T>
LOCALSGD_DEVICE void put_squares_of_units(const Workspace& w, const TileGrid& grid) {
    double squares = 0;
    for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(grid.units); unit += gridDim.x) {
#pragma unroll 8
        for (int slot = 0; slot < T::kSlots; ++slot)
            squares += squares_of(__ldcg(partial_quad<T>(w, grid, unit, 0, slot * T::kThreads + threadIdx.x)));
    }
    put_squares<T>(w, squares);
}

LOCALSGD_DEVICE int64 target_offset(const Target& target, const Patches& x, int out_channel, int column) {
    unsigned channel, tap[3];
    split_column(x, column, channel, tap);
    return out_channel * target.out_stride + channel * target.channel_stride + tap[0] * target.tap_stride[0] +
           tap[1] * target.tap_stride[1] + tap[2] * target.tap_stride[2];
}

// A quad of neighbouring columns of D: where its sums lie in the workspace, and which elements they are.
struct OwnedQuad {
    float4* first; // of the first split
    int k;         // out channel
    int n, count;  // first column, and how many there are: none, or fewer, beyond the matrix
};

// The quads that a thread owns, a batch at a time: the same ones in every phase, so what it left in the workspace needs no
// barrier. A batch's loads are in flight together; where splits are added up, those of several splits as well.
constexpr int kBatch = 4, kSumBatch = 2;

template <class T>
struct OwnedQuads {
    static constexpr unsigned kTileQuads = T::kElements / 4;

    const Workspace& workspace;
    const TileGrid& grid;
    int m_size, n_size;

    LOCALSGD_DEVICE int quads_a_warp() const { return 32 / grid.sharers; }
    LOCALSGD_DEVICE int sharer() const { return static_cast<int>(threadIdx.x) % 32 / quads_a_warp(); }
    LOCALSGD_DEVICE unsigned size() const { // 2^31 at most, as the launcher makes sure
        return static_cast<unsigned>(grid.groups * grid.tiles_m * grid.tiles_n) * kTileQuads;
    }
    // The warp's quads are base .. base + quads_a_warp(), then those `step` further on. Warp-uniform: lanes meet in shuffles.
    LOCALSGD_DEVICE unsigned begin() const {
        return (blockIdx.x * (T::kThreads / 32) + threadIdx.x / 32) * static_cast<unsigned>(quads_a_warp());
    }
    LOCALSGD_DEVICE unsigned step() const { return gridDim.x * (T::kThreads / 32) * static_cast<unsigned>(quads_a_warp()); }

    LOCALSGD_DEVICE OwnedQuad at(unsigned base) const {
        const unsigned wanted = base + threadIdx.x % 32 % static_cast<unsigned>(quads_a_warp());
        const unsigned quad = wanted < size() ? wanted : 0;
        const unsigned tile = quad / kTileQuads, within = quad % kTileQuads;
        const int slot = static_cast<int>(within / T::kThreads), thread = static_cast<int>(within % T::kThreads);
        const TilePlace place = place_of<T>(grid, tile);
        const int m = place.m + T::m_of(thread, slot), n = place.n + T::n_of(thread, slot);
        const bool exists = wanted < size() && m < m_size;
        return {partial_quad<T>(workspace, grid, tile, 0, within), place.group * m_size + m, n,
                exists ? min(4, n_size - n) : 0};
    }

    // Over the splits. With sharers each adds a run of them, and all get the sum. What does not exist is added up as well:
    // there is something in its place, and without branches more loads are in flight.
    LOCALSGD_DEVICE void add_splits(float4 (&sum)[kSumBatch], const OwnedQuad (&quads)[kSumBatch]) const {
        const int run = (grid.splits + grid.sharers - 1) / grid.sharers;
        const int first = min(sharer() * run, grid.splits), last = min(first + run, grid.splits);
#pragma unroll
        for (int j = 0; j < kSumBatch; ++j) sum[j] = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int split = first; split < last; ++split) {
#pragma unroll
            for (int j = 0; j < kSumBatch; ++j) {
                const float4 v = __ldcg(quads[j].first + static_cast<int64>(split) * kTileQuads);
                sum[j] = make_float4(sum[j].x + v.x, sum[j].y + v.y, sum[j].z + v.z, sum[j].w + v.w);
            }
        }
#pragma unroll 1
        for (int apart = quads_a_warp(); apart < 32; apart *= 2) {
#pragma unroll
            for (int j = 0; j < kSumBatch; ++j) {
                sum[j].x += __shfl_xor_sync(0xffffffffu, sum[j].x, apart);
                sum[j].y += __shfl_xor_sync(0xffffffffu, sum[j].y, apart);
                sum[j].z += __shfl_xor_sync(0xffffffffu, sum[j].z, apart);
                sum[j].w += __shfl_xor_sync(0xffffffffu, sum[j].w, apart);
            }
        }
    }

    // Calls visit(quad, sum over the splits) for those that exist.
    template <class Visit>
    LOCALSGD_DEVICE void for_sums(const Visit& visit) const {
        for (unsigned base = begin(); base < size(); base += kSumBatch * step()) {
            OwnedQuad quads[kSumBatch];
            float4 sum[kSumBatch];
            quads[0] = at(base);
#pragma unroll
            for (int j = 1; j < kSumBatch; ++j) {
                quads[j] = {quads[0].first, 0, 0, 0}; // none: the first one's place may be read once more
                // What is jumped over need not be fetched.
                if (base + j * step() < size()) quads[j] = at(base + j * step());
            }
            add_splits(sum, quads);
            if (sharer() != 0) continue;
#pragma unroll
            for (int j = 0; j < kSumBatch; ++j)
                if (quads[j].count > 0) visit(quads[j], sum[j]);
        }
    }
};

// `rows`: of D per group, its columns are those of x.

// D into the first split's place, its squares' sum for this block; or D to the target, if that is all that is wanted.
template <class T>
LOCALSGD_DEVICE void reduce_partials(const Workspace& w, const TileGrid& grid, int rows, const Patches& x, const Target& target,
                                     bool to_target) {
    const OwnedQuads<T> owned{w, grid, rows, x.columns};
    double squares = 0;
    owned.for_sums([&](const OwnedQuad& q, const float4& sum) {
        squares += squares_of(sum); // 0 beyond the matrix, or not finite where some of D is not either
        if (!to_target) {
            *q.first = sum;
            return;
        }
#pragma unroll 1 // few instructions: fetching them takes longer than a short loop
        for (int i = 0; i < q.count; ++i)
            static_cast<float*>(target.data)[target_offset(target, x, q.k, q.n + i)] = component(sum, i);
    });
    if (!to_target) put_squares<T>(w, squares);
}

// `wait` returns when all blocks are through with the phase before. What is overwritten is read before that, since memory takes
// its time: until then nobody writes it.
template <class T, class Wait>
LOCALSGD_DEVICE void norm_and_write(const Workspace& w, const TileGrid& grid, int rows, const Patches& x, const Target& target,
                                    const Step& step, const Wait& wait) {
    const OwnedQuads<T> owned{w, grid, rows, x.columns};
    const unsigned end = owned.sharer() == 0 ? owned.size() : 0;
    float* const data = static_cast<float*>(target.data);
    double scale = 0;
    bool waited = false;
    unsigned base = owned.begin();
#pragma unroll 1
    do { // once even without a quad: all threads meet in `wait`
        const float4* first[kBatch];
        float* at[kBatch] = {};
        float4 old[kBatch];
        if (target.in_quads) {
#pragma unroll
            for (int j = 0; j < kBatch; ++j) {
                if (base + j * owned.step() >= end) break; // past the code for the others, which need not be fetched
                const OwnedQuad q = owned.at(base + j * owned.step());
                if (q.count <= 0) continue;
                first[j] = q.first;
                at[j] = data + target_offset(target, x, q.k, q.n);
                old[j] = quad(at[j]);
            }
        }
        if (!waited) {
            waited = true;
            wait();
            const double squares = block_sum<T::kThreads>(w.squares, static_cast<int>(gridDim.x));
            if (!usable(step, squares)) {
                if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(step.skipped);
                return;
            }
            scale = step_scale(step, squares);
        }
        float4 d[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
            if (at[j]) d[j] = __ldcg(first[j]);
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
            if (at[j])
                quad(at[j]) = make_float4(add_scaled(old[j].x, scale, d[j].x), add_scaled(old[j].y, scale, d[j].y),
                                          add_scaled(old[j].z, scale, d[j].z), add_scaled(old[j].w, scale, d[j].w));
        if (!target.in_quads && owned.sharer() == 0) {
#pragma unroll 1
            for (int j = 0; j < kBatch; ++j) {
                const OwnedQuad q = owned.at(base + j * owned.step());
                const float4 four = __ldcg(q.first);
#pragma unroll 1
                for (int i = 0; i < q.count; ++i)
                    add_scaled_at(target.data, target_offset(target, x, q.k, q.n + i), target.element, scale,
                                  component(four, i));
            }
        }
        base += kBatch * owned.step();
    } while (base < end);
}

} // namespace localsgd::cuda
