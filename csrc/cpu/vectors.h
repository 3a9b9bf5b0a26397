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

// As many elements of bf16 as a vector of kBytes has floats, and twice as many. GCC takes no size that depends on a template's.
template <int kBytes>
struct Bf16;
template <>
struct Bf16<kWideBytes> {
    typedef uint16_t Bits __attribute__((vector_size(kWideBytes / 2), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(kWideBytes), aligned(2), may_alias));
};
template <>
struct Bf16<kNarrowBytes> {
    typedef uint16_t Bits __attribute__((vector_size(kNarrowBytes / 2), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(kNarrowBytes), aligned(2), may_alias));
};

template <typename Acc, int kBytes>
LOCALSGD_INLINE typename Vector<Acc, kBytes>::Type read_vector(const Acc* p) {
    return *reinterpret_cast<const typename Vector<Acc, kBytes>::Type*>(p);
}
template <typename Acc, int kBytes>
LOCALSGD_INLINE typename Vector<Acc, kBytes>::Type read_vector(const BFloat16* p) {
    const auto bits = *reinterpret_cast<const typename Bf16<kBytes>::Bits*>(p);
    return (typename Vector<Acc, kBytes>::Type)(__builtin_convertvector(bits, typename Bf16<kBytes>::Wide) << 16);
}

#ifdef LOCALSGD_HAS_TARGETS
#define LOCALSGD_WIDE __attribute__((target("arch=x86-64-v4")))
#define LOCALSGD_NARROW __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define LOCALSGD_WIDE
#define LOCALSGD_NARROW
#endif

// A vector of kWideBytes that is to be in a register from here on, not read again from memory wherever it is used.
template <int kBytes, typename V>
LOCALSGD_INLINE void keep([[maybe_unused]] V& v) {
#ifdef LOCALSGD_HAS_TARGETS
    if constexpr (kBytes == kWideBytes) asm("" : "+v"(v));
#endif
}

inline bool has_wide_registers() {
#ifdef LOCALSGD_HAS_TARGETS
    static const bool yes = __builtin_cpu_supports("x86-64-v4");
    return yes;
#else
    return false;
#endif
}

} // namespace localsgd
