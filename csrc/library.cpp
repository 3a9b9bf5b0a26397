#include "library.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

namespace localsgd {

// Rounded to the operands' dtype: hence not in fp16, whose range a sum over positions exceeds.
at::Tensor library_gradient(const Layer& layer) {
    const Geometry& g = layer.geometry;
    auto common = c10::promoteTypes(layer.x.scalar_type(), layer.z->scalar_type());
    if (common == at::kHalf) common = at::kFloat;
    // oneDNN (torch 2.14, AVX-512 with bf16) multiplies by memory that it never wrote: x [1, 2, 1], C = 2 groups, K = 4, kernel
    // 3, stride 2, padding 1.
    if (common == at::kBFloat16 && g.input[2] < g.stride[2] && g.pad[2] > 0) common = at::kFloat;
    at::Tensor x = layer.x.to(common);
    const at::Tensor z = layer.z->to(common);
    if (g.dims == 0) return at::mm(z.t(), x);
    const auto tail = [&](const Triple& t) { return std::vector<int64_t>(t.end() - g.dims, t.end()); };
    auto padding = tail(g.pad);
    if (!layer.even_padding) {
        std::vector<int64_t> flat; // starts at the last dimension
        for (int i = 2; i > 2 - g.dims; --i) {
            const int64_t needed = (g.output[i] - 1) * g.stride[i] + (g.kernel[i] - 1) * g.dilation[i] + 1;
            flat.insert(flat.end(), {g.pad[i], needed - g.input[i] - g.pad[i]});
        }
        x = at::constant_pad_nd(x, flat);
        padding.assign(g.dims, 0);
    }
    auto stride = tail(g.stride);
    if (x.is_cpu() && g.pointwise() && g.pad == Triple{0, 0, 0}) {
        // Outputs read every stride-th element and no other. oneDNN (torch 2.14, AVX-512) writes past its buffers where it
        // gathers those itself: channels_last fp32, x [2, 6, 10, 10], K = 6, stride 2.
        for (int i = 3 - g.dims; i < 3; ++i)
            if (g.stride[i] > 1) x = x.slice(i - 3, 0, (g.output[i] - 1) * g.stride[i] + 1, g.stride[i]);
        stride.assign(g.dims, 1);
    }
    const at::Tensor like = at::empty(layer.weight.sizes(), x.options());
    const auto gradients = at::convolution_backward(z, x, like, std::nullopt, stride, padding, tail(g.dilation), false,
                                                    std::vector<int64_t>(g.dims, 0), g.groups, {false, true, false});
    return std::get<1>(gradients);
}

at::Tensor library_correlation(const Layer& layer) { return library_gradient(layer).contiguous().to(layer.accumulate); }

} // namespace localsgd
