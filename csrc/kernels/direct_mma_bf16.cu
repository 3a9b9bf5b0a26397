#include "direct_mma.cuh"

LOCALSGD_DEFINE_MMA_KERNELS(mma_bf16, kMmaBf16Variants, LOCALSGD_MMA_HALF_KERNELS)
