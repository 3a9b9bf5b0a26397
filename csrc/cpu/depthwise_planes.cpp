#include "depthwise.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "copy.h"
#include "vectors.h"

namespace localsgd {
namespace {

constexpr int64_t kJoinedVectors = 4; // in shorter rows, the last vector's empty lanes are too many

template <typename Acc>
using MaskElement = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>; // all ones or all zeros

// A plane of x or z whose columns are neighbours: element (row, column) at data + row * pitch + column.
template <typename Acc>
struct Plane {
    const Acc* data;
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

// What of a vector is summed: all of it; where the taps read inside x's row; of that only the first lanes; of that only the
// taps that read inside x's plane.
enum class Cover { kAll, kInside, kFirst, kRows };

// R x S taps' sums, of a vector of z's columns at a time. A row of x meets R rows of z where rows are not strided, which takes
// fewer loads than a row of z and R rows of x.
template <typename Acc, int kBytes, int kStride, int R, int S>
struct PlaneSums {
    using V = typename Vector<Acc, kBytes>::Type;
    using Mask = typename Vector<Acc, kBytes>::Mask;
    static constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    static constexpr bool kByX = R > 1 && kStride == 1;
    static constexpr int kXRows = kByX ? 1 : R, kZRows = kByX ? R : 1;
    V sum[R][S];
    const Acc *x[kXRows], *z[kZRows];
    MaskElement<Acc> row_inside[R];

    static LOCALSGD_INLINE V read(const Acc* p) { return *reinterpret_cast<const V*>(p); }
    static LOCALSGD_INLINE Mask read(const MaskElement<Acc>* p) { return *reinterpret_cast<const Mask*>(p); }
    static LOCALSGD_INLINE V masked(const V& v, const Mask& mask) { return (V)((Mask)v & mask); }

    // Every other element of two vectors costs one instruction if each 16 bytes of the result come from the same 16 of both.
    // The lanes of z and of the masks are put in that order too.
    static constexpr int64_t column_of(int64_t lane) {
        constexpr int64_t kHalf = 8 / sizeof(Acc);
        return lane / (2 * kHalf) * kHalf + lane % kHalf + (lane % (2 * kHalf) < kHalf ? 0 : kLanes / 2);
    }
    template <typename T, size_t... lane>
    static LOCALSGD_INLINE T in_order(const T& v, std::index_sequence<lane...>) {
        return __builtin_shufflevector(v, v, column_of(lane)...);
    }
    template <size_t... lane>
    static LOCALSGD_INLINE V alternate(const V& a, const V& b, std::index_sequence<lane...>) {
        return __builtin_shufflevector(a, b, 2 * column_of(lane)...);
    }
    static constexpr auto kEach = std::make_index_sequence<kLanes>();

    template <typename T>
    static LOCALSGD_INLINE auto load(const T* p) {
        if constexpr (kStride == 2)
            return in_order(read(p), kEach);
        else
            return read(p);
    }
    // p[0], p[stride], ...; a kStride other than 0 is that stride.
    static LOCALSGD_INLINE V load_strided(const Acc* p, int64_t stride) {
        if constexpr (kStride == 1) return read(p);
        if constexpr (kStride == 2) return alternate(read(p), read(p + kLanes), kEach);
        V v;
        for (int64_t l = 0; l < kLanes; ++l) v[l] = p[l * stride];
        return v;
    }

    // Columns of z from q on, `column` modulo the width; `count` of them if only the first.
    template <Cover kCover>
    LOCALSGD_INLINE void add(const Sweep<Acc>& w, int64_t s0, int64_t q, int64_t column, int64_t count) {
        const int64_t stride = w.g.stride[2], dilation = w.g.dilation[2];
        Mask first, mask;
        if (kCover >= Cover::kFirst) first = load(w.first_lanes.data() + kMostLanes<Acc> - count);
        V zv[kZRows];
        for (int r = 0; r < kZRows; ++r) {
            zv[r] = load(z[r] + q);
            if (kCover >= Cover::kFirst) zv[r] = masked(zv[r], kByX && kCover == Cover::kRows ? first & row_inside[r] : first);
        }
        for (int s = 0; s < S; ++s) {
            if (kCover >= Cover::kInside) mask = load(w.inside.data() + (s0 + s) * w.mask_pitch + column);
            if (kCover >= Cover::kFirst) mask &= first;
            V xv;
            for (int r = 0; r < R; ++r) {
                if (r < kXRows) {
                    xv = load_strided(x[r] + q * stride + s * dilation, stride);
                    if (kCover >= Cover::kInside) xv = masked(xv, mask);
                }
                const V read_inside = kCover == Cover::kRows ? masked(xv, Mask{} | row_inside[r]) : xv;
                sum[r][s] += zv[r % kZRows] * read_inside;
            }
        }
    }
};

// sums[taps][kLanes] += R x S taps of a plane, from tap (r0, s0) on.
template <typename Acc, int kBytes, int kStride, int R, int S>
LOCALSGD_INLINE void plane_block(const Sweep<Acc>& w, const Plane<Acc>& x, const Plane<Acc>& z, int64_t r0, int64_t s0,
                                 Acc* sums) {
    using Sums = PlaneSums<Acc, kBytes, kStride, R, S>;
    constexpr int64_t kLanes = Sums::kLanes;
    constexpr bool kByX = Sums::kByX;
    const Geometry& g = w.g;
    const int64_t width = g.output[2], stride = g.stride[1];
    const int64_t step = kLanes < width ? kLanes : kLanes % width;
    const int64_t top = r0 * g.dilation[1] - g.pad[1], bottom = top + (R - 1) * g.dilation[1]; // of the taps
    const auto sums_of = [&](int r, int s) { return sums + ((r0 + r) * g.kernel[2] + s0 + s) * kLanes; };
    Sums taps;
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) taps.sum[r][s] = Sums::read(sums_of(r, s));
    // Short rows one behind the other are swept as one, as far as all their taps read inside the plane.
    const bool joined = kStride == 1 && stride == 1 && width < kJoinedVectors * kLanes && x.pitch == width && z.pitch == width;
    Range clean{ceil_div(w.clean.begin, kLanes) * kLanes, w.clean.end / kLanes * kLanes}; // whole vectors
    if (joined || clean.begin >= clean.end) clean = {0, 0};
    for (int64_t i = 0, rows; i < (kByX ? g.input[1] : g.output[1]); i += rows) {
        const int64_t left = kByX ? std::min(g.input[1] - i, g.output[1] + top - i)
                                  : std::min(g.output[1] - i, g.input[1] - bottom - i * stride); // rows for joining
        const bool whole = left > 0 && (kByX ? i >= bottom : i * stride + top >= 0);             // all taps are in the plane
        rows = joined && whole ? left : 1;
        for (int r = 0; r < R; ++r) {
            const int64_t tap = top + r * g.dilation[1], p = kByX ? i - tap : i, h = kByX ? i : i * stride + tap;
            const bool inside = p >= 0 && p < g.output[1] && h >= 0 && h < g.input[1];
            taps.row_inside[r] = inside ? -1 : 0;
            if (r < Sums::kZRows) taps.z[r] = z.data + (inside || !kByX ? p * z.pitch : 0);
            if (r < Sums::kXRows) taps.x[r] = x.data + (inside || kByX ? h * x.pitch : 0) + w.shift(s0);
        }
        const int64_t length = rows * width;
        if (!whole) {
            for (int64_t q = 0; q < length; q += kLanes)
                taps.template add<Cover::kRows>(w, s0, q, q, std::min(kLanes, length - q));
            continue;
        }
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
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) *reinterpret_cast<typename Sums::V*>(sums_of(r, s)) = taps.sum[r][s];
}

// As many taps at once as registers hold accumulators; the rest in columns of the kernel.
template <typename Acc, int kBytes, int kStride>
LOCALSGD_INLINE void plane_taps(const Sweep<Acc>& w, const Plane<Acc>& x, const Plane<Acc>& z, Acc* sums) {
    const int64_t kernel_h = w.g.kernel[1], kernel_w = w.g.kernel[2];
    if (kernel_h == 3 && kernel_w == 3 && (kStride != 1 || w.g.stride[1] == 1))
        return plane_block<Acc, kBytes, kStride, 3, 3>(w, x, z, 0, 0, sums);
    for (int64_t r = 0; r < kernel_h; ++r) {
        int64_t s = 0;
        for (; s + 7 <= kernel_w; s += 7) plane_block<Acc, kBytes, kStride, 1, 7>(w, x, z, r, s, sums);
        for (; s + 5 <= kernel_w; s += 5) plane_block<Acc, kBytes, kStride, 1, 5>(w, x, z, r, s, sums);
        for (; s + 3 <= kernel_w; s += 3) plane_block<Acc, kBytes, kStride, 1, 3>(w, x, z, r, s, sums);
        for (; s < kernel_w; ++s) plane_block<Acc, kBytes, kStride, 1, 1>(w, x, z, r, s, sums);
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void sweep_any(const Sweep<Acc>& w, const Plane<Acc>& x, const Plane<Acc>& z, Acc* sums) {
    if (w.g.stride[2] == 1) return plane_taps<Acc, kBytes, 1>(w, x, z, sums);
    if (w.g.stride[2] == 2) return plane_taps<Acc, kBytes, 2>(w, x, z, sums);
    plane_taps<Acc, kBytes, 0>(w, x, z, sums);
}

LOCALSGD_WIDE
void sweep_wide(const Sweep<float>& w, const Plane<float>& x, const Plane<float>& z, float* sums) {
    sweep_any<float, kWideBytes>(w, x, z, sums);
}
LOCALSGD_WIDE
void sweep_wide(const Sweep<double>& w, const Plane<double>& x, const Plane<double>& z, double* sums) {
    sweep_any<double, kWideBytes>(w, x, z, sums);
}
LOCALSGD_NARROW
void sweep_narrow(const Sweep<float>& w, const Plane<float>& x, const Plane<float>& z, float* sums) {
    sweep_any<float, kNarrowBytes>(w, x, z, sums);
}
LOCALSGD_NARROW
void sweep_narrow(const Sweep<double>& w, const Plane<double>& x, const Plane<double>& z, double* sums) {
    sweep_any<double, kNarrowBytes>(w, x, z, sums);
}

// The planes of x or z: where they lie, or copied.
template <typename Acc>
struct Planes {
    const void* data;
    Kind kind;
    Strides strides;
    int64_t height, width;
    int64_t before, after;   // elements beyond a plane that are read
    int64_t extent;          // elements from the first to the last one
    std::vector<Acc> buffer; // [before + height * width + after]

    Planes(const void* data, Kind kind, const Strides& strides, int64_t batch, int64_t channels, const Triple& space,
           int64_t before, int64_t after)
        : data(data), kind(kind), strides(strides), height(space[1]), width(space[2]), before(before), after(after) {
        extent = 1 + (batch - 1) * strides.batch + (channels - 1) * strides.channel;
        for (int i = 0; i < 3; ++i) extent += (space[i] - 1) * strides.space[i];
    }

    Plane<Acc> at(int64_t n, int64_t channel, int64_t depth) {
        const int64_t start = n * strides.batch + channel * strides.channel + depth * strides.space[0];
        const int64_t pitch = strides.space[1], step = strides.space[2];
        const bool in_reach = start >= before && start + (height - 1) * pitch + width + after <= extent;
        if (kind == kKindOf<Acc> && step == 1 && in_reach) return {static_cast<const Acc*>(data) + start, pitch};
        buffer.resize(before + height * width + after);
        Acc* const to = buffer.data() + before;
        const bool dense = pitch == width * step;
        for (int64_t row = 0; row < (dense ? 1 : height); ++row)
            copy_run(to + row * width, offset(data, kind, start + row * pitch), kind, dense ? height * width : width, step);
        return {to, width};
    }
};

// Planes that meet: an input depth, a kernel plane and the output depth that reads the one through the other.
struct Meeting {
    int64_t depth, r, p0;
};
std::vector<Meeting> meetings(const Geometry& g) {
    std::vector<Meeting> all;
    for (int64_t depth = 0; depth < g.input[0]; ++depth)
        for (int64_t r = 0; r < g.kernel[0]; ++r) {
            const int64_t from = depth + g.pad[0] - r * g.dilation[0];
            if (from >= 0 && from % g.stride[0] == 0 && from / g.stride[0] < g.output[0])
                all.push_back({depth, r, from / g.stride[0]});
        }
    return all;
}

} // namespace

template <typename Acc>
void depthwise_planes(const DepthwiseArgs& a, int64_t channel_begin, int64_t channel_end, Acc* d) {
    constexpr int64_t kTogether = 1024;    // elements of z: what is summed in lanes, before they are added up in double
    constexpr int64_t kMostChannels = 32;  // of an image, one after another as they lie in memory,
    constexpr int64_t kSumsInCache = 4096; // while their sums stay in the first-level cache
    const Geometry& g = a.geometry;
    const Sweep<Acc> sweep(g);
    Planes<Acc> x_planes(a.x, a.x_kind, a.x_strides, g.batch, g.in_channels, g.input, sweep.before, sweep.after);
    Planes<Acc> z_planes(a.z, a.z_kind, a.z_strides, g.batch, g.out_channels, g.output, 0, kMostLanes<Acc>);
    const std::vector<Meeting> all = meetings(g);
    const bool wide = has_wide_registers();
    const int64_t lanes = (wide ? kWideBytes : kNarrowBytes) / sizeof(Acc), in_plane = g.kernel[1] * g.kernel[2] * lanes;
    const int64_t multiplier = g.out_per_group(), in_channel = multiplier * g.taps();
    const int64_t together = std::clamp<int64_t>(kTogether / g.image_positions(), 1, std::max<int64_t>(g.batch, 1));
    const int64_t most = std::clamp<int64_t>(kSumsInCache / (in_channel * lanes), 1, kMostChannels);
    std::vector<Acc> in_lanes;
    std::vector<double> sums;
    for (int64_t first = channel_begin; first < channel_end; first += most) {
        const int64_t channels = std::min(most, channel_end - first), count = channels * in_channel;
        in_lanes.assign(count * lanes, Acc(0));
        sums.assign(count, 0.0);
        for (int64_t n = 0; n < g.batch; ++n) {
            for (int64_t c = 0; c < channels; ++c) {
                Plane<Acc> x{nullptr, 0};
                for (size_t i = 0; i < all.size(); ++i) {
                    const auto [depth, r, p0] = all[i];
                    if (i == 0 || depth != all[i - 1].depth) x = x_planes.at(n, first + c, depth);
                    for (int64_t j = 0; j < multiplier; ++j) {
                        const Plane<Acc> z = z_planes.at(n, (first + c) * multiplier + j, p0);
                        Acc* const to = in_lanes.data() + ((c * multiplier + j) * g.kernel[0] + r) * in_plane;
                        wide ? sweep_wide(sweep, x, z, to) : sweep_narrow(sweep, x, z, to);
                    }
                }
            }
            if ((n + 1) % together && n + 1 < g.batch) continue;
            for (int64_t lane = 0; lane < lanes; ++lane)
                for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(in_lanes[i * lanes + lane]);
            std::fill(in_lanes.begin(), in_lanes.end(), Acc(0));
        }
        for (int64_t i = 0; i < count; ++i) d[first * in_channel + i] = static_cast<Acc>(sums[i]);
    }
}

template void depthwise_planes<float>(const DepthwiseArgs&, int64_t, int64_t, float*);
template void depthwise_planes<double>(const DepthwiseArgs&, int64_t, int64_t, double*);

} // namespace localsgd
