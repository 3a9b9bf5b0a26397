// Launches of direct kernels on the emulated GPU, and what must hold of each. For tests that include the kernels' sources.
#pragma once

#include <memory>

#include "check.h"
#include "emulation/guarded.h"
#include "layers.h"

namespace launches {

using namespace localsgd;
using namespace localsgd::cuda;
using emulation::Flush;
using emulation::Guarded;
using layers::Case;
using layers::Layout;

inline void use(unsigned seed, bool cooperative) {
    emulation::options().seed = seed;
    emulation::options().multiprocessors = 3;
    emulation::options().blocks_per_multiprocessor = 2;
    emulation::options().cooperative = cooperative;
}

// Another number of splits than the chosen one, to see more of them than blocks, and none.
inline void split(DirectConfig& config, const Geometry& g, int splits, int step) {
    config.splits = splits;
    config.split_positions = static_cast<int>(ceil_div(ceil_div(g.positions(), splits), step) * step);
    config.sharers = splits >= 4 ? 4 : 1;
    config.blocks = std::max(1, std::min(6, config.tiles * splits));
}

// A launch's device memory. Buffers lie against unmapped pages and are poisoned; the workspace is, but for its header.
struct Memory {
    layers::Tensor x, z;
    Guarded<float> weight, d;
    std::unique_ptr<Guarded<unsigned char>> workspace;
    DirectProblem problem;
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

    void make_workspace(const DirectConfig& config) {
        workspace = std::make_unique<Guarded<unsigned char>>(workspace_bytes(config));
        std::memset(workspace->data(), 0, kWorkspaceHeader);
    }

    bool intact() const { return x.intact() && z.intact() && weight.intact() && d.intact() && workspace->intact(); }

    // Index of D[k, c, t0, t1, t2] in the weight's memory.
    size_t weight_index(int64_t k, int64_t c, const Triple& t) const {
        const Target& w = weight_target;
        return static_cast<size_t>(k * w.out_stride + c * w.channel_stride + t[0] * w.tap_stride[0] + t[1] * w.tap_stride[1] +
                                   t[2] * w.tap_stride[2]);
    }
};

inline bool same_bits(const std::vector<float>& a, const Guarded<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// ||D - D64|| / ||D64||
inline double error_of(const Guarded<float>& d, const std::vector<double>& oracle) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < oracle.size(); ++i) {
        difference += (d[i] - oracle[i]) * (d[i] - oracle[i]);
        norm += oracle[i] * oracle[i];
    }
    return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

// Sums of n products of about unit size, added in fp32 by runs: rounding errors grow as a random walk.
constexpr double kTolerance = 2e-6;

inline void check_weight(const Memory& m, const Case& c, const std::vector<float>& before, const std::vector<double>& oracle,
                         double lr, const std::string& what) {
    const Geometry& g = c.geometry;
    double norm = 0, worst = 0;
    for (const double v : oracle) norm += v * v;
    norm = std::sqrt(norm);
    for (int64_t k = 0; k < g.out_channels; ++k)
        for (int64_t j = 0; j < g.patch(); ++j) {
            const int64_t taps = g.taps(), tap = j % taps;
            const Triple t{tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
            const size_t i = m.weight_index(k, j / taps, t);
            worst = std::max(worst, std::fabs(m.weight[i] - (before[i] + lr * oracle[k * g.patch() + j] / norm)));
        }
    CHECK_THAT(worst <= 1e-6, what); // half an ulp of |W| < 8, and D's own error
}

// D; two updates; D again by a launch a phase in another order of blocks and threads, with the same bits.
inline void check_launches(Memory& m, const Case& c, DirectConfig config, const std::vector<double>& oracle, unsigned seed,
                           const std::string& what) {
    m.make_workspace(config);
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact(), what);
    const double error = error_of(m.d, oracle);
    CHECK_THAT(error <= kTolerance, what + ": error " + std::to_string(error));

    // Twice with the workspace as the last launch left it, the rate once from the host and once from the device.
    const float rate = -0.5f;
    for (int repeat = 0; repeat < 2; ++repeat) {
        Guarded<uint64> skipped(1);
        skipped[0] = 7;
        Step step;
        step.rate.value = 0.25;
        if (repeat) step.rate.device_float = &rate;
        step.skipped = skipped.data();
        const std::vector<float> before = m.weight.values();
        CHECK_THAT(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess,
                   what);
        CHECK_THAT(m.intact() && skipped.intact(), what);
        double norm = 0;
        for (const double v : oracle) norm += v * v;
        CHECK_THAT(skipped[0] == (norm > 0 ? 7u : 8u), what);
        if (norm > 0)
            check_weight(m, c, before, oracle, repeat ? rate : 0.25, what.c_str());
        else
            CHECK_THAT(same_bits(before, m.weight), what);
    }
    // Without cooperative launches, and in another order of blocks and threads: the same bits.
    const std::vector<float> d = m.d.values();
    use(seed + 17, false);
    config.cooperative = false;
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact() && same_bits(d, m.d), what);
}

} // namespace launches
