// From a user's arguments to batched operands and plain numbers, with every check on the way.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include <ATen/core/Tensor.h>

#include "cpu/elements.h"
#include "geometry.h"

namespace localsgd {

using Ints = std::variant<int64_t, std::vector<int64_t>>;                 // one for all dimensions, or one each
using Padding = std::variant<int64_t, std::vector<int64_t>, std::string>; // or 'same', 'valid'

// The arguments of a call as torch.nn spells them.
struct LayerArguments {
    at::Tensor x;
    std::optional<at::Tensor> z;
    at::Tensor weight;
    std::optional<at::Tensor> bias;
    Ints stride;
    Padding padding;
    Ints dilation;
    int64_t groups;
    std::string padding_mode;
    bool z_is_output;
};

// What the algorithms work on.
struct Layer {
    at::Tensor x;                // [N, C, *space], linear: [M, C]; padded already unless the padding is zeros
    std::optional<at::Tensor> z; // [N, K, *space_out], linear: [M, K]
    at::Tensor weight;           // [K, C/groups, *kernel], linear: [K, C]
    std::optional<at::Tensor> bias;
    Geometry geometry;
    bool even_padding = true; // as many zeros after as before, which is all that ATen's convolutions know
    bool z_is_output = false;
    at::ScalarType accumulate = at::kFloat;
};

Layer canonical(const LayerArguments& arguments);

Kind kind_of(const at::Tensor& tensor);
void check_floating(const at::Tensor& tensor, const char* name);

// `t` is [N, C, *space] or, for linear layers, [M, C].
Strides strides_of(const at::Tensor& t);

// Python's way of writing a shape: "(64, 3)".
std::string text(at::IntArrayRef shape);

} // namespace localsgd
