// The part of the CUDA runtime that launchers use.
#pragma once

#include "machine.h"

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrCooperativeLaunch,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrClockRate,
    cudaDevAttrMemoryClockRate,
    cudaDevAttrGlobalMemoryBusWidth,
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const emulation::Options& o = emulation::options();
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = static_cast<int>(o.multiprocessors);
        break;
    case cudaDevAttrCooperativeLaunch:
        *value = o.cooperative;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = o.ptx_version / 10;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = o.ptx_version % 10;
        break;
    case cudaDevAttrClockRate: // kHz
    case cudaDevAttrMemoryClockRate:
        *value = 1'000'000;
        break;
    case cudaDevAttrGlobalMemoryBusWidth: // bits
        *value = 512;
        break;
    }
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = static_cast<int>(emulation::options().blocks_per_multiprocessor);
    return cudaSuccess;
}

// Dynamic shared memory beyond 48 KiB has to be asked for, kernel by kernel.
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace emulation {
inline std::map<const void*, size_t>& granted_shared() {
    static std::map<const void*, size_t> value;
    return value;
}
} // namespace emulation
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
    attributes->ptxVersion = emulation::options().ptx_version;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<size_t>(value) > emulation::kDynamicShared) return cudaErrorInvalidValue;
    emulation::granted_shared()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    return cudaSuccess;
}

namespace emulation {

// Arguments are copied at the launch, as a launch copies them.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, bool cooperative,
                   const Arguments&... arguments) {
    const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    if (blocks == 0 || threads == 0 || threads > 1024 || dynamic_shared > kDynamicShared) return cudaErrorInvalidConfiguration;
    const auto granted = granted_shared().find(reinterpret_cast<const void*>(kernel));
    if (dynamic_shared > (granted == granted_shared().end() ? size_t{48} << 10 : granted->second)) return cudaErrorInvalidValue;
    const Options& o = options();
    if (cooperative && blocks > o.multiprocessors * o.blocks_per_multiprocessor) return cudaErrorCooperativeLaunchTooLarge;
    run_grid(grid, block, dynamic_shared, cooperative, [=] { kernel(arguments...); });
    return cudaSuccess;
}

} // namespace emulation
