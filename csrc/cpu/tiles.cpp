#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../canonical.h"

namespace localsgd::cpu {

Tiles::Tiles(const at::Tensor& tensor, const Geometry& geometry, at::ScalarType accumulate)
    : tensor_(tensor), accumulate_(accumulate) {
    Strides strides = strides_of(tensor);
    Geometry merged = geometry;
    merge_space(merged, strides);
    const bool last = strides.channel == 1 && merged.in_channels > 1;
    source_ = {tensor.const_data_ptr(), kind_of(tensor), merged, strides,
               last ? TileOrder::kChannelsLast : TileOrder::kChannelsFirst};
    const bool even = merged.pointwise() && merged.input == merged.output && merged.output[0] == 1 && merged.output[1] == 1 &&
                      merged.stride[2] == 1 && merged.pad == Triple{0, 0, 0};
    if (!even || tensor.scalar_type() != accumulate) return;
    const bool one_run = merged.batch == 1 || strides.batch == strides.space[2] * merged.image_positions();
    viewable_ = one_run ? merged.positions() : merged.image_positions();
}

at::Tensor Tiles::view(int64_t first, int64_t count) const {
    const Geometry& g = source_.geometry;
    const Strides& s = source_.strides;
    const int64_t image = g.image_positions();
    const int64_t offset = first / image * s.batch + first % image * s.space[2];
    return tensor_.as_strided({g.groups, count, g.in_per_group()}, {g.in_per_group() * s.channel, s.space[2], s.channel},
                              tensor_.storage_offset() + offset);
}

at::Tensor Tiles::at(int64_t first, int64_t count) {
    const Geometry& g = source_.geometry;
    const int64_t image = g.image_positions();
    const bool in_one_image = first / image == (first + count - 1) / image;
    if (viewable_ == g.positions() || (viewable_ > 0 && in_one_image)) return view(first, count);
    const int64_t elements = features() * count;
    if (!workspace_.defined() || workspace_.numel() < elements)
        workspace_ = at::empty({elements}, at::TensorOptions().dtype(accumulate_));
    const int64_t tasks = pack_tasks(source_, count);
    const int64_t grain = std::max<int64_t>(1, tasks * 8192 / elements); // at least 8192 elements per thread
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
        if (accumulate_ == at::kDouble)
            pack(source_, first, count, begin, end, workspace_.mutable_data_ptr<double>());
        else
            pack(source_, first, count, begin, end, workspace_.mutable_data_ptr<float>());
    });
    const at::Tensor tile = workspace_.narrow(0, 0, elements);
    return channels_last() ? tile.view({g.groups, count, g.patch()}) : tile.view({g.groups, g.patch(), count}).transpose(1, 2);
}

} // namespace localsgd::cpu
