// 3x3 taps of channels_last operands, which do not pass through shared memory: half a warp, a walker, goes along the columns of
// a few rows, two channels a lane. Columns are loaded some steps ahead, straight to the lane that multiplies them, and the
// columns of z that the next ones of x meet stay in registers.
#pragma once

#include "geometry.cuh"
#include "ptx.cuh"

namespace localsgd::cuda {

constexpr int kSlice = 32; // output channels of a unit
constexpr int kDepthwiseWarps = 8, kDepthwiseThreads = 32 * kDepthwiseWarps;
constexpr int kWalkerLanes = kSlice / 2;
constexpr int kWalkers = kDepthwiseThreads / kWalkerLanes;

// Two neighbouring channels in memory.
template <Element kElement>
struct Pair {
    using Bits = unsigned;
    static constexpr int kElementBytes = 2;
    static LOCALSGD_DEVICE Bits zero() { return 0; }
    static LOCALSGD_DEVICE float2 widen(Bits bits) {
        if (kElement == Element::f16) return make_float2(half_to_float(bits & 0xffffu), half_to_float(bits >> 16));
        unsigned low = bits << 16, high = bits & 0xffff0000u;
        LOCALSGD_FORGET(low); // here, before `bits` are loaded again, or they would have to be copied
        LOCALSGD_FORGET(high);
        return make_float2(__uint_as_float(low), __uint_as_float(high));
    }
};
template <>
struct Pair<Element::f32> {
    using Bits = uint2;
    static constexpr int kElementBytes = 4;
    static LOCALSGD_DEVICE Bits zero() { return make_uint2(0, 0); }
    static LOCALSGD_DEVICE float2 widen(Bits bits) { return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y)); }
};

// Some rows of an operand, a column after the other.
template <Element kElement, int kRows>
struct WalkRows {
    using Bits = typename Pair<kElement>::Bits;
    const unsigned char* at;   // the next column, in the first row
    unsigned rows;             // a bit for each that exists
    int column, end;           // the next column; outside of [0, end) are zeros
    unsigned pitch, row_pitch; // bytes from a column, a row to the next

    LOCALSGD_DEVICE void begin(const DepthwiseOperand& o, unsigned image, int row, int row_count, int first, int columns,
                               int k) {
        constexpr int kBytes = Pair<kElement>::kElementBytes;
        const int64 offset = image * o.batch_stride + row * o.space_stride[1] + first * o.space_stride[2] + k;
        at = static_cast<const unsigned char*>(o.data) + offset * kBytes;
        rows = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (r < row_count && row + r >= 0 && row + r < o.size[1]) rows |= 1u << r;
        column = first;
        end = max(0, min(first + columns, o.size[2]));
        pitch = static_cast<unsigned>(o.space_stride[2]) * kBytes;
        row_pitch = static_cast<unsigned>(o.space_stride[1]) * kBytes;
    }

    // The next column. What is not there leaves its `bits` as they are. One by one the rows' bits are tested: kept as
    // predicates, they would be more than there are.
    LOCALSGD_DEVICE void load(Bits (&bits)[kRows]) {
        unsigned there = static_cast<unsigned>(column) < static_cast<unsigned>(end) ? rows : 0u;
        LOCALSGD_FORGET(there);
#pragma unroll
        for (int r = 0; r < kRows; ++r) load_if(bits[r], at + static_cast<uint64>(row_pitch) * r, there & 1u << r);
        at += pitch;
        ++column;
    }

    // The column that was loaded `ahead` columns ago; if `kChecked`, zeros where it was not there.
    template <bool kChecked>
    LOCALSGD_DEVICE void widen(float2 (&to)[kRows], const Bits (&bits)[kRows], int ahead) const {
        const bool there = !kChecked || static_cast<unsigned>(column - ahead) < static_cast<unsigned>(end);
#pragma unroll
        for (int r = 0; r < kRows; ++r) to[r] = Pair<kElement>::widen(there ? bits[r] : Pair<kElement>::zero());
    }
};

template <Element kElement, int kStride>
struct Walker {
    using Bits = typename Pair<kElement>::Bits;
    static constexpr int kRows = kStride == 1 ? 4 : 2, kInputRows = (kRows - 1) * kStride + 3;
    // Columns of z that a column of x meets. And that are loaded ahead, with kStride columns of x each: what registers hold.
    static constexpr int kKept = kStride == 1 ? 3 : 2, kAhead = kElement == Element::f32 ? 1 : kKept;

    WalkRows<kElement, kRows> z;
    WalkRows<kElement, kInputRows> x;
    Bits z_bits[kAhead][kRows], x_bits[kAhead][kStride][kInputRows];
    float2 kept[kKept][kRows];

    LOCALSGD_DEVICE void begin() {
#pragma unroll
        for (int i = 0; i < kKept; ++i)
#pragma unroll
            for (int r = 0; r < kRows; ++r) kept[i][r] = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) z_bits[i][r] = Pair<kElement>::zero();
            z.load(z_bits[i]);
#pragma unroll
            for (int j = 0; j < kStride; ++j) {
#pragma unroll
                for (int r = 0; r < kInputRows; ++r) x_bits[i][j][r] = Pair<kElement>::zero();
                x.load(x_bits[i][j]);
            }
        }
    }

    // kKept columns of z, and kStride times as many of x. Column q * kStride + s of x meets column q of z at tap s.
    template <bool kChecked>
    LOCALSGD_DEVICE void step(float2 (&sum)[3][3]) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            z.template widen<kChecked>(kept[i], z_bits[i % kAhead], kAhead);
            z.load(z_bits[i % kAhead]);
#pragma unroll
            for (int j = 0; j < kStride; ++j) {
                float2 v[kInputRows];
                x.template widen<kChecked>(v, x_bits[i % kAhead][j], kAhead * kStride);
                x.load(x_bits[i % kAhead][j]);
#pragma unroll
                for (int s = j; s < 3; s += kStride)
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
#pragma unroll
                        for (int t = 0; t < 3; ++t) {
                            const float2 by = kept[(i + kKept - s / kStride) % kKept][r], at = v[r * kStride + t];
                            sum[t][s].x = fmaf(by.x, at.x, sum[t][s].x);
                            sum[t][s].y = fmaf(by.y, at.y, sum[t][s].y);
                        }
            }
        }
    }
};

template <Element kElement, int kStride>
LOCALSGD_DEVICE void walk_tile(float2 (&sum)[3][3], const DepthwiseParams& p, int tile, bool exists, int k) {
    using W = Walker<kElement, kStride>;
    unsigned across = static_cast<unsigned>(tile), down = divide(across, p.by_across);
    const unsigned image = divide(down, p.by_down);
    const int row = static_cast<int>(down) * W::kRows, column = static_cast<int>(across) * p.tile_columns;
    const int rows = exists ? p.z.size[1] - row : 0; // of which a walker takes at most kRows
    const int columns = min(p.tile_columns, p.z.size[2] - column);
    W walker;
    walker.z.begin(p.z, image, row, rows, column, columns, k);
    walker.x.begin(p.x, image, row * kStride - p.pad[1], rows > 0 ? (rows - 1) * kStride + 3 : 0, column * kStride - p.pad[2],
                   (columns - 1) * kStride + 3, k);
    walker.begin();
    // Columns of z that are there, as are those of x before its end: what is not there on the left has stayed zeros.
    const int there = min(columns, (walker.x.end - (column * kStride - p.pad[2])) / kStride);
    int q = 0;
    for (; q + W::kKept <= there; q += W::kKept) walker.template step<false>(sum);
    // Columns of z beyond the tile are zeros, so that an infinite x makes its row of taps NaN: D is not usable either way.
    for (; q < columns + W::kKept - 1; q += W::kKept) walker.template step<true>(sum);
}

// The sums of a channel for each lane, its walker's and the other one's of its warp.
template <Element kElement, int kStride>
LOCALSGD_DEVICE void walk_unit(float (&sum)[3][3], const DepthwiseParams& p, int slice, int first_tile, int last_tile) {
    const int walker = static_cast<int>(threadIdx.x) / kWalkerLanes, lane = static_cast<int>(threadIdx.x) % kWalkerLanes;
    const int k = slice * kSlice + 2 * lane;
    float2 own[3][3];
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int s = 0; s < 3; ++s) own[r][s] = make_float2(0, 0);
    // Both walkers of a warp take as many steps.
    for (int tile = first_tile + walker; tile - walker % 2 < last_tile; tile += kWalkers)
        walk_tile<kElement, kStride>(own, p, tile, tile < last_tile && k < p.out_channels, k);
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            const float x = own[r][s].x + __shfl_xor_sync(0xffffffffu, own[r][s].x, kWalkerLanes);
            const float y = own[r][s].y + __shfl_xor_sync(0xffffffffu, own[r][s].y, kWalkerLanes);
            sum[r][s] = walker % 2 == 0 ? x : y;
        }
}

} // namespace localsgd::cuda
