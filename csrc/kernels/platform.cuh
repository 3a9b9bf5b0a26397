// The compilers that read this directory: nvcc, NVRTC (no standard headers), and a plain C++ compiler that emulates a GPU for
// the native tests.
#pragma once

#if defined(LOCALSGD_EMULATION)
#include "emulation/cuda.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#include "params.h"

// One object of a block's shared memory; no constructors run.
#if defined(LOCALSGD_EMULATION)
#define LOCALSGD_SHARED(type, name)               \
    static constexpr char name##_declaration = 0; \
    auto& name = emulation::static_shared<type>(&name##_declaration)
#define LOCALSGD_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
#else
#define LOCALSGD_SHARED(type, name) __shared__ type name
#define LOCALSGD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// The compiler forgets where an int came from: what was computed from it is computed again rather than kept in registers.
#if defined(__CUDA_ARCH__)
#define LOCALSGD_FORGET(value) asm volatile("" : "+r"(value))
#else
#define LOCALSGD_FORGET(value)
#endif

#define LOCALSGD_DEVICE __device__ __forceinline__

namespace localsgd::cuda {

#if !defined(__CUDACC_RTC__)
// kernel<<<grid, block, dynamic_shared, stream>>>(arguments...), cooperative if asked.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, bool cooperative,
                          cudaStream_t stream, const Arguments&... arguments) {
#if defined(LOCALSGD_EMULATION)
    (void)stream;
    return emulation::launch(kernel, grid, block, dynamic_shared, cooperative, arguments...);
#else
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
#endif
}
#endif

} // namespace localsgd::cuda
