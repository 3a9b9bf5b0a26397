// Launches of direct kernels on the emulated GPU, and what must hold of each. For tests that include the kernels' sources.
#pragma once

#include "launches.h"

namespace launches {

// Another number of splits than the chosen one, to see more of them than blocks, and none.
inline void split(DirectConfig& config, const Geometry& g, int splits, int step) {
    config.splits = splits;
    config.split_positions = static_cast<int>(ceil_div(ceil_div(g.positions(), splits), step) * step);
    config.sharers = splits >= 4 ? 4 : 1;
    config.blocks = std::max(1, std::min(6, config.tiles * splits));
}

struct Memory {
    layers::Tensor x, z;
    Guarded<float> weight, d;
    std::unique_ptr<Guarded<unsigned char>> workspace;
    DirectProblem problem;
    static constexpr Kind weight_kind = Kind::f32;
    Target weight_target, d_target;

    Memory(const Case& c, Kind x_kind, Kind z_kind, Layout layout, Flush flush)
        : x(layers::input(c), x_kind, layout, flush, 1),
          z(layers::output(c), z_kind, layout, flush, 2),
          weight(layers::random(c.geometry.out_channels * c.geometry.patch(), 3), flush),
          d(static_cast<size_t>(c.geometry.out_channels * c.geometry.patch()), flush) {
        const Geometry& g = c.geometry;
        problem = {g, {x.data(), x_kind, x.strides()}, {z.data(), z_kind, z.strides()}};
        const int64_t taps = g.taps();
        const int64 plane = g.kernel[1] * g.kernel[2], row = g.kernel[2];
        weight_target = {weight.data(), Element::f32, g.patch(), taps, {plane, row, 1}};
        if (layout == Layout::nhwc) { // the weight lies as such models have it: [K, R, S, C]
            const int64 channels = g.in_per_group();
            weight_target = {weight.data(), Element::f32, g.patch(), 1, {plane * channels, row * channels, channels}};
        }
        d_target = {d.data(), Element::f32, g.patch(), taps, {plane, row, 1}};
    }

    void make_workspace(const DirectConfig& config) { workspace = new_workspace(workspace_bytes(config)); }

    bool intact() const { return x.intact() && z.intact() && weight.intact() && d.intact() && workspace->intact(); }

    std::vector<float> floats() const {
        std::vector<float> values(weight.size());
        for (size_t i = 0; i < values.size(); ++i) values[i] = weight[weight_index(static_cast<int64_t>(i))];
        return values;
    }
    void set_weight(const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); ++i) weight[weight_index(static_cast<int64_t>(i))] = values[i];
    }

  private:
    // Index of the D that is number i in the weight's memory.
    size_t weight_index(int64_t i) const {
        const Geometry& g = problem.geometry;
        const int64_t k = i / g.patch(), c = i % g.patch() / g.taps(), tap = i % g.taps();
        const Triple t{tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
        const Target& w = weight_target;
        return static_cast<size_t>(k * w.out_stride + c * w.channel_stride + t[0] * w.tap_stride[0] + t[1] * w.tap_stride[1] +
                                   t[2] * w.tap_stride[2]);
    }
};

} // namespace launches
