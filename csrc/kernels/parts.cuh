// fp32 numbers as sums of numbers that matrix units multiply: what keeps the product W G at fp32's precision, or
// at 2.5e-6 where operands are bf16.
//
// G is a sum in fp32, and rounding it would cost more than everything before: D's relative error is about that of G's elements.
// A part of p bits leaves a remainder of 2^-p at most, some 0.4 of that on average. Measured on W G of random patches:
//   bf16 (p = 8): 1 part 1.7e-3, 2 parts 2.5e-6 (more than the 2e-6 that adding in fp32 costs), 3 parts 0 (all 24 bits);
//   tf32 (p = 11): 1 part 2e-4, 2 parts 4e-8.
// Not fp16: a sum over positions soon exceeds 65504, and small elements would lose bits to its exponent.
// A product is a main loop of its own, whose tf32 multiplies half as fast as bf16:
//   W is exact in bf16, and so is z (autocast): 2 products in bf16 are enough beside operands of 8 bits;
//   W is exact in bf16, z is not: 3 products in bf16 beat 2 in tf32;
//   W is fp16, which tf32 holds, but bf16 only in two parts: 2 products in tf32 beat 5 in bf16;
//   x and W are fp32 and rounded to tf32 as in the forward: W is rounded the same, G in 2 parts.
// A W of more parts (fp32 that the forward did not round) takes those pairs of parts that count: of (W's, G's) in the order
// (0, 0) (0, 1) (1, 0) in tf32 and (0, 0) (0, 1) (0, 2) (1, 0) (1, 1) (1, 2) (2, 0) in bf16: what is left out is at most 2^-22
// and 2^-24, as are the remainders.
#pragma once

#include "element.cuh"
#include "ptx.cuh"

namespace localsgd::cuda {

// The parts of a number, largest first. `take` returns the next one and leaves what remains.
template <Core kProduct>
struct Parts;

template <>
struct Parts<Core::ffma> {
    using Value = float;
    static constexpr int kCount = 1;
    static LOCALSGD_DEVICE Value take(float& rest) {
        const float all = rest;
        rest = 0;
        return all;
    }
};

template <>
struct Parts<Core::mma_bf16> {
    using Value = unsigned short;
    static constexpr int kCount = 3;
    static LOCALSGD_DEVICE Value take(float& rest) {
        const unsigned part = float_to_bfloat16(rest);
        rest -= bfloat16_to_float(part);
        return static_cast<Value>(part);
    }
};

template <>
struct Parts<Core::mma_tf32> {
    using Value = float;
    static constexpr int kCount = 2;
    static LOCALSGD_DEVICE Value take(float& rest) {
        const float part = __uint_as_float(to_tf32(rest));
        rest -= part;
        return part;
    }
};

} // namespace localsgd::cuda
