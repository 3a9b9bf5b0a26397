#include "plan.h"

#include <algorithm>

#include <ATen/Context.h>

namespace localsgd::cuda {
namespace {

constexpr double kLaunchUs = 3;
constexpr double kMovesOfD = 14; // of 4 bytes, from partial sums to the weight

double bytes_of(const Operand& o, double elements) { return elements * double(kind_size(o.kind)); }

double x_elements(const Geometry& g) { return double(g.batch) * double(g.in_channels) * double(product(g.input)); }

double z_elements(const Geometry& g) { return double(g.positions()) * double(g.out_channels); }

double weight_bytes(const Layer& layer) { return double(layer.weight.numel()) * double(layer.weight.element_size()); }

// Clocks of the busiest multiprocessor, as launchers estimate them, or the time that memory needs, whichever is longer.
double kernel_us(const Chips& chips, double clocks, double bytes, int launches) {
    return std::max(clocks / chips.clocks_per_us, bytes / chips.bytes_per_us) + launches * kLaunchUs;
}

double moves_of_d_us(const Layer& layer, const Chips& chips) {
    return kMovesOfD * 4 * double(layer.weight.numel()) / chips.bytes_per_us;
}

struct Estimate {
    double us;
    std::string configuration;
};

// What a launch takes by its estimated time, which knows nothing of cold instructions and idle lanes: as measured on an H200.
struct Correction {
    double start_us, factor;
    double of(double us) const { return start_us + factor * us; }
};

Correction direct_correction(Core core) { return {4, core == Core::ffma ? 1.7 : core == Core::mma_tf32 ? 1.15 : 1.1}; }

Correction gram_correction(Core core, const Geometry& g) {
    const double look_ups = product(g.stride) > 1 ? 1.3 : 1;
    return {14, look_ups * (core == Core::ffma ? 1.8 : core == Core::mma_tf32 ? 1.2 : 1.15)};
}

Estimate estimate(const DirectProblem& p, const Layer& layer, const Chips& chips) {
    const DirectConfig c = get_best_config(p, chips.direct);
    const double bytes =
        bytes_of(p.x, x_elements(p.geometry)) + bytes_of(p.z, z_elements(p.geometry)) + 2 * weight_bytes(layer);
    const double us = kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 3) + moves_of_d_us(layer, chips);
    return {direct_correction(c.core).of(us), c.text()};
}

Estimate estimate(const GramProblem& p, const Layer& layer, const Chips& chips) {
    const GramConfig c = get_best_config(p, chips.gram);
    const double bytes = bytes_of(p.x, x_elements(p.geometry)) + 2 * weight_bytes(layer);
    const double us = kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 5) + moves_of_d_us(layer, chips);
    return {gram_correction(c.core, p.geometry).of(us), c.text()};
}

Estimate estimate(const DepthwiseProblem& p, const Layer& layer, const Chips& chips) {
    const DepthwiseConfig c = get_best_config(p, chips.depthwise);
    const double bytes =
        bytes_of(p.x, x_elements(p.geometry)) + bytes_of(p.z, z_elements(p.geometry)) + 2 * weight_bytes(layer);
    return {0.9 * kernel_us(chips, c.estimated_clocks, bytes, c.cooperative ? 1 : 3), c.text()}; // measured on an H200
}

// What cuDNN and cuBLAS multiply in.
enum class LibraryUnit { ffma, tf32, bf16 };

LibraryUnit library_unit(const DirectProblem& p, const Chips& chips) {
    if (chips.capability < 80) return LibraryUnit::ffma;
    if (p.x.kind == p.z.kind && p.x.kind == Kind::bf16) return LibraryUnit::bf16; // fp16 is widened, see library.cpp
    return p.allow_tf32 ? LibraryUnit::tf32 : LibraryUnit::ffma;
}

// Multiply-adds a clock and multiprocessor.
double library_multiplies(LibraryUnit unit, const Chips& chips) {
    if (unit == LibraryUnit::ffma) return 128;
    return (unit == LibraryUnit::bf16 ? 1024 : 512) * (chips.capability >= 90 ? 2 : 1);
}

// What a library's weight gradient takes: a start, and multiples of what its multiplications and its bytes would at the peaks.
struct LibraryCost {
    double start_us, compute, memory;
};

// As measured on an H200 in channels_last, and supposed of all other GPUs and of NCHW. Few channels are filled up to many, taps
// of depthwise layers read apart, and 3x3 taps of many channels in fp32 go through Winograd's algorithm.
LibraryCost library_cost(const Geometry& g, LibraryUnit unit) {
    const auto by_unit = [&](double ffma, double tf32, double bf16) {
        return unit == LibraryUnit::ffma ? ffma : unit == LibraryUnit::tf32 ? tf32 : bf16;
    };
    if (g.dims == 0) return {5.5, by_unit(1.4, 2.5, 1.5), 1.3};
    if (g.depthwise()) return {by_unit(12, 12, 9), 1, by_unit(1.5, 1.5, 2.7)};
    if (g.in_per_group() < 8) return {by_unit(25, 25, 18), by_unit(3.8, 10, 15), by_unit(6, 6, 12)};
    const int64_t narrowest = std::min(g.in_per_group(), g.out_per_group());
    if (g.pointwise()) {
        const double strided = product(g.stride) > 1 ? 6 : 0;
        return {by_unit(20, 15, 9) + strided, by_unit(narrowest < 32 ? 5.5 : 3.2, 2.4, 1.4), 1.25};
    }
    const bool winograd = g.taps() == 9 && product(g.stride) == 1 && narrowest >= 128;
    return {12, by_unit(winograd ? 1.1 : 2.8, 3.2, 2.2), 2.2};
}

// cuDNN's weight gradient, or cuBLAS for linear layers, then norm and write in a launch of their own.
double library_us(const DirectProblem& p, const Layer& layer, const Chips& chips) {
    const Geometry& g = p.geometry;
    const LibraryUnit unit = library_unit(p, chips);
    const LibraryCost cost = library_cost(g, unit);
    const double x = x_elements(g), z = z_elements(g);
    double bytes = bytes_of(p.x, x) + bytes_of(p.z, z);
    if (p.x.kind != p.z.kind || p.x.kind == Kind::f16) bytes += 3 * 4 * (x + z); // converted first: written and read again
    if (g.dims > 0 && p.x.strides.channel != 1 && unit != LibraryUnit::ffma) bytes *= 3; // to NHWC first
    const double slow = g.groups > 1 && !g.depthwise() ? 3 : 1;
    const double compute = double(g.positions()) * double(g.out_channels) * double(g.patch()) * slow /
                           library_multiplies(unit, chips) / chips.multiprocessors / chips.clocks_per_us;
    constexpr double kApplyUs = 5, kBytesOfApply = 16; // for each element: D twice, the weight read and written
    const double write = kApplyUs + kBytesOfApply * double(layer.weight.numel()) / chips.bytes_per_us;
    return cost.start_us + std::max(cost.compute * compute, cost.memory * bytes / chips.bytes_per_us) + write;
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
