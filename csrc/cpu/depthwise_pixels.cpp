#include <algorithm>
#include <type_traits>
#include <vector>

#include "copy.h"
#include "depthwise.h"
#include "vectors.h"

namespace localsgd {
namespace {

constexpr int64_t kBlockChannels = 192; // some cache lines of a pixel, and sums that stay in the first-level cache
constexpr int64_t kBandRows = 16;       // output rows summed in the accumulation type, before they join a sum in double
constexpr int64_t kConvertedRows = 4;   // the same where x and z are converted first, into buffers that stay in the cache

// A block of channels in some rows of z and of x: element (row, pixel, channel) at row * row_stride + pixel * pixel_stride +
// channel.
template <typename T>
struct Rows {
    const T* data; // of the first row
    int64_t row_stride, pixel_stride;
};

template <typename T>
struct Band {
    Rows<T> x, z;
    int64_t first_input;  // the input row at which x begins
    int64_t first, count; // output rows
    int64_t channels;     // to sum; a vector at the end may begin before the first, where there are others
    bool padded;          // or ends after the last: there is memory for whole vectors
    const Range* columns; // [S], of z: those at which tap s reads inside x's row
};

// The sums of R x S taps over an output row, for kVectors neighbouring vectors of channels.
template <typename Acc, int kBytes, int kVectors, int R, int S, typename T>
LOCALSGD_INLINE void row_sums(typename Vector<Acc, kBytes>::Type (&sum)[R][S][kVectors], const Geometry& g, const T* x,
                              int64_t tap_row, int64_t x_pixel, const T* z, int64_t z_pixel, const Range* columns, int64_t s0) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    const int64_t step = g.stride[2], dilation = g.dilation[2], shift = s0 * dilation - g.pad[2];
    const Range &left = columns[0], &right = columns[S - 1];
    const int64_t begin = std::min(left.begin, g.output[2]), end = std::max(begin, std::min(left.end, right.end));
    const auto load = [](const T* p) __attribute__((always_inline)) { return read_vector<Acc, kBytes>(p); };
    const auto edge = [&](int64_t q) __attribute__((always_inline)) {
        for (int s = 0; s < S; ++s) {
            const int64_t column = q * step + shift + s * dilation;
            if (column < 0 || column >= g.input[2]) continue;
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v)
                    sum[r][s][v] += load(z + q * z_pixel + v * kLanes) * load(x + r * tap_row + column * x_pixel + v * kLanes);
        }
    };
    for (int64_t q = 0; q < begin; ++q) edge(q);
    const T* corner = x + (begin * step + shift) * x_pixel;
    for (int64_t q = begin; q < end; ++q, corner += step * x_pixel)
        for (int v = 0; v < kVectors; ++v) {
            const V zv = load(z + q * z_pixel + v * kLanes);
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < S; ++s)
                    sum[r][s][v] += zv * load(corner + r * tap_row + s * dilation * x_pixel + v * kLanes);
        }
    for (int64_t q = end; q < g.output[2]; ++q) edge(q);
}

// `sums` [kernel_h * kernel_w][kBlockChannels] += those taps over an output row, for the channels from `c` to `end`.
template <typename Acc, int kBytes, int kVectors, int R, int S, typename T>
LOCALSGD_INLINE int64_t add_vectors(const Geometry& g, const Band<T>& b, const T* x, const T* z, int64_t r0, int64_t s0,
                                    Acc* sums, int64_t c, int64_t end) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
        V sum[R][S][kVectors] = {};
        row_sums<Acc, kBytes, kVectors, R, S>(sum, g, x + c, g.dilation[1] * b.x.row_stride, b.x.pixel_stride, z + c,
                                              b.z.pixel_stride, b.columns + s0, s0);
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < S; ++s)
                for (int v = 0; v < kVectors; ++v)
                    *reinterpret_cast<V*>(sums + ((r0 + r) * g.kernel[2] + s0 + s) * kBlockChannels + c + v * kLanes) +=
                        sum[r][s][v];
    }
    return c;
}

template <typename Acc, int kBytes, int kVectors, int R, int S, typename T>
LOCALSGD_INLINE void add_taps(const Geometry& g, const Band<T>& b, const T* x, const T* z, int64_t r0, int64_t s0, Acc* sums) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    const int64_t whole = b.padded ? ceil_div(b.channels, kLanes) * kLanes : b.channels;
    int64_t c = add_vectors<Acc, kBytes, kVectors, R, S>(g, b, x, z, r0, s0, sums, 0, whole);
    if (kVectors > 1) c = add_vectors<Acc, kBytes, 1, R, S>(g, b, x, z, r0, s0, sums, c, whole);
    if (c == whole) return;
    // The last vector begins earlier, over channels that are summed already.
    const int64_t at = whole - kLanes;
    V sum[R][S][1] = {};
    row_sums<Acc, kBytes, 1, R, S>(sum, g, x + at, g.dilation[1] * b.x.row_stride, b.x.pixel_stride, z + at, b.z.pixel_stride,
                                   b.columns + s0, s0);
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s)
            for (int64_t l = c - at; l < kLanes; ++l)
                sums[((r0 + r) * g.kernel[2] + s0 + s) * kBlockChannels + at + l] += sum[r][s][0][l];
}

// The cache lines of a row's block of channels, in the order of their addresses, to be fetched while another row is summed:
// sums walk through several rows and pixels at once, which hides from the hardware what they read next.
template <typename T>
struct Lines {
    static constexpr int64_t kElements = 64 / sizeof(T);
    const T* pixel;
    int64_t pixel_stride, channels, channel = 0;

    LOCALSGD_INLINE void fetch_one() {
        __builtin_prefetch(pixel + channel, 0, 2);
        channel += kElements;
        if (channel < channels) return;
        channel = 0;
        pixel += pixel_stride;
    }
};

// `sums` [R * 3][kBlockChannels] += R x 3 taps at Q neighbouring pixels of z, each element of x and z loaded once. `inside`:
// the columns of x, from the first tap's on, that exist.
template <typename Acc, int kBytes, int R, int Q, bool kEdge, typename T>
LOCALSGD_INLINE void add_pixels(const T* x, int64_t x_row, int64_t x_pixel, const Range& inside, const T* z, int64_t z_pixel,
                                int64_t channels, Lines<T>& x_ahead, Lines<T>& z_ahead, Acc* sums) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    const auto load = [](const auto* p) __attribute__((always_inline)) { return read_vector<Acc, kBytes>(p); };
    const auto add = [&](int64_t c) __attribute__((always_inline)) {
        V sum[R][3], zv[Q];
#pragma GCC unroll 16
        for (int i = 0; i < R * 3; ++i) sum[i / 3][i % 3] = load(sums + i * kBlockChannels + c);
#pragma GCC unroll 16
        for (int j = 0; j < Q + 2; ++j) {
            if (j < Q) zv[j] = load(z + j * z_pixel + c);
            if (kEdge && (j < inside.begin || j >= inside.end)) continue;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const V xv = load(x + r * x_row + j * x_pixel + c);
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s)
                    if (j >= s && j - s < Q) sum[r][s] += xv * zv[j - s];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < R * 3; ++i) *reinterpret_cast<V*>(sums + i * kBlockChannels + c) = sum[i / 3][i % 3];
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
        if (c % Lines<T>::kElements == 0)
            for (int q = 0; q < Q; ++q) x_ahead.fetch_one(), z_ahead.fetch_one();
        add(c);
    }
    if (c == channels) return;
    // The last vector begins earlier, over channels that are summed already.
    const int64_t at = channels - kLanes;
    Acc summed[R * 3][kLanes];
    for (int i = 0; i < R * 3; ++i) std::copy_n(sums + i * kBlockChannels + at, c - at, summed[i]);
    add(at);
    for (int i = 0; i < R * 3; ++i) std::copy_n(summed[i], c - at, sums + i * kBlockChannels + at);
}

// The same for an output row, with steps of one pixel.
template <typename Acc, int kBytes, int R, typename T>
LOCALSGD_INLINE void add_row(const Geometry& g, const Band<T>& b, const T* x, const T* z, Acc* sums) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPixels = 4;
    const int64_t channels = b.padded ? ceil_div(b.channels, kLanes) * kLanes : b.channels, width = g.output[2];
    const int64_t x_row = g.dilation[1] * b.x.row_stride, x_pixel = b.x.pixel_stride, z_pixel = b.z.pixel_stride;
    Lines<T> x_ahead{x + (R - 1) * x_row + g.stride[1] * b.x.row_stride, x_pixel, channels};
    Lines<T> z_ahead{z + b.z.row_stride, z_pixel, channels};
    for (int64_t q = 0; q < width;) {
        const int64_t column = q - g.pad[2];
        const Range inside{-column, g.input[2] - column};
        const T *const corner = x + column * x_pixel, *const pixel = z + q * z_pixel;
        const bool edge = inside.begin > 0 || inside.end < kPixels + 2;
        if (q + kPixels > width)
            add_pixels<Acc, kBytes, R, 1, true>(corner, x_row, x_pixel, inside, pixel, z_pixel, channels, x_ahead, z_ahead,
                                                sums);
        else if (edge)
            add_pixels<Acc, kBytes, R, kPixels, true>(corner, x_row, x_pixel, inside, pixel, z_pixel, channels, x_ahead,
                                                      z_ahead, sums);
        else
            add_pixels<Acc, kBytes, R, kPixels, false>(corner, x_row, x_pixel, inside, pixel, z_pixel, channels, x_ahead,
                                                       z_ahead, sums);
        q += q + kPixels > width ? 1 : kPixels;
    }
}

template <typename Acc, int kBytes, typename T>
LOCALSGD_INLINE void band_sums(const Geometry& g, const Band<T>& b, Acc* sums) {
    const bool small = g.kernel[1] <= 3 && g.kernel[2] == 3 && g.dilation[2] == 1 && g.stride[2] == 1;
    for (int64_t row = 0; row < b.count; ++row) {
        const T* z = b.z.data + row * b.z.row_stride;
        const int64_t top = (b.first + row) * g.stride[1] - g.pad[1];
        const auto x_row = [&](int64_t r) { return b.x.data + (top + r * g.dilation[1] - b.first_input) * b.x.row_stride; };
        if (small) {
            const Range rows = valid_outputs(g.kernel[1], g.input[1], g.dilation[1], top);
            const T* const x = x_row(rows.begin);
            Acc* const to = sums + rows.begin * 3 * kBlockChannels;
            const int64_t count = rows.end - rows.begin;
            if (count == 3) add_row<Acc, kBytes, 3>(g, b, x, z, to);
            if (count == 2) add_row<Acc, kBytes, 2>(g, b, x, z, to);
            if (count == 1) add_row<Acc, kBytes, 1>(g, b, x, z, to);
            continue;
        }
        for (int64_t r = 0; r < g.kernel[1]; ++r) {
            const int64_t h = top + r * g.dilation[1];
            if (h < 0 || h >= g.input[1]) continue;
            int64_t s = 0;
            for (; s + 7 <= g.kernel[2]; s += 7) add_taps<Acc, kBytes, 1, 1, 7>(g, b, x_row(r), z, r, s, sums);
            for (; s + 5 <= g.kernel[2]; s += 5) add_taps<Acc, kBytes, 2, 1, 5>(g, b, x_row(r), z, r, s, sums);
            for (; s + 3 <= g.kernel[2]; s += 3) add_taps<Acc, kBytes, 4, 1, 3>(g, b, x_row(r), z, r, s, sums);
            for (; s < g.kernel[2]; ++s) add_taps<Acc, kBytes, 4, 1, 1>(g, b, x_row(r), z, r, s, sums);
        }
    }
}

LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<float>& b, float* sums) { band_sums<float, kWideBytes>(g, b, sums); }
LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<double>& b, double* sums) { band_sums<double, kWideBytes>(g, b, sums); }
LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<BFloat16>& b, float* sums) { band_sums<float, kWideBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<BFloat16>& b, float* sums) { band_sums<float, kNarrowBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<float>& b, float* sums) { band_sums<float, kNarrowBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<double>& b, double* sums) { band_sums<double, kNarrowBytes>(g, b, sums); }

// Rows [first, first + count) of one plane, a block of channels, where they lie.
template <typename T>
Rows<T> rows_in_place(const void* data, const Strides& strides, int64_t plane, int64_t first, int64_t channel) {
    return {static_cast<const T*>(data) + plane + first * strides.space[1] + channel, strides.space[1], strides.space[2]};
}

// The same converted into `buffer` [count][width][pitch], whose pitch are the channels, filled up to whole vectors.
template <typename Acc>
Rows<Acc> converted_rows(const void* data, Kind kind, const Strides& strides, int64_t plane, int64_t first, int64_t count,
                         int64_t width, int64_t channel, int64_t channels, std::vector<Acc>& buffer) {
    const int64_t start = plane + first * strides.space[1] + channel;
    const int64_t pitch = ceil_div(channels, kMostLanes<Acc>) * kMostLanes<Acc>;
    const bool dense = channels == pitch && strides.space[2] == pitch; // pixels that lie side by side: a row is one run
    buffer.resize(std::max(buffer.size(), static_cast<size_t>(count * width * pitch)));
    for (int64_t row = 0; row < count; ++row)
        for (int64_t pixel = 0; pixel < (dense ? 1 : width); ++pixel)
            copy_run(buffer.data() + (row * width + pixel) * pitch,
                     offset(data, kind, start + row * strides.space[1] + pixel * strides.space[2]), kind,
                     dense ? width * pitch : channels, 1);
    return {buffer.data(), width * pitch, pitch};
}

} // namespace

PixelTasks pixel_tasks(const Geometry& g) {
    constexpr int64_t kLeastProducts = 1 << 19; // of a task: some 50 us
    const int64_t rows = g.batch * g.output[0] * g.output[1];
    const int64_t blocks = ceil_div(g.in_channels, kBlockChannels);
    // Even blocks, of whole vectors.
    const int64_t channels = ceil_div(ceil_div(g.in_channels, blocks), kMostLanes<float>) * kMostLanes<float>;
    const int64_t products = g.positions() * g.taps() * std::min(channels, g.in_channels);
    return {std::clamp<int64_t>(products / kLeastProducts, 1, std::min<int64_t>(rows, 64)), ceil_div(g.in_channels, channels),
            channels};
}

bool pixels_eligible(const DepthwiseArgs& a) {
    return a.geometry.out_per_group() == 1 && a.x_strides.channel == 1 && a.z_strides.channel == 1;
}

namespace {

// x and z of type T, or of any if that is Acc.
template <typename Acc, typename T>
void sum_pixels(const DepthwiseArgs& a, int64_t task, double* partials) {
    const Geometry& g = a.geometry;
    const PixelTasks tasks = pixel_tasks(g);
    const int64_t part = task / tasks.blocks, c0 = task % tasks.blocks * tasks.block_channels;
    const int64_t channels = std::min(tasks.block_channels, g.in_channels - c0);
    const int64_t rows = g.batch * g.output[0] * g.output[1];
    const int64_t begin = rows * part / tasks.parts, end = rows * (part + 1) / tasks.parts;
    const int64_t plane_taps = g.kernel[1] * g.kernel[2];
    // A tensor of fewer channels than a vector has lanes cannot be read where it lies.
    const bool convert =
        std::is_same_v<T, Acc> && (a.x_kind != kKindOf<Acc> || a.z_kind != kKindOf<Acc> || g.in_channels < kMostLanes<Acc>);
    std::vector<Acc> x_buffer, z_buffer, memory(kMostLanes<Acc> + plane_taps * kBlockChannels);
    Acc* const sums = memory.data() + kMostLanes<Acc>; // a vector at the end of a narrow block begins before it
    std::vector<Range> columns;
    for (int64_t s = 0; s < g.kernel[2]; ++s)
        columns.push_back(valid_outputs(g.output[2], g.input[2], g.stride[2], s * g.dilation[2] - g.pad[2]));
    double* const partial = partials + part * g.taps() * g.in_channels + c0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) std::fill_n(partial + tap * g.in_channels, channels, 0.0);

    for (int64_t first = begin; first < end;) {
        const int64_t n = first / (g.output[0] * g.output[1]), p0 = first / g.output[1] % g.output[0], p1 = first % g.output[1];
        const int64_t most = convert ? kConvertedRows : kBandRows;
        const int64_t count = std::min({most, end - first, g.output[1] - p1}); // a band stays within one plane
        const int64_t top = std::clamp<int64_t>(p1 * g.stride[1] - g.pad[1], 0, g.input[1]);
        const int64_t bottom = std::clamp<int64_t>(
            (p1 + count - 1) * g.stride[1] - g.pad[1] + (g.kernel[1] - 1) * g.dilation[1] + 1, top, g.input[1]);
        const auto rows_of = [&](const void* data, Kind kind, const Strides& strides, int64_t depth, int64_t row,
                                 int64_t height, int64_t width, std::vector<Acc>& buffer) -> Rows<T> {
            const int64_t plane = n * strides.batch + depth * strides.space[0];
            if constexpr (std::is_same_v<T, Acc>)
                if (convert) return converted_rows(data, kind, strides, plane, row, height, width, c0, channels, buffer);
            return rows_in_place<T>(data, strides, plane, row, c0);
        };
        const Rows<T> z = rows_of(a.z, a.z_kind, a.z_strides, p0, p1, count, g.output[2], z_buffer);
        for (int64_t r = 0; r < g.kernel[0]; ++r) {
            const int64_t depth = p0 * g.stride[0] + r * g.dilation[0] - g.pad[0];
            if (depth < 0 || depth >= g.input[0] || bottom == top) continue;
            const Rows<T> x = rows_of(a.x, a.x_kind, a.x_strides, depth, top, bottom - top, g.input[2], x_buffer);
            std::fill(memory.begin(), memory.end(), Acc(0));
            const Band<T> band{x, z, top, p1, count, channels, convert, columns.data()};
            has_wide_registers() ? sweep_wide(g, band, sums) : sweep_narrow(g, band, sums);
            for (int64_t tap = 0; tap < plane_taps; ++tap)
                for (int64_t c = 0; c < channels; ++c)
                    partial[(r * plane_taps + tap) * g.in_channels + c] += static_cast<double>(sums[tap * kBlockChannels + c]);
        }
        first += count;
    }
}

} // namespace

template <typename Acc>
void depthwise_pixels(const DepthwiseArgs& a, int64_t task, double* partials) {
    if constexpr (std::is_same_v<Acc, float>) {
        const bool bf16 = a.x_kind == Kind::bf16 && a.z_kind == Kind::bf16;
        if (bf16 && a.geometry.in_channels >= kMostLanes<float>) return sum_pixels<float, BFloat16>(a, task, partials);
    }
    sum_pixels<Acc, Acc>(a, task, partials);
}

template <typename Acc>
void reduce_pixels(const Geometry& g, const double* partials, int64_t channel_begin, int64_t channel_end, Acc* d) {
    const int64_t size = g.taps() * g.in_channels, parts = pixel_tasks(g).parts;
    for (int64_t c = channel_begin; c < channel_end; ++c)
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
            double sum = 0;
            for (int64_t part = 0; part < parts; ++part) sum += partials[part * size + tap * g.in_channels + c];
            d[c * g.taps() + tap] = static_cast<Acc>(sum);
        }
}

template void depthwise_pixels<float>(const DepthwiseArgs&, int64_t, double*);
template void depthwise_pixels<double>(const DepthwiseArgs&, int64_t, double*);
template void reduce_pixels<float>(const Geometry&, const double*, int64_t, int64_t, float*);
template void reduce_pixels<double>(const Geometry&, const double*, int64_t, int64_t, double*);

} // namespace localsgd
