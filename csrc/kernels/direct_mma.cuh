// The direct kernels of the matrix-unit cores. Each core's are compiled in a file of their own.
#pragma once

#include "direct.cuh"
#include "direct_variants.h"
#include "segments_mma.cuh"

namespace localsgd::cuda {

template <class T>
struct MmaPathOf<T, Access::chunks16, Access::segments> {
    using Type = SegmentedMma<T>;
};

template <class T>
struct MmaPathOf<T, Access::chunks16, Access::segments32> {
    using Type = SegmentedMma<T, float>;
};

template <class T, Access kZ, Access kX>
__global__ void __launch_bounds__(T::kThreads, kMmaResidentBlocks<T, kZ, kX>) direct_mma_kernel(const DirectParams p) {
    using Path = typename MmaPathOf<T, kZ, kX>::Type;
    if constexpr (!Path::kExists) {
        __trap(); // compiled for an architecture without the instructions: never nothing without a word
    } else {
        if (p.first == kCorrelate) {
            LOCALSGD_DYNAMIC_SHARED(bytes);
            auto& shared = *reinterpret_cast<typename Path::Storage*>(bytes);
            correlate_units<Path>(p.workspace, p.grid, p.z, x_of<kX>(p), shared);
        }
        finish_direct<T>(p);
    }
}

#if !defined(__CUDACC_RTC__)
// What the host has to know of a kernel.
template <class T, Access kZ, Access kX>
constexpr Variant mma_variant() {
    using Path = typename MmaPathOf<T, kZ, kX>::Type;
    const bool chunks = kZ == Access::chunks16;
    return {T::kCore,
            T::kM,
            T::kN,
            T::kThreads,
            Path::kPositions,
            static_cast<int>(sizeof(typename Path::Storage)),
            T::kCore == Core::mma_f16 && !chunks ? 75 : 80,
            kZ,
            kX,
            kX == Access::segments     ? kSegmentChunks
            : kX == Access::segments32 ? 2 * kSegmentChunks
                                       : 0,
            direct_mma_kernel<T, kZ, kX>};
}
#endif

} // namespace localsgd::cuda

#define LOCALSGD_MMA_ACCESSES(X, core, m, n)              \
    X(core, m, n, Access::chunks16, Access::chunks16)     \
    X(core, m, n, Access::channels4, Access::channels4)   \
    X(core, m, n, Access::channels4, Access::scalar)      \
    X(core, m, n, Access::positions4, Access::positions4) \
    X(core, m, n, Access::positions4, Access::scalar)     \
    X(core, m, n, Access::scalar, Access::scalar)
#define LOCALSGD_MMA_TF32_KERNELS(X, core)              \
    LOCALSGD_MMA_ACCESSES(X, core, 128, 128)            \
    LOCALSGD_MMA_ACCESSES(X, core, 64, 128)             \
    LOCALSGD_MMA_ACCESSES(X, core, 128, 64)             \
    LOCALSGD_MMA_ACCESSES(X, core, 64, 64)              \
    X(core, 64, 32, Access::chunks16, Access::segments) \
    X(core, 64, 160, Access::chunks16, Access::segments)
#define LOCALSGD_MMA_HALF_KERNELS(X, core)                \
    LOCALSGD_MMA_TF32_KERNELS(X, core)                    \
    X(core, 64, 32, Access::chunks16, Access::segments32) \
    X(core, 64, 160, Access::chunks16, Access::segments32)

#if defined(__CUDACC_RTC__)
#define LOCALSGD_INSTANTIATE_MMA(core, m, n, z, x) \
    template __global__ void direct_mma_kernel<MmaTile<Core::core, m, n>, z, x>(DirectParams);
#define LOCALSGD_DEFINE_MMA_KERNELS(core, name, KERNELS) \
    namespace localsgd::cuda {                           \
    KERNELS(LOCALSGD_INSTANTIATE_MMA, core)              \
    }
#else
#define LOCALSGD_MMA_VARIANT(core, m, n, z, x) mma_variant<MmaTile<Core::core, m, n>, z, x>(),
#define LOCALSGD_DEFINE_MMA_KERNELS(core, name, KERNELS)               \
    namespace localsgd::cuda {                                         \
    const decltype(name) name = {KERNELS(LOCALSGD_MMA_VARIANT, core)}; \
    }
#endif
