// A barrier over all blocks of a grid that are alive together, and sums over a block.
#pragma once

#include "platform.cuh"

namespace localsgd::cuda {

LOCALSGD_DEVICE unsigned load_volatile(const unsigned* p) { return *static_cast<const volatile unsigned*>(p); }

// Only in a cooperative launch: otherwise blocks that wait here may keep those out for which they wait.
// One block adds 2^31 - (blocks - 1), the others 1 each, so the last arrival flips the top bit and leaves the rest 0: nothing
// to reset between barriers, launches or replays of a graph, whatever their grids.
LOCALSGD_DEVICE void grid_barrier(unsigned* ticket) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        __threadfence(); // this block's writes come before its arrival
        const unsigned old = atomicAdd(ticket, step);
        while (((old ^ load_volatile(ticket)) & 0x80000000u) == 0) {
#if defined(LOCALSGD_EMULATION)
            emulation::backoff();
#endif
        }
        __threadfence(); // and the others' arrivals before its reads
    }
    __syncthreads();
}

// The sum over a block's threads, in an order that only depends on their number; all threads get it.
template <int kThreads>
LOCALSGD_DEVICE double block_sum(double value) {
    static_assert(kThreads % 32 == 0 && kThreads <= 1024);
    constexpr int kWarps = kThreads / 32;
    using Partials = double[kWarps];
    LOCALSGD_SHARED(Partials, partials);
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partials[w];
    __syncthreads(); // the next sum reuses `partials`
    return sum;
}

// The same for `count` values in memory that other blocks wrote before a grid barrier or an earlier launch: hence past the
// first-level cache.
template <int kThreads>
LOCALSGD_DEVICE double block_sum(const double* values, int count) {
    double sum = 0;
#pragma unroll(kThreads == 32 ? 8 : 2) // loads in flight; grids of small blocks have many
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) sum += __ldcg(values + i);
    return block_sum<kThreads>(sum);
}

} // namespace localsgd::cuda
