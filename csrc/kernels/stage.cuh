// One step's slice of an operand on its way from global to shared memory, through registers: the loads of step i + 1 are in
// flight while step i is computed.
#pragma once

#include "geometry.cuh"

namespace localsgd::cuda {

constexpr int kStepPositions = 8; // rows of a slice; 8 fp32 of one channel are one 32-byte sector in NCHW

// A slice in shared memory, [position][column]. The 4 columns of padding put the 8 positions x 4 columns that a warp stores at
// a time (scalar, positions4) into 32 different banks, and keep rows aligned for 16-byte accesses.
template <int kColumns>
using Slice = float[kStepPositions][kColumns + 4];

template <Access kAccess, int kColumns, int kThreads>
class Stage {
    static constexpr int kWidth = kAccess == Access::scalar ? 1 : 4;
    static constexpr int kLoads = kStepPositions * kColumns / (kThreads * kWidth);
    static_assert(kLoads * kThreads * kWidth == kStepPositions * kColumns);

  public:
    // `table`: the tile's columns, which all threads have written before a barrier.
    LOCALSGD_DEVICE Stage(const Patches& patches, const PatchColumn* table) : patches_(patches), table_(table) {}

    LOCALSGD_DEVICE void load(int position, int end) {
        if constexpr (kAccess == Access::channels4) {
            const PatchColumn column = table_[first_column()]; // again in every step: kept, it would take 4 registers
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const PatchRow row = patch_row(patches_, position + first_row() + i * kRowsApart, end);
                bits4_[i] = inside(patches_, row, column)
                                ? load_bits4(patches_.data, row.offset + column.offset, patches_.element)
                                : make_uint4(0, 0, 0, 0);
            }
        } else {
            // A thread keeps to one position (or 4): finding it takes three divisions.
            const PatchRow row = patch_row(patches_, position + first_row(), end);
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const PatchColumn column = table_[first_column() + i * kColumnsApart];
                const int64 at = row.offset + column.offset;
                const bool valid = inside(patches_, row, column);
                if constexpr (kAccess == Access::positions4)
                    bits4_[i] = valid ? load_bits4(patches_.data, at, patches_.element) : make_uint4(0, 0, 0, 0);
                else
                    bits_[i] = valid ? load_bits(patches_.data, at, patches_.element) : 0u;
            }
        }
    }

    LOCALSGD_DEVICE void store(Slice<kColumns>& slice) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (kAccess == Access::channels4) {
                quad(&slice[first_row() + i * kRowsApart][first_column()]) = widen4(bits4_[i], patches_.element);
            } else {
                const int column = first_column() + i * kColumnsApart, row = first_row();
                if constexpr (kAccess == Access::positions4) {
                    const float4 v = widen4(bits4_[i], patches_.element);
                    slice[row][column] = v.x;
                    slice[row + 1][column] = v.y;
                    slice[row + 2][column] = v.z;
                    slice[row + 3][column] = v.w;
                } else {
                    slice[row][column] = widen(bits_[i], patches_.element);
                }
            }
        }
    }

  private:
    // channels4: threads run along a row, then down; otherwise down (8 positions in 8 lanes, or 2 lanes of 4), then along.
    static constexpr int kDown = kStepPositions / (kAccess == Access::positions4 ? 4 : 1);
    static constexpr int kRowsApart = kThreads * 4 / kColumns;
    static constexpr int kColumnsApart = kThreads / kDown;

    // In every step anew: rows, columns and addresses that follow from it would otherwise hold registers through the main loop.
    static LOCALSGD_DEVICE int thread() {
        int t = static_cast<int>(threadIdx.x);
        LOCALSGD_FORGET(t);
        return t;
    }
    static LOCALSGD_DEVICE int first_row() {
        const int t = thread();
        if constexpr (kAccess == Access::channels4) return t / (kColumns / 4);
        return t % kDown * (kStepPositions / kDown);
    }
    static LOCALSGD_DEVICE int first_column() {
        const int t = thread();
        if constexpr (kAccess == Access::channels4) return t % (kColumns / 4) * 4;
        return t / kDown;
    }

    const Patches& patches_;
    const PatchColumn* table_;
    uint4 bits4_[kAccess == Access::scalar ? 1 : kLoads];
    unsigned bits_[kAccess == Access::scalar ? kLoads : 1];
};

} // namespace localsgd::cuda
