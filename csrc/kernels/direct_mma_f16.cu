#include "direct_mma.cuh"

LOCALSGD_DEFINE_MMA_KERNELS(mma_f16, kMmaF16Variants, LOCALSGD_MMA_HALF_KERNELS)
