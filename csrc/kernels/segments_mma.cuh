// Segments for the matrix-unit cores.
#pragma once

#include "pipeline_mma.cuh"
#include "segments.cuh"

namespace localsgd::cuda {

// A ring as in PipelinedMma: slices of z, and each step's segments of x. X: what x is, which may be fp32 that autocast rounds:
// a network's input.
template <class T, class X = typename T::Value>
struct SegmentedMma {
    using Tile = T;
    using Value = typename T::Value;
    static constexpr bool kExists = LOCALSGD_ARCH >= 800;
    static constexpr int kStages = PipelinedMma<T>::kStages, kPositions = PipelinedMma<T>::kPositions;
    static constexpr int kWidth = 16 / static_cast<int>(sizeof(X));
    static constexpr int kChunks = kSegmentChunks * (sizeof(X) > sizeof(Value) ? 2 : 1);
    using ZCopy = typename PipelinedMma<T>::ZCopy;
    using Columns = int[T::kFragmentsN]; // where this thread's lie in the segments of a step

    struct Storage {
        alignas(16) MmaSlice<T, kPositions, T::kM> z[kStages];
        alignas(16) X x[kStages][kChunks * kWidth];
        typename ZCopy::Columns z_columns;
        typename ZCopy::Rows z_rows[2];
        PatchColumn x_chunks[kChunks];
        PatchRow x_row[2];
    };

    static LOCALSGD_DEVICE void find_rows(Storage& shared, const Patches& z, const Segments& x, int step, int begin, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        const int position = begin + step * kPositions;
        if (warp == 0 && lane < kPositions && !z.in_place) shared.z_rows[step % 2][lane] = patch_row(z, position + lane, end);
        if (warp == 1 && lane == 0) shared.x_row[step % 2] = patch_row(x, position, end);
    }

    static LOCALSGD_DEVICE void issue(Storage& shared, const Patches& z, const Segments& x, int step, int begin, int end) {
        ZCopy::issue(shared.z[step % kStages], z, shared.z_columns, shared.z_rows[step % 2], begin + step * kPositions, end);
        const PatchRow row = shared.x_row[step % 2];
        const auto* from = static_cast<const X*>(x.data) + row.offset;
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < (x.rows + 1) * x.chunks; i += T::kThreads) {
            const PatchColumn chunk = shared.x_chunks[i];
            cp_async16(&shared.x[step % kStages][i * kWidth], from + chunk.offset, inside(x, row, chunk));
        }
    }

    // `positions`: how many of the step's exist. Beside others z is zero, and x must be: it may be a pixel that is not finite.
    static LOCALSGD_DEVICE void multiply(typename T::Sum& sum, const MmaSlice<T, kPositions, T::kM>& z, const X* x,
                                         const Columns& columns, int pitch, int positions) {
        constexpr int kHeld = 4 / static_cast<int>(sizeof(Value)); // positions in a register,
        constexpr int kApart = kHeld * 4;                          // to the next register's
        const int first = static_cast<int>(threadIdx.x) % 4 * kHeld;
#pragma unroll
        for (int k = 0; k < kPositions; k += T::Operand::kDepth) {
            unsigned a[T::kFragmentsM][4];
            load_z_fragments<T, kPositions>(a, z, k);
            unsigned exists[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) exists[r] = mask_of(positions - k - first - r * kApart);
#pragma unroll
            for (int j = 0; j < T::kFragmentsN; ++j) {
                unsigned b[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const X* at = x + columns[j] + (k + first + r * kApart) * pitch;
                    if constexpr (sizeof(X) == 2)
                        b[r] = (at[0] | static_cast<unsigned>(at[pitch]) << 16) & exists[r];
                    else if constexpr (sizeof(Value) == 2)
                        b[r] = T::Operand::pack(at[0], at[pitch]) & exists[r];
                    else
                        b[r] = to_tf32(__uint_as_float(__float_as_uint(at[0]) & exists[r]));
                }
#pragma unroll
                for (int i = 0; i < T::kFragmentsM; ++i) T::Operand::multiply_add(sum[i][j], a[i], b);
            }
        }
    }

    // The bits of a register's positions, of which so many exist.
    static LOCALSGD_DEVICE unsigned mask_of(int positions) {
        return positions <= 0 ? 0 : sizeof(Value) == 2 && positions == 1 ? 0xffffu : 0xffffffffu;
    }

    static LOCALSGD_DEVICE void correlate(typename T::Sum& sum, Storage& shared, const Patches& z, const Segments& x, int group,
                                          int first_m, int first_n, int begin, int end) {
        clear<T>(sum);
        const int steps = (end - begin) / kPositions; // whole ones: positions are padded
        Columns columns;
#pragma unroll
        for (int j = 0; j < T::kFragmentsN; ++j) {
            const int n = T::warp_n(threadIdx.x) + j * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
            columns[j] = place_in_segments<kWidth>(x, first_n, first_n + n);
        }
        ZCopy::tabulate(shared.z_columns, z, group, first_m);
        tabulate_segments<kChunks, T::kThreads>(shared.x_chunks, x, first_n);
        find_rows(shared, z, x, 0, begin, end);
        run_pipeline<kStages>(
            steps, [&](int step) { issue(shared, z, x, step, begin, end); },
            [&](int step) { find_rows(shared, z, x, step, begin, end); },
            [&](int step) {
                multiply(sum, shared.z[step % kStages], shared.x[step % kStages], columns, x.pitch,
                         positions_left(x, begin + step * kPositions));
            });
    }
};

} // namespace localsgd::cuda
