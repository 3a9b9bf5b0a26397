// D[K, C/g * taps] = sum over output positions of z * patch(x): an implicit GEMM whose summed index is the position.
#pragma once

#include "split_k.cuh"
#include "tile_ffma.cuh"

namespace localsgd::cuda {

template <class T, Access kZ, Access kX>
__global__ void __launch_bounds__(T::kThreads, kResidentBlocks<T, kZ, kX>) direct_kernel(const DirectParams p) {
    if (p.first == kCorrelate) {
        LOCALSGD_SHARED(FfmaStorage<T>, shared);
        for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(p.grid.units); unit += gridDim.x) {
            unsigned split = unit;
            const TilePlace place = place_of<T>(p.grid, divide(split, p.grid.by_splits));
            const int begin = static_cast<int>(split) * p.grid.split_positions;
            const int end = min(begin + p.grid.split_positions, p.x.positions);
            float sum[8][8];
            correlate_ffma<T, kZ, kX>(sum, shared, p.z, p.x, place.group, place.m, place.n, begin, end);
            LOCALSGD_FORGET(unit); // two registers less in the main loop
            split = unit;
            const unsigned tile = divide(split, p.grid.by_splits);
            store_partial<T>(p.workspace, p.grid, tile, split, sum);
        }
    }
    if (p.first < kReduce && p.last >= kReduce) grid_barrier(p.workspace.barrier);
    if (p.first <= kReduce && p.last >= kReduce) reduce_partials<T>(p.workspace, p.grid, p.z, p.x, p.target, p.to_target);
    if (p.first < kWrite && p.last >= kWrite) grid_barrier(p.workspace.barrier);
    if (p.last >= kWrite) norm_and_write<T>(p.workspace, p.grid, p.z, p.x, p.target, p.step);
}

} // namespace localsgd::cuda
