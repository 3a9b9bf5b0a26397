// im2col by indexing: where the element of an operand at (output position, column of the patch matrix) lies in memory.
#pragma once

#include "element.cuh"

namespace localsgd::cuda {

LOCALSGD_DEVICE unsigned quotient(unsigned n, const FastDiv& by) { return (__umulhi(n, by.multiplier) + n) >> by.shift; }

// The quotient; leaves the remainder in n.
LOCALSGD_DEVICE unsigned divide(unsigned& n, const FastDiv& by) {
    const unsigned q = quotient(n, by);
    n -= q * by.divisor;
    return q;
}

// What is the same for all columns of a position, and for all positions of a column. An index beyond the matrix is marked by a
// coordinate so far outside the input that the one bounds check also turns it down, even with both marks added.
constexpr int kOutside = 1 << 30;

struct PatchRow {
    int64 offset;
    int i0, i1, i2;
};
struct alignas(16) PatchColumn {
    int offset; // of the group and the channel as well; the launcher makes sure that it fits
    int t0, t1, t2;
};

LOCALSGD_DEVICE PatchRow patch_row(const Patches& p, unsigned position, unsigned end) {
    unsigned rest = position;
    const unsigned n = divide(rest, p.image);
    unsigned p0 = 0, p1 = 0;
    if (!p.flat) {
        p0 = divide(rest, p.plane);
        p1 = divide(rest, p.row);
    }
    PatchRow row;
    row.i0 = static_cast<int>(p0) * p.stride[0] - p.pad[0];
    row.i1 = static_cast<int>(p1) * p.stride[1] - p.pad[1];
    row.i2 = static_cast<int>(rest) * p.stride[2] - p.pad[2];
    row.offset = static_cast<int64>(n) * p.batch_stride + static_cast<int64>(row.i0) * p.space_stride[0] +
                 static_cast<int64>(row.i1) * p.space_stride[1] + static_cast<int64>(row.i2) * p.space_stride[2];
    if (position >= end) row.i0 = kOutside;
    return row;
}

LOCALSGD_DEVICE void split_column(const Patches& p, unsigned column, unsigned& channel, unsigned (&tap)[3]) {
    unsigned inner = column;
    const unsigned outer = divide(inner, p.column_inner);
    channel = p.channels_fastest ? inner : outer;
    unsigned rest = p.channels_fastest ? outer : inner;
    tap[0] = divide(rest, p.tap_plane);
    tap[1] = divide(rest, p.tap_row);
    tap[2] = rest;
}

LOCALSGD_DEVICE PatchColumn patch_column(const Patches& p, int group, unsigned column) {
    unsigned channel, tap[3];
    split_column(p, column, channel, tap);
    PatchColumn c;
    c.t0 = static_cast<int>(tap[0]) * p.dilation[0];
    c.t1 = static_cast<int>(tap[1]) * p.dilation[1];
    c.t2 = static_cast<int>(tap[2]) * p.dilation[2];
    c.offset = group * p.group_stride + static_cast<int>(channel) * p.channel_stride + c.t0 * p.space_stride[0] +
               c.t1 * p.space_stride[1] + c.t2 * p.space_stride[2];
    if (column >= static_cast<unsigned>(p.columns)) c.t0 = kOutside;
    return c;
}

LOCALSGD_DEVICE bool inside(const Patches& p, const PatchRow& r, const PatchColumn& c) {
    // Unsigned: a negative coordinate is a large one.
    return static_cast<unsigned>(r.i0) + static_cast<unsigned>(c.t0) < static_cast<unsigned>(p.input[0]) &&
           static_cast<unsigned>(r.i1) + static_cast<unsigned>(c.t1) < static_cast<unsigned>(p.input[1]) &&
           static_cast<unsigned>(r.i2) + static_cast<unsigned>(c.t2) < static_cast<unsigned>(p.input[2]);
}

} // namespace localsgd::cuda
