#include "forward.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/linear.h>

namespace localsgd {

at::Tensor forward(const Layer& layer) {
    const Geometry& g = layer.geometry;
    const auto common = c10::promoteTypes(layer.x.scalar_type(), layer.weight.scalar_type());
    const at::Tensor x = layer.x.to(common), w = layer.weight.to(common);
    std::optional<at::Tensor> b;
    if (layer.bias) b = layer.bias->to(common);
    if (g.dims == 0) return at::linear(x, w, b);
    const auto tail = [&](const Triple& t) { return std::vector<int64_t>(t.end() - g.dims, t.end()); };
    if (layer.even_padding)
        return at::convolution(x, w, b, tail(g.stride), tail(g.pad), tail(g.dilation), false, std::vector<int64_t>(g.dims, 0),
                               g.groups);
    // Zeros on both sides to the larger amount, then the outputs that start too early are dropped ('same', stride 1).
    std::vector<int64_t> pads;
    for (int i = 3 - g.dims; i < 3; ++i) pads.push_back((g.kernel[i] - 1) * g.dilation[i] - g.pad[i]);
    at::Tensor z =
        at::convolution(x, w, b, tail(g.stride), pads, tail(g.dilation), false, std::vector<int64_t>(g.dims, 0), g.groups);
    for (int i = 3 - g.dims; i < 3; ++i) z = z.narrow(i - 1 + g.dims, pads[i - 3 + g.dims] - g.pad[i], g.output[i]);
    return z;
}

} // namespace localsgd
