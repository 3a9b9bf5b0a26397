// Instructions that C++ has no words for, each under one name with its emulated twin. PTX ISA, "cp.async" and "Warp-level
// matrix instructions". Where the instruction is missing a function is declared without a body, so that a kernel that would
// call it does not link. LOCALSGD_ARCH is the architecture being compiled for.
#pragma once

#include "element.cuh"

#if defined(LOCALSGD_ARCH)
// a native test emulates another one
#elif defined(LOCALSGD_EMULATION)
#define LOCALSGD_ARCH 900
#elif defined(__CUDA_ARCH__)
#define LOCALSGD_ARCH __CUDA_ARCH__
#else
#define LOCALSGD_ARCH 900 // nvcc's host pass, which only parses
#endif

namespace localsgd::cuda {

// Through the read-only cache; in place, so that nothing is copied where nothing is loaded.
LOCALSGD_DEVICE void load_if(unsigned& bits, const void* from, unsigned condition) {
#if defined(LOCALSGD_EMULATION)
    if (condition) bits = __ldg(static_cast<const unsigned*>(from));
#else
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %2, 0;\n\t@p ld.global.nc.b32 %0, [%1];\n\t}"
                 : "+r"(bits)
                 : "l"(from), "r"(condition));
#endif
}
LOCALSGD_DEVICE void load_if(uint2& bits, const void* from, unsigned condition) {
#if defined(LOCALSGD_EMULATION)
    if (condition) bits = __ldg(static_cast<const uint2*>(from));
#else
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %3, 0;\n\t@p ld.global.nc.v2.b32 {%0, %1}, [%2];\n\t}"
                 : "+r"(bits.x), "+r"(bits.y)
                 : "l"(from), "r"(condition));
#endif
}

#if LOCALSGD_ARCH >= 750

#if !defined(LOCALSGD_EMULATION)
LOCALSGD_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
#endif

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 bring the rows of matrix i.
LOCALSGD_DEVICE void ldmatrix(unsigned (&to)[4], const void* row) {
#if defined(LOCALSGD_EMULATION)
    emulation::load_matrix(to, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same, each matrix transposed: operands that lie with the summed index outermost, as x and z do.
LOCALSGD_DEVICE void ldmatrix_transposed(unsigned (&to)[4], const void* row) {
#if defined(LOCALSGD_EMULATION)
    emulation::load_matrix(to, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// d[16, 8] += a[16, 8] * b[8, 8], fp16: the shape of sm_75.
LOCALSGD_DEVICE void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1]) {
#if defined(LOCALSGD_EMULATION)
    emulation::mma_16bit<emulation::HalfBits, 8>(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

#else

__device__ void ldmatrix(unsigned (&to)[4], const void* row);
__device__ void ldmatrix_transposed(unsigned (&to)[4], const void* row);
__device__ void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1]);

#endif // sm_75

#if LOCALSGD_ARCH >= 800

// 16 bytes from global to shared memory without registers, past the first-level cache; zeros if not `valid`.
LOCALSGD_DEVICE void cp_async16(void* to, const void* from, bool valid = true) {
#if defined(LOCALSGD_EMULATION)
    emulation::copy_async(to, from, valid ? 16 : 0, 16);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

LOCALSGD_DEVICE void cp_async_commit() {
#if defined(LOCALSGD_EMULATION)
    emulation::commit_async();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all but this thread's latest kPending groups; a barrier must follow before other threads read the data.
template <int kPending>
LOCALSGD_DEVICE void cp_async_wait() {
#if defined(LOCALSGD_EMULATION)
    emulation::wait_async(kPending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

LOCALSGD_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(LOCALSGD_EMULATION)
    emulation::mma_16bit<emulation::BFloat16Bits, 16>(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

LOCALSGD_DEVICE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(LOCALSGD_EMULATION)
    emulation::mma_16bit<emulation::HalfBits, 16>(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// tf32 operands are fp32 bit patterns rounded by `to_tf32`; the matrix unit truncates what is not.
LOCALSGD_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(LOCALSGD_EMULATION)
    emulation::mma_tf32(d, a, b);
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

LOCALSGD_DEVICE unsigned to_tf32(float value) { // nearest, ties away from zero
#if defined(LOCALSGD_EMULATION)
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#endif
}

// Two numbers rounded to nearest, ties to even, in one register.
LOCALSGD_DEVICE unsigned pack_bf16(float low, float high) {
#if defined(LOCALSGD_EMULATION)
    return float_to_bfloat16(low) | float_to_bfloat16(high) << 16;
#else
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
}
LOCALSGD_DEVICE unsigned pack_f16(float low, float high) {
#if defined(LOCALSGD_EMULATION)
    return float_to_half(low) | float_to_half(high) << 16;
#else
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
}

#else

__device__ void cp_async16(void* to, const void* from, bool valid = true);
__device__ void cp_async_commit();
template <int kPending>
__device__ void cp_async_wait();
__device__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
__device__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
__device__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
__device__ unsigned to_tf32(float value);
__device__ unsigned pack_bf16(float low, float high);
__device__ unsigned pack_f16(float low, float high);

#endif // sm_80

} // namespace localsgd::cuda
