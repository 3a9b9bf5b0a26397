// Layers and launches of the Gram form on the emulated GPU. For tests that include the kernels' sources.
#pragma once

#include "launches.h"

namespace launches {

inline std::vector<Case> gram_cases() {
    using layers::layer;
    std::vector<Case> all{
        layer("1x1 stride 2, padded", 2, 5, 9, {1, 7, 6}, {1, 1, 1}, {1, 2, 2}, {0, 1, 2}),
        layer("1x1 stride 3, quads", 3, 8, 12, {1, 9, 9}, {1, 1, 1}, {1, 3, 3}),
        layer("grouped", 2, 15, 21, {1, 5, 5}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 3),
        layer("grouped, quads, two tiles", 1, 136, 24, {1, 4, 6}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 2),
        layer("three strips", 1, 130, 65, {1, 3, 7}, {1, 1, 1}),
        layer("five strips, quads", 1, 260, 8, {1, 2, 6}, {1, 1, 1}),
        layer("one position", 1, 66, 3, {1, 1, 1}, {1, 1, 1}),
        layer("conv1d", 4, 7, 5, {1, 1, 33}, {1, 1, 1}, {1, 1, 2}),
        layer("strided 1x1x1 conv3d", 2, 4, 6, {3, 4, 5}, {1, 1, 1}, {2, 2, 1}),
        layer("no images", 0, 3, 4, {1, 5, 5}, {1, 1, 1}),
        layer("no output channels", 2, 3, 0, {1, 5, 5}, {1, 1, 1}),
    };
    for (const Case& c : layers::cases())
        if (c.geometry.pointwise()) all.push_back(c);
    return all;
}

struct Memory {
    const Case& layer;
    layers::Tensor x, weight, bias;
    Guarded<float> d;
    std::unique_ptr<Guarded<unsigned char>> workspace;
    GramProblem problem;
    Kind weight_kind, z_kind;
    Target weight_target, d_target;

    Memory(const Case& c, Kind x_kind, Kind weight_kind_, Kind z_kind_, Layout layout, bool has_bias, Flush flush)
        : layer(c),
          x(layers::input(c), x_kind, layout, flush, 1),
          weight({c.geometry.out_channels, c.geometry.patch(), 1, 1, 1}, weight_kind_, layout, flush, 2),
          bias({c.geometry.out_channels, 1, 1, 1, 1}, weight_kind_, Layout::nchw, flush, 3),
          d(static_cast<size_t>(c.geometry.out_channels * c.geometry.patch()), flush),
          weight_kind(weight_kind_),
          z_kind(z_kind_) {
        const Strides& w = weight.strides();
        problem = {c.geometry, {x.data(), x_kind, x.strides()},  weight.data(), weight_kind, w.batch,
                   w.channel,  has_bias ? bias.data() : nullptr, weight_kind,   z_kind};
        weight_target = {weight.data(), element(weight_kind), w.batch, w.channel, {0, 0, 0}};
        d_target = {d.data(), Element::f32, c.geometry.patch(), 1, {0, 0, 0}};
    }

    void make_workspace(const GramConfig& config) { workspace = new_workspace(workspace_bytes(problem, config)); }

    bool intact() const {
        return x.intact() && weight.intact() && bias.intact() && d.intact() && (!workspace || workspace->intact());
    }

    std::vector<float> floats() const { return weight.floats(); }
    void set_weight(const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); ++i) weight.set(i, values[i]);
    }

    // W or b as the forward rounded it, W by a core once more.
    double parameter(float value, Core core) const {
        return rounded_by(core, kind_size(z_kind) < kind_size(weight_kind) ? layers::rounded_to(z_kind, value) : value);
    }

    // D[k, c] = sum over positions of z[k] x[c], z = W x + b with W, b and x as the forward and the core round them, in fp64.
    // tf32 rounds W and x where they are multiplied, but not b and its sum of x.
    std::vector<double> oracle(Core core = Core::ffma) const {
        const Geometry& g = layer.geometry;
        const int64_t in = g.in_per_group(), out = g.out_per_group();
        std::vector<double> w, b;
        for (const float v : weight.floats()) w.push_back(parameter(v, core == Core::mma_tf32 ? core : Core::ffma));
        for (const float v : bias.floats()) b.push_back(problem.bias ? parameter(v, Core::ffma) : 0);
        std::vector<double> sum(static_cast<size_t>(g.out_channels * in), 0.0), at(static_cast<size_t>(in)), exact = at;
        for (int64_t n = 0; n < g.batch; ++n)
            for (int64_t p = 0; p < g.image_positions(); ++p) {
                const Triple q{p / (g.output[1] * g.output[2]), p / g.output[2] % g.output[1], p % g.output[2]};
                Triple i;
                bool valid = true;
                for (int a = 0; a < 3; ++a) {
                    i[a] = q[a] * g.stride[a] - g.pad[a];
                    valid = valid && i[a] >= 0 && i[a] < g.input[a];
                }
                if (!valid) continue; // x = 0
                for (int64_t group = 0; group < g.groups; ++group) {
                    for (int64_t c = 0; c < in; ++c) {
                        const auto value = static_cast<float>(x.at(x.index(n, group * in + c, i)));
                        at[c] = rounded_by(core, value);
                        exact[c] = core == Core::mma_tf32 ? value : at[c];
                    }
                    for (int64_t k = group * out; k < (group + 1) * out; ++k) {
                        double z = 0;
                        for (int64_t c = 0; c < in; ++c) z += at[c] * w[k * in + c];
                        for (int64_t c = 0; c < in; ++c) sum[k * in + c] += z * at[c] + b[k] * exact[c];
                    }
                }
            }
        return sum;
    }
};

inline double tolerance_of(const GramConfig& c) {
    return c.product == Core::mma_bf16 && c.product_pairs == 2 ? kTwoPartsTolerance : kTolerance;
}

// Other numbers of splits than the chosen ones: more than blocks, one, and a last one that is short.
inline void split(GramConfig& config, const GramProblem& problem, int splits) {
    const Geometry& g = problem.geometry;
    const GramVariant& v = gram_kernel_variant(config.kernel);
    const auto run_of = [](int64_t length, int64_t runs, int64_t step) {
        return static_cast<int>(ceil_div(std::max<int64_t>(1, ceil_div(length, runs)), step) * step);
    };
    config.splits = splits;
    config.split_positions = run_of(g.positions(), splits, v.step_positions);
    config.sharers = splits >= 4 ? 4 : 1;
    config.product_splits = splits % 3 + 1;
    config.product_split_length = run_of(config.product_pairs * inner_of(problem), config.product_splits, v.product_step);
    config.product_sharers = config.product_splits >= 2 ? 2 : 1;
    config.blocks = std::clamp(std::max(config.tiles * splits, config.product_tiles * config.product_splits), 1, 6);
}

// The kernel that one asks for in the place of a chosen one.
inline GramConfig with_kernel(const GramProblem& problem, int kernel) {
    GramConfig config = config_of(problem, kernel);
    config.cooperative = true;
    return config;
}

inline std::string describe(const Memory& m, Layout layout, const GramConfig& config) {
    return std::string(m.layer.name) + " " + kind_name(m.problem.x.kind) + "/" + kind_name(m.weight_kind) + "/" +
           kind_name(m.z_kind) + " " + layers::name_of(layout) + (m.problem.bias ? " with bias" : "") + ": " + config.text();
}

} // namespace launches
