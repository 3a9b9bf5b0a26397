// The direct kernels as values, from which get_best_config chooses.
#pragma once

#include "params.h"

namespace localsgd::cuda {

struct Variant {
    Core core;
    int tile_m, tile_n, threads;
    int step_positions; // of the main loop; splits are multiples of it
    int shared_bytes;   // dynamic
    int compute;        // the compute capability, 75 for 7.5, from which on its instructions exist
    Access z, x;
    int chunks; // of a step's segments, at most
    void (*kernel)(DirectParams);
};

constexpr int kDirectTiles = 4;
constexpr int kDirectAccesses = 5;                                                   // pairs of accesses to z and x: ffma,
constexpr int kMmaAccesses = 6;                                                      // each mma core
constexpr int kSegmentKernels = 4, kTf32SegmentKernels = 2, kHalfSegmentKernels = 4; // for few channels
constexpr int kFfmaKernels = kDirectTiles * kDirectAccesses + kSegmentKernels;
constexpr int kTf32Kernels = kDirectTiles * kMmaAccesses + kTf32SegmentKernels;
constexpr int kHalfKernels = kDirectTiles * kMmaAccesses + kHalfSegmentKernels;
constexpr int kDirectKernels = kFfmaKernels + 2 * kHalfKernels + kTf32Kernels; // ffma, bf16, f16, tf32

#if !defined(__CUDACC_RTC__)
extern const Variant kMmaBf16Variants[kHalfKernels], kMmaF16Variants[kHalfKernels], kMmaTf32Variants[kTf32Kernels];
#endif

} // namespace localsgd::cuda
