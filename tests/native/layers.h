// Layers for native tests: shapes, operands in every layout and dtype, the correlation in fp64.
#pragma once

#include <array>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/elements.h"
#include "emulation/guarded.h"
#include "geometry.h"

namespace layers {

using localsgd::Geometry;
using localsgd::Kind;
using localsgd::Strides;
using localsgd::Triple;

struct Case {
    const char* name;
    Geometry geometry;
};

inline Case layer(const char* name, int64_t batch, int64_t in, int64_t out, Triple input, Triple kernel,
                  Triple stride = {1, 1, 1}, Triple pad = {0, 0, 0}, Triple dilation = {1, 1, 1}, int64_t groups = 1) {
    return {name, test::geometry(batch, in, out, groups, input, kernel, stride, dilation, pad)};
}

inline std::vector<Case> cases() {
    return {
        layer("3x3", 2, 5, 7, {1, 9, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("3x3, quads", 2, 12, 20, {1, 6, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("3x3 stride 2", 3, 8, 68, {1, 9, 7}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}),
        layer("3x3 dilated", 1, 4, 9, {1, 13, 13}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2}, {1, 2, 2}),
        layer("uneven kernel", 2, 3, 5, {1, 10, 12}, {1, 5, 2}, {1, 3, 2}, {0, 2, 0}, {1, 2, 3}),
        layer("stem 7x7", 2, 3, 16, {1, 20, 20}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}),
        layer("patches of 4x4", 2, 3, 24, {1, 8, 23}, {1, 4, 4}, {1, 4, 4}),
        layer("patches of 1x8, depth 2", 2, 3, 8, {4, 2, 24}, {2, 1, 8}, {2, 1, 8}),
        layer("1x1", 3, 36, 129, {1, 4, 4}, {1, 1, 1}),
        layer("1x1 stride 2", 2, 16, 24, {1, 7, 7}, {1, 1, 1}, {1, 2, 2}),
        layer("1x1 padded", 2, 4, 8, {1, 5, 5}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}),
        layer("grouped", 2, 12, 24, {1, 6, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, 3),
        layer("depthwise", 1, 6, 6, {1, 7, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, 6),
        layer("linear", 1, 151, 129, {1, 1, 67}, {1, 1, 1}),
        layer("linear, quads", 1, 132, 72, {1, 1, 128}, {1, 1, 1}),
        layer("conv1d", 3, 5, 9, {1, 1, 31}, {1, 1, 5}, {1, 1, 2}, {0, 0, 2}),
        layer("conv3d", 2, 3, 4, {5, 6, 7}, {3, 2, 3}, {2, 1, 1}, {1, 0, 1}, {1, 2, 1}),
        layer("1x1x1 conv3d", 2, 8, 4, {3, 4, 5}, {1, 1, 1}),
        layer("one element", 1, 1, 1, {1, 1, 1}, {1, 1, 1}),
        layer("no images", 0, 3, 4, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("no output channels", 2, 3, 0, {1, 5, 5}, {1, 3, 3}),
    };
}

// One that any access can read, larger than every tile.
inline Case every_access() { return layer("every access", 2, 136, 132, {1, 4, 5}, {1, 1, 1}); }

// A number as a dtype holds it.
inline float rounded_to(Kind kind, float value) {
    localsgd::Half half;
    localsgd::BFloat16 bfloat;
    localsgd::store(half, value);
    localsgd::store(bfloat, value);
    return kind == Kind::f16 ? localsgd::to_float(half) : kind == Kind::bf16 ? localsgd::to_float(bfloat) : value;
}

enum class Layout { nchw, nhwc, sliced };
inline const char* name_of(Layout layout) {
    return layout == Layout::nchw ? "NCHW" : layout == Layout::nhwc ? "NHWC" : "sliced";
}

using Shape = std::array<int64_t, 5>; // N, C, D, H, W

inline Shape input(const Case& c) {
    const Geometry& g = c.geometry;
    return {g.batch, g.in_channels, g.input[0], g.input[1], g.input[2]};
}
inline Shape output(const Case& c) {
    const Geometry& g = c.geometry;
    return {g.batch, g.out_channels, g.output[0], g.output[1], g.output[2]};
}

inline std::vector<float> random(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = std::max(-3.9f, std::min(3.9f, normal(generator)));
    return values;
}

// Random values of some dtype and layout in guarded memory; `sliced`: every second element of rows twice as long, so that no
// two are neighbours and the gaps hold NaN.
class Tensor {
  public:
    Tensor(const Shape& shape, Kind kind, Layout layout, emulation::Flush flush, unsigned seed)
        : shape_(shape), kind_(kind), memory_(extent(shape, layout) * static_cast<size_t>(localsgd::kind_size(kind)), flush) {
        const int64_t c = shape[1], w = shape[4], hw = shape[3] * w, dhw = shape[2] * hw;
        if (layout == Layout::nchw) strides_ = {c * dhw, dhw, {hw, w, 1}};
        if (layout == Layout::nhwc) strides_ = {c * dhw, 1, {hw * c, w * c, c}};
        if (layout == Layout::sliced) strides_ = {2 * c * dhw, 2 * dhw, {2 * hw, 2 * w, 2}};
        const std::vector<float> values = random(static_cast<int64_t>(size()), seed);
        for (size_t i = 0; i < size(); ++i) set(i, values[i]);
    }

    void* data() { return memory_.data(); }
    const Strides& strides() const { return strides_; }
    size_t size() const { return static_cast<size_t>(shape_[0] * shape_[1] * shape_[2] * shape_[3] * shape_[4]); }
    bool intact() const { return memory_.intact(); }

    int64_t index(int64_t n, int64_t c, const Triple& at) const {
        return n * strides_.batch + c * strides_.channel + at[0] * strides_.space[0] + at[1] * strides_.space[1] +
               at[2] * strides_.space[2];
    }

    double at(int64_t index) const {
        const unsigned char* p = memory_.data() + index * localsgd::kind_size(kind_);
        if (kind_ == Kind::f32) return load<float>(p);
        if (kind_ == Kind::f16) return localsgd::to_float(load<localsgd::Half>(p));
        return localsgd::to_float(load<localsgd::BFloat16>(p));
    }

    // By number in the order N, C, D, H, W.
    void set(size_t number, float value) {
        unsigned char* p = memory_.data() + nth(number) * localsgd::kind_size(kind_);
        if (kind_ == Kind::f32) put<float>(p, value);
        if (kind_ == Kind::f16) put<localsgd::Half>(p, value);
        if (kind_ == Kind::bf16) put<localsgd::BFloat16>(p, value);
    }
    void fill(float value) {
        for (size_t i = 0; i < size(); ++i) set(i, value);
    }
    std::vector<float> floats() const {
        std::vector<float> values(size());
        for (size_t i = 0; i < size(); ++i) values[i] = static_cast<float>(at(nth(i)));
        return values;
    }

  private:
    static size_t extent(const Shape& s, Layout layout) {
        const int64_t count = s[0] * s[1] * s[2] * s[3] * s[4];
        return static_cast<size_t>(layout == Layout::sliced && count ? 2 * count - 1 : count);
    }
    int64_t nth(size_t number) const {
        auto i = static_cast<int64_t>(number);
        const int64_t w = i % shape_[4], h = (i /= shape_[4]) % shape_[3], d = (i /= shape_[3]) % shape_[2];
        const int64_t c = (i /= shape_[2]) % shape_[1], n = i / shape_[1];
        return index(n, c, {d, h, w});
    }
    template <class T>
    static T load(const unsigned char* p) {
        T value;
        std::memcpy(&value, p, sizeof(T));
        return value;
    }
    template <class T>
    static void put(unsigned char* p, float value) {
        T element;
        localsgd::store(element, value);
        std::memcpy(p, &element, sizeof(T));
    }

    Shape shape_;
    Kind kind_;
    emulation::Guarded<unsigned char> memory_;
    Strides strides_;
};

// D[k, c, t0, t1, t2] by its definition.
inline std::vector<double> correlation(const Geometry& g, const Tensor& x, const Tensor& z) {
    std::vector<double> d(static_cast<size_t>(g.out_channels * g.patch()), 0.0);
    for (int64_t k = 0; k < g.out_channels; ++k)
        for (int64_t j = 0; j < g.patch(); ++j) {
            const int64_t channel = k / g.out_per_group() * g.in_per_group() + j / g.taps(), tap = j % g.taps();
            const Triple t{tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
            double sum = 0;
            for (int64_t n = 0; n < g.batch; ++n)
                for (int64_t p = 0; p < g.image_positions(); ++p) {
                    const Triple q{p / (g.output[1] * g.output[2]), p / g.output[2] % g.output[1], p % g.output[2]};
                    Triple i;
                    bool valid = true;
                    for (int a = 0; a < 3; ++a) {
                        i[a] = q[a] * g.stride[a] - g.pad[a] + t[a] * g.dilation[a];
                        valid = valid && i[a] >= 0 && i[a] < g.input[a];
                    }
                    if (valid) sum += z.at(z.index(n, k, q)) * x.at(x.index(n, channel, i));
                }
            d[static_cast<size_t>(k * g.patch() + j)] = sum;
        }
    return d;
}

} // namespace layers
