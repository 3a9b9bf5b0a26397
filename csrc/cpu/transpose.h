// Square blocks transposed in registers of 16 bytes: every instruction set has those, and GCC expands shuffles of wider
// vectors into single elements before it knows for which one it compiles a clone.
#pragma once

#include "vectors.h"

namespace localsgd {

template <typename Acc>
constexpr int64_t kTransposed = Vector<Acc, 16>::kLanes;

#if defined(__clang__)
#define LOCALSGD_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LOCALSGD_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

// to[column * to_pitch + row] = from[row * from_pitch + column], rows and columns in [0, kTransposed).
LOCALSGD_INLINE void transpose_block(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    using V = Vector<float, 16>::Type;
    using Mask = Vector<float, 16>::Mask;
    const auto row = [&](int64_t i) { return *reinterpret_cast<const V*>(from + i * from_pitch); };
    const V a = row(0), b = row(1), c = row(2), d = row(3);
    const V ab = LOCALSGD_SHUFFLE(Mask, a, b, 0, 4, 1, 5), ab_end = LOCALSGD_SHUFFLE(Mask, a, b, 2, 6, 3, 7);
    const V cd = LOCALSGD_SHUFFLE(Mask, c, d, 0, 4, 1, 5), cd_end = LOCALSGD_SHUFFLE(Mask, c, d, 2, 6, 3, 7);
    const auto column = [&](int64_t i) -> V& { return *reinterpret_cast<V*>(to + i * to_pitch); };
    column(0) = LOCALSGD_SHUFFLE(Mask, ab, cd, 0, 1, 4, 5);
    column(1) = LOCALSGD_SHUFFLE(Mask, ab, cd, 2, 3, 6, 7);
    column(2) = LOCALSGD_SHUFFLE(Mask, ab_end, cd_end, 0, 1, 4, 5);
    column(3) = LOCALSGD_SHUFFLE(Mask, ab_end, cd_end, 2, 3, 6, 7);
}

LOCALSGD_INLINE void transpose_block(const double* from, int64_t from_pitch, double* to, int64_t to_pitch) {
    using V = Vector<double, 16>::Type;
    using Mask = Vector<double, 16>::Mask;
    const V a = *reinterpret_cast<const V*>(from), b = *reinterpret_cast<const V*>(from + from_pitch);
    *reinterpret_cast<V*>(to) = LOCALSGD_SHUFFLE(Mask, a, b, 0, 2);
    *reinterpret_cast<V*>(to + to_pitch) = LOCALSGD_SHUFFLE(Mask, a, b, 1, 3);
}

#undef LOCALSGD_SHUFFLE

} // namespace localsgd
