// D = W G + b (sum x)^T with G = sum over positions of x x^T, which is wgrad(x, W x + b): for layers whose outputs each read
// one position, x is all that has to be read, once for every strip of tiles, and symmetry halves the work.
#pragma once

#include "parts.cuh"
#include "split_k.cuh"
#include "tile_ffma.cuh"

namespace localsgd::cuda {

// Tiles of G, as they lie in its lower triangle.
template <class T>
struct GramTile : T {};
template <class T>
constexpr bool kTriangle<GramTile<T>> = true;

// Whether the launch runs `phase`; if it ran the one before it as well, all blocks are through with that afterwards.
LOCALSGD_DEVICE bool begin_phase(const GramParams& p, GramPhase phase) {
    if (phase < p.first || phase > p.last) return false;
    if (phase > p.first) grid_barrier(p.workspace.barrier);
    return true;
}

// On the diagonal both operands of a tile are the same strip. With a bias its columns are added up as well: each thread adds a
// share of every slice's positions in one column, from what lies in shared memory, which in tf32 is not rounded yet.
template <class T>
struct MaybeDiagonal {
    static constexpr int kShares = T::kThreads / T::kN;
    static_assert(T::kM == T::kN && kShares * T::kN == T::kThreads);

    const GramParams& params;
    bool diagonal;
    float sum = 0;

    LOCALSGD_DEVICE bool same() const { return diagonal; }
    LOCALSGD_DEVICE bool summing() const { return diagonal && params.bias != nullptr; }
    static LOCALSGD_DEVICE int column() { return static_cast<int>(threadIdx.x) % T::kN; }
    static LOCALSGD_DEVICE int share() { return static_cast<int>(threadIdx.x) / T::kN; }

    template <class Holds, class Value, int kPositions, int kRowValues>
    LOCALSGD_DEVICE void visit(const Value (&slice)[kPositions][kRowValues]) {
        constexpr int kEach = kPositions / kShares;
        static_assert(kEach * kShares == kPositions);
        if (!summing()) return;
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += Holds::value_of(slice[share() * kEach + i][column()]);
    }
};

template <class Path>
LOCALSGD_DEVICE void gram_tiles(const GramParams& p, typename Path::Storage& shared) {
    using T = typename Path::Tile;
    for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(p.gram.units); unit += gridDim.x) {
        const auto [place, split, begin, end] = unit_of<GramTile<T>>(p.gram, p.x.positions, unit);
        MaybeDiagonal<T> strips{p, place.m == place.n};
        typename T::Sum sum;
        Path::correlate(sum, shared, p.x, p.x, place.group, place.m, place.n, begin, end, strips);
        LOCALSGD_FORGET(unit); // fewer registers in the main loop
        const Unit u = unit_of<GramTile<T>>(p.gram, p.x.positions, unit);
        const int c = u.place.n + strips.column();
        if (strips.summing() && c < p.pitch) {
            const int64 row = static_cast<int64>(u.split) * strips.kShares + strips.share();
            p.sum_partials[(row * p.gram.groups + u.place.group) * p.pitch + c] = strips.sum;
        }
        unsigned again = unit;
        store_partial<GramTile<T>>(p.workspace, p.gram, divide(again, p.gram.by_splits), u.split, sum);
    }
}

// --- The product's operands.

// As the forward cast it to z's dtype.
LOCALSGD_DEVICE float rounded(float value, Element to) {
    return to == Element::f32    ? value
           : to == Element::bf16 ? bfloat16_to_float(float_to_bfloat16(value))
                                 : half_to_float(float_to_half(value));
}

template <class Value>
struct alignas(4 * sizeof(Value)) Four {
    Value value[4];
};

// One part of each of 4 neighbours.
template <class P>
LOCALSGD_DEVICE Four<typename P::Value> take4(float (&rest)[4]) {
    return {P::take(rest[0]), P::take(rest[1]), P::take(rest[2]), P::take(rest[3])};
}

template <class Value>
LOCALSGD_DEVICE void put(Value* to, const Four<Value>& v) {
    *reinterpret_cast<Four<Value>*>(to) = v;
}

// G whole, both its halves, in parts; below it, with a bias, sum x, once for every part of b.
template <class T, class P>
LOCALSGD_DEVICE void write_matrix(const GramParams& p) {
    using Value = typename P::Value;
    const auto row_of = [&](unsigned group, int part, unsigned row) {
        return static_cast<Value*>(p.matrix_data) +
               ((static_cast<int64>(group) * p.matrix_parts + part) * p.inner + row) * p.pitch;
    };
    const auto write = [&](const OwnedQuad& quad, const float4& sum) {
        auto m = static_cast<unsigned>(quad.k);
        const unsigned group = divide(m, p.by_pitch);
        float rest[4] = {sum.x, sum.y, sum.z, sum.w};
        const bool mirrored = static_cast<int>(m) / T::kM != quad.n / T::kN; // on the diagonal a tile holds both halves
#pragma unroll
        for (int part = 0; part < P::kCount; ++part) {
            if (part >= p.matrix_parts) break;
            const Four<Value> four = take4<P>(rest);
            put(row_of(group, part, m) + quad.n, four);
            if (!mirrored) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) row_of(group, part, static_cast<unsigned>(quad.n + i))[m] = four.value[i];
        }
    };
    const OwnedQuads<GramTile<T>> owned{p.workspace, p.gram, p.pitch, p.pitch};
    owned.for_sums(write);
    if (!p.bias) return;
    const unsigned threads = gridDim.x * T::kThreads, columns = static_cast<unsigned>(p.gram.groups * p.pitch);
    for (unsigned i = blockIdx.x * T::kThreads + threadIdx.x; i < columns; i += threads) {
        float sum = 0;
#pragma unroll 8
        for (int row = 0; row < p.gram.splits * MaybeDiagonal<T>::kShares; ++row)
            sum += __ldcg(p.sum_partials + static_cast<int64>(row) * columns + i);
        unsigned c = i;
        const unsigned group = divide(c, p.by_pitch);
#pragma unroll
        for (int part = 0; part < P::kCount; ++part) {
            if (part >= p.matrix_parts) break;
            const Value value = P::take(sum);
            for (int row = 0; row < 8; ++row)
                row_of(group, part, static_cast<unsigned>(p.pitch + row))[c] = row < P::kCount ? value : Value(0);
        }
    }
}

// W in parts, transposed, so that the summed index lies outermost as it does in x; then rows of b, of which each part has a
// channel of its own.
template <class P>
struct PartsOfWeights {
    using Value = typename P::Value;
    const GramParams& p;

    LOCALSGD_DEVICE Value* row(int64 group, int part, int c) const {
        return static_cast<Value*>(p.weights_data) +
               ((group * p.weight_parts + part) * p.inner + c) * static_cast<int64>(p.rows);
    }

    LOCALSGD_DEVICE void put_parts(int64 group, int c, int k, float (&rest)[4]) const {
        for (int part = 0; part < p.weight_parts; ++part) put(row(group, part, c) + k, take4<P>(rest));
    }

    // The 4 output channels from k on.
    LOCALSGD_DEVICE void load(float (&to)[4], int64 group, int c, int k) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64 out = group * p.outputs + k + j;
            const bool exists = k + j < p.outputs && c < p.x.columns;
            to[j] =
                exists ? weight_at(p.weight, out * p.weight_out_stride + c * p.weight_channel_stride, p.weight_element) : 0.0f;
        }
    }

    LOCALSGD_DEVICE float bias_part(int64 group, int k, int part) const {
        if (k >= p.outputs || part >= P::kCount) return 0;
        float rest = rounded(widen(load_bits(p.bias, group * p.outputs + k, p.bias_element), p.bias_element), p.bias_rounding);
        for (int i = 0; i < part; ++i) P::take(rest);
        return rest;
    }
};

constexpr int kWeightBatch = 2; // what 128 registers hold

// A thread takes 4 output channels of one input channel, a batch of those at a time; the 32 of a warp read 8 neighbours of W
// and write 16, whole sectors of 32 bytes in either.
template <class P, int kThreads>
LOCALSGD_DEVICE void write_weights(const GramParams& p) {
    const PartsOfWeights<P> weights{p};
    const unsigned quads = static_cast<unsigned>(p.gram.groups * p.inner) * static_cast<unsigned>(p.rows / 4);
    const unsigned step = gridDim.x * kThreads, first = blockIdx.x * kThreads + threadIdx.x;
    int64 group;
    int c, k;
    const auto place = [&](unsigned i) {
        unsigned quad = i / 8, octet = divide(quad, p.by_row_quads);
        group = divide(octet, p.by_inner_octets);
        c = static_cast<int>(octet * 8 + i % 8);
        k = static_cast<int>(quad * 4);
    };
#pragma unroll 1
    for (unsigned base = first; base < quads; base += kWeightBatch * step) {
        float rest[kWeightBatch][4];
#pragma unroll
        for (int b = 0; b < kWeightBatch; ++b) {
            if (base + b * step >= quads) break;
            place(base + b * step);
            weights.load(rest[b], group, c, k);
        }
#pragma unroll
        for (int b = 0; b < kWeightBatch; ++b) {
            if (base + b * step >= quads) break;
            place(base + b * step);
#pragma unroll
            for (int j = 0; j < 4; ++j) rest[b][j] = rounded(rest[b][j], p.weight_rounding);
            weights.put_parts(group, c, k, rest[b]); // zeros where b goes next
        }
    }
    if (!p.bias) return;
#pragma unroll 1
    for (unsigned i = first; i < quads; i += step) {
        place(i);
        if (c < p.pitch) continue;
        float rest[4];
#pragma unroll 1
        for (int part = 0; part < p.weight_parts; ++part) {
#pragma unroll
            for (int j = 0; j < 4; ++j) rest[j] = part == 0 ? weights.bias_part(group, k + j, c - p.pitch) : 0.0f;
            put(weights.row(group, part, c) + k, take4<P>(rest));
        }
    }
}

// The main loops of a kernel and what multiplies in them.
template <Core kCore, int kSize, Access kAccess, Core kProductCore>
struct GramPaths;

// The product's tile on fused multiply-adds, for blocks of so many threads.
template <int kSize, int kThreads>
using FfmaProduct = StagedFfma<Tile<kSize, 64 * kThreads / kSize>, Access::channels4, Access::channels4, Source::written>;

template <int kSize, Access kAccess>
struct GramPaths<Core::ffma, kSize, kAccess, Core::ffma> {
    using T = Tile<kSize, kSize>;
    using Gram = StagedFfma<T, kAccess, kAccess>;
    using Product = FfmaProduct<kSize, T::kThreads>;
    // As for direct kernels, but that the small tile's diagonal takes some registers more.
    static constexpr int kResident = kSize == 64 ? 384 / T::kThreads : kResidentBlocks<T, kAccess, kAccess>;
    static constexpr bool kExists = true;
};

template <Core kCore, int kSize, Access kAccess, Core kProductCore,
          class Paths = GramPaths<kCore, kSize, kAccess, kProductCore>>
__global__ void __launch_bounds__(Paths::Gram::Tile::kThreads, Paths::kResident) gram_kernel(const GramParams p) {
    if constexpr (!Paths::kExists) {
        __trap(); // not for this architecture: never nothing without a word
    } else {
        using Gram = typename Paths::Gram;
        using Product = typename Paths::Product;
        using T = typename Gram::Tile;
        using D = typename Product::Tile;
        static_assert(D::kThreads == T::kThreads);
        LOCALSGD_DYNAMIC_SHARED(shared);
        if (begin_phase(p, kGramTiles)) gram_tiles<Gram>(p, *reinterpret_cast<typename Gram::Storage*>(shared));
        if (begin_phase(p, kGramMatrix)) {
            write_matrix<T, Parts<kProductCore>>(p);
            write_weights<Parts<kProductCore>, T::kThreads>(p);
        }
        const bool whole = is_whole(p.product, p.to_target);
        if (begin_phase(p, kGramProduct)) {
            correlate_units<Product>(p.workspace, p.product, p.weights, p.matrix,
                                     *reinterpret_cast<typename Product::Storage*>(shared));
            if (whole) put_squares_of_units<D>(p.workspace, p.product);
        }
        if (!whole && begin_phase(p, kGramReduce))
            reduce_partials<D>(p.workspace, p.product, p.outputs, p.x, p.target, p.to_target);
        if (p.last >= kGramWrite)
            norm_and_write<D>(p.workspace, p.product, p.outputs, p.x, p.target, p.step, [&] {
                if (p.first < kGramWrite) grid_barrier(p.workspace.barrier);
            });
    }
}

} // namespace localsgd::cuda
