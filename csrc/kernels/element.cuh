// fp16, bf16 and fp32 in memory, fp32 in registers. CUDA's own fp16/bf16 headers are not used: NVRTC and the emulation lack
// them.
#pragma once

#include "platform.cuh"

namespace localsgd::cuda {

LOCALSGD_DEVICE float bfloat16_to_float(unsigned bits) { return __uint_as_float(bits << 16); }

LOCALSGD_DEVICE float half_to_float(unsigned bits) {
#if defined(LOCALSGD_EMULATION)
    // The exponent moves to fp32's place and is re-biased by a multiplication, which also normalises subnormals.
    const unsigned magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const unsigned scaled = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    return __uint_as_float(((bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled) | sign);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
#endif
}

LOCALSGD_DEVICE unsigned float_to_bfloat16(float value) { // nearest, ties to even; sm_75 has no instruction for it
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

LOCALSGD_DEVICE unsigned float_to_half(float value) {
#if defined(LOCALSGD_EMULATION)
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u; // rounds to 2^16 or more: infinity
    // Below 2^-14 the step is fixed at 2^-24: adding 0.5 leaves the multiple of it in the mantissa's low bits, rounded.
    if (magnitude < 0x38800000u) return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
#else
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

LOCALSGD_DEVICE float widen(unsigned bits, Element element) {
    return element == Element::f32    ? __uint_as_float(bits)
           : element == Element::bf16 ? bfloat16_to_float(bits)
                                      : half_to_float(bits);
}

// What is read: what nothing writes while the kernel runs, as x and z, through the read-only cache; or fp32 that other blocks
// wrote before a grid barrier, past the first-level cache.
enum class Source { constant, written };

template <Source kSource, class T>
LOCALSGD_DEVICE T load_from(const T* p) {
    return kSource == Source::constant ? __ldg(p) : __ldcg(p);
}

// Loads leave their bits as they are: a conversion right after a load would wait for it, and the main loops issue theirs one
// step ahead.
template <Source kSource = Source::constant>
LOCALSGD_DEVICE unsigned load_bits(const void* data, int64 index, Element element) {
    return element == Element::f32 ? load_from<kSource>(static_cast<const unsigned*>(data) + index)
                                   : load_from<kSource>(static_cast<const unsigned short*>(data) + index);
}

// Four neighbours, aligned to their 16 (fp32) or 8 bytes.
template <Source kSource = Source::constant>
LOCALSGD_DEVICE uint4 load_bits4(const void* data, int64 index, Element element) {
    if (element == Element::f32)
        return load_from<kSource>(reinterpret_cast<const uint4*>(static_cast<const float*>(data) + index));
    const uint2 pairs = load_from<kSource>(reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(data) + index));
    return make_uint4(pairs.x, pairs.y, 0, 0);
}

LOCALSGD_DEVICE float4 widen4(uint4 bits, Element element) {
    if (element == Element::f32)
        return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w));
    if (element == Element::bf16)
        return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
                           __uint_as_float(bits.y & 0xffff0000u));
    return make_float4(half_to_float(bits.x & 0xffffu), half_to_float(bits.x >> 16), half_to_float(bits.y & 0xffffu),
                       half_to_float(bits.y >> 16));
}

// Four neighbours as one access; the hardware faults where they are not aligned to 16 bytes, so the emulation does.
LOCALSGD_DEVICE float4& quad(float* p) {
#if defined(LOCALSGD_EMULATION)
    if (reinterpret_cast<uint64>(p) % 16) emulation::fail("misaligned 16-byte access");
#endif
    return *reinterpret_cast<float4*>(p);
}
LOCALSGD_DEVICE const float4& quad(const float* p) { return quad(const_cast<float*>(p)); }

// Weights, by plain loads: the read-only cache is not for what the same launch writes at its end.
LOCALSGD_DEVICE float weight_at(const void* data, int64 index, Element element) {
    return element == Element::f32 ? static_cast<const float*>(data)[index]
                                   : widen(static_cast<const unsigned short*>(data)[index], element);
}
LOCALSGD_DEVICE void put_weight(void* data, int64 index, Element element, float value) {
    if (element == Element::f32)
        static_cast<float*>(data)[index] = value;
    else
        static_cast<unsigned short*>(data)[index] =
            static_cast<unsigned short>(element == Element::bf16 ? float_to_bfloat16(value) : float_to_half(value));
}

// w + scale * d, in fp64 and rounded once.
LOCALSGD_DEVICE float add_scaled(float w, double scale, float d) {
    return static_cast<float>(static_cast<double>(w) + scale * static_cast<double>(d));
}
LOCALSGD_DEVICE void add_scaled_at(void* data, int64 index, Element element, double scale, float d) {
    put_weight(data, index, element, add_scaled(weight_at(data, index, element), scale, d));
}

} // namespace localsgd::cuda
