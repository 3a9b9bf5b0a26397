// The Gram kernels of the matrix-unit cores. Each core's are compiled in a file of their own.
#pragma once

#include "gram.cuh"
#include "gram_variants.h"
#include "pipeline_mma.cuh"

namespace localsgd::cuda {

template <Core kProductCore, int kSize, int kThreads>
struct ProductPathOf {
    using Type = PipelinedMma<MmaTile<kProductCore, kSize, kSize>>;
    static constexpr bool kExists = Type::kExists;
};
// Of sm_75, where fp16 is all that matrix units multiply: kernels with this product are not compiled for others, unless which
// GPU is emulated turns out at run time.
template <int kSize, int kThreads>
struct ProductPathOf<Core::ffma, kSize, kThreads> {
    using Type = FfmaProduct<kSize, kThreads>;
#if defined(LOCALSGD_EMULATES_ANY_GPU)
    static constexpr bool kExists = true;
#else
    static constexpr bool kExists = LOCALSGD_ARCH < 800;
#endif
};

template <Core kCore, int kSize, Access kAccess, Core kProductCore>
struct GramPaths {
    using T = MmaTile<kCore, kSize, kSize>;
    using Gram = typename MmaPathOf<T, kAccess, kAccess>::Type;
    using ProductPath = ProductPathOf<kProductCore, kSize, T::kThreads>;
    using Product = typename ProductPath::Type;
    // A product on fused multiply-adds takes some registers more in a small block, as in tile_ffma.cuh.
    static constexpr int kResident =
        kProductCore == Core::ffma && kSize == 64 ? 384 / T::kThreads : kMmaResidentBlocks<T, kAccess, kAccess>;
    static constexpr bool kExists = Gram::kExists && ProductPath::kExists;
};

} // namespace localsgd::cuda

#define LOCALSGD_GRAM_SIZES(X, core, access, product) \
    X(core, 128, Access::access, product)             \
    X(core, 64, Access::access, product)

#if defined(__CUDACC_RTC__)
#define LOCALSGD_GRAM_MMA(core, size, access, product) \
    template __global__ void gram_kernel<Core::core, size, access, Core::product>(GramParams);
#define LOCALSGD_DEFINE_GRAM_KERNELS(name, count, KERNELS) \
    namespace localsgd::cuda {                             \
    KERNELS(LOCALSGD_GRAM_MMA)                             \
    }
#else
#define LOCALSGD_GRAM_MMA(core, size, access, product)                                                         \
    gram_variant<Core::core, size, access, Core::product, GramPaths<Core::core, size, access, Core::product>>( \
        Core::product == Core::ffma ? 75 : 80, Core::product == Core::ffma ? 80 : 1 << 30,                     \
        gram_kernel<Core::core, size, access, Core::product>),
#define LOCALSGD_DEFINE_GRAM_KERNELS(name, count, KERNELS)        \
    namespace localsgd::cuda {                                    \
    const GramVariant name[count] = {KERNELS(LOCALSGD_GRAM_MMA)}; \
    }
#endif
