// Operands that lie in memory as the matrix units want them (NHWC, rows of a linear layer): copied to shared memory by
// cp.async, 16 bytes of neighbouring columns at a time, several steps ahead and without registers.
#pragma once

#include "tile_mma.cuh"

namespace localsgd::cuda {

// Chunks of one slice. A thread keeps to one column of chunks and goes down the positions; what lies in the padding, beyond
// the matrix or beyond the split is filled with zeros.
template <class T, int kPositions, int kColumns>
struct ChunkCopy {
    static constexpr int kWidth = 16 / static_cast<int>(sizeof(typename T::Value));
    static constexpr int kChunks = kColumns / kWidth; // of a position
    static constexpr int kDown = T::kThreads / kChunks;
    static_assert(kDown * kChunks == T::kThreads && kPositions % kDown == 0);

    using Columns = PatchColumn[kChunks];
    using Rows = PatchRow[kPositions];

    static LOCALSGD_DEVICE void tabulate(Columns& columns, const Patches& patches, int group, int first) {
#pragma unroll 1 // once, as there are more threads
        for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += T::kThreads)
            columns[i] = patch_column(patches, group, first + i * kWidth);
    }

    static LOCALSGD_DEVICE int within(int start, int tap, int size) {
        return static_cast<unsigned>(start) + static_cast<unsigned>(tap) < static_cast<unsigned>(size);
    }

    static LOCALSGD_DEVICE void issue(MmaSlice<T, kPositions, kColumns>& to, const Patches& patches, const Columns& columns,
                                      const Rows& rows, int position, int end) {
        const int chunk = static_cast<int>(threadIdx.x) % kChunks;
        const PatchColumn column = columns[chunk];
        const auto* from = static_cast<const typename T::Value*>(patches.data);
        if (patches.in_place) { // nothing to look up
            const int first = static_cast<int>(threadIdx.x) / kChunks;
            from += column.offset + static_cast<int64>(position + first) * patches.space_stride[2];
            const int left = column.t0 == 0 ? end - position - first : 0;
#pragma unroll
            for (int i = 0; i < kPositions / kDown; ++i)
                cp_async16(&to[first + i * kDown][chunk * kWidth],
                           from + static_cast<int64>(i * kDown) * patches.space_stride[2], i * kDown < left);
            return;
        }
#pragma unroll
        for (int i = 0; i < kPositions / kDown; ++i) {
            const int down = static_cast<int>(threadIdx.x) / kChunks + i * kDown;
            const PatchRow row = rows[down];
            // Nothing is read from where an invalid chunk would be. All three comparisons, for `inside` branches.
            const bool valid = (within(row.i0, column.t0, patches.input[0]) & within(row.i1, column.t1, patches.input[1]) &
                                within(row.i2, column.t2, patches.input[2])) != 0;
            cp_async16(&to[down][chunk * kWidth], from + row.offset + column.offset, valid);
        }
    }
};

// A ring of stages, all but one of them on their way while one is multiplied. `find(step)` comes a barrier before
// `issue(step)`.
template <int kStages, class Issue, class Find, class Multiply>
LOCALSGD_DEVICE void run_pipeline(int steps, const Issue& issue, const Find& find, const Multiply& multiply) {
    // The first turns only fill the ring: by the same instructions, since fetching those takes longer than a short loop.
#pragma unroll 1
    for (int step = 1 - kStages; step < steps; ++step) {
        cp_async_wait<kStages - 2>(); // this thread's part of the step has arrived,
        __syncthreads(); // everybody's has, everybody is done with the slices of the step before, and rows have been found
        const int ahead = step + kStages - 1;
        if (ahead < steps) issue(ahead);
        cp_async_commit(); // a group a step, empty or not: waiting counts groups
        find(ahead + 1);
        if (step >= 0) multiply(step);
    }
    // No barrier: who is still multiplying reads no table, and the next tile's slices are filled after its first one.
    cp_async_wait<0>(); // empty groups
}

// A ring of kStages slices, each 32 positions deep (16 in tf32); kStages - 1 of them are on their way while one is multiplied.
// Finding a position takes three divisions, and each is needed by 8 to 32 threads: 2 warps find a step's positions while the
// copies of the step before are issued. Of an operand that is read in place nothing has to be found.
template <class T>
struct PipelinedMma {
    using Tile = T;
    using Holds = typename T::Operand::Holds;
    static constexpr bool kExists = LOCALSGD_ARCH >= 800;
    static constexpr int kStages = 4;
    static constexpr int kPositions = 64 / static_cast<int>(sizeof(typename T::Value));
    using ZCopy = ChunkCopy<T, kPositions, T::kM>;
    using XCopy = ChunkCopy<T, kPositions, T::kN>;

    struct Storage {
        alignas(16) MmaSlice<T, kPositions, T::kM> z[kStages];
        alignas(16) MmaSlice<T, kPositions, T::kN> x[kStages];
        typename ZCopy::Columns z_columns;
        typename XCopy::Columns x_columns;
        typename ZCopy::Rows z_rows[2];
        typename XCopy::Rows x_rows[2];
    };

    static LOCALSGD_DEVICE void find_rows(Storage& shared, const Patches& z, const Patches& x, int step, int begin, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
        if (lane >= kPositions) return;
        const int position = begin + step * kPositions + lane;
        if (warp == 0 && !z.in_place) shared.z_rows[step % 2][lane] = patch_row(z, position, end);
        if (warp == 1 && !x.in_place) shared.x_rows[step % 2][lane] = patch_row(x, position, end);
    }

    template <class Strips>
    static LOCALSGD_DEVICE void issue(Storage& shared, const Patches& z, const Patches& x, int step, int begin, int end,
                                      const Strips& strips) {
        const int position = begin + step * kPositions;
        if (!strips.same()) ZCopy::issue(shared.z[step % kStages], z, shared.z_columns, shared.z_rows[step % 2], position, end);
        XCopy::issue(shared.x[step % kStages], x, shared.x_columns, shared.x_rows[step % 2], position, end);
    }

    template <class Strips = TwoStrips>
    static LOCALSGD_DEVICE void correlate(typename T::Sum& sum, Storage& shared, const Patches& z, const Patches& x, int group,
                                          int first_m, int first_n, int begin, int end, Strips&& strips = {}) {
        clear<T>(sum);
        const int steps = (end - begin + kPositions - 1) / kPositions; // none for an empty batch
        ZCopy::tabulate(shared.z_columns, z, group, first_m);
        XCopy::tabulate(shared.x_columns, x, group, first_n);
        find_rows(shared, z, x, 0, begin, end);
        run_pipeline<kStages>(
            steps, [&](int step) { issue(shared, z, x, step, begin, end, strips); },
            [&](int step) { find_rows(shared, z, x, step, begin, end); },
            [&](int step) {
                const auto& x_slice = shared.x[step % kStages];
                multiply_slices<T, kPositions>(sum, first_slice(strips, shared.z[step % kStages], x_slice), x_slice);
                strips.template visit<Holds>(x_slice);
            });
    }
};

template <class T, Access kZ, Access kX>
struct MmaPathOf {
    using Type = StagedMma<T, kZ, kX>;
};
template <class T>
struct MmaPathOf<T, Access::chunks16, Access::chunks16> {
    using Type = PipelinedMma<T>;
};

// 512 threads on a multiprocessor leave 128 registers for each; gathering element by element takes more, which 384 have. The
// sums of a 64 x 64 warp are 128 registers alone: 256 threads. Those of 64 x 40, and where their columns lie: 384.
template <class T, Access kZ, Access kX>
constexpr int kMmaResidentBlocks =
    (T::kM == 128 && T::kN == 128                                                           ? 256
     : kZ == Access::scalar || T::kN == 160 || (T::kThreads == 128 && kX == Access::scalar) ? 384
                                                                                            : 512) /
    T::kThreads;

} // namespace localsgd::cuda
