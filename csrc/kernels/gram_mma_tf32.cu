#include "gram_mma.cuh"

#define LOCALSGD_GRAM_TF32(X)                              \
    LOCALSGD_GRAM_SIZES(X, mma_tf32, chunks16, mma_tf32)   \
    LOCALSGD_GRAM_SIZES(X, mma_tf32, positions4, mma_tf32) \
    LOCALSGD_GRAM_SIZES(X, mma_tf32, scalar, mma_tf32)
LOCALSGD_DEFINE_GRAM_KERNELS(kGramTf32Variants, kGramTf32Kernels, LOCALSGD_GRAM_TF32)
