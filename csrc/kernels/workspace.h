// The layout of a launch's workspace: header, sums of squares, partial tiles.
#pragma once

#include <cstddef>

#include "params.h"

namespace localsgd::cuda {

// A workspace is device memory aligned to 256 bytes. Its header must be zero before the first launch that uses it and belongs
// to the kernels afterwards; the rest may hold anything. Launches that may overlap need a workspace each.
constexpr size_t kWorkspaceHeader = 256;

inline size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline size_t layout_bytes(size_t squares, size_t partials) {
    return kWorkspaceHeader + round_up(squares * sizeof(double)) + partials * sizeof(float);
}

inline Workspace lay_out(void* memory, size_t squares) {
    auto* bytes = static_cast<unsigned char*>(memory);
    return {reinterpret_cast<unsigned*>(bytes), reinterpret_cast<double*>(bytes + kWorkspaceHeader),
            reinterpret_cast<float*>(bytes + kWorkspaceHeader + round_up(squares * sizeof(double)))};
}

} // namespace localsgd::cuda
