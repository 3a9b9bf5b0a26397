#include "plane_runs.h"

#include <algorithm>

#include "intrinsics.h"

namespace localsgd {
namespace {

// Of `lanes` pixels from `first` on, a bit each: those in [begin, end).
uint32_t bits_of(int64_t first, int64_t lanes, int64_t begin, int64_t end) {
    const int64_t from = std::clamp<int64_t>(begin - first, 0, lanes), to = std::clamp<int64_t>(end - first, from, lanes);
    return static_cast<uint32_t>((uint64_t{1} << to) - (uint64_t{1} << from));
}

} // namespace

bool runs_fit([[maybe_unused]] const Geometry& g) {
#ifndef LOCALSGD_HAS_TILES
    return false;
#else
    return g.kernel[1] == 3 && g.kernel[2] == 3 && g.stride[1] == 1 && g.stride[2] == 1 && g.dilation[1] == 1 &&
           g.dilation[2] == 1 && g.pad[1] == 1 && g.pad[2] == 1 && g.input[1] == g.output[1] && g.input[2] == g.output[2];
#endif
}

template <typename T>
PlaneRuns<T>::PlaneRuns(const Geometry& g) : height_(g.output[1]), width_(g.output[2]) {
    for (int64_t column = 0; column < width_; ++column) {
        Sides sides{};
        for (int i = 0; i < kLanes; ++i) {
            sides.left |= uint32_t{(column + i) % width_ > 0} << i;
            sides.right |= uint32_t{(column + i) % width_ < width_ - 1} << i;
        }
        sides_.push_back(sides);
    }
    const int64_t all = height_ * width_;
    for (int64_t i = 0; i < all; i += kLanes) {
        if (inside(i)) continue;
        const auto bits = [&](int64_t begin, int64_t end) { return bits_of(i, kLanes, begin, end); };
        const uint32_t there = bits(0, all);
        const Sides& sides = sides_[i % width_];
        edges_.push_back({{there & sides.left, there, there & sides.right}, {bits(0, all - width_), there, bits(width_, all)}});
    }
}

#ifdef LOCALSGD_HAS_TILES

// Each vector of x, and its neighbours on both sides, meets the three rows of z that read it: by the upper taps the one below.
// What is beyond is not multiplied by zero either, which Inf would survive.

template <>
LOCALSGD_DOTS void PlaneRuns<BFloat16>::add(const BFloat16* x, const BFloat16* z, float* sums) const {
    const int64_t width = width_, all = height_ * width, step = kLanes % width;
    __m512 sum[9];
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) sum[i] = _mm512_loadu_ps(sums + i * 16);
    int64_t column = 0;
    const Edge* edge = edges_.data();
    for (int64_t i = 0; i < all; i += kLanes) {
        __builtin_prefetch(x + i + kAhead);
        __builtin_prefetch(z + i + kAhead);
        const auto add = [&](int tap, __m512i xs, __m512i zs)
                             LOCALSGD_DOTS { sum[tap] = _mm512_dpbf16_ps(sum[tap], (__m512bh)xs, (__m512bh)zs); };
        if (inside(i)) {
            const __m512i xs[3] = {_mm512_maskz_loadu_epi16(sides_[column].left, x + i - 1), _mm512_loadu_si512(x + i),
                                   _mm512_maskz_loadu_epi16(sides_[column].right, x + i + 1)};
#pragma GCC unroll 16
            for (int r = 0; r < 3; ++r) {
                const __m512i zs = _mm512_loadu_si512(z + i + (1 - r) * width);
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s) add(3 * r + s, xs[s], zs);
            }
        } else {
#pragma GCC unroll 16
            for (int r = 0; r < 3; ++r) {
                const __m512i zs = _mm512_maskz_loadu_epi16(edge->z[r], z + i + (1 - r) * width);
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s)
                    add(3 * r + s, _mm512_maskz_loadu_epi16(edge->x[s] & edge->z[r], x + i + s - 1), zs);
            }
            ++edge;
        }
        column += step;
        column -= column >= width ? width : 0;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) _mm512_storeu_ps(sums + i * 16, sum[i]);
}

template <>
LOCALSGD_PACKS void PlaneRuns<float>::add(const float* x, const float* z, float* sums) const {
    const int64_t width = width_, all = height_ * width, step = kLanes % width;
    __m512 sum[9];
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) sum[i] = _mm512_loadu_ps(sums + i * 16);
    int64_t column = 0;
    const Edge* edge = edges_.data();
    for (int64_t i = 0; i < all; i += kLanes) {
        __builtin_prefetch(x + i + kAhead);
        __builtin_prefetch(z + i + kAhead);
        if (inside(i)) {
            const __m512 xs[3] = {_mm512_maskz_loadu_ps(sides_[column].left, x + i - 1), _mm512_loadu_ps(x + i),
                                  _mm512_maskz_loadu_ps(sides_[column].right, x + i + 1)};
#pragma GCC unroll 16
            for (int r = 0; r < 3; ++r) {
                const __m512 zs = _mm512_loadu_ps(z + i + (1 - r) * width);
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s) sum[3 * r + s] = _mm512_fmadd_ps(xs[s], zs, sum[3 * r + s]);
            }
        } else {
            __m512 xs[3];
            for (int s = 0; s < 3; ++s) xs[s] = _mm512_maskz_loadu_ps(edge->x[s], x + i + s - 1);
#pragma GCC unroll 16
            for (int r = 0; r < 3; ++r) {
                const __m512 zs = _mm512_maskz_loadu_ps(edge->z[r], z + i + (1 - r) * width);
#pragma GCC unroll 16
                for (int s = 0; s < 3; ++s) sum[3 * r + s] = _mm512_mask3_fmadd_ps(xs[s], zs, sum[3 * r + s], edge->z[r]);
            }
            ++edge;
        }
        column += step;
        column -= column >= width ? width : 0;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 9; ++i) _mm512_storeu_ps(sums + i * 16, sum[i]);
}

#else

template <typename T>
void PlaneRuns<T>::add(const T*, const T*, float*) const {}

#endif

template class PlaneRuns<float>;
template class PlaneRuns<BFloat16>;

} // namespace localsgd
