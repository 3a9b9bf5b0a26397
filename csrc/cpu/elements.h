// Element types of the CPU kernels and their conversions, without torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// GCC compiles a function marked LOCALSGD_MULTIVERSION once per instruction set and picks at load time, so that a build for
// any x86-64 still uses AVX-512 or AVX2 where there is one. Everything inlined into it is compiled the same way.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define LOCALSGD_HAS_TARGETS
#define LOCALSGD_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOCALSGD_MULTIVERSION
#endif
#define LOCALSGD_INLINE inline __attribute__((always_inline))

namespace localsgd {

enum class Kind { f16, bf16, f32, f64 };

inline const char* kind_name(Kind kind) {
    switch (kind) {
    case Kind::f16:
        return "float16";
    case Kind::bf16:
        return "bfloat16";
    case Kind::f32:
        return "float32";
    default:
        return "float64";
    }
}

inline int64_t kind_size(Kind kind) { return kind == Kind::f64 ? 8 : kind == Kind::f32 ? 4 : 2; }

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <typename Acc>
constexpr Kind kKindOf = sizeof(Acc) == 8 ? Kind::f64 : Kind::f32;

template <typename To, typename From>
LOCALSGD_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

LOCALSGD_INLINE float to_float(float v) { return v; }
LOCALSGD_INLINE double to_float(double v) { return v; }
LOCALSGD_INLINE float to_float(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
LOCALSGD_INLINE float to_float(Half v) {
    // The exponent moves to fp32's place and is re-biased by a multiplication, which also normalises subnormals; Inf and NaN
    // keep exponent 255. Without branches, hence vectorisable.
    const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
    const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
    return bit_cast<float>(((v.bits & 0x7c00) == 0x7c00 ? special : scaled) | sign);
}

// Round to nearest, ties to even; NaN stays NaN.
LOCALSGD_INLINE void store(float& to, double v) { to = static_cast<float>(v); }
LOCALSGD_INLINE void store(double& to, double v) { to = v; }
LOCALSGD_INLINE void store(BFloat16& to, double v) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(v));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits =
        nan ? static_cast<uint16_t>((bits >> 16) | 0x40) : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
LOCALSGD_INLINE void store(Half& to, double v) {
    // Adding 2^(exponent + 13) to |v| makes the FPU round its mantissa to 10 bits, at the subnormals' fixed step as well.
    const float value = static_cast<float>(v);
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const float magnitude = (bit_cast<float>(bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f; // saturates to Inf above fp16's range
    uint32_t exponent = (bits << 1) & 0xff000000u;
    exponent = exponent < 0x71000000u ? 0x71000000u : exponent;
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>((exponent >> 1) + 0x07800000u) + magnitude);
    const uint32_t nonsign = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
    to.bits = static_cast<uint16_t>(sign | ((bits << 1) > 0xff000000u ? 0x7e00u : nonsign));
}

} // namespace localsgd
