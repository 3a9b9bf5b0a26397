// Launches of direct kernels on the emulated GPU, and what must hold of each. For tests that include the kernels' sources.
#pragma once

#include "launches.h"

namespace launches {

// Another number of splits than the chosen one, to see more of them than blocks, and none.
inline void split(DirectConfig& config, const Geometry& g, int splits, int step) {
    const int64_t positions = (by_segments(config.x_access) ? padded_to(step, g) : g).positions();
    config.splits = splits;
    config.split_positions = static_cast<int>(ceil_div(ceil_div(positions, splits), step) * step);
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

inline DirectConfig config_with(int kernel, const Case& c, int splits) {
    const Variant& v = variant(kernel);
    DirectConfig config;
    config.kernel = kernel;
    config.core = v.core;
    config.tile_m = v.tile_m;
    config.tile_n = v.tile_n;
    config.threads = v.threads;
    config.z_access = v.z;
    config.x_access = v.x;
    config.cooperative = true;
    config.tiles = static_cast<int>(ceil_div(c.geometry.out_channels, v.tile_m) * ceil_div(c.geometry.patch(), v.tile_n));
    split(config, c.geometry, splits, v.step_positions);
    return config;
}

// Few channels in whole chunks a row: windows that overlap and that do not, more of a row of the output than a step takes and
// less, padding on each side, tiles that begin within a row of the kernel.
inline std::vector<Case> segment_cases() {
    using layers::layer;
    return {
        layer("7x7 stem", 2, 3, 72, {1, 21, 32}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}),
        layer("3x3, RGB", 2, 3, 64, {1, 9, 40}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("3x3, one channel", 3, 1, 24, {1, 7, 16}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("4x4 stride 4", 1, 3, 8, {1, 16, 80}, {1, 4, 4}, {1, 4, 4}),
        layer("5x5 dilated", 2, 2, 16, {1, 12, 24}, {1, 5, 5}, {1, 1, 3}, {0, 4, 5}, {1, 2, 2}),
        layer("11 channels, two tiles", 1, 11, 80, {1, 6, 8}, {1, 4, 4}, {1, 1, 1}, {0, 2, 3}),
        layer("1x1, 5 channels", 2, 5, 16, {1, 4, 24}, {1, 1, 1}),
        layer("1x1 strided, beyond the input", 1, 3, 16, {1, 5, 8}, {1, 1, 1}, {1, 2, 3}, {0, 1, 2}),
        layer("conv1d", 3, 3, 16, {1, 1, 104}, {1, 1, 9}, {1, 1, 2}, {0, 0, 4}),
        layer("conv3d", 2, 3, 8, {4, 5, 16}, {2, 3, 3}, {2, 1, 1}, {1, 0, 1}),
        layer("empty batch", 0, 3, 8, {1, 5, 16}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
    };
}

// Pixels that no window reads, and those that only windows beside the last position of a row would, are as if they were not
// there.
inline void check_unread_pixels(int kernel) {
    const Variant& v = variant(kernel);
    const Case c = layers::layer("3x3 stride 2", 1, 3, 8, {1, 7, 16}, {1, 3, 3}, {1, 2, 2}); // 7 positions: column 15 is unread
    use(3, true);
    const Kind kind = operand_kind(v.core);
    Memory m(c, v.x == Access::segments32 ? Kind::f32 : kind, kind, Layout::nhwc, Flush::end);
    const std::vector<double> expected = layers::correlation(c.geometry, m.x, m.z);
    CHECK(c.geometry.output[2] == 7);
    for (int64_t h = 0; h < 7; ++h)
        for (int64_t channel = 0; channel < 3; ++channel) m.x.set(static_cast<size_t>((channel * 7 + h) * 16 + 15), NAN);
    const DirectConfig config = config_with(kernel, c, 1);
    m.make_workspace(config);
    CHECK(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess);
    check_d(m.d, expected, config.text(), v.core == Core::mma_tf32 || v.x == Access::segments32 ? 1e-2 : kTolerance);
}

// Of the kernels [first, last), those that read x by segments: every layer, x in either layout beside a z in the kernel's.
// `oracle`: of a case, its memory and a core.
template <class Oracle>
void check_segments(int first, int last, int compute, const Oracle& oracle) {
    unsigned seed = 0;
    for (int kernel = first; kernel < last; ++kernel) {
        const Variant& v = variant(kernel);
        if (!by_segments(v.x) || v.compute > compute) continue;
        const Kind kind = operand_kind(v.core), x_kind = v.x == Access::segments32 ? Kind::f32 : kind;
        const Layout z_layout = v.z == Access::positions4 ? Layout::nchw : Layout::nhwc;
        if (z_layout == Layout::nhwc) check_unread_pixels(kernel);
        int taken = 0;
        for (const Case& c : segment_cases())
            for (const Layout layout : {Layout::nhwc, Layout::nchw}) {
                use(++seed, true);
                Memory m(c, kind, kind, z_layout, seed % 2 ? Flush::begin : Flush::end);
                layers::Tensor x(layers::input(c), x_kind, layout, Flush::end, 1);
                m.problem.x = {x.data(), x_kind, x.strides()};
                if (!takes_segments(v, m.problem, v.z)) continue;
                ++taken;
                const DirectConfig config = config_with(kernel, c, static_cast<int>(1 + seed % 4));
                check_launches(
                    m, config, oracle(c, m, v.core), seed,
                    std::string(c.name) + ", x " + name_of(layout) + ", z " + name_of(z_layout) + ": " + config.text());
                CHECK(x.intact());
            }
        CHECK_THAT(taken >= 8, std::to_string(taken) + " layers for kernel " + std::to_string(kernel));
    }
}

} // namespace launches
