// D[K, C/g * taps] = sum over output positions of z * patch(x): an implicit GEMM whose summed index is the position.
#pragma once

#include "segments_ffma.cuh"
#include "split_k.cuh"

namespace localsgd::cuda {

// What follows the main loop, in this launch or in one of its own.
template <class T>
LOCALSGD_DEVICE void finish_direct(const DirectParams& p) {
    if (is_whole(p.grid, p.to_target)) {
        if (p.first == kCorrelate) put_squares_of_units<T>(p.workspace, p.grid);
    } else {
        if (p.first < kReduce && p.last >= kReduce) grid_barrier(p.workspace.barrier);
        if (p.first <= kReduce && p.last >= kReduce)
            reduce_partials<T>(p.workspace, p.grid, p.z.columns, p.x, p.target, p.to_target);
    }
    if (p.last < kWrite) return;
    norm_and_write<T>(p.workspace, p.grid, p.z.columns, p.x, p.target, p.step, [&] {
        if (p.first < kWrite) grid_barrier(p.workspace.barrier);
    });
}

template <class T, Access kZ, Access kX>
struct FfmaPathOf {
    using Type = StagedFfma<T, kZ, kX>;
};
template <class T, Access kZ>
struct FfmaPathOf<T, kZ, Access::segments> {
    using Type = SegmentedFfma<T, kZ>;
};

// x as the main loop of a kernel reads it.
template <Access kX>
LOCALSGD_DEVICE const auto& x_of(const DirectParams& p) {
    if constexpr (kX == Access::segments || kX == Access::segments32)
        return p.segments;
    else
        return p.read;
}

template <class T, Access kZ, Access kX>
__global__ void __launch_bounds__(T::kThreads, kResidentBlocks<T, kZ, kX>) direct_kernel(const DirectParams p) {
    using Path = typename FfmaPathOf<T, kZ, kX>::Type;
    if (p.first == kCorrelate) {
        LOCALSGD_SHARED(typename Path::Storage, shared);
        correlate_units<Path>(p.workspace, p.grid, p.z, x_of<kX>(p), shared);
    }
    finish_direct<T>(p);
}

} // namespace localsgd::cuda
