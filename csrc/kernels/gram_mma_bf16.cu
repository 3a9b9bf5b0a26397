#include "gram_mma.cuh"

#define LOCALSGD_GRAM_BF16(X)                              \
    LOCALSGD_GRAM_SIZES(X, mma_bf16, chunks16, mma_bf16)   \
    LOCALSGD_GRAM_SIZES(X, mma_bf16, channels4, mma_bf16)  \
    LOCALSGD_GRAM_SIZES(X, mma_bf16, positions4, mma_bf16) \
    LOCALSGD_GRAM_SIZES(X, mma_bf16, scalar, mma_bf16)
LOCALSGD_DEFINE_GRAM_KERNELS(kGramBf16Variants, kGramBf16Kernels, LOCALSGD_GRAM_BF16)
