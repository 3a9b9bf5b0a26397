#include "views.h"

#include "../canonical.h"

namespace localsgd::cpu {

Views::Views(const at::Tensor& tensor, const Geometry& geometry, at::ScalarType accumulate)
    : tensor_(tensor), geometry_(geometry), strides_(strides_of(tensor)) {
    merge_space(geometry_, strides_);
    const Geometry& g = geometry_;
    const bool even = g.pointwise() && g.input == g.output && g.output[0] == 1 && g.output[1] == 1 && g.stride[2] == 1 &&
                      g.pad == Triple{0, 0, 0};
    if (!even || tensor.scalar_type() != accumulate) return;
    const bool one_run = g.batch == 1 || strides_.batch == strides_.space[2] * g.image_positions();
    span_ = one_run ? g.positions() : g.image_positions();
}

at::Tensor Views::at(int64_t first, int64_t count) const {
    const int64_t image = geometry_.image_positions(), features = geometry_.in_per_group();
    const int64_t offset = first / image * strides_.batch + first % image * strides_.space[2];
    return tensor_.as_strided({geometry_.groups, count, features},
                              {features * strides_.channel, strides_.space[2], strides_.channel},
                              tensor_.storage_offset() + offset);
}

} // namespace localsgd::cpu
