#include "problems.h"

#include <ATen/Context.h>
#include <torch/version.h>

namespace localsgd::cuda {
namespace {

Operand operand(const at::Tensor& t) { return {t.const_data_ptr(), kind_of(t), strides_of(t)}; }

bool channels_last(const Layer& layer) { return strides_of(layer.x).channel == 1 && layer.geometry.in_channels > 1; }

Operand output_operand(const Layer& layer) {
    if (layer.z) return operand(*layer.z);
    const Geometry& g = layer.geometry;
    const Triple& o = g.output;
    Operand z{nullptr, output_kind(layer), {g.out_channels * g.image_positions(), 1, {}}};
    if (g.dims == 0 || channels_last(layer)) {
        z.strides.space = {o[1] * o[2] * g.out_channels, o[2] * g.out_channels, g.out_channels};
    } else {
        z.strides.channel = g.image_positions();
        z.strides.space = {o[1] * o[2], o[2], 1};
    }
    return z;
}

// An fp32 x beside an output of lower precision: autocast rounded x for the forward, so that is what z came from.
bool forward_rounded_input(const Layer& layer) {
    return layer.z_is_output && kind_size(output_kind(layer)) < kind_size(kind_of(layer.x));
}

} // namespace

Kind output_kind(const Layer& layer) {
    if (layer.z) return kind_of(*layer.z);
    const auto type = c10::promoteTypes(layer.x.scalar_type(), layer.weight.scalar_type());
    return type == at::kDouble ? Kind::f64 : type == at::kHalf ? Kind::f16 : type == at::kBFloat16 ? Kind::bf16 : Kind::f32;
}

bool tf32_allowed(const Layer& layer) {
    const auto& context = at::globalContext();
    const bool linear = layer.geometry.dims == 0;
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
    const auto op = linear ? at::Float32Op::MATMUL : at::Float32Op::CONV;
    return context.float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
#else
    try {
        return linear ? context.allowTF32CuBLAS() : context.allowTF32CuDNN();
    } catch (const c10::Error&) { // set through the newer interface, which these refuse: rather exact than wrong
        return false;
    }
#endif
}

DirectProblem direct_problem(const Layer& layer) {
    const Operand x = operand(layer.x), z = output_operand(layer);
    return {layer.geometry, x, z, tf32_allowed(layer), forward_rounded_input(layer)};
}

GramProblem gram_problem(const Layer& layer) {
    const at::Tensor& w = layer.weight;
    GramProblem problem{};
    problem.geometry = layer.geometry;
    problem.x = operand(layer.x);
    problem.weight = w.const_data_ptr();
    problem.weight_kind = kind_of(w);
    problem.weight_out_stride = w.stride(0);
    problem.weight_channel_stride = w.stride(1);
    problem.bias_kind = layer.bias ? kind_of(*layer.bias) : Kind::f32;
    problem.bias = layer.bias ? layer.bias->const_data_ptr() : nullptr;
    problem.z_kind = output_kind(layer);
    problem.allow_tf32 = tf32_allowed(layer);
    problem.allow_lower = forward_rounded_input(layer);
    return problem;
}

DepthwiseProblem depthwise_problem(const Layer& layer) { return {layer.geometry, operand(layer.x), output_operand(layer)}; }

Target target_of(const at::Tensor& weight) {
    Target target{weight.mutable_data_ptr(), element_of(kind_of(weight)), weight.stride(0), weight.stride(1), {0, 0, 0}};
    for (int64_t i = 2; i < weight.dim(); ++i) target.tap_stride[3 - weight.dim() + i] = weight.stride(i);
    return target;
}

Key key_of(const Layer& layer) {
    Key key{};
    size_t used = 0;
    const auto add = [&](int64_t value) { key.at(used++) = value; };
    const auto add_triple = [&](const Triple& t) {
        for (const int64_t value : t) add(value);
    };
    const auto add_operand = [&](const Operand& o) {
        add(static_cast<int64_t>(o.kind));
        add(static_cast<int64_t>(reinterpret_cast<uintptr_t>(o.data) % 16));
        add(o.strides.batch);
        add(o.strides.channel);
        add_triple(o.strides.space);
    };
    const Geometry& g = layer.geometry;
    for (const int64_t value : {int64_t{g.dims}, g.batch, g.in_channels, g.out_channels, g.groups}) add(value);
    for (const Triple& t : {g.input, g.output, g.kernel, g.stride, g.dilation, g.pad}) add_triple(t);
    add_operand(operand(layer.x));
    add_operand(output_operand(layer));
    add(layer.z.has_value());
    add(layer.z_is_output);
    add(static_cast<int64_t>(kind_of(layer.weight)));
    add(layer.bias ? static_cast<int64_t>(kind_of(*layer.bias)) : -1);
    add(tf32_allowed(layer));
    add(at::globalContext().deterministicAlgorithms());
    return key;
}

} // namespace localsgd::cuda
