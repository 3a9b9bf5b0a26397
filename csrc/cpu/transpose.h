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

// Elements 0, kStep, 2 kStep .. of a row: a vector of them, and none behind the last is read.
template <int kStep>
LOCALSGD_INLINE Vector<float, 16>::Type load_apart(const float* from) {
    using V = Vector<float, 16>::Type;
    const V begin = *reinterpret_cast<const V*>(from);
    if constexpr (kStep == 1) return begin;
    using Mask = Vector<float, 16>::Mask;
    const V end = *reinterpret_cast<const V*>(from + 3);
    return LOCALSGD_SHUFFLE(Mask, begin, end, 0, 2, 5, 7);
}
template <int kStep>
LOCALSGD_INLINE Vector<double, 16>::Type load_apart(const double* from) {
    using V = Vector<double, 16>::Type;
    if constexpr (kStep == 1) return *reinterpret_cast<const V*>(from);
    return V{from[0], from[kStep]};
}

// to[column * to_pitch + row] = from[row * from_pitch + column * kStep], rows and columns in [0, kTransposed), kStep 1 or 2.
template <int kStep>
LOCALSGD_INLINE void transpose_block(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
    using V = Vector<float, 16>::Type;
    using Mask = Vector<float, 16>::Mask;
    const auto row = [&](int64_t i) { return load_apart<kStep>(from + i * from_pitch); };
    const V a = row(0), b = row(1), c = row(2), d = row(3);
    const V ab = LOCALSGD_SHUFFLE(Mask, a, b, 0, 4, 1, 5), ab_end = LOCALSGD_SHUFFLE(Mask, a, b, 2, 6, 3, 7);
    const V cd = LOCALSGD_SHUFFLE(Mask, c, d, 0, 4, 1, 5), cd_end = LOCALSGD_SHUFFLE(Mask, c, d, 2, 6, 3, 7);
    const auto column = [&](int64_t i) -> V& { return *reinterpret_cast<V*>(to + i * to_pitch); };
    column(0) = LOCALSGD_SHUFFLE(Mask, ab, cd, 0, 1, 4, 5);
    column(1) = LOCALSGD_SHUFFLE(Mask, ab, cd, 2, 3, 6, 7);
    column(2) = LOCALSGD_SHUFFLE(Mask, ab_end, cd_end, 0, 1, 4, 5);
    column(3) = LOCALSGD_SHUFFLE(Mask, ab_end, cd_end, 2, 3, 6, 7);
}

template <int kStep>
LOCALSGD_INLINE void transpose_block(const double* from, int64_t from_pitch, double* to, int64_t to_pitch) {
    using V = Vector<double, 16>::Type;
    using Mask = Vector<double, 16>::Mask;
    const V a = load_apart<kStep>(from), b = load_apart<kStep>(from + from_pitch);
    *reinterpret_cast<V*>(to) = LOCALSGD_SHUFFLE(Mask, a, b, 0, 2);
    *reinterpret_cast<V*>(to + to_pitch) = LOCALSGD_SHUFFLE(Mask, a, b, 1, 3);
}

#undef LOCALSGD_SHUFFLE

} // namespace localsgd
