// The host's half of every kernel family: questions to the runtime, and a launch of all phases or one for each.
#pragma once

#include <algorithm>

#include "platform.cuh"

namespace localsgd::cuda {

inline cudaError_t query_device(int& multiprocessors, bool& cooperative) {
    int device = 0, value = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, device);
    cooperative = value != 0;
    return error;
}

// The compute capability that a kernel was compiled for, 80 for 8.0. Not the device's own: where it runs an older
// architecture's code, that has no newer instructions.
template <class Params>
cudaError_t query_compute(int& compute, void (*kernel)(Params)) {
    cudaFuncAttributes attributes = {};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    compute = attributes.ptxVersion;
    return error;
}

constexpr int kSharedUnasked = 48 << 10; // bytes of dynamic shared memory that any kernel may have

// Blocks alive at once on a multiprocessor, after asking for the shared memory that they need.
template <class Params>
cudaError_t query_blocks(int& blocks, void (*kernel)(Params), int threads, int shared_bytes) {
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedUnasked)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
    return error;
}

struct Grid {
    int blocks, threads;
    size_t shared_bytes; // dynamic
    bool cooperative;    // may have barriers: one launch, otherwise one a phase
};

template <class Params, class Phase>
cudaError_t launch_phases(void (*kernel)(Params), const Grid& grid, Params p, Phase first, Phase last, cudaStream_t stream) {
    const auto run = [&](Phase from, Phase to, bool cooperative) {
        p.first = from;
        p.last = to;
        return launch(kernel, dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.threads)),
                      grid.shared_bytes, cooperative, stream, p);
    };
    if (grid.cooperative) {
        const cudaError_t error = run(first, last, true);
        // Less may fit than the runtime said, beside other processes or under a debugger: the other way gives the same bits.
        if (error != cudaErrorCooperativeLaunchTooLarge) return error;
        cudaGetLastError();
    }
    for (int phase = first; phase <= last; ++phase) {
        const cudaError_t error = run(static_cast<Phase>(phase), static_cast<Phase>(phase), false);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

} // namespace localsgd::cuda
