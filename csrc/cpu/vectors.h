// Vectors of the compiler's own kind, whose instructions follow from the instruction set of the function they stand in.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "elements.h"

namespace localsgd {

template <typename Acc, int kBytes>
struct Vector;
template <int kBytes>
struct Vector<float, kBytes> {
    static constexpr int64_t kLanes = kBytes / 4;
    typedef float Type __attribute__((vector_size(kBytes), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(kBytes)));
};
template <int kBytes>
struct Vector<double, kBytes> {
    static constexpr int64_t kLanes = kBytes / 8;
    typedef double Type __attribute__((vector_size(kBytes), aligned(8), may_alias));
    typedef int64_t Mask __attribute__((vector_size(kBytes)));
};

// Sums of nine taps stay in registers only if a vector is one register: 64 bytes where there is AVX-512, 32 elsewhere.
constexpr int kWideBytes = 64, kNarrowBytes = 32;
template <typename Acc>
constexpr int64_t kMostLanes = Vector<Acc, kWideBytes>::kLanes;

inline bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
    static const bool yes = __builtin_cpu_supports("avx512f");
    return yes;
#else
    return false;
#endif
}

} // namespace localsgd
