// Sums of a depthwise convolution's taps over rows of pixels whose channels lie side by side (channels_last), without torch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "depthwise.h"
#include "pages.h"
#include "vectors.h"

namespace localsgd {

constexpr int64_t kBlockChannels = 384; // some cache lines of a pixel; sums of 3x3 taps stay in the first-level cache

// A block of channels in some rows of z and of x: element (row, pixel, channel) at row * row_stride + pixel * pixel_stride +
// channel.
template <typename T>
struct Rows {
    const T* data; // of the first row
    int64_t row_stride, pixel_stride;
    const T* end; // of the tensor, or null of a copy

    // `count` rows from `row` on, `width` pixels each, are read soon.
    LOCALSGD_INLINE void touch(const T* row, int64_t count, int64_t width) const {
        if (end && width * pixel_stride <= row_stride)
            for (int64_t i = 0; i < count; ++i) touch_pages(row + i * row_stride, width * pixel_stride, end);
    }
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

// A pointer that moves on by a stride: the compiler would keep one per pixel and row, more than there are registers for.
template <typename T>
struct Walk {
    const T* at;
    LOCALSGD_INLINE void move(int64_t stride) {
        at += stride;
        asm("" : "+r"(at));
    }
};

// Which columns of x are not there: at most one on either side, known to the compiler, or any.
template <int kLeft, int kRight>
struct Outside {
    static LOCALSGD_INLINE bool skips(int j, int columns, const Range&) { return j < kLeft || j >= columns - kRight; }
};
struct AnyOutside {
    static LOCALSGD_INLINE bool skips(int j, int, const Range& inside) { return j < inside.begin || j >= inside.end; }
};

// The cache lines of a row's block of channels, in the order of their addresses, to be fetched while another row is summed:
// sums walk through several rows and pixels at once, which hides from the hardware what they read next.
template <typename T>
class Lines {
  public:
    static constexpr int64_t kElements = 64 / sizeof(T);

    Lines(const T* begin, int64_t pixel_stride, int64_t channels)
        : at_(begin),
          jump_(pixel_stride - ceil_div(channels, kElements) * kElements),
          of_a_pixel_(ceil_div(channels, kElements)),
          left_(of_a_pixel_) {}

    LOCALSGD_INLINE void fetch(int64_t count) {
        while (count > left_) {
            fetch_neighbours(left_);
            count -= left_;
            at_ += jump_;
            left_ = of_a_pixel_;
        }
        fetch_neighbours(count);
        left_ -= count;
    }

  private:
    LOCALSGD_INLINE void fetch_neighbours(int64_t count) {
        for (const T* const end = at_ + count * kElements; at_ != end; at_ += kElements) __builtin_prefetch(at_, 0, 2);
    }

    const T* at_;
    int64_t jump_, of_a_pixel_, left_; // to the next pixel's lines; lines
};

// `sums` [R * 3][kBlockChannels] += R x 3 taps at Q neighbouring pixels of z, kStep pixels of x apart, each element of x and z
// loaded once per row. `inside`: the columns of x, from the first tap's on, that exist. `x_lines`: of x_ahead to fetch per
// pixel.
template <typename Acc, int kBytes, int R, int kStep, int Q, typename Edge, typename T>
LOCALSGD_INLINE void add_pixels(const T* x, int64_t x_row, int64_t x_pixel, const Range& inside, const T* z, int64_t z_pixel,
                                int64_t channels, int64_t x_lines, Lines<T>& x_ahead, Lines<T>& z_ahead, Acc* sums) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    constexpr int kColumns = kStep * (Q - 1) + 3;
    const auto load = [](const auto* p) __attribute__((always_inline)) { return read_vector<Acc, kBytes>(p); };
    const auto add = [&](int64_t c) __attribute__((always_inline)) {
        V sum[R][3], zv[Q];
        Walk<T> z_walk{z + c}, x_walk[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) x_walk[r].at = x + r * x_row + c;
#pragma GCC unroll 16
        for (int i = 0; i < R * 3; ++i) sum[i / 3][i % 3] = load(sums + i * kBlockChannels + c);
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j) {
            if (j % kStep == 0 && j / kStep < Q) zv[j / kStep] = load(z_walk.at), z_walk.move(z_pixel);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                if (!Edge::skips(j, kColumns, inside)) {
                    const V xv = load(x_walk[r].at);
#pragma GCC unroll 16
                    for (int s = 0; s < 3; ++s)
                        if (j >= s && (j - s) % kStep == 0 && (j - s) / kStep < Q) sum[r][s] += xv * zv[(j - s) / kStep];
                }
                x_walk[r].move(x_pixel);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < R * 3; ++i) *reinterpret_cast<V*>(sums + i * kBlockChannels + c) = sum[i / 3][i % 3];
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
        if (c % Lines<T>::kElements == 0) x_ahead.fetch(Q * x_lines), z_ahead.fetch(Q);
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

// The same for an output row: four pixels at once or, where there are registers for them, seven.
template <typename Acc, int kBytes, int R, int kStep, typename T>
LOCALSGD_INLINE void add_row(const Geometry& g, const Band<T>& b, const T* x, const T* z, Acc* sums) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    constexpr int kMany = kBytes == kWideBytes && sizeof(Acc) == 4 ? 7 : 4;
    const int64_t channels = b.padded ? ceil_div(b.channels, kLanes) * kLanes : b.channels, width = g.output[2];
    const int64_t x_row = g.dilation[1] * b.x.row_stride, x_pixel = b.x.pixel_stride, z_pixel = b.z.pixel_stride;
    Lines<T> x_ahead(x + (R - 1) * x_row + b.x.row_stride, x_pixel, channels);
    Lines<T> z_ahead(z + b.z.row_stride, z_pixel, channels);
    b.x.touch(x + (R - 1) * x_row + b.x.row_stride, g.stride[1], g.input[2]);
    b.z.touch(z + b.z.row_stride, 1, width);
    int64_t q = 0;
    const auto add = [&](auto pixels, auto edge) __attribute__((always_inline)) {
        constexpr int Q = decltype(pixels)::value;
        const int64_t column = q * kStep - g.pad[2];
        add_pixels<Acc, kBytes, R, kStep, Q, decltype(edge)>(x + column * x_pixel, x_row, x_pixel,
                                                             {-column, g.input[2] - column}, z + q * z_pixel, z_pixel, channels,
                                                             g.stride[1] * kStep, x_ahead, z_ahead, sums);
        q += Q;
    };
    const auto add_several = [&](auto pixels) __attribute__((always_inline)) {
        const int64_t column = q * kStep - g.pad[2];
        const int64_t left = std::max<int64_t>(-column, 0);
        const int64_t right = std::max<int64_t>(column + kStep * (decltype(pixels)::value - 1) + 3 - g.input[2], 0);
        if (left == 0 && right == 0)
            add(pixels, Outside<0, 0>());
        else if (left == 1 && right == 0)
            add(pixels, Outside<1, 0>());
        else if (left == 0 && right == 1)
            add(pixels, Outside<0, 1>());
        else if (left == 1 && right == 1)
            add(pixels, Outside<1, 1>());
        else
            add(std::integral_constant<int, 1>(), AnyOutside());
    };
    while (q < width) {
        const int64_t rest = width - q;
        if (kMany > 4 && rest % 4 != 0 && rest >= kMany * (4 - rest % 4)) // so that no single pixels are left
            add_several(std::integral_constant<int, kMany>());
        else if (rest >= 4)
            add_several(std::integral_constant<int, 4>());
        else
            add(std::integral_constant<int, 1>(), AnyOutside());
    }
}

template <typename Acc, int kBytes, typename T>
LOCALSGD_INLINE void band_sums(const Geometry& g, const Band<T>& b, Acc* sums) {
    const bool small = g.kernel[1] <= 3 && g.kernel[2] == 3 && g.dilation[2] == 1 && g.stride[2] <= 2;
    for (int64_t row = 0; row < b.count; ++row) {
        const T* z = b.z.data + row * b.z.row_stride;
        const int64_t top = (b.first + row) * g.stride[1] - g.pad[1];
        const auto x_row = [&](int64_t r) { return b.x.data + (top + r * g.dilation[1] - b.first_input) * b.x.row_stride; };
        if (small) {
            const Range rows = valid_outputs(g.kernel[1], g.input[1], g.dilation[1], top);
            const T* const x = x_row(rows.begin);
            Acc* const to = sums + rows.begin * 3 * kBlockChannels;
            const int64_t count = rows.end - rows.begin;
            const auto add = [&](auto step) __attribute__((always_inline)) {
                constexpr int kStep = decltype(step)::value;
                if (count == 3) add_row<Acc, kBytes, 3, kStep>(g, b, x, z, to);
                if (count == 2) add_row<Acc, kBytes, 2, kStep>(g, b, x, z, to);
                if (count == 1) add_row<Acc, kBytes, 1, kStep>(g, b, x, z, to);
            };
            g.stride[2] == 1 ? add(std::integral_constant<int, 1>()) : add(std::integral_constant<int, 2>());
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

} // namespace localsgd
