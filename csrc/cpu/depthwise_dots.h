// Depthwise 3x3 layers of bf16 by AVX-512's dot products of pairs of pixels: exact products, summed in fp32, but for what is
// subnormal, which is taken for 0. The CPU must have them.
#pragma once

#include <cstdint>
#include <vector>

#include "pixel_taps.h"

namespace localsgd {

constexpr int64_t kDotChannels = 32; // of a pixel at once

// Whether a band of pixels of such a layer can be summed so.
bool dots_fit_pixels(const Geometry& geometry);

// `sums` [9][kBlockChannels] += 3x3 taps over a band, in an order of channels of their own.
void dot_pixels(const Geometry& geometry, const Band<BFloat16>& band, float* sums);

// `total` [9][pitch] += those sums.
void join_dots(const float* sums, int64_t channels, double* total, int64_t pitch);

// Planes whose rows follow each other without gaps, swept as one run of pixels.
class DotRuns {
  public:
    // Whether they can be: of layers with 3x3 taps whose output is of the size of the input.
    static bool fit(const Geometry& geometry);

    explicit DotRuns(const Geometry& geometry);

    // `sums` [9][16] += 3x3 taps between two planes.
    void add(const BFloat16* x, const BFloat16* z, float* sums) const;

  private:
    struct Sides {
        uint32_t left, right; // of 32 pixels, a bit each: those that have a neighbour on that side
    };
    struct Edge {
        uint32_t z;       // those that exist
        uint32_t x[3][3]; // and, by tap, those that have that neighbour
    };
    int64_t height_, width_;
    std::vector<Sides> sides_; // by the first one's column
    std::vector<Edge> edges_;  // of those that are not all inside the plane's first and last row
};

} // namespace localsgd
