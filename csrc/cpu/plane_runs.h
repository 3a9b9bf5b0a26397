// Planes whose rows follow each other without gaps, swept as one run of pixels: the lanes of a vector are full but at the
// plane's end, however short its rows are.
#pragma once

#include <cstdint>
#include <vector>

#include "../geometry.h"
#include "elements.h"

namespace localsgd {

// Whether this compiler knows the instructions and planes of a layer can be swept so: 3x3 taps whose output is of the size of
// the input.
bool runs_fit(const Geometry& geometry);

// Of float, with AVX-512; of BFloat16, by its dot products of pairs of pixels (see depthwise_dots.h). The CPU must have them.
template <typename T>
class PlaneRuns {
  public:
    static constexpr int64_t kLanes = 64 / sizeof(T); // pixels at once

    explicit PlaneRuns(const Geometry& geometry);

    // `sums` [9][16] += 3x3 taps between two planes.
    void add(const T* x, const T* z, float* sums) const;

  private:
    static constexpr int64_t kAhead = 4096 / sizeof(T); // what is fetched while others are summed

    // Of kLanes pixels, a bit each.
    struct Sides {
        uint32_t left, right; // those that have a neighbour on that side
    };
    struct Edge {
        uint32_t x[3]; // by the tap's column, those that have the neighbour that it reads
        uint32_t z[3]; // by its row, those that it reads from a row of z
    };
    // Whether all neighbours above and below of the pixels from `first` on exist.
    bool inside(int64_t first) const { return first >= width_ && first + kLanes <= (height_ - 1) * width_; }

    int64_t height_, width_;
    std::vector<Sides> sides_; // by the first one's column
    std::vector<Edge> edges_;  // of those that are not all inside the plane's first and last row
};

} // namespace localsgd
