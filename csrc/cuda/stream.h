// What the glue needs of c10::cuda, and what stands in for it where kernels are emulated: there the CPU is the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "../kernels/platform.cuh"

#if defined(LOCALSGD_EMULATION)
#include "emulation/guarded.h"
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace localsgd::cuda {

struct Stream {
    cudaStream_t raw = nullptr;
    uint64_t capture = 0; // the id of the graph capture in progress on it, or 0
};

inline void check(cudaError_t error, const char* what) {
#if defined(LOCALSGD_EMULATION)
    TORCH_CHECK(error == cudaSuccess, what, ": emulated CUDA error ", static_cast<int>(error));
#else
    if (error == cudaSuccess) return;
    cudaGetLastError(); // it is reported here: the next call should not stumble over it
    TORCH_CHECK(false, what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
#endif
}

#if defined(LOCALSGD_EMULATION)

constexpr at::DeviceType kDeviceType = at::kCPU;

struct DeviceGuard {
    explicit DeviceGuard(at::Device) {}
};

inline Stream current_stream(at::Device) { return {}; }

// Poisoned, and against an unmapped page: what reads or writes past its end crashes, what reads before writing finds NaN.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const auto elements = static_cast<size_t>(c10::multiply_integers(sizes));
    auto* const memory = new emulation::Guarded<unsigned char>(elements * options.dtype().itemsize());
    const auto release = [memory](void*) {
        if (!memory->intact()) emulation::fail("an operation's own buffer was overrun");
        delete memory;
    };
    return at::from_blob(memory->data(), sizes, release, options);
}

#else

constexpr at::DeviceType kDeviceType = at::kCUDA;

using DeviceGuard = c10::cuda::CUDAGuard;

inline Stream current_stream(at::Device device) {
    Stream stream{c10::cuda::getCurrentCUDAStream(device.index()).stream(), 0};
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(stream.raw, &status, &id), "cudaStreamGetCaptureInfo");
    if (status == cudaStreamCaptureStatusActive) stream.capture = id;
    return stream;
}

inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

#endif

} // namespace localsgd::cuda
