#include "device.h"

#include <algorithm>

#include <ATen/ops/zeros.h>

namespace localsgd::cuda {
namespace {

using Registry = std::unordered_map<int, std::unique_ptr<Device>>;

std::mutex registry_mutex;
// Never destroyed: at the end of the process the runtime may be gone before its memory could be given back.
Registry& registry = *new Registry;

int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

} // namespace

Device::Device(at::Device device) : device_(device) {
    const DeviceGuard guard(device);
    check(query_chip(chips_.direct), "direct kernels");
    check(query_chip(chips_.gram), "Gram kernels");
    check(query_chip(chips_.depthwise), "depthwise kernels");
    check(query_chip(chips_.apply), "apply kernel");
    chips_.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    chips_.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    // In kHz; some drivers no longer tell. Two transfers a clock of memory, whatever its generation calls a clock.
    const auto told = [](int value, double otherwise) { return value > 0 ? value / 1e3 : otherwise; };
    chips_.clocks_per_us = told(attribute(cudaDevAttrClockRate), 1500);
    chips_.bytes_per_us =
        2 * told(attribute(cudaDevAttrMemoryClockRate), 2000) * std::max(128, attribute(cudaDevAttrGlobalMemoryBusWidth)) / 8;
    TORCH_CHECK(current_stream(device).capture == 0,
                "the first update on a device must not be captured in a CUDA graph: make one before, as any graph needs it");
    barriers_ = at::zeros({kBarriers * kBarrierSpacing}, at::TensorOptions().dtype(at::kInt).device(device));
}

Scratch Device::scratch(size_t bytes, const Stream& stream) {
    Buffers& buffers = buffers_[stream.raw];
    if (stream.capture && buffers.capture != stream.capture) {
        buffers.captured = {at::Tensor(), nullptr}; // an earlier graph's, which keeps that memory for itself
        buffers.capture = stream.capture;
    }
    auto& [memory, barrier] = stream.capture ? buffers.captured : buffers.eager;
    if (!barrier)
        barrier =
            reinterpret_cast<unsigned*>(barriers_.mutable_data_ptr<int>()) + barriers_used_++ % kBarriers * kBarrierSpacing;
    if (!memory.defined() || memory.nbytes() < bytes) {
        const auto options = at::TensorOptions().dtype(at::kByte).device(device_);
        const size_t size = (bytes + (1 << 20) - 1) >> 20 << 20;
        memory.reset(); // before the new one is taken: the allocator may then extend it
        try {
            memory = allocate({static_cast<int64_t>(std::max(size, largest_))}, options); // so that it need not grow again
        } catch (const c10::OutOfMemoryError&) {
            memory = allocate({static_cast<int64_t>(size)}, options);
        }
        largest_ = std::max(largest_, size);
    }
    return {barrier, memory.mutable_data_ptr()};
}

Device& state_of(at::Device device) {
    const std::lock_guard lock(registry_mutex);
    auto& state = registry[device.has_index() ? device.index() : 0];
    if (!state) {
        const std::string reason = unavailable(device);
        TORCH_CHECK(reason.empty(), "no localsgd_ext kernel runs on ", device, ": ", reason);
        state = std::make_unique<Device>(device);
    }
    return *state;
}

std::string unavailable(at::Device device) {
    if (device.type() != kDeviceType) return "it is no CUDA device";
#if defined(LOCALSGD_EMULATION)
    return "";
#else
    int devices = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    if (device.has_index() && device.index() >= devices) return "there are " + std::to_string(devices) + " CUDA devices";
    const DeviceGuard guard(device);
    ApplyChip chip;
    const cudaError_t error = query_chip(chip); // asks the runtime about a kernel, which it must have loaded for that
    if (error == cudaSuccess) return "";
    cudaGetLastError();
    const std::string name = std::to_string(attribute(cudaDevAttrComputeCapabilityMajor)) +
                             std::to_string(attribute(cudaDevAttrComputeCapabilityMinor));
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion)
        return "it is of architecture sm_" + name + ", for which this build holds no code (build with TORCH_CUDA_ARCH_LIST)";
    return cudaGetErrorString(error);
#endif
}

void forget_devices() {
    const std::lock_guard lock(registry_mutex);
    registry.clear();
}

} // namespace localsgd::cuda
