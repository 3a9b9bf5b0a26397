#include "canonical.h"

#include <algorithm>

#include <ATen/ops/pad.h>

namespace localsgd {
namespace {

void check_operand(const at::Tensor& tensor, const char* name, const at::Tensor& weight) {
    check_floating(tensor, name);
    TORCH_CHECK_VALUE(tensor.device() == weight.device(), name, " must be on the weight's device ", weight.device(), ", got ",
                      tensor.device());
}

std::vector<int64_t> per_dimension(const Ints& value, int64_t dims, const char* name, int64_t least) {
    std::vector<int64_t> values;
    if (const auto* one = std::get_if<int64_t>(&value))
        values.assign(dims, *one);
    else
        values = std::get<std::vector<int64_t>>(value);
    TORCH_CHECK_VALUE(static_cast<int64_t>(values.size()) == dims, name, " must be an int or ", dims, " ints, got ",
                      text(values));
    for (const int64_t v : values) TORCH_CHECK_VALUE(v >= least, name, " must be at least ", least, ", got ", text(values));
    return values;
}

struct Pads {
    std::vector<int64_t> before, after;
};

Pads pads_of(const LayerArguments& a, const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation) {
    const auto dims = static_cast<int64_t>(stride.size());
    if (const auto* word = std::get_if<std::string>(&a.padding)) {
        TORCH_CHECK_VALUE(*word == "same" || *word == "valid", "padding must be ints, 'same' or 'valid', got '", *word, "'");
        Pads pads{std::vector<int64_t>(dims, 0), std::vector<int64_t>(dims, 0)};
        if (*word == "valid") return pads;
        for (int64_t i = 0; i < dims; ++i) {
            TORCH_CHECK_VALUE(stride[i] == 1, "padding 'same' needs stride 1, got ", text(stride));
            const int64_t total = dilation[i] * (a.weight.size(2 + i) - 1);
            pads.before[i] = total / 2;
            pads.after[i] = total - total / 2;
        }
        return pads;
    }
    const Ints ints = std::holds_alternative<int64_t>(a.padding) ? Ints(std::get<int64_t>(a.padding))
                                                                 : Ints(std::get<std::vector<int64_t>>(a.padding));
    const auto values = per_dimension(ints, dims, "padding", 0);
    return {values, values};
}

void check_padding_mode(const std::string& mode) {
    TORCH_CHECK_VALUE(mode == "zeros" || mode == "reflect" || mode == "replicate" || mode == "circular",
                      "padding_mode must be one of zeros, reflect, replicate, circular, got '", mode, "'");
}

// Linear: all leading dimensions are rows.
void fill_linear(const LayerArguments& a, Layer& layer) {
    const int64_t in = a.weight.size(1), out = a.weight.size(0);
    TORCH_CHECK_VALUE(a.x.dim() >= 1 && a.x.size(-1) == in, "x must have shape (..., ", in, ") for a weight of shape ",
                      text(a.weight.sizes()), ", got ", text(a.x.sizes()));
    if (a.z) {
        auto expected = a.x.sizes().vec();
        expected.back() = out;
        TORCH_CHECK_VALUE(a.z->sizes() == at::IntArrayRef(expected), "z must have shape ", text(expected), ", got ",
                          text(a.z->sizes()));
        layer.z = a.z->reshape({a.x.numel() / std::max<int64_t>(in, 1), out});
    }
    layer.x = a.x.reshape({a.x.numel() / std::max<int64_t>(in, 1), in});
    Geometry& g = layer.geometry;
    g.dims = 0;
    g.in_channels = in;
    g.out_channels = out;
    g.input[2] = g.output[2] = layer.x.size(0);
}

void fill_conv(const LayerArguments& a, Layer& layer) {
    const int64_t dims = a.weight.dim() - 2;
    TORCH_CHECK_VALUE(a.groups >= 1 && a.weight.size(0) % a.groups == 0,
                      "groups must be positive and divide weight.shape[0] = ", a.weight.size(0), ", got ", a.groups);
    const int64_t channels = a.weight.size(1) * a.groups;
    const bool unbatched = a.x.dim() == dims + 1;
    TORCH_CHECK_VALUE(a.x.dim() == dims + 2 || unbatched, "x must have ", dims + 2, " dimensions (", dims + 1,
                      " if unbatched) for a weight of shape ", text(a.weight.sizes()), ", got shape ", text(a.x.sizes()));
    layer.x = unbatched ? a.x.unsqueeze(0) : a.x;
    TORCH_CHECK_VALUE(layer.x.size(1) == channels, "x must have ", channels, " channels (weight.shape[1] * groups), got shape ",
                      text(a.x.sizes()));
    check_padding_mode(a.padding_mode);
    const auto stride = per_dimension(a.stride, dims, "stride", 1), dilation = per_dimension(a.dilation, dims, "dilation", 1);
    Pads pads = pads_of(a, stride, dilation);
    if (a.padding_mode != "zeros" && layer.x.numel() > 0) {
        std::vector<int64_t> flat; // at::pad starts at the last dimension
        for (int64_t i = dims - 1; i >= 0; --i) flat.insert(flat.end(), {pads.before[i], pads.after[i]});
        layer.x = at::pad(layer.x, flat, a.padding_mode);
        pads = {std::vector<int64_t>(dims, 0), std::vector<int64_t>(dims, 0)};
    }
    Geometry& g = layer.geometry;
    g.dims = static_cast<int>(dims);
    g.batch = layer.x.size(0);
    g.in_channels = channels;
    g.out_channels = a.weight.size(0);
    g.groups = a.groups;
    std::vector<int64_t> expected{g.batch, g.out_channels};
    for (int64_t i = 0; i < dims; ++i) {
        const int64_t to = 3 - dims + i;
        g.input[to] = layer.x.size(2 + i);
        g.kernel[to] = a.weight.size(2 + i);
        g.stride[to] = stride[i];
        g.dilation[to] = dilation[i];
        g.pad[to] = pads.before[i];
        layer.even_padding = layer.even_padding && pads.before[i] == pads.after[i];
        const int64_t room = g.input[to] + pads.before[i] + pads.after[i] - dilation[i] * (g.kernel[to] - 1) - 1;
        TORCH_CHECK_VALUE(room >= 0, "x of shape ", text(a.x.sizes()), " is smaller than the kernel of weight ",
                          text(a.weight.sizes()), " after padding");
        g.output[to] = room / stride[i] + 1;
        expected.push_back(g.output[to]);
    }
    if (a.z) {
        if (unbatched) expected.erase(expected.begin());
        TORCH_CHECK_VALUE(a.z->sizes() == at::IntArrayRef(expected), "z must have shape ", text(expected), ", got ",
                          text(a.z->sizes()));
        layer.z = unbatched ? a.z->unsqueeze(0) : *a.z;
    }
}

} // namespace

std::string text(at::IntArrayRef shape) {
    std::string out = "(";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + (shape.size() == 1 ? ",)" : ")");
}

void check_floating(const at::Tensor& tensor, const char* name) {
    const auto type = tensor.scalar_type();
    TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, name,
                     " must be float16, bfloat16, float32 or float64, got ", toString(type));
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " must be a dense tensor, got layout ", tensor.layout());
}

Kind kind_of(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
    case at::kHalf:
        return Kind::f16;
    case at::kBFloat16:
        return Kind::bf16;
    case at::kDouble:
        return Kind::f64;
    default:
        return Kind::f32;
    }
}

Strides strides_of(const at::Tensor& t) {
    if (t.dim() == 2) return {0, t.stride(1), {0, 0, t.stride(0)}};
    Strides s{t.stride(0), t.stride(1), {0, 0, 0}};
    for (int64_t i = 2; i < t.dim(); ++i) s.space[5 - t.dim() + i - 2] = t.stride(i);
    return s;
}

Layer canonical(const LayerArguments& a) {
    check_floating(a.weight, "weight");
    check_operand(a.x, "x", a.weight);
    if (a.z) check_operand(*a.z, "z", a.weight);
    TORCH_CHECK_VALUE(a.weight.dim() >= 2 && a.weight.dim() <= 5,
                      "weight must have 2 (linear), 3, 4 or 5 (conv) dimensions, got shape ", text(a.weight.sizes()));
    if (a.bias) {
        check_operand(*a.bias, "bias", a.weight);
        TORCH_CHECK_VALUE(a.bias->dim() == 1 && a.bias->size(0) == a.weight.size(0), "bias must have shape (", a.weight.size(0),
                          ",), got ", text(a.bias->sizes()));
    }
    Layer layer;
    layer.weight = a.weight;
    if (a.bias) layer.bias = a.bias->resolve_neg().contiguous(); // [K]
    layer.z_is_output = a.z_is_output;
    const bool wide =
        a.x.scalar_type() == at::kDouble || a.weight.scalar_type() == at::kDouble || (a.z && a.z->scalar_type() == at::kDouble);
    layer.accumulate = wide ? at::kDouble : at::kFloat;
    a.weight.dim() == 2 ? fill_linear(a, layer) : fill_conv(a, layer);
    layer.x = layer.x.resolve_neg(); // kernels read memory as it is
    if (layer.z) layer.z = layer.z->resolve_neg();
    return layer;
}

} // namespace localsgd
