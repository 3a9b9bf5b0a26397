// Vectors of the compiler's own kind, whose instructions follow from the instruction set of the function they stand in.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "elements.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" // how vectors are passed depends on the instruction set; here all is inlined
#endif

namespace localsgd {

template <typename Acc, int kBytes>
struct Vector;
template <int kBytes>
struct Vector<float, kBytes> {
    static constexpr int64_t kLanes = kBytes / 4;
    typedef float Type __attribute__((vector_size(kBytes), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <int kBytes>
struct Vector<double, kBytes> {
    static constexpr int64_t kLanes = kBytes / 8;
    typedef double Type __attribute__((vector_size(kBytes), aligned(8), may_alias));
    typedef int64_t Mask __attribute__((vector_size(kBytes), aligned(8), may_alias));
};

// Sums of nine taps stay in registers only if a vector is one register: 64 bytes where there is AVX-512, 32 elsewhere. A
// function is written for either, LOCALSGD_WIDE and LOCALSGD_NARROW, and called by `has_wide_registers`.
constexpr int kWideBytes = 64, kNarrowBytes = 32;
template <typename Acc>
constexpr int64_t kMostLanes = Vector<Acc, kWideBytes>::kLanes;

#ifdef LOCALSGD_HAS_TARGETS
#define LOCALSGD_WIDE __attribute__((target("arch=x86-64-v4")))
#define LOCALSGD_NARROW __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define LOCALSGD_WIDE
#define LOCALSGD_NARROW
#endif

inline bool has_wide_registers() {
#ifdef LOCALSGD_HAS_TARGETS
    static const bool yes = __builtin_cpu_supports("x86-64-v4");
    return yes;
#else
    return false;
#endif
}

} // namespace localsgd
