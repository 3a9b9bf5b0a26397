// The layout of a launch's workspace: header, sums of squares, partial tiles.
#pragma once

#include <cstddef>

#include "params.h"

namespace localsgd::cuda {

// A workspace is device memory aligned to 256 bytes. Its header must be zero before the first launch that uses it and belongs
// to the kernels afterwards; the rest may hold anything. Launches that may overlap need a workspace each.
constexpr size_t kWorkspaceHeader = 256;

// A workspace, and where its barrier lies: in the header, or elsewhere, which then need not be zeroed with each new memory.
struct Scratch {
    unsigned* barrier;
    void* memory;
    Scratch(void* memory_) : barrier(static_cast<unsigned*>(memory_)), memory(memory_) {}
    Scratch(unsigned* barrier_, void* memory_) : barrier(barrier_), memory(memory_) {}
};

inline size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline size_t layout_bytes(size_t squares, size_t partials) {
    return kWorkspaceHeader + round_up(squares * sizeof(double)) + partials * sizeof(float);
}

inline Workspace lay_out(const Scratch& scratch, size_t squares) {
    auto* bytes = static_cast<unsigned char*>(scratch.memory);
    return {scratch.barrier, reinterpret_cast<double*>(bytes + kWorkspaceHeader),
            reinterpret_cast<float*>(bytes + kWorkspaceHeader + round_up(squares * sizeof(double)))};
}

} // namespace localsgd::cuda
