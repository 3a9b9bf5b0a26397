// D[K, C/g * taps] = sum over output positions of z * patch(x): an implicit GEMM whose summed index is the position.
#pragma once

#include "split_k.cuh"
#include "tile_ffma.cuh"

namespace localsgd::cuda {

struct Unit {
    TilePlace place;
    int begin, end; // positions
};

template <class T>
LOCALSGD_DEVICE Unit unit_of(const DirectParams& p, unsigned unit) {
    unsigned split = unit;
    const TilePlace place = place_of<T>(p.grid, divide(split, p.grid.by_splits));
    const int begin = static_cast<int>(split) * p.grid.split_positions;
    return {place, begin, min(begin + p.grid.split_positions, p.x.positions)};
}

// What follows the main loop, in this launch or in one of its own.
template <class T>
LOCALSGD_DEVICE void finish_direct(const DirectParams& p) {
    if (p.first < kReduce && p.last >= kReduce) grid_barrier(p.workspace.barrier);
    if (p.first <= kReduce && p.last >= kReduce) reduce_partials<T>(p.workspace, p.grid, p.z, p.x, p.target, p.to_target);
    if (p.first < kWrite && p.last >= kWrite) grid_barrier(p.workspace.barrier);
    if (p.last >= kWrite) norm_and_write<T>(p.workspace, p.grid, p.z, p.x, p.target, p.step);
}

template <class T, Access kZ, Access kX>
__global__ void __launch_bounds__(T::kThreads, kResidentBlocks<T, kZ, kX>) direct_kernel(const DirectParams p) {
    if (p.first == kCorrelate) {
        LOCALSGD_SHARED(FfmaStorage<T>, shared);
        for (unsigned unit = blockIdx.x; unit < static_cast<unsigned>(p.grid.units); unit += gridDim.x) {
            const auto [place, begin, end] = unit_of<T>(p, unit);
            float sum[8][8];
            correlate_ffma<T, kZ, kX>(sum, shared, p.z, p.x, place.group, place.m, place.n, begin, end);
            LOCALSGD_FORGET(unit); // two registers less in the main loop
            unsigned split = unit;
            const unsigned tile = divide(split, p.grid.by_splits);
            store_partial<T>(p.workspace, p.grid, tile, split, sum);
        }
    }
    finish_direct<T>(p);
}

} // namespace localsgd::cuda
