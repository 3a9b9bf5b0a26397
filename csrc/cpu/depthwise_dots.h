// Depthwise 3x3 layers of bf16 by AVX-512's dot products of pairs of pixels: exact products, summed in fp32, but for what is
// subnormal, which is taken for 0. The CPU must have them.
#pragma once

#include <cstdint>

#include "pixel_taps.h"

namespace localsgd {

constexpr int64_t kDotChannels = 32; // of a pixel at once

// Whether a band of pixels of such a layer can be summed so.
bool dots_fit_pixels(const Geometry& geometry);

// `sums` [9][kBlockChannels] += 3x3 taps over a band, in an order of channels of their own.
void dot_pixels(const Geometry& geometry, const Band<BFloat16>& band, float* sums);

// `total` [9][pitch] += those sums.
void join_dots(const float* sums, int64_t channels, double* total, int64_t pitch);

} // namespace localsgd
