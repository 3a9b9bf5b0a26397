// A barrier over all blocks of a grid that are alive together, and sums over a block.
#pragma once

#include "platform.cuh"

namespace localsgd::cuda {

// An addition that comes after what this thread has written or, before a __syncthreads, its block; and a read before what
// follows it there: what CUDA's own barriers over grids are made of. Fences do more (they are sequentially consistent), but
// older GPUs have nothing else.
LOCALSGD_DEVICE unsigned add_release(unsigned* to, unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
    unsigned old;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(__cvta_generic_to_global(to)), "r"(value)
                 : "memory");
    return old;
#else
    __threadfence();
    return atomicAdd(to, value);
#endif
}
LOCALSGD_DEVICE unsigned load_acquire(const unsigned* from) {
    unsigned value;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
#else
    value = *static_cast<const volatile unsigned*>(from);
    __threadfence();
#endif
    return value;
}

// Only in a cooperative launch: otherwise blocks that wait here may keep those out for which they wait.
// One block adds 2^31 - (blocks - 1), the others 1 each, so the last arrival flips the top bit and leaves the rest 0: nothing
// to reset between barriers, launches or replays of a graph, whatever their grids.
LOCALSGD_DEVICE void grid_barrier(unsigned* ticket) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned step = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        const unsigned old = add_release(ticket, step); // after this block's writes
        while (((old ^ load_acquire(ticket)) & 0x80000000u) == 0) {
#if defined(LOCALSGD_EMULATION)
            emulation::backoff();
#endif
        }
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
