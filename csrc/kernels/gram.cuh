// D = W G + b (sum x)^T with G = sum over positions of x x^T, which is wgrad(x, W x + b): for layers whose outputs each read
// one position, x is all that has to be read, once for every strip of tiles, and symmetry halves the work.
#pragma once

#include "split_k.cuh"
#include "tile_ffma.cuh"

namespace localsgd::cuda {

// Tiles of G. Those of D are Tile<kSize, kSize>, computed by the same threads.
template <int kSize>
struct GramTile : Tile<kSize, kSize> {};
template <int kSize>
constexpr bool kTriangle<GramTile<kSize>> = true;

// Whether the launch runs `phase`; if it ran the one before it as well, all blocks are through with that afterwards.
LOCALSGD_DEVICE bool begin_phase(const GramParams& p, GramPhase phase) {
    if (phase < p.first || phase > p.last) return false;
    if (phase > p.first) grid_barrier(p.workspace.barrier);
    return true;
}

// A tile on the diagonal: both operands are the same slice, which is read once. Returns the sum over positions [begin, end) of
// x[position, first + thread], for the threads that have such a column.
template <class T, Access kAccess>
LOCALSGD_DEVICE float diagonal_ffma(float (&sum)[8][8], FfmaStorage<T>& shared, const Patches& x, int group, int first,
                                    int begin, int end) {
    float column_sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = 0;
    tabulate<T::kN, T::kThreads>(shared.x_columns, x, group, first);
    __syncthreads();
    Stage<kAccess, T::kN, T::kThreads> stage(x, shared.x_columns);
    stage.load(begin, end);
    stage.store(shared.x[0]);
    __syncthreads();
    int current = 0;
    for (int position = begin; position < end; position += kStepPositions) {
        const bool more = position + kStepPositions < end;
        if (more) stage.load(position + kStepPositions, end);
        multiply_slices<T>(sum, shared.x[current], shared.x[current]);
        if (threadIdx.x < T::kN) {
#pragma unroll
            for (int k = 0; k < kStepPositions; ++k) column_sum += shared.x[current][k][threadIdx.x];
        }
        if (more) stage.store(shared.x[current ^ 1]);
        current ^= 1;
        __syncthreads(); // also before the next tile overwrites the table
    }
    return column_sum;
}

template <class T, Access kAccess>
LOCALSGD_DEVICE void gram_tiles(const GramParams& p, FfmaStorage<T>& shared) {
    using Triangle = GramTile<T::kM>;
    for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(p.gram.units); unit += gridDim.x) {
        unsigned split = unit;
        const TilePlace place = place_of<Triangle>(p.gram, divide(split, p.gram.by_splits));
        const int begin = static_cast<int>(split) * p.gram.split_positions;
        const int end = min(begin + p.gram.split_positions, p.x.positions);
        float sum[8][8];
        if (place.m == place.n) {
            const float column_sum = diagonal_ffma<T, kAccess>(sum, shared, p.x, place.group, place.n, begin, end);
            const int c = place.n + static_cast<int>(threadIdx.x);
            if (p.bias && threadIdx.x < T::kN && c < p.pitch)
                p.sum_partials[(static_cast<int64>(split) * p.gram.groups + place.group) * p.pitch + c] = column_sum;
        } else {
            correlate_ffma<T, kAccess, kAccess>(sum, shared, p.x, p.x, place.group, place.m, place.n, begin, end);
        }
        LOCALSGD_FORGET(unit); // fewer registers in the main loops
        split = unit;
        const unsigned tile = divide(split, p.gram.by_splits);
        store_partial<Triangle>(p.workspace, p.gram, tile, static_cast<int>(split), sum);
    }
}

// As the forward cast it to z's dtype.
LOCALSGD_DEVICE float rounded(float value, Element to) {
    return to == Element::f32    ? value
           : to == Element::bf16 ? bfloat16_to_float(float_to_bfloat16(value))
                                 : half_to_float(float_to_half(value));
}

// W by plain loads: the read-only cache is not for what the same launch writes at its end.
LOCALSGD_DEVICE float load_weight(const GramParams& p, int64 index) {
    return p.weight_element == Element::f32 ? static_cast<const float*>(p.weight)[index]
                                            : widen(static_cast<const unsigned short*>(p.weight)[index], p.weight_element);
}

// G whole, both its halves, and W in dense rows. With a bias, b is another column of W and sum x another row of G, so that one
// product is all of D. Zeros fill up to multiples of 4.
template <class T>
LOCALSGD_DEVICE void gram_matrix(const GramParams& p) {
    const auto matrix_of = [&](unsigned group) { return p.gram_matrix + static_cast<int64>(group) * p.inner * p.pitch; };
    for_owned_quads<GramTile<T::kM>, true>(p.workspace, p.gram, p.pitch, p.pitch,
                                           [&](float4*, const float4& sum, int64 row, int n, int) {
                                               auto m = static_cast<unsigned>(row);
                                               float* matrix = matrix_of(divide(m, p.by_pitch));
                                               quad(matrix + static_cast<int64>(m) * p.pitch + n) = sum;
                                               if (static_cast<int>(m) / T::kM == n / T::kN)
                                                   return; // the tile holds both halves
#pragma unroll
                                               for (int i = 0; i < 4; ++i)
                                                   matrix[static_cast<int64>(n + i) * p.pitch + m] = component(sum, i);
                                           });
    const unsigned threads = gridDim.x * T::kThreads, thread = blockIdx.x * T::kThreads + threadIdx.x;
    const unsigned columns = static_cast<unsigned>(p.gram.groups) * static_cast<unsigned>(p.pitch);
    for (unsigned i = thread; p.bias && i < columns; i += threads) {
        float sum = 0;
#pragma unroll 4
        for (int split = 0; split < p.gram.splits; ++split)
            sum += __ldcg(p.sum_partials + static_cast<int64>(split) * columns + i);
        unsigned c = i;
        float* row = matrix_of(divide(c, p.by_pitch)) + static_cast<int64>(p.pitch) * p.pitch;
        row[c] = sum;
        for (int more = 1; more < 4; ++more) row[more * p.pitch + c] = 0;
    }
    const unsigned weights = static_cast<unsigned>(p.gram.groups) * static_cast<unsigned>(p.z.columns) * p.inner;
    for (unsigned i = thread; i < weights; i += threads) {
        unsigned c = i;
        const unsigned k = divide(c, p.by_inner);
        float value = 0;
        if (c < static_cast<unsigned>(p.x.columns))
            value = rounded(load_weight(p, k * p.weight_out_stride + c * p.weight_channel_stride), p.weight_rounding);
        else if (c == static_cast<unsigned>(p.pitch)) // only with a bias
            value = rounded(widen(load_bits(p.bias, k, p.bias_element), p.bias_element), p.bias_rounding);
        p.rounded[i] = value;
    }
}

// A step's slices of W and G. Past the first-level cache: other blocks wrote them in the same launch.
template <class T>
class ProductStage {
    static constexpr int kWeights = kStepPositions / 4 * T::kM / T::kThreads, kGrams = kStepPositions * T::kN / 4 / T::kThreads;
    static_assert(kWeights * T::kThreads * 4 == kStepPositions * T::kM && kGrams * T::kThreads * 4 == kStepPositions * T::kN);

  public:
    LOCALSGD_DEVICE ProductStage(const GramParams& params, const TilePlace& place) : params_(params), place_(place) {}

    LOCALSGD_DEVICE void load(int channel, int end) {
        const float4 zero = make_float4(0, 0, 0, 0);
        const int rows = params_.z.columns, pitch = params_.pitch; // the launcher makes sure that ints suffice
#pragma unroll
        for (int i = 0; i < kWeights; ++i) {
            const int m = place_.m + weight_row(i), c = channel + weight_channel();
            weight_[i] =
                m < rows && c < end ? load_quad(params_.rounded + (place_.group * rows + m) * params_.inner + c) : zero;
        }
#pragma unroll
        for (int i = 0; i < kGrams; ++i) {
            const int c = channel + gram_row(i), n = place_.n + gram_column();
            gram_[i] =
                c < end && n < pitch ? load_quad(params_.gram_matrix + (place_.group * params_.inner + c) * pitch + n) : zero;
        }
    }

    LOCALSGD_DEVICE void store(Slice<T::kM>& w, Slice<T::kN>& g) const {
#pragma unroll
        for (int i = 0; i < kWeights; ++i) {
            const int m = weight_row(i), c = weight_channel();
            w[c][m] = weight_[i].x;
            w[c + 1][m] = weight_[i].y;
            w[c + 2][m] = weight_[i].z;
            w[c + 3][m] = weight_[i].w;
        }
#pragma unroll
        for (int i = 0; i < kGrams; ++i) quad(&g[gram_row(i)][gram_column()]) = gram_[i];
    }

  private:
    static LOCALSGD_DEVICE float4 load_quad(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

    // In every step anew, as in Stage.
    static LOCALSGD_DEVICE int thread() {
        int t = static_cast<int>(threadIdx.x);
        LOCALSGD_FORGET(t);
        return t;
    }
    // Two lanes share a row of W: their 8 channels are one 32-byte sector, and the stores of a warp hit 32 banks.
    static LOCALSGD_DEVICE int weight_channel() { return thread() % 2 * 4; }
    static LOCALSGD_DEVICE int weight_row(int i) { return thread() / 2 + i * (T::kThreads / 2); }
    static LOCALSGD_DEVICE int gram_column() { return thread() % (T::kN / 4) * 4; }
    static LOCALSGD_DEVICE int gram_row(int i) { return thread() / (T::kN / 4) + i * (T::kThreads * 4 / T::kN); }

    const GramParams& params_;
    const TilePlace& place_;
    float4 weight_[kWeights], gram_[kGrams];
};

// sum[m, n] = sum over channels [begin, end) of w[first_m + m, channel] * g[channel, first_n + n].
template <class T>
LOCALSGD_DEVICE void product_ffma(float (&sum)[8][8], FfmaStorage<T>& shared, ProductStage<T>& stage, int begin, int end) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = 0;
    stage.load(begin, end);
    stage.store(shared.z[0], shared.x[0]);
    __syncthreads();
    int current = 0;
    for (int channel = begin; channel < end; channel += kStepPositions) {
        const bool more = channel + kStepPositions < end;
        if (more) stage.load(channel + kStepPositions, end);
        multiply_slices<T>(sum, shared.z[current], shared.x[current]);
        if (more) stage.store(shared.z[current ^ 1], shared.x[current ^ 1]);
        current ^= 1;
        __syncthreads();
    }
}

template <class T>
LOCALSGD_DEVICE void gram_product(const GramParams& p, FfmaStorage<T>& shared) {
    for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(p.product.units); unit += gridDim.x) {
        unsigned split = unit;
        const unsigned tile = divide(split, p.product.by_splits);
        const TilePlace place = place_of<T>(p.product, tile);
        const int begin = static_cast<int>(split) * p.product.split_positions;
        ProductStage<T> stage(p, place);
        float sum[8][8];
        product_ffma<T>(sum, shared, stage, begin, min(begin + p.product.split_positions, p.inner));
        store_partial<T>(p.workspace, p.product, tile, static_cast<int>(split), sum);
    }
}

template <int kSize, Access kAccess>
__global__ void __launch_bounds__(Tile<kSize, kSize>::kThreads, kResidentBlocks<Tile<kSize, kSize>, kAccess, kAccess>)
    gram_kernel(const GramParams p) {
    using T = Tile<kSize, kSize>;
    LOCALSGD_SHARED(FfmaStorage<T>, shared);
    if (begin_phase(p, kGramTiles)) gram_tiles<T, kAccess>(p, shared);
    if (begin_phase(p, kGramMatrix)) gram_matrix<T>(p);
    if (begin_phase(p, kGramProduct)) gram_product<T>(p, shared);
    if (begin_phase(p, kGramReduce)) reduce_partials<T>(p.workspace, p.product, p.z, p.x, p.target, p.to_target);
    if (begin_phase(p, kGramWrite)) norm_and_write<T>(p.workspace, p.product, p.z, p.x, p.target, p.step);
}

} // namespace localsgd::cuda
