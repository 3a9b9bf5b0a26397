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

template <int kColumns, int kThreads>
LOCALSGD_DEVICE void tabulate(PatchColumn (&table)[kColumns], const Patches& patches, int group, int first) {
#pragma unroll 1 // once, as there are as many threads
    for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += kThreads) table[i] = patch_column(patches, group, first + i);
}

// Whether a tile's two operands are strips of their own. Where they may be one and the same, the main loops ask, and load it
// once; what then is to be done with its slices happens in `visit`.
struct TwoStrips {
    static LOCALSGD_DEVICE constexpr bool same() { return false; }
    template <class Holds, class Slice>
    LOCALSGD_DEVICE void visit(const Slice&) const {}
};
template <class Strips, class Z, class X>
LOCALSGD_DEVICE const Z& first_slice(const Strips&, const Z& z, const X&) { // not the same: of another size
    return z;
}
template <class Strips, class Slice>
LOCALSGD_DEVICE const Slice& first_slice(const Strips& strips, const Slice& z, const Slice& x) {
    return strips.same() ? x : z;
}

// What a slice holds: fp32,
struct HoldsFloats {
    using Value = float;
    using Four = float4;
    static LOCALSGD_DEVICE float one(unsigned bits, Element element) { return widen(bits, element); }
    static LOCALSGD_DEVICE float4 four(uint4 bits, Element element) { return widen4(bits, element); }
    static LOCALSGD_DEVICE float part(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
    static LOCALSGD_DEVICE void put(float* to, const float4& v) { quad(to) = v; }
    static LOCALSGD_DEVICE float value_of(float held) { return held; }
};

// or 16-bit operands of the matrix units: bits that pass through, or fp32 that is rounded.
template <Element kElement>
struct HoldsHalves {
    using Value = unsigned short;
    using Four = uint2;
    static LOCALSGD_DEVICE unsigned narrow(float value) {
        return kElement == Element::bf16 ? float_to_bfloat16(value) : float_to_half(value);
    }
    static LOCALSGD_DEVICE unsigned short one(unsigned bits, Element element) {
        return static_cast<unsigned short>(element == kElement ? bits : narrow(widen(bits, element)));
    }
    static LOCALSGD_DEVICE uint2 four(uint4 bits, Element element) {
        if (element == kElement) return make_uint2(bits.x, bits.y);
        const float4 v = widen4(bits, element);
        return make_uint2(narrow(v.x) | narrow(v.y) << 16, narrow(v.z) | narrow(v.w) << 16);
    }
    static LOCALSGD_DEVICE unsigned short part(const uint2& v, int i) {
        return static_cast<unsigned short>((i < 2 ? v.x : v.y) >> i % 2 * 16);
    }
    static LOCALSGD_DEVICE void put(unsigned short* to, const uint2& v) { *reinterpret_cast<uint2*>(to) = v; }
    static LOCALSGD_DEVICE float value_of(unsigned short held) { return widen(held, kElement); }
};

template <Access kAccess, int kColumns, int kThreads, class Holds = HoldsFloats, int kPositions = kStepPositions,
          Source kSource = Source::constant>
class Stage {
    static constexpr int kWidth = kAccess == Access::scalar ? 1 : 4;
    static constexpr int kLoads = kPositions * kColumns / (kThreads * kWidth);
    static_assert(kLoads * kThreads * kWidth == kPositions * kColumns);

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
                                ? load_bits4<kSource>(patches_.data, row.offset + column.offset, element())
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
                    bits4_[i] = valid ? load_bits4<kSource>(patches_.data, at, element()) : make_uint4(0, 0, 0, 0);
                else
                    bits_[i] = valid ? load_bits<kSource>(patches_.data, at, element()) : 0u;
            }
        }
    }

    template <int kRowValues> // columns and padding
    LOCALSGD_DEVICE void store(typename Holds::Value (&slice)[kPositions][kRowValues]) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            if constexpr (kAccess == Access::channels4) {
                Holds::put(&slice[first_row() + i * kRowsApart][first_column()], Holds::four(bits4_[i], element()));
            } else {
                const int column = first_column() + i * kColumnsApart, row = first_row();
                if constexpr (kAccess == Access::positions4) {
                    const typename Holds::Four v = Holds::four(bits4_[i], element());
#pragma unroll
                    for (int j = 0; j < 4; ++j) slice[row + j][column] = Holds::part(v, j);
                } else {
                    slice[row][column] = Holds::one(bits_[i], element());
                }
            }
        }
    }

  private:
    // channels4: threads run along a row, then down; otherwise down (a position a lane, or 4 of them), then along.
    static constexpr int kDown = kPositions / (kAccess == Access::positions4 ? 4 : 1);
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
        return t % kDown * (kPositions / kDown);
    }
    static LOCALSGD_DEVICE int first_column() {
        const int t = thread();
        if constexpr (kAccess == Access::channels4) return t % (kColumns / 4) * 4;
        return t / kDown;
    }

    LOCALSGD_DEVICE Element element() const { return kSource == Source::written ? Element::f32 : patches_.element; }

    const Patches& patches_;
    const PatchColumn* table_;
    uint4 bits4_[kAccess == Access::scalar ? 1 : kLoads];
    unsigned bits_[kAccess == Access::scalar ? kLoads : 1];
};

} // namespace localsgd::cuda
