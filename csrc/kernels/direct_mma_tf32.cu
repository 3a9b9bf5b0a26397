#include "direct_mma.cuh"

LOCALSGD_DEFINE_MMA_KERNELS(mma_tf32, kMmaTf32Variants, LOCALSGD_MMA_TF32_KERNELS)
