// The matrix-unit cores: a tile of D by mma.sync, operands in bf16, fp16 or tf32, sums in fp32.
#pragma once

#include "ptx.cuh"
#include "stage.cuh"

namespace localsgd::cuda {

// What differs between operand types. kDepth: positions that one `multiply_add` sums over.
template <Core kCore>
struct MmaOperand;
template <>
struct MmaOperand<Core::mma_bf16> {
    using Holds = HoldsHalves<Element::bf16>;
    static constexpr int kDepth = 16;
    static constexpr bool kStaged = LOCALSGD_ARCH >= 800; // whether the instructions exist that the staged path needs
    static LOCALSGD_DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_m16n8k16_bf16(d, a, b);
    }
    static LOCALSGD_DEVICE unsigned pack(float low, float high) { return pack_bf16(low, high); }
};
template <>
struct MmaOperand<Core::mma_f16> {
    using Holds = HoldsHalves<Element::f16>;
    static constexpr int kDepth = 16;
    static constexpr bool kStaged = LOCALSGD_ARCH >= 750;
    static LOCALSGD_DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        if constexpr (LOCALSGD_ARCH >= 800) {
            mma_m16n8k16_f16(d, a, b);
        } else { // the same registers, half of the depth at a time
            mma_m16n8k8_f16(d, {a[0], a[1]}, {b[0]});
            mma_m16n8k8_f16(d, {a[2], a[3]}, {b[1]});
        }
    }
    static LOCALSGD_DEVICE unsigned pack(float low, float high) { return pack_f16(low, high); }
};
template <>
struct MmaOperand<Core::mma_tf32> {
    using Holds = HoldsFloats;
    static constexpr int kDepth = 8;
    static constexpr bool kStaged = LOCALSGD_ARCH >= 800;
    static LOCALSGD_DEVICE void multiply_add(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_m16n8k8_tf32(d, a, b);
    }
};

// A thread holds 2 columns of row lane/4 and 2 of the row 8 below; its neighbour holds the next 2 of both. They swap, and the
// even one has 4 of the upper row, the odd one 4 of the lower.
LOCALSGD_DEVICE float4 fragment_quad(const float (&d)[4]) {
    const bool odd = threadIdx.x % 2 != 0;
    const float first = __shfl_xor_sync(0xffffffffu, odd ? d[0] : d[2], 1);
    const float second = __shfl_xor_sync(0xffffffffu, odd ? d[1] : d[3], 1);
    return odd ? make_float4(first, second, d[2], d[3]) : make_float4(d[0], d[1], first, second);
}

// kM x kN of D for a block; a warp computes 64 x 64 of a 128x128 tile, 64 x 32 of an oblong one, of a 64x64 tile 32 x 32, so
// that 4 warps hide latencies there too; 4 warps also share 64x32 and 64x160, for few channels (segments_mma.cuh). From global
// memory a tile takes 2 kM kN flops for (kM + kN) operands: 128x128 64 flop/B in 16 bits (32 in tf32), 128x64 and 64x128 43
// (21), 64x64 32 (16). From shared memory a warp reads 64 + 64 operands a position for 64 * 64 multiply-adds: 32 flop/B in 16
// bits, with 64 + 32 21, where an A100's matrix units ask for 16 and an H200's for 32.
template <Core kCore_, int kM_, int kN_>
struct MmaTile {
    static constexpr Core kCore = kCore_;
    using Operand = MmaOperand<kCore>;
    using Value = typename Operand::Holds::Value;
    static constexpr int kM = kM_, kN = kN_;
    static constexpr int kWarpM = kM == 64 && kN <= 64 ? 32 : 64;
    static constexpr int kWarpN = kM == 128 && kN == 128 ? 64 : kN == 160 ? 40 : kN == 32 ? 16 : 32;
    static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kElements = kM * kN;
    // Fragments of 16 x 8 results, 4 a thread.
    static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
    using Sum = float[kFragmentsM][kFragmentsN][4];
    static_assert(kM % kWarpM == 0 && kN % kWarpN == 0);

    static LOCALSGD_DEVICE int warp_m(int thread) { return thread / 32 / kWarpsN * kWarpM; }
    static LOCALSGD_DEVICE int warp_n(int thread) { return thread / 32 % kWarpsN * kWarpN; }

    // Quads of neighbouring columns as `fragment_quad` makes them, one a fragment.
    static constexpr int kSlots = kFragmentsM * kFragmentsN;
    static LOCALSGD_DEVICE int m_of(int thread, int slot) {
        return warp_m(thread) + slot / kFragmentsN * 16 + thread % 32 / 4 + thread % 2 * 8;
    }
    static LOCALSGD_DEVICE int n_of(int thread, int slot) {
        return warp_n(thread) + slot % kFragmentsN * 8 + thread % 4 / 2 * 4;
    }
    static LOCALSGD_DEVICE float4 quad_of(const Sum& sum, int slot) {
        return fragment_quad(sum[slot / kFragmentsN][slot % kFragmentsN]);
    }
};

// A slice in shared memory, [position][column]. 8 values of padding: the 8 rows of 16 bytes that ldmatrix reads at a time lie
// 4 banks apart, and the 4 rows x 8 columns of fp32 that make a tf32 fragment 8 banks: no conflicts in either.
template <class T, int kPositions, int kColumns>
using MmaSlice = typename T::Value[kPositions][kColumns + 8];

// Matrices of z: (upper positions, left), (upper, right), (lower, left), (lower, right). Transposed, since the summed index
// lies outermost in memory.
template <class T, int kPositions>
LOCALSGD_DEVICE void load_z_fragments(unsigned (&a)[T::kFragmentsM][4], const MmaSlice<T, kPositions, T::kM>& z, int k) {
    const int lane = static_cast<int>(threadIdx.x) % 32, m = T::warp_m(threadIdx.x);
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; ++i) {
        if constexpr (sizeof(typename T::Value) == 2) {
            ldmatrix_transposed(a[i], &z[k + lane / 16 * 8 + lane % 8][m + i * 16 + lane / 8 % 2 * 8]);
        } else { // ldmatrix cannot transpose 32-bit elements
#pragma unroll
            for (int r = 0; r < 4; ++r) a[i][r] = to_tf32(z[k + lane % 4 + r / 2 * 4][m + i * 16 + lane / 4 + r % 2 * 8]);
        }
    }
}

template <class T, int kPositions>
LOCALSGD_DEVICE void multiply_slices(typename T::Sum& sum, const MmaSlice<T, kPositions, T::kM>& z,
                                     const MmaSlice<T, kPositions, T::kN>& x) {
    constexpr int kDepth = T::Operand::kDepth;
    static_assert(kPositions % kDepth == 0 && T::kFragmentsN % 2 == 0);
    const int lane = static_cast<int>(threadIdx.x) % 32, n = T::warp_n(threadIdx.x);
#pragma unroll
    for (int k = 0; k < kPositions; k += kDepth) {
        unsigned a[T::kFragmentsM][4], b[T::kFragmentsN][2];
        load_z_fragments<T, kPositions>(a, z, k);
        if constexpr (sizeof(typename T::Value) == 2) { // of x: (upper, left), (lower, left), (upper, right), (lower, right)
#pragma unroll
            for (int j = 0; j < T::kFragmentsN; j += 2) {
                unsigned both[4];
                ldmatrix_transposed(both, &x[k + lane % 16][n + j * 8 + lane / 16 * 8]);
                b[j][0] = both[0], b[j][1] = both[1];
                b[j + 1][0] = both[2], b[j + 1][1] = both[3];
            }
        } else {
#pragma unroll
            for (int j = 0; j < T::kFragmentsN; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r) b[j][r] = to_tf32(x[k + lane % 4 + r * 4][n + j * 8 + lane / 4]);
        }
#pragma unroll
        for (int i = 0; i < T::kFragmentsM; ++i)
#pragma unroll
            for (int j = 0; j < T::kFragmentsN; ++j) T::Operand::multiply_add(sum[i][j], a[i], b[j]);
    }
}

template <class T>
LOCALSGD_DEVICE void clear(typename T::Sum& sum) {
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < T::kFragmentsN; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[i][j][r] = 0;
}

// Through registers, for operands that have to be converted or gathered. Two slices of each, one `kDepth` deep: one barrier a
// step, and a step's loads take few enough registers to be in flight beside the sums.
template <class T, Access kZ, Access kX>
struct StagedMma {
    using Tile = T;
    using Holds = typename T::Operand::Holds;
    static constexpr bool kExists = T::Operand::kStaged;
    static constexpr int kPositions = T::Operand::kDepth;

    struct Storage {
        alignas(16) MmaSlice<T, kPositions, T::kM> z[2];
        alignas(16) MmaSlice<T, kPositions, T::kN> x[2];
        PatchColumn z_columns[T::kM], x_columns[T::kN];
    };

    template <class Strips = TwoStrips>
    static LOCALSGD_DEVICE void correlate(typename T::Sum& sum, Storage& shared, const Patches& z, const Patches& x, int group,
                                          int first_m, int first_n, int begin, int end, Strips&& strips = {}) {
        clear<T>(sum);
        if (!strips.same()) tabulate<T::kM, T::kThreads>(shared.z_columns, z, group, first_m);
        tabulate<T::kN, T::kThreads>(shared.x_columns, x, group, first_n);
        __syncthreads();
        Stage<kZ, T::kM, T::kThreads, Holds, kPositions> z_stage(z, shared.z_columns);
        Stage<kX, T::kN, T::kThreads, Holds, kPositions> x_stage(x, shared.x_columns);
        if (!strips.same()) z_stage.load(begin, end);
        x_stage.load(begin, end);
        if (!strips.same()) z_stage.store(shared.z[0]);
        x_stage.store(shared.x[0]);
        __syncthreads();
        int current = 0;
        for (int position = begin; position < end; position += kPositions) {
            const bool more = position + kPositions < end;
            if (more) {
                if (!strips.same()) z_stage.load(position + kPositions, end);
                x_stage.load(position + kPositions, end);
            }
            const auto& x_slice = shared.x[current];
            multiply_slices<T, kPositions>(sum, first_slice(strips, shared.z[current], x_slice), x_slice);
            strips.template visit<Holds>(x_slice);
            if (more) {
                if (!strips.same()) z_stage.store(shared.z[current ^ 1]);
                x_stage.store(shared.x[current ^ 1]);
            }
            current ^= 1;
            __syncthreads(); // also before the next tile overwrites the tables
        }
    }
};

} // namespace localsgd::cuda
