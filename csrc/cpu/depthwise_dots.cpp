#include "depthwise_dots.h"

#include <algorithm>
#include <type_traits>

#include "intrinsics.h"

namespace localsgd {

bool dots_fit_pixels(const Geometry& g) {
    return g.kernel == Triple{1, 3, 3} && g.dilation[1] == 1 && g.dilation[2] == 1 && g.stride[1] == g.stride[2] &&
           g.stride[2] <= 2 && g.pad[2] <= 1 && g.output[2] > 1 && g.in_channels >= kDotChannels;
}

#ifdef LOCALSGD_HAS_TILES

namespace {

// 3x3 taps at Y x Q pixels of z, whose pixels of x are kStep rows and columns apart.
struct Corner {
    const BFloat16 *x, *z;
    int64_t x_row, x_pixel, z_row, z_pixel;
    Range rows, columns; // of x, from the first tap's on: those that exist; of columns, all but the first or the last
    bool skip;           // z's first pixels, which are summed already
};

LOCALSGD_DOTS inline __m512i load(const BFloat16* p) { return _mm512_loadu_si512(p); }

// `sums` [9][kBlockChannels] += those taps, of 32 channels: the pairs of the first four of each eight, then the other ones'.
template <int kStep, int Q, int Y>
LOCALSGD_DOTS inline void dot_corner(const Corner& g, int64_t channel, float* sums) {
    constexpr int kRows = kStep * (Y - 1) + 3, kColumns = kStep * (Q - 1) + 3;
    __m512 low[9], high[9];
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) {
        low[i] = _mm512_loadu_ps(sums + i * kBlockChannels);
        high[i] = _mm512_loadu_ps(sums + i * kBlockChannels + 16);
    }
    __m512i z_low[Y][Q / 2], z_high[Y][Q / 2];
#pragma GCC unroll 16
    for (int y = 0; y < Y; ++y)
#pragma GCC unroll 16
        for (int q = 0; q < Q; q += 2) {
            const BFloat16* const at = g.z + y * g.z_row + q * g.z_pixel + channel;
            const __m512i first = q == 0 && g.skip ? _mm512_setzero_si512() : load(at), second = load(at + g.z_pixel);
            z_low[y][q / 2] = _mm512_unpacklo_epi16(first, second);
            z_high[y][q / 2] = _mm512_unpackhi_epi16(first, second);
        }
    const BFloat16* row = g.x + channel;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, row += g.x_row) {
        if (i < g.rows.begin || i >= g.rows.end) continue;
        const BFloat16* at = row;
        __m512i x[kColumns];
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j, at += g.x_pixel) {
            asm("" : "+r"(at)); // the compiler would keep a pointer per column, more than there are registers for
            const bool outside = (j == 0 && g.columns.begin > 0) || (j == kColumns - 1 && g.columns.end < kColumns);
            x[j] = outside ? _mm512_setzero_si512() : load(at);
            if (j < kStep) continue;
            const int first = j - kStep; // of the pair that ends here
            const __m512i x_low = _mm512_unpacklo_epi16(x[first], x[j]), x_high = _mm512_unpackhi_epi16(x[first], x[j]);
#pragma GCC unroll 16
            for (int y = 0; y < Y; ++y)
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s)
                    if (const int r = i - y * kStep, q = first - s;
                        r >= 0 && r < 3 && q >= 0 && q % (2 * kStep) == 0 && q / kStep < Q) {
                        const int tap = r * 3 + s, pair = q / kStep / 2;
                        low[tap] = _mm512_dpbf16_ps(low[tap], (__m512bh)x_low, (__m512bh)z_low[y][pair]);
                        high[tap] = _mm512_dpbf16_ps(high[tap], (__m512bh)x_high, (__m512bh)z_high[y][pair]);
                    }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) {
        _mm512_storeu_ps(sums + i * kBlockChannels, low[i]);
        _mm512_storeu_ps(sums + i * kBlockChannels + 16, high[i]);
    }
}

// The first of a block's 32 channels: the last block begins earlier, over channels that are summed already.
int64_t first_channel(int64_t block, int64_t channels) { return std::min(block * kDotChannels, channels - kDotChannels); }

// Y output rows, the first of which reads x from row `top` on.
template <int kStep, int Y>
LOCALSGD_DOTS void dot_rows(const Geometry& g, const Band<BFloat16>& b, int64_t top, const BFloat16* z, float* sums) {
    const int64_t width = g.output[2], blocks = ceil_div(b.channels, kDotChannels);
    const Range rows = valid_outputs((Y - 1) * kStep + 3, g.input[1], 1, top);
    if (rows.begin == rows.end) return;
    const BFloat16* const x = b.x.data + (top - b.first_input) * b.x.row_stride;
    Lines<BFloat16> x_ahead(x + rows.end * b.x.row_stride, b.x.pixel_stride, b.channels); // below an image lies the next
    Lines<BFloat16> z_ahead(z + Y * b.z.row_stride, b.z.pixel_stride, b.channels);
    b.x.touch(x + rows.end * b.x.row_stride, Y * kStep, g.input[2]);
    b.z.touch(z + Y * b.z.row_stride, Y, width);
    for (int64_t q = 0; q < width;) {
        const int64_t rest = width - q;
        const auto add = [&](auto pixels) LOCALSGD_DOTS {
            constexpr int Q = decltype(pixels)::value;
            const bool skip = rest < Q;
            const int64_t at = q - skip, column = at * kStep - g.pad[2];
            const Corner corner{x + column * b.x.pixel_stride,
                                z + at * b.z.pixel_stride,
                                b.x.row_stride,
                                b.x.pixel_stride,
                                b.z.row_stride,
                                b.z.pixel_stride,
                                rows,
                                {-column, g.input[2] - column},
                                skip};
            for (int64_t block = 0; block < blocks; ++block) {
                x_ahead.fetch(Q * Y * kStep * kStep);
                z_ahead.fetch(Q * Y);
                dot_corner<kStep, Q, Y>(corner, first_channel(block, b.channels), sums + block * kDotChannels);
            }
            q = at + Q;
        };
        rest >= 4 || (rest == 3 && width > 3) ? add(std::integral_constant<int, 4>()) : add(std::integral_constant<int, 2>());
    }
}

template <int kStep>
void dot_band(const Geometry& g, const Band<BFloat16>& b, float* sums) {
    constexpr int64_t kTogether = kStep == 1 ? 2 : 1; // rows of z that share rows of x
    for (int64_t row = 0; row < b.count;) {
        const int64_t top = (b.first + row) * kStep - g.pad[1];
        const BFloat16* const z = b.z.data + row * b.z.row_stride;
        if (row + kTogether <= b.count) {
            dot_rows<kStep, kTogether>(g, b, top, z, sums);
            row += kTogether;
        } else {
            dot_rows<kStep, 1>(g, b, top, z, sums);
            ++row;
        }
    }
}

} // namespace

void dot_pixels(const Geometry& g, const Band<BFloat16>& b, float* sums) {
    g.stride[2] == 1 ? dot_band<1>(g, b, sums) : dot_band<2>(g, b, sums);
}

LOCALSGD_DOTS
void join_dots(const float* sums, int64_t channels, double* total, int64_t pitch) {
    const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
    for (int tap = 0; tap < 9; ++tap)
        for (int64_t block = 0; block * kDotChannels < channels; ++block) {
            const float* const from = sums + tap * kBlockChannels + block * kDotChannels;
            const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
            float ordered[kDotChannels];
            _mm512_storeu_ps(ordered, _mm512_permutex2var_ps(low, front, high));
            _mm512_storeu_ps(ordered + 16, _mm512_permutex2var_ps(low, back, high));
            const int64_t c = block * kDotChannels, first = first_channel(block, channels);
            double* const to = total + tap * pitch;
            for (int64_t i = c - first; i < std::min(kDotChannels, channels - first); ++i)
                to[first + i] += static_cast<double>(ordered[i]);
        }
}

#else

void dot_pixels(const Geometry&, const Band<BFloat16>&, float*) {}
void join_dots(const float*, int64_t, double*, int64_t) {}

#endif

} // namespace localsgd
