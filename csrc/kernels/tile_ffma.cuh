// The fp32 core, for every architecture: a tile of D by fused multiply-adds, 8x8 of it in each thread's registers.
#pragma once

#include "stage.cuh"

namespace localsgd::cuda {

// kM x kN of D for a block. A warp computes 32 x 64, or 64 x 32: per position its threads read 8 + 8 floats from shared memory
// for 64 multiply-adds, as four 16-byte loads without bank conflicts (4 resp. 8 different addresses, side by side).
// From global memory a tile takes 2 kM kN flops for 4 (kM + kN) bytes of fp32: 128x128 32 flop/B, 64x128 21, 64x64 16.
template <int kM_, int kN_>
struct Tile {
    static constexpr int kM = kM_, kN = kN_;
    static constexpr int kWarpN = kN < 64 ? kN : 64, kWarpM = 2048 / kWarpN;
    static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kElements = kM * kN;
    using Sum = float[8][8];
    static_assert(kM % kWarpM == 0 && kN % kWarpN == 0);

    // A thread's 64 results are 16 quads of 4 neighbouring columns; quad `slot` of thread `thread` begins at (m, n).
    static constexpr int kSlots = 16;
    static constexpr int kApartM = kWarpM / 2, kApartN = kWarpN / 2; // two runs of 4 rows, and of 4 columns
    static LOCALSGD_DEVICE int first_m(int thread) { return thread / 32 / kWarpsN * kWarpM + thread % 32 / (kApartN / 4) * 4; }
    static LOCALSGD_DEVICE int first_n(int thread) { return thread / 32 % kWarpsN * kWarpN + thread % (kApartN / 4) * 4; }
    static LOCALSGD_DEVICE int m_of(int thread, int slot) { return first_m(thread) + slot / 8 * kApartM + slot / 2 % 4; }
    static LOCALSGD_DEVICE int n_of(int thread, int slot) { return first_n(thread) + slot % 2 * kApartN; }
    static LOCALSGD_DEVICE float4 quad_of(const Sum& sum, int slot) {
        const float* s = &sum[slot / 2][slot % 2 * 4];
        return make_float4(s[0], s[1], s[2], s[3]);
    }
};

// Blocks a multiprocessor is to hold, by which the compiler rations registers, of which the tile takes 64: 512 threads have 128
// each. Reading element by element in a small block takes some more, which 384 threads have.
template <class T, Access kZ, Access kX>
constexpr int kResidentBlocks =
    (T::kThreads == 256 || (kZ == Access::channels4 && kX == Access::channels4) ? 512 : 384) / T::kThreads;

template <class T>
LOCALSGD_DEVICE void multiply_slices(float (&sum)[8][8], const Slice<T::kM>& z, const Slice<T::kN>& x) {
    const int m = T::first_m(threadIdx.x), n = T::first_n(threadIdx.x);
#pragma unroll
    for (int k = 0; k < kStepPositions; ++k) {
        const float4 a0 = quad(&z[k][m]), a1 = quad(&z[k][m + T::kApartM]);
        const float4 b0 = quad(&x[k][n]), b1 = quad(&x[k][n + T::kApartN]);
        const float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
        const float b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
}

LOCALSGD_DEVICE void clear(float (&sum)[8][8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = 0;
}

// sum[m, n] = sum over positions [begin, end) of z[position, first_m + m] * x[position, first_n + n], for one group.
// Two slices of each operand in shared memory: one barrier a step.
template <class T, Access kZ, Access kX, Source kSource = Source::constant>
struct StagedFfma {
    using Tile = T;
    static constexpr bool kExists = true;
    static constexpr int kPositions = kStepPositions;
    using Holds = HoldsFloats;

    struct Storage {
        alignas(16) Slice<T::kM> z[2];
        alignas(16) Slice<T::kN> x[2];
        PatchColumn z_columns[T::kM], x_columns[T::kN];
    };

    template <class Strips = TwoStrips>
    static LOCALSGD_DEVICE void correlate(typename T::Sum& sum, Storage& shared, const Patches& z, const Patches& x, int group,
                                          int first_m, int first_n, int begin, int end, Strips&& strips = {}) {
        clear(sum);
        if (!strips.same()) tabulate<T::kM, T::kThreads>(shared.z_columns, z, group, first_m);
        tabulate<T::kN, T::kThreads>(shared.x_columns, x, group, first_n);
        __syncthreads();
        Stage<kZ, T::kM, T::kThreads, Holds, kPositions, kSource> z_stage(z, shared.z_columns);
        Stage<kX, T::kN, T::kThreads, Holds, kPositions, kSource> x_stage(x, shared.x_columns);
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
            multiply_slices<T>(sum, first_slice(strips, shared.z[current], shared.x[current]), shared.x[current]);
            strips.template visit<Holds>(shared.x[current]);
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
