#include "gram_mma.cuh"

// The product of fp16 layers is in tf32, see parts.cuh, and on sm_75 on fused multiply-adds.
#define LOCALSGD_GRAM_F16(X)                              \
    LOCALSGD_GRAM_SIZES(X, mma_f16, chunks16, mma_tf32)   \
    LOCALSGD_GRAM_SIZES(X, mma_f16, channels4, mma_tf32)  \
    LOCALSGD_GRAM_SIZES(X, mma_f16, positions4, mma_tf32) \
    LOCALSGD_GRAM_SIZES(X, mma_f16, scalar, mma_tf32)     \
    LOCALSGD_GRAM_SIZES(X, mma_f16, channels4, ffma)      \
    LOCALSGD_GRAM_SIZES(X, mma_f16, positions4, ffma)     \
    LOCALSGD_GRAM_SIZES(X, mma_f16, scalar, ffma)
LOCALSGD_DEFINE_GRAM_KERNELS(kGramF16Variants, kGramF16Kernels, LOCALSGD_GRAM_F16)
