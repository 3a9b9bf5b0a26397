// Segments for the fp32 core.
#pragma once

#include "segments.cuh"
#include "tile_ffma.cuh"

namespace localsgd::cuda {

// Two slices of z and two steps' segments of x in shared memory, both through registers: one barrier a step. x is fp32.
template <class T, Access kZ>
struct SegmentedFfma {
    using Tile = T;
    static constexpr bool kExists = true;
    static constexpr int kPositions = kStepPositions;
    static constexpr int kLoads = 2, kChunks = kLoads * T::kThreads;

    struct Storage {
        alignas(16) Slice<T::kM> z[2];
        alignas(16) float x[2][kChunks * 4];
        PatchColumn z_columns[T::kM], x_chunks[kChunks];
    };

    static LOCALSGD_DEVICE void load(uint4 (&chunks)[kLoads], const Segments& x, const PatchColumn (&table)[kChunks],
                                     int position, int end) {
        const PatchRow row = patch_row(x, position, end);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const PatchColumn chunk = table[static_cast<int>(threadIdx.x) + i * T::kThreads];
            chunks[i] =
                inside(x, row, chunk) ? load_bits4(x.data, row.offset + chunk.offset, Element::f32) : make_uint4(0, 0, 0, 0);
        }
    }
    static LOCALSGD_DEVICE void store(float (&to)[kChunks * 4], const uint4 (&chunks)[kLoads]) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            quad(&to[(static_cast<int>(threadIdx.x) + i * T::kThreads) * 4]) = widen4(chunks[i], Element::f32);
    }

    // `positions`: how many of the step's exist. Others are left out: z is zero there, but x may be a pixel that is not finite.
    static LOCALSGD_DEVICE void multiply(float (&sum)[8][8], const Slice<T::kM>& z, const float* x, const int (&columns)[8],
                                         int pitch, int positions) {
        const int m = T::first_m(threadIdx.x);
        const auto add = [&](int k) {
            const float4 a0 = quad(&z[k][m]), a1 = quad(&z[k][m + T::kApartM]);
            const float* const at = x + k * pitch;
            const float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float b = at[columns[j]];
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i][j] = fmaf(a[i], b, sum[i][j]);
            }
        };
        if (positions >= kPositions) {
#pragma unroll
            for (int k = 0; k < kPositions; ++k) add(k);
        } else {
#pragma unroll 1
            for (int k = 0; k < positions; ++k) add(k);
        }
    }

    static LOCALSGD_DEVICE void correlate(typename T::Sum& sum, Storage& shared, const Patches& z, const Segments& x, int group,
                                          int first_m, int first_n, int begin, int end) {
        clear(sum);
        tabulate<T::kM, T::kThreads>(shared.z_columns, z, group, first_m);
        tabulate_segments<kChunks, T::kThreads>(shared.x_chunks, x, first_n);
        int columns[8];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            columns[j] = place_in_segments<4>(x, first_n, first_n + T::first_n(threadIdx.x) + j / 4 * T::kApartN + j % 4);
        __syncthreads();
        Stage<kZ, T::kM, T::kThreads> z_stage(z, shared.z_columns);
        uint4 chunks[kLoads];
        z_stage.load(begin, end);
        load(chunks, x, shared.x_chunks, begin, end);
        z_stage.store(shared.z[0]);
        store(shared.x[0], chunks);
        __syncthreads();
        int current = 0;
        for (int position = begin; position < end; position += kPositions) {
            const bool more = position + kPositions < end;
            if (more) {
                z_stage.load(position + kPositions, end);
                load(chunks, x, shared.x_chunks, position + kPositions, end);
            }
            multiply(sum, shared.z[current], shared.x[current], columns, x.pitch, positions_left(x, position));
            if (more) {
                z_stage.store(shared.z[current ^ 1]);
                store(shared.x[current ^ 1], chunks);
            }
            current ^= 1;
            __syncthreads(); // also before the next tile overwrites the tables
        }
    }
};

} // namespace localsgd::cuda
