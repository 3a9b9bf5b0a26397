// First layers: x of few channels, copied to shared memory as it lies, pixel by pixel, and only there looked up by position and
// column. Gathering its elements from global memory takes an instruction for each, as often as windows overlap.
#pragma once

#include "geometry.cuh"

namespace localsgd::cuda {

LOCALSGD_DEVICE int first_kernel_row(const Segments& x, int first_n) {
    return static_cast<int>(quotient(static_cast<unsigned>(first_n), x.by_kernel_row));
}

// A step's chunks for the tile of D whose first column is `first_n`: of each row of the kernel, then zeros for columns beyond
// the matrix.
template <int kChunks, int kThreads>
LOCALSGD_DEVICE void tabulate_segments(PatchColumn (&chunks)[kChunks], const Segments& x, int first_n) {
    const int first = first_kernel_row(x, first_n) * x.chunks;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kChunks; i += kThreads) {
        const bool zeros = i >= x.rows * x.chunks;
        chunks[i] = patch_column(x, 0, static_cast<unsigned>(zeros ? x.columns : first + i));
    }
}

// Where the first position's element for column `n` of D lies in a step's chunks, each of kWidth elements.
template <int kWidth>
LOCALSGD_DEVICE int place_in_segments(const Segments& x, int first_n, int n) {
    unsigned within = static_cast<unsigned>(n);
    const int row = static_cast<int>(divide(within, x.by_kernel_row)) - first_kernel_row(x, first_n);
    const int pixel = static_cast<int>(quotient(within, x.by_channels));
    return n < x.patch ? row * x.chunks * kWidth + x.lead + static_cast<int>(within) + pixel * x.gap
                       : x.rows * x.chunks * kWidth;
}

// How many of a step's positions, from `position` on, exist; the others pad the row of the output.
LOCALSGD_DEVICE int positions_left(const Segments& x, int position) {
    unsigned within = static_cast<unsigned>(position);
    divide(within, x.row);
    return x.across - static_cast<int>(within);
}

} // namespace localsgd::cuda
