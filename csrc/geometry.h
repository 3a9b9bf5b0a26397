// A layer's shape as plain numbers: what kernels and algorithm selection see instead of tensors.
#pragma once

#include <array>
#include <cstdint>

namespace localsgd {

using Triple = std::array<int64_t, 3>; // depth, height, width

inline int64_t product(const Triple& t) { return t[0] * t[1] * t[2]; }

// Every layer is a 3-d convolution here: conv2d and conv1d have leading spatial sizes of 1, and a linear layer over M rows
// is a convolution of one image that is M wide, with a kernel of size 1.
struct Geometry {
    int dims = 0; // 1, 2, 3; 0 for linear (names and messages only)
    int64_t batch = 1;
    int64_t in_channels = 1;
    int64_t out_channels = 1;
    int64_t groups = 1;
    Triple input{1, 1, 1};
    Triple output{1, 1, 1};
    Triple kernel{1, 1, 1};
    Triple stride{1, 1, 1};
    Triple dilation{1, 1, 1};
    Triple pad{0, 0, 0}; // zeros before the first element; those after it follow from `output`

    int64_t in_per_group() const { return in_channels / groups; }
    int64_t out_per_group() const { return out_channels / groups; }
    int64_t taps() const { return product(kernel); }
    int64_t image_positions() const { return product(output); }
    int64_t positions() const { return batch * image_positions(); } // GEMM K: one column per output position
    int64_t patch() const { return in_per_group() * taps(); }       // GEMM N: one row of D
    bool pointwise() const { return taps() == 1; }                  // every output reads at most one input position
    bool depthwise() const { return groups == in_channels && groups > 1; }
};

// Whether positions are so few that a product of all of them with each other is little beside the correlation.
inline bool few_rows(const Geometry& g) {
    const int64_t rows = g.positions(), in = g.in_channels, out = g.out_channels;
    return g.pointwise() && g.groups == 1 && rows * rows * (in + out) <= 16 * in * out;
}

// Element strides of x [N, C, D, H, W] or z [N, K, P0, P1, P2]; any strides will do.
struct Strides {
    int64_t batch = 0;
    int64_t channel = 0;
    Triple space{0, 0, 0};
};

// Range of output indices q in [0, output) whose input index q * stride + offset lies in [0, input).
struct Range {
    int64_t begin, end;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); } // of a < 0, too

inline Range valid_outputs(int64_t output, int64_t input, int64_t stride, int64_t offset) {
    const int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, stride);
    const int64_t end = input - offset <= 0 ? 0 : ceil_div(input - offset, stride);
    const Range r{begin < output ? begin : output, end < output ? end : output};
    return {r.begin, r.end > r.begin ? r.end : r.begin};
}

// The kernel-1 convolution of one position each that reads z's own layout: lets z be tiled by the code that tiles x.
inline Geometry output_geometry(const Geometry& g) {
    Geometry out;
    out.dims = g.dims;
    out.batch = g.batch;
    out.in_channels = out.out_channels = g.out_channels;
    out.groups = g.groups;
    out.input = out.output = g.output;
    return out;
}

} // namespace localsgd
