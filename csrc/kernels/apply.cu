#include "apply.cuh"

#if !defined(__CUDACC_RTC__)
#include <algorithm>

#include "apply.h"
#include "launch.h"
#include "workspace.h"

namespace localsgd::cuda {
namespace {

// An empty tensor has one chunk as well, which finds no direction to go and counts that.
int64 chunks_of(int64 count) { return std::max<int64>(1, (count + kChunk - 1) / kChunk); }

} // namespace

cudaError_t query_chip(ApplyChip& chip) {
    int multiprocessors = 0, blocks = 0;
    bool cooperative = false;
    cudaError_t error = query_device(multiprocessors, cooperative);
    if (error == cudaSuccess) error = query_blocks(blocks, apply_kernel, kApplyThreads, 0);
    chip = {multiprocessors * blocks, cooperative};
    return error;
}

size_t apply_workspace_bytes(const ApplyItem* items, int count) {
    int64 most = 0;
    for (int first = 0; first < count; first += kApplyTensors) {
        int64 chunks = 0;
        for (int i = first; i < std::min(count, first + kApplyTensors); ++i) chunks += chunks_of(items[i].count);
        most = std::max(most, chunks);
    }
    return layout_bytes(static_cast<size_t>(most), 0);
}

cudaError_t apply_update(const ApplyItem* items, int count, const Step& step, int skipped_stride, const ApplyChip& chip,
                         const Scratch& workspace, cudaStream_t stream) {
    for (int first = 0; first < count; first += kApplyTensors) {
        ApplyParams p{};
        p.count = std::min(count - first, kApplyTensors);
        int64 chunks = 0;
        for (int i = 0; i < p.count; ++i) {
            const ApplyItem& item = items[first + i];
            p.tensors[i] = {item.weight, item.d, item.count, static_cast<int>(chunks), item.element, item.d_element};
            chunks += chunks_of(item.count);
        }
        if (chunks > 0x7fffffff - chip.blocks) return cudaErrorInvalidValue; // 2^43 elements
        p.chunks = static_cast<int>(chunks);
        p.skipped_stride = skipped_stride;
        p.step = step;
        if (step.skipped) p.step.skipped += static_cast<int64>(first) * skipped_stride;
        p.workspace = lay_out(workspace, static_cast<size_t>(chunks));
        const int blocks = static_cast<int>(std::min<int64>(chunks, std::max(1, chip.blocks)));
        const cudaError_t error =
            launch_phases(apply_kernel, {blocks, kApplyThreads, 0, chip.cooperative}, p, kReduce, kWrite, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

} // namespace localsgd::cuda
#endif
