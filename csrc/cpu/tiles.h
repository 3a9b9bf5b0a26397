// x or z as a sequence of matrices [groups, T, features] over output positions: a view of the tensor's own memory where
// strides allow, else gathered (im2col, conversion to the accumulation type) into one reused workspace.
#pragma once

#include <algorithm>
#include <initializer_list>

#include <ATen/core/Tensor.h>

#include "patches.h"

namespace localsgd::cpu {

class Tiles {
  public:
    Tiles(const at::Tensor& tensor, const Geometry& geometry, at::ScalarType accumulate);

    // Positions from the start of an image (or of everything) that one view can cover; 0: gathering only.
    int64_t viewable() const { return viewable_; }
    int64_t features() const { return source_.geometry.groups * source_.geometry.patch(); }
    bool channels_last() const { return source_.order == TileOrder::kChannelsLast; }

    // [groups, count, features / groups]; valid until the next call.
    at::Tensor at(int64_t first, int64_t count);

  private:
    at::Tensor view(int64_t first, int64_t count) const;

    at::Tensor tensor_;
    at::ScalarType accumulate_;
    PatchSource source_;
    int64_t viewable_ = 0;
    at::Tensor workspace_;
};

// Calls body(first, count) over all positions in order, in tiles that suit every operand: up to `longest` where all are views,
// within the workspace bound where one must be gathered.
template <typename Body>
void for_each_tile(int64_t positions, int64_t image, int64_t longest, std::initializer_list<Tiles*> operands,
                   const Body& body) {
    constexpr int64_t kWorkspace = int64_t{2} << 20; // elements gathered at once
    constexpr int64_t kLeast = 256;                  // shorter tiles are all overhead
    int64_t span = positions, gathered = 0;
    for (const Tiles* tiles : operands)
        if (tiles->viewable() < positions) span = std::min(span, image);
    if (span < kLeast) span = positions; // small images: several per tile, gathered
    for (const Tiles* tiles : operands)
        if (tiles->viewable() < span) gathered += tiles->features();
    const int64_t limit = gathered == 0 ? longest : std::min(longest, std::max(kLeast, kWorkspace / gathered));
    for (int64_t begin = 0; begin < positions; begin += span) {
        const int64_t end = std::min(begin + span, positions);
        for (int64_t first = begin; first < end; first += limit) body(first, std::min(limit, end - first));
    }
}

} // namespace localsgd::cpu
