// Norm and signed write of many tensors on a GPU: what the host calls.
#pragma once

#include <cstddef>

#include "platform.cuh"
#include "workspace.h"

namespace localsgd::cuda {

struct ApplyItem {
    void* weight;
    Element element;
    const void* d; // [count], in the order of the weight's memory
    Element d_element;
    int64 count;
};

struct ApplyChip {
    int blocks = 0; // alive at once on the device
    bool cooperative = false;
};
cudaError_t query_chip(ApplyChip& chip);

// As workspace_bytes of direct.h, header included.
size_t apply_workspace_bytes(const ApplyItem* items, int count);

// W_i += lr * D_i / ||D_i|| with a norm for each tensor. One launch for every kApplyTensors tensors (two without cooperative
// launches). `skipped_stride` 1: step.skipped is an array of a counter each.
cudaError_t apply_update(const ApplyItem* items, int count, const Step& step, int skipped_stride, const ApplyChip& chip,
                         const Scratch& workspace, cudaStream_t stream);

} // namespace localsgd::cuda
