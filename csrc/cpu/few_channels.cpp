#include "few_channels.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "copy.h"
#include "lanes.h"

namespace localsgd {
namespace {

constexpr int64_t kMostChannels = 4;  // of x: with more, patches are worth their while
constexpr int64_t kLeastColumns = 16; // of z: in shorter rows too many lanes are empty
constexpr int64_t kBandRows = 8;      // of z; what they read stays in the second-level cache
constexpr int64_t kPositions = 4096;  // from so many on sums in lanes are added up in double
constexpr int64_t kMostRowParts = 64;
constexpr int64_t kMostElements = 1 << 14; // of D: their lanes, 1 MB, stay in the second-level cache

int64_t bands_of_an_image(const Geometry& g) { return ceil_div(g.output[1], kBandRows); }

// Where the taps of a row of the kernel read: in x's columns of one remainder by the stride, which are copied to lie side by
// side, a column's shift to the right of the output's.
struct Columns {
    int64_t stride, first_shift, pitch;      // elements of the columns of one remainder
    std::vector<int64_t> remainders, starts; // that are read; [S], in a copied row

    explicit Columns(const Geometry& g) : stride(g.stride[2]) {
        const auto offset = [&](int64_t s) { return s * g.dilation[2] - g.pad[2]; };
        first_shift = floor_div(offset(0), stride);
        pitch = g.output[2] + floor_div(offset(g.kernel[2] - 1), stride) - first_shift;
        for (int64_t s = 0; s < g.kernel[2]; ++s) {
            const int64_t shift = floor_div(offset(s), stride), remainder = offset(s) - shift * stride;
            const auto known = std::find(remainders.begin(), remainders.end(), remainder);
            starts.push_back((known - remainders.begin()) * pitch + shift - first_shift);
            if (known == remainders.end()) remainders.push_back(remainder);
        }
    }
    int64_t row() const { return int64_t(remainders.size()) * pitch; }
};

// A row of x into `to` [remainders][pitch]; what is not in x is 0.
template <typename Acc>
void copy_row(const PatchSource& s, const Columns& c, int64_t element, Acc* to) {
    const int64_t width = s.geometry.input[2], step = s.strides.space[2];
    for (const int64_t remainder : c.remainders) {
        const int64_t first = c.first_shift * c.stride + remainder; // column of x
        const int64_t begin = std::clamp<int64_t>(ceil_div(-first, c.stride), 0, c.pitch);
        const int64_t end = std::clamp<int64_t>(ceil_div(width - first, c.stride), begin, c.pitch);
        std::fill(to, to + begin, Acc(0));
        if (end > begin)
            copy_run(to + begin, offset(s.data, s.kind, element + (first + begin * c.stride) * step), s.kind, end - begin,
                     c.stride * step);
        std::fill(to + end, to + c.pitch, Acc(0));
        to += c.pitch;
    }
}

// The rows of x that a band of z reads, in order, each once.
std::vector<int64_t> rows_of_band(const Geometry& g, int64_t p0, int64_t count) {
    std::vector<int64_t> rows;
    for (int64_t p = p0; p < p0 + count; ++p)
        for (int64_t r = 0; r < g.kernel[1]; ++r)
            if (const int64_t h = p * g.stride[1] + r * g.dilation[1] - g.pad[1]; h >= 0 && h < g.input[1]) rows.push_back(h);
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    return rows;
}

// Some rows of all planes of z, and those of x that they read.
template <typename T, typename Acc>
struct Band {
    const T* z;
    int64_t planes, z_plane, z_row, rows, width;
    int64_t rows_of_taps; // C * R
    const Acc* const* x;  // [C * R][kBandRows], each [remainders][pitch]; null where all of a row is padding
    int64_t kernel_w;
    const int64_t* starts; // [kernel_w]
    Acc* sums;             // [K, C, R, S, lanes]
};

// S taps of row `row` of the kernel, from s0 on, for kPlanes planes of z from `k` on.
template <typename T, typename Acc, int kBytes, int kPlanes, int S>
LOCALSGD_INLINE void add_taps(const Band<T, Acc>& b, int64_t k, int64_t row, int64_t s0) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    using Mask = typename Vector<Acc, kBytes>::Mask;
    using Element = std::remove_reference_t<decltype(Mask()[0])>;
    alignas(64) static constexpr auto kMasks = [] {
        std::array<Element, 2 * kLanes> masks{};
        for (int64_t i = kLanes; i < 2 * kLanes; ++i) masks[i] = -1;
        return masks;
    }();
    const int64_t rest = b.width % kLanes; // columns of a last vector, which begins before them
    const Mask last = *reinterpret_cast<const Mask*>(kMasks.data() + rest);
    const auto at = [&](int i, int s) { return b.sums + (((k + i) * b.rows_of_taps + row) * b.kernel_w + s0 + s) * kLanes; };
    V sum[kPlanes][S];
    for (int i = 0; i < kPlanes; ++i)
        for (int s = 0; s < S; ++s) sum[i][s] = read_vector<Acc, kBytes>(at(i, s));
    for (int64_t p = 0; p < b.rows; ++p) {
        const Acc* const from = b.x[row * kBandRows + p];
        if (!from) continue;
        const T* const z = b.z + k * b.z_plane + p * b.z_row;
        const Acc* x[S];
        for (int s = 0; s < S; ++s) x[s] = from + b.starts[s0 + s];
        const auto add = [&](int64_t q, auto masked) __attribute__((always_inline)) {
            V xv[S];
            for (int s = 0; s < S; ++s) {
                xv[s] = read_vector<Acc, kBytes>(x[s] + q);
                if (masked) xv[s] = (V)((Mask)xv[s] & last); // 0 times infinity is not 0
                keep<kBytes>(xv[s]);
            }
            for (int i = 0; i < kPlanes; ++i) {
                V zv = read_vector<Acc, kBytes>(z + i * b.z_plane + q);
                if (masked) zv = (V)((Mask)zv & last);
                for (int s = 0; s < S; ++s) sum[i][s] += zv * xv[s];
            }
        };
        for (int64_t q = 0; q + kLanes <= b.width; q += kLanes) add(q, std::false_type());
        if (rest > 0) add(b.width - kLanes, std::true_type());
    }
    for (int i = 0; i < kPlanes; ++i)
        for (int s = 0; s < S; ++s) *reinterpret_cast<V*>(at(i, s)) = sum[i][s];
}

// The same for all planes, of which some stay in the first-level cache, and all rows of the kernel.
template <typename T, typename Acc, int kBytes, int kPlanes, int S>
LOCALSGD_INLINE void add_columns(const Band<T, Acc>& b, int64_t s0) {
    int64_t k = 0;
    for (; k + kPlanes <= b.planes; k += kPlanes)
        for (int64_t row = 0; row < b.rows_of_taps; ++row) add_taps<T, Acc, kBytes, kPlanes, S>(b, k, row, s0);
    for (; k < b.planes; ++k)
        for (int64_t row = 0; row < b.rows_of_taps; ++row) add_taps<T, Acc, kBytes, 1, S>(b, k, row, s0);
}

// As many planes and taps at once as registers hold sums.
template <typename T, typename Acc, int kBytes>
LOCALSGD_INLINE void add_band(const Band<T, Acc>& b) {
    constexpr bool kWide = kBytes == kWideBytes;
    int64_t s = 0;
    for (; s + 7 <= b.kernel_w; s += 7) add_columns<T, Acc, kBytes, kWide ? 3 : 1, 7>(b, s);
    for (; s + 5 <= b.kernel_w; s += 5) add_columns<T, Acc, kBytes, kWide ? 4 : 2, 5>(b, s);
    for (; s + 3 <= b.kernel_w; s += 3) add_columns<T, Acc, kBytes, kWide ? 8 : 3, 3>(b, s);
    for (; s < b.kernel_w; ++s) add_columns<T, Acc, kBytes, kWide ? 8 : 4, 1>(b, s);
}

LOCALSGD_WIDE
void add_band_wide(const Band<float, float>& b) { add_band<float, float, kWideBytes>(b); }
LOCALSGD_WIDE
void add_band_wide(const Band<BFloat16, float>& b) { add_band<BFloat16, float, kWideBytes>(b); }
LOCALSGD_WIDE
void add_band_wide(const Band<double, double>& b) { add_band<double, double, kWideBytes>(b); }
LOCALSGD_NARROW
void add_band_narrow(const Band<float, float>& b) { add_band<float, float, kNarrowBytes>(b); }
LOCALSGD_NARROW
void add_band_narrow(const Band<BFloat16, float>& b) { add_band<BFloat16, float, kNarrowBytes>(b); }
LOCALSGD_NARROW
void add_band_narrow(const Band<double, double>& b) { add_band<double, double, kNarrowBytes>(b); }

template <typename T, typename Acc>
void sum_bands(const DirectArgs& a, int64_t begin, int64_t end, bool wide, double* total) {
    const Geometry& g = a.x.geometry;
    const int64_t lanes = (wide ? kWideBytes : kNarrowBytes) / sizeof(Acc), bands = bands_of_an_image(g);
    const int64_t channels = g.in_channels, kernel_h = g.kernel[1], elements = g.out_channels * g.patch();
    const Columns columns(g);
    const int64_t most_rows = std::min(kBandRows * kernel_h, g.input[1]);
    std::vector<Acc> rows(channels * most_rows * columns.row()), sums(elements * lanes);
    std::vector<const Acc*> read(channels * kernel_h * kBandRows);
    std::fill_n(total, elements, 0.0);
    int64_t summed = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t n = unit / bands, p0 = unit % bands * kBandRows, count = std::min(kBandRows, g.output[1] - p0);
        const std::vector<int64_t> used = rows_of_band(g, p0, count);
        for (int64_t c = 0; c < channels; ++c) {
            Acc* const to = rows.data() + c * most_rows * columns.row();
            for (size_t i = 0; i < used.size(); ++i)
                copy_row(a.x, columns, n * a.x.strides.batch + c * a.x.strides.channel + used[i] * a.x.strides.space[1],
                         to + int64_t(i) * columns.row());
            for (int64_t r = 0; r < kernel_h; ++r)
                for (int64_t p = 0; p < count; ++p) {
                    const int64_t h = (p0 + p) * g.stride[1] + r * g.dilation[1] - g.pad[1];
                    const auto at = std::lower_bound(used.begin(), used.end(), h);
                    const bool inside = at != used.end() && *at == h;
                    read[(c * kernel_h + r) * kBandRows + p] = inside ? to + (at - used.begin()) * columns.row() : nullptr;
                }
        }
        const T* const z = static_cast<const T*>(a.z.data) + n * a.z.strides.batch + p0 * a.z.strides.space[1];
        const Band<T, Acc> band{z,           g.out_channels,        a.z.strides.channel, a.z.strides.space[1],
                                count,       g.output[2],           channels * kernel_h, read.data(),
                                g.kernel[2], columns.starts.data(), sums.data()};
        wide ? add_band_wide(band) : add_band_narrow(band);
        summed += count * g.output[2];
        if (summed < kPositions && unit + 1 < end) continue;
        add_lanes(wide, sums.data(), elements, total);
        summed = 0;
    }
}

} // namespace

bool has_few_channels(const Geometry& g, Kind z, bool in_double) {
    return g.dims == 2 && g.groups == 1 && g.taps() > 1 && g.in_channels <= kMostChannels &&
           g.out_channels * g.patch() <= kMostElements && g.output[2] >= kLeastColumns &&
           (in_double ? z == Kind::f64 : z == Kind::f32 || z == Kind::bf16);
}

template <typename Acc>
bool few_channels_fit(const DirectArgs& a) {
    return has_few_channels(a.x.geometry, a.z.kind, std::is_same_v<Acc, double>) && a.z.strides.space[2] == 1;
}

int64_t few_channels_parts(const Geometry& g) {
    const int64_t products = g.positions() * g.out_channels * g.patch();
    const int64_t most = std::max<int64_t>(1, std::min(kMostRowParts, g.batch * bands_of_an_image(g)));
    return std::clamp<int64_t>(products / kLeastProducts, 1, most);
}

template <typename Acc>
void few_channels_part(const DirectArgs& a, int64_t parts, int64_t part, bool wide, double* partials) {
    const Geometry& g = a.x.geometry;
    const int64_t units = g.batch * bands_of_an_image(g), begin = units * part / parts, end = units * (part + 1) / parts;
    double* const total = partials + part * g.out_channels * g.patch();
    if constexpr (std::is_same_v<Acc, float>)
        if (a.z.kind == Kind::bf16) return sum_bands<BFloat16, Acc>(a, begin, end, wide, total);
    sum_bands<Acc, Acc>(a, begin, end, wide, total);
}

template <typename Acc>
void finish_few_channels(const Geometry& g, int64_t parts, int64_t k, const double* partials, Acc* d, bool taps_first) {
    const int64_t channels = g.in_channels, taps = g.taps();
    for (int64_t i = 0; i < g.patch(); ++i) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partials[(part * g.out_channels + k) * g.patch() + i];
        d[k * g.patch() + (taps_first ? i % taps * channels + i / taps : i)] = static_cast<Acc>(sum);
    }
}

template bool few_channels_fit<float>(const DirectArgs&);
template bool few_channels_fit<double>(const DirectArgs&);
template void few_channels_part<float>(const DirectArgs&, int64_t, int64_t, bool, double*);
template void few_channels_part<double>(const DirectArgs&, int64_t, int64_t, bool, double*);
template void finish_few_channels<float>(const Geometry&, int64_t, int64_t, const double*, float*, bool);
template void finish_few_channels<double>(const Geometry&, int64_t, int64_t, const double*, double*, bool);

} // namespace localsgd
