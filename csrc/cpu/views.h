// x or z as matrices [groups, positions, features] in the tensor's own memory, where strides allow.
#pragma once

#include <ATen/core/Tensor.h>

#include "patches.h"

namespace localsgd::cpu {

class Views {
  public:
    Views(const at::Tensor& tensor, const Geometry& geometry, at::ScalarType accumulate);

    // Positions that a view covers: all, those of an image, or none.
    int64_t span() const { return span_; }

    // [groups, count, features / groups], not across the end of a span.
    at::Tensor at(int64_t first, int64_t count) const;

  private:
    at::Tensor tensor_;
    Geometry geometry_;
    Strides strides_;
    int64_t span_ = 0;
};

} // namespace localsgd::cpu
