#include "plan.h"

#include <algorithm>

#include <ATen/Context.h>

namespace localsgd::cuda {
namespace {

constexpr double kLaunchUs = 3;

double bytes_of(const Operand& o, double elements) { return elements * double(kind_size(o.kind)); }

double x_elements(const Geometry& g) { return double(g.batch) * double(g.in_channels) * double(product(g.input)); }

double z_elements(const Geometry& g) { return double(g.positions()) * double(g.out_channels); }

double weight_bytes(const Layer& layer) { return double(layer.weight.numel()) * double(layer.weight.element_size()); }

// Clocks of the busiest multiprocessor, as launchers estimate them, or the time that memory needs, whichever is longer.
double kernel_us(const Chips& chips, double clocks, double bytes, int launches) {
    return std::max(clocks / chips.clocks_per_us, bytes / chips.bytes_per_us) + launches * kLaunchUs;
}

struct Estimate {
    double us;
    std::string configuration;
};

Estimate estimate(const DirectProblem& p, const Layer& layer, const Chips& chips) {
    const DirectConfig c = get_best_config(p, chips.direct);
    const double bytes =
        bytes_of(p.x, x_elements(p.geometry)) + bytes_of(p.z, z_elements(p.geometry)) + 2 * weight_bytes(layer);
    return {kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 3), c.text()};
}

Estimate estimate(const GramProblem& p, const Layer& layer, const Chips& chips) {
    const GramConfig c = get_best_config(p, chips.gram);
    const double bytes = bytes_of(p.x, x_elements(p.geometry)) + 2 * weight_bytes(layer);
    return {kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 5), c.text()};
}

Estimate estimate(const DepthwiseProblem& p, const Layer& layer, const Chips& chips) {
    const DepthwiseConfig c = get_best_config(p, chips.depthwise);
    const double bytes =
        bytes_of(p.x, x_elements(p.geometry)) + bytes_of(p.z, z_elements(p.geometry)) + 2 * weight_bytes(layer);
    return {kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 3), c.text()};
}

// Multiply-adds a clock and multiprocessor that cuDNN and cuBLAS have at hand: matrix units where the dtype allows them.
double library_multiplies(const DirectProblem& p, const Chips& chips) {
    const bool lower = p.x.kind == p.z.kind && p.x.kind == Kind::bf16; // fp16 is widened, see library.cpp
    if (chips.capability >= 80 && lower) return chips.capability >= 90 ? 2048 : 1024;
    if (chips.capability >= 80 && p.allow_tf32) return chips.capability >= 90 ? 1024 : 512;
    return 128;
}

// cuDNN's weight gradient, or cuBLAS for linear layers, then norm and write in a launch of their own. The shares of the peaks
// are what such kernels usually reach on large layers.
double library_us(const DirectProblem& p, const Layer& layer, const Chips& chips) {
    constexpr double kMmaShare = 0.55, kFfmaShare = 0.75;
    const Geometry& g = p.geometry;
    const double multiplies = library_multiplies(p, chips);
    const double x = x_elements(g), z = z_elements(g);
    double bytes = bytes_of(p.x, x) + bytes_of(p.z, z);
    if (p.x.kind != p.z.kind || p.x.kind == Kind::f16) bytes += 3 * 4 * (x + z); // converted first: written and read again
    if (g.dims > 0 && p.x.strides.channel != 1 && multiplies > 128) bytes *= 3;  // to NHWC first
    if (g.depthwise()) bytes *= 6;                                               // taps read apart
    const double slow = g.groups > 1 && !g.depthwise() ? 3 : 1;
    const double compute = double(g.positions()) * double(g.out_channels) * double(g.patch()) * slow / multiplies /
                           chips.multiprocessors / (multiplies > 128 ? kMmaShare : kFfmaShare) / chips.clocks_per_us;
    const double d = double(layer.weight.numel()) * 4;
    const double write = (3 * d + 2 * weight_bytes(layer)) / chips.bytes_per_us;
    return std::max(compute, bytes / chips.bytes_per_us) + write + 3 * kLaunchUs;
}

template <class Problem>
void judge(Candidate& candidate, const Problem& problem, const Layer& layer, const Chips& chips) {
    if (const char* reason = unsupported(problem)) {
        candidate.eligible = candidate.automatic = false;
        candidate.why_not = std::string("cannot take ") + reason;
        return;
    }
    const Estimate e = estimate(problem, layer, chips);
    candidate.estimated_us = e.us;
    candidate.configuration = e.configuration;
}

Candidate judged(const Layer& layer, Candidate candidate, const Chips& chips) {
    if (!candidate.eligible) return candidate;
    const DirectProblem direct = direct_problem(layer);
    switch (candidate.algorithm) {
    case Algorithm::kGram:
        judge(candidate, gram_problem(layer), layer, chips);
        return candidate;
    case Algorithm::kDepthwise:
        judge(candidate, depthwise_problem(layer), layer, chips);
        break;
    case Algorithm::kDirect:
        judge(candidate, direct, layer, chips);
        break;
    case Algorithm::kWinograd:
        candidate.eligible = candidate.automatic = false;
        candidate.why_not = "has kernels for a CPU only";
        return candidate;
    case Algorithm::kLibrary:
        candidate.estimated_us = library_us(direct, layer, chips);
        candidate.configuration = layer.geometry.dims == 0 ? "matrix product, then apply" : "weight gradient, then apply";
        // A product of two matrices is deterministic only with a cuBLAS workspace that the user has to configure.
        if (layer.geometry.dims == 0 && at::globalContext().deterministicAlgorithms()) {
            candidate.automatic = false;
            candidate.why_not = "is not picked under torch.use_deterministic_algorithms";
        }
        break;
    }
    if (!layer.z) // the layer's forward comes first: one more GEMM
        candidate.estimated_us += library_us(direct, layer, chips);
    return candidate;
}

} // namespace

Plan estimated_plan(const Layer& layer, const Query& query, const Chips& chips) {
    Plan plan;
    plan.query = query;
    for (const Algorithm algorithm : kAlgorithms)
        plan.candidates.push_back(judged(layer, candidate_of(query, algorithm), chips));
    pick_by_estimate(plan);
    return plan;
}

} // namespace localsgd::cuda
