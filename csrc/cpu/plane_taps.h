// The taps of a depthwise kernel between one plane of x and one of z, vectorised over columns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace localsgd {

constexpr int64_t kJoinedVectors = 4; // in shorter rows, the last vector's empty lanes are too many

template <typename Acc>
using MaskElement = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>; // all ones or all zeros

// A plane of x or z whose columns are neighbours: element (row, column) at data + row * pitch + column.
template <typename T>
struct Plane {
    const T* data;
    int64_t pitch;
};

// One z plane [P, Q] against one x plane [H, W]. A vector of lanes begins at any column of z and may reach beyond its row, so
// that x and z are read up to `before` elements ahead of a plane and `after` behind it, and masked.
template <typename Acc>
struct Sweep {
    const Geometry& g;
    int64_t before, after;
    int64_t mask_pitch;
    std::vector<MaskElement<Acc>> inside;      // [S, mask_pitch], by the column of z modulo Q: does tap s read within x's row?
    std::vector<MaskElement<Acc>> first_lanes; // from element kMostLanes - n on: n times all ones, then zeros
    Range clean;                               // columns of z at which all taps read within x's row

    explicit Sweep(const Geometry& g)
        : g(g), before(g.pad[2]), mask_pitch(g.output[2] + kMostLanes<Acc>), clean{0, g.output[2]} {
        const int64_t end = mask_pitch * g.stride[2] + shift(g.kernel[2] - 1); // of what vectors of a row read
        after = std::max(kMostLanes<Acc>, end - g.input[2]);
        first_lanes.resize(2 * kMostLanes<Acc>);
        std::fill_n(first_lanes.begin(), kMostLanes<Acc>, -1);
        for (int64_t s = 0; s < g.kernel[2]; ++s) {
            const Range in = valid_outputs(g.output[2], g.input[2], g.stride[2], shift(s));
            clean = {std::max(clean.begin, in.begin), std::min(clean.end, in.end)};
            for (int64_t i = 0; i < mask_pitch; ++i) {
                const int64_t q = i % g.output[2];
                inside.push_back(q >= in.begin && q < in.end ? -1 : 0);
            }
        }
    }
    int64_t shift(int64_t s) const { return s * g.dilation[2] - g.pad[2]; }
};

// Vectors of the columns of a plane of T, which is Acc or bf16.
template <typename T, typename Acc, int kBytes, int kStride>
struct Lanes {
    using V = typename Vector<Acc, kBytes>::Type;
    using Mask = typename Vector<Acc, kBytes>::Mask;
    static constexpr int64_t kCount = Vector<Acc, kBytes>::kLanes;
    static constexpr bool kConverts = !std::is_same_v<T, Acc>;

    static LOCALSGD_INLINE V read(const Acc* p) { return read_vector<Acc, kBytes>(p); }
    static LOCALSGD_INLINE Mask read(const MaskElement<Acc>* p) { return *reinterpret_cast<const Mask*>(p); }
    static LOCALSGD_INLINE V read(const BFloat16* p) { return read_vector<Acc, kBytes>(p); }
    static LOCALSGD_INLINE V read_every_other(const BFloat16* p) {
        return (V)(*reinterpret_cast<const typename Bf16<kBytes>::Wide*>(p) << 16);
    }
    static LOCALSGD_INLINE void write(Acc* p, const V& v) { *reinterpret_cast<V*>(p) = v; }
    static LOCALSGD_INLINE V masked(const V& v, const Mask& mask) { return (V)((Mask)v & mask); }

    // Every other element of two vectors costs one instruction if each 16 bytes of the result come from the same 16 of both.
    // The lanes of z and of the masks are put in that order too.
    static constexpr int64_t column_of(int64_t lane) {
        constexpr int64_t kHalf = 8 / sizeof(Acc);
        return lane / (2 * kHalf) * kHalf + lane % kHalf + (lane % (2 * kHalf) < kHalf ? 0 : kCount / 2);
    }
    template <typename Any, size_t... lane>
    static LOCALSGD_INLINE Any in_order(const Any& v, std::index_sequence<lane...>) {
        return __builtin_shufflevector(v, v, column_of(lane)...);
    }
    template <size_t... lane>
    static LOCALSGD_INLINE V alternate(const V& a, const V& b, std::index_sequence<lane...>) {
        return __builtin_shufflevector(a, b, 2 * column_of(lane)...);
    }
    static constexpr auto kEach = std::make_index_sequence<kCount>();

    template <typename Any>
    static LOCALSGD_INLINE auto load(const Any* p) {
        if constexpr (kStride == 2 && !kConverts)
            return in_order(read(p), kEach);
        else
            return read(p);
    }
    // p[0], p[stride], ...; a kStride other than 0 is that stride.
    static LOCALSGD_INLINE V load_strided(const T* p, int64_t stride) {
        if constexpr (kStride == 1) {
            return read(p);
        } else if constexpr (kConverts) {
            static_assert(kStride == 2);
            return read_every_other(p);
        } else {
            if constexpr (kStride == 2) return alternate(read(p), read(p + kCount), kEach);
            V v;
            for (int64_t l = 0; l < kCount; ++l) v[l] = p[l * stride];
            return v;
        }
    }
    static LOCALSGD_INLINE Mask first(const Sweep<Acc>& w, int64_t count) {
        return load(w.first_lanes.data() + kMostLanes<Acc> - count);
    }
    static LOCALSGD_INLINE Mask inside(const Sweep<Acc>& w, int64_t s, int64_t column) {
        return load(w.inside.data() + s * w.mask_pitch + column);
    }
};

// What of a vector is summed: all of it; where the taps read inside x's row; of that only the first lanes.
enum class Cover { kAll, kInside, kFirst };

// The sums of S taps of a row of the kernel.
template <typename Acc, int kBytes, int kStride, int S>
struct RowSums : Lanes<Acc, Acc, kBytes, kStride> {
    using Base = Lanes<Acc, Acc, kBytes, kStride>;
    using typename Base::Mask, typename Base::V;
    V sum[S];
    const Acc *x, *z;

    // Columns of z from q on, `column` modulo the width; `count` of them if only the first.
    template <Cover kCover>
    LOCALSGD_INLINE void add(const Sweep<Acc>& w, int64_t s0, int64_t q, int64_t column, int64_t count) {
        const int64_t stride = w.g.stride[2], dilation = w.g.dilation[2];
        Mask first, mask;
        if (kCover == Cover::kFirst) first = Base::first(w, count);
        V zs = Base::load(z + q);
        if (kCover == Cover::kFirst) zs = Base::masked(zs, first);
        for (int s = 0; s < S; ++s) {
            V xs = Base::load_strided(x + q * stride + s * dilation, stride);
            if (kCover >= Cover::kInside) mask = Base::inside(w, s0 + s, column);
            if (kCover == Cover::kFirst) mask &= first;
            if (kCover >= Cover::kInside) xs = Base::masked(xs, mask);
            sum[s] += zs * xs;
        }
    }
};

// sums[taps][lanes] += S taps of a row of the kernel, from tap (r, s0) on.
template <typename Acc, int kBytes, int kStride, int S>
LOCALSGD_INLINE void plane_row(const Sweep<Acc>& w, const Plane<Acc>& x, const Plane<Acc>& z, int64_t r, int64_t s0,
                               Acc* sums) {
    using Sums = RowSums<Acc, kBytes, kStride, S>;
    constexpr int64_t kLanes = Sums::kCount;
    const Geometry& g = w.g;
    const int64_t width = g.output[2], top = r * g.dilation[1] - g.pad[1];
    const int64_t step = kLanes < width ? kLanes : kLanes % width;
    Acc* const to = sums + (r * g.kernel[2] + s0) * kLanes;
    Sums taps;
    for (int s = 0; s < S; ++s) taps.sum[s] = Sums::read(to + s * kLanes);
    // Short rows one behind the other are swept as one.
    const bool joined =
        kStride == 1 && g.stride[1] == 1 && width < kJoinedVectors * kLanes && x.pitch == width && z.pitch == width;
    const Range rows = valid_outputs(g.output[1], g.input[1], g.stride[1], top);
    const int64_t together = joined ? std::max<int64_t>(rows.end - rows.begin, 1) : 1, length = together * width;
    Range clean{ceil_div(w.clean.begin, kLanes) * kLanes, w.clean.end / kLanes * kLanes}; // whole vectors
    if (joined || clean.begin >= clean.end) clean = {0, 0};
    for (int64_t p = rows.begin; p < rows.end; p += together) {
        taps.z = z.data + p * z.pitch;
        taps.x = x.data + (p * g.stride[1] + top) * x.pitch + w.shift(s0);
        for (int64_t q = clean.begin; q < clean.end; q += kLanes) taps.template add<Cover::kAll>(w, s0, q, q, kLanes);
        int64_t q = 0, column = 0;
        for (;; q += kLanes) {
            if (q == clean.begin) q = column = clean.end;
            if (q + kLanes > length) break;
            taps.template add<Cover::kInside>(w, s0, q, column, kLanes);
            column += step;
            column -= column >= width ? width : 0;
        }
        if (q < length) taps.template add<Cover::kFirst>(w, s0, q, column, length - q);
    }
    for (int s = 0; s < S; ++s) Sums::write(to + s * kLanes, taps.sum[s]);
}

// The sums of 3x3 taps over a strip of z, a vector wide, row after row: they stay in registers, and so does what rows share.
// What comes next in memory is asked for: the hardware loses track of strips and of short planes.
template <typename T, typename Acc, int kBytes, int kStride>
struct Strip : Lanes<T, Acc, kBytes, kStride> {
    using Base = Lanes<T, Acc, kBytes, kStride>;
    using typename Base::Mask, typename Base::V;
    static constexpr int64_t kLine = 64 / sizeof(T), kAhead = 4096 / sizeof(T);
    const Sweep<Acc>& w;
    Plane<T> x, z;
    V (&sum)[3][3];
    int64_t q = 0;
    Mask first{}, inside[3]{};

    template <bool kMasked>
    LOCALSGD_INLINE V row_of_z(int64_t p) const {
        const T* const from = z.data + p * z.pitch + q;
        __builtin_prefetch(from + kAhead);
        const V v = Base::load(from);
        return kMasked ? Base::masked(v, first) : v;
    }
    template <bool kMasked>
    LOCALSGD_INLINE V row_of_x(int64_t h, int s) const {
        const T* const from = x.data + h * x.pitch + q * kStride + w.shift(s);
        for (int64_t i = 0; s == 0 && i < kStride * Base::kCount; i += kLine) __builtin_prefetch(from + i + kAhead);
        const V v = Base::load_strided(from, kStride);
        return kMasked ? Base::masked(v, inside[s]) : v;
    }

    // A row of x meets three rows of z, of which two met the row before.
    template <bool kMasked, bool kEdge>
    LOCALSGD_INLINE void add_row_of_x(int64_t h, V (&zs)[3]) {
        const int64_t p = h + w.g.pad[1], height = w.g.output[1];
        if (!kEdge || p < height) zs[0] = row_of_z<kMasked>(p);
        for (int s = 0; s < 3; ++s) {
            const V xs = row_of_x<kMasked>(h, s);
            for (int r = 0; r < 3; ++r)
                if (!kEdge || (p - r >= 0 && p - r < height)) sum[r][s] += zs[r] * xs;
        }
        zs[2] = zs[1];
        zs[1] = zs[0];
    }
    template <bool kMasked>
    LOCALSGD_INLINE void add_rows_of_x(int64_t h, int64_t end) {
        const int64_t pad = w.g.pad[1], height = w.g.output[1];
        V zs[3]{};
        for (int r = 1; r < 3; ++r)
            if (const int64_t p = h + pad - r; p >= 0 && p < height) zs[r] = row_of_z<kMasked>(p);
        for (; h < end && h + pad < 2; ++h) add_row_of_x<kMasked, true>(h, zs);
        for (; h < end && h + pad < height; ++h) add_row_of_x<kMasked, false>(h, zs);
        for (; h < end && h + pad < height + 2; ++h) add_row_of_x<kMasked, true>(h, zs);
    }

    // A row of z meets three rows of x, of which one met the row before.
    template <bool kMasked, bool kEdge>
    LOCALSGD_INLINE void add_row_of_z(int64_t p, V (&shared)[3]) {
        const int64_t h = p * 2 - w.g.pad[1], height = w.g.input[1];
        const V zs = row_of_z<kMasked>(p);
        for (int r = 0; r < 3; ++r) {
            if (kEdge && (h + r < 0 || h + r >= height)) continue;
            for (int s = 0; s < 3; ++s) {
                const V xs = r == 0 ? shared[s] : row_of_x<kMasked>(h + r, s);
                sum[r][s] += zs * xs;
                if (r == 2) shared[s] = xs;
            }
        }
    }
    template <bool kMasked>
    LOCALSGD_INLINE void add_rows_of_z(int64_t p, int64_t end) {
        const int64_t pad = w.g.pad[1], height = w.g.input[1];
        V shared[3]{};
        if (const int64_t h = p * 2 - pad; h >= 0 && h < height)
            for (int s = 0; s < 3; ++s) shared[s] = row_of_x<kMasked>(h, s);
        for (; p < end && p * 2 < pad; ++p) add_row_of_z<kMasked, true>(p, shared);
        for (; p < end && p * 2 - pad + 2 < height; ++p) add_row_of_z<kMasked, false>(p, shared);
        for (; p < end; ++p) add_row_of_z<kMasked, true>(p, shared);
    }

    template <bool kMasked>
    LOCALSGD_INLINE void add(int64_t begin, int64_t end) {
        if constexpr (kStride == 1)
            add_rows_of_x<kMasked>(begin, end);
        else
            add_rows_of_z<kMasked>(begin, end);
    }
    // All strips of some rows, of x or of z: of those that are fewer.
    LOCALSGD_INLINE void add_rows(int64_t begin, int64_t end) {
        const int64_t width = w.g.output[2];
        for (q = 0; q < width; q += Base::kCount) {
            const bool whole = q >= w.clean.begin && q + Base::kCount <= w.clean.end;
            if (!whole) {
                first = Base::first(w, std::min(Base::kCount, width - q));
                for (int s = 0; s < 3; ++s) inside[s] = Base::inside(w, s, q) & first;
            }
            whole ? add<false>(begin, end) : add<true>(begin, end);
        }
    }
};

template <typename T, typename Acc, int kBytes, int kStride>
LOCALSGD_INLINE void plane_strips(const Sweep<Acc>& w, const Plane<T>& x, const Plane<T>& z, Acc* sums) {
    using Base = Lanes<T, Acc, kBytes, kStride>;
    // Elements of a row of z, times rows: what is read stays near what was read before. Less where x has four times as many.
    constexpr bool kFar = kStride == 2 && !Base::kConverts;
    constexpr int64_t kBand = kFar ? 112 : 512, kLeastRows = kFar ? 2 : 4;
    typename Base::V sum[3][3];
    for (int i = 0; i < 9; ++i) sum[i / 3][i % 3] = Base::read(sums + i * Base::kCount);
    Strip<T, Acc, kBytes, kStride> strip{{}, w, x, z, sum};
    const int64_t rows = kStride == 1 ? w.g.input[1] : w.g.output[1];
    const int64_t band = std::max<int64_t>(kBand / w.g.output[2], kLeastRows);
    for (int64_t begin = 0; begin < rows; begin += band) strip.add_rows(begin, std::min(rows, begin + band));
    for (int i = 0; i < 9; ++i) Base::write(sums + i * Base::kCount, sum[i / 3][i % 3]);
}

inline bool in_strips(const Geometry& g) {
    return g.kernel[1] == 3 && g.kernel[2] == 3 && g.stride[1] == g.stride[2] && g.stride[2] <= 2 && g.dilation[1] == 1;
}

// As many taps at once as registers hold accumulators; kernels other than 3x3 row by row. bf16 in strips only.
template <typename T, typename Acc, int kBytes, int kStride>
LOCALSGD_INLINE void plane_taps(const Sweep<Acc>& w, const Plane<T>& x, const Plane<T>& z, Acc* sums) {
    if constexpr (kStride != 0)
        if (in_strips(w.g)) return plane_strips<T, Acc, kBytes, kStride>(w, x, z, sums);
    if constexpr (std::is_same_v<T, Acc>) {
        const int64_t kernel_w = w.g.kernel[2];
        for (int64_t r = 0; r < w.g.kernel[1]; ++r) {
            int64_t s = 0;
            for (; s + 7 <= kernel_w; s += 7) plane_row<Acc, kBytes, kStride, 7>(w, x, z, r, s, sums);
            for (; s + 5 <= kernel_w; s += 5) plane_row<Acc, kBytes, kStride, 5>(w, x, z, r, s, sums);
            for (; s + 3 <= kernel_w; s += 3) plane_row<Acc, kBytes, kStride, 3>(w, x, z, r, s, sums);
            for (; s < kernel_w; ++s) plane_row<Acc, kBytes, kStride, 1>(w, x, z, r, s, sums);
        }
    }
}

} // namespace localsgd
