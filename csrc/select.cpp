#include "select.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "cpu/cost.h"
#include "cpu/tiles.h"
#include "cpu/winograd.h"

namespace localsgd {
namespace {

bool fits(const Geometry& g, Algorithm algorithm) {
    switch (algorithm) {
    case Algorithm::kGram:
        return g.pointwise();
    case Algorithm::kDepthwise:
        return g.depthwise();
    case Algorithm::kWinograd:
        return winograd_fits(g);
    default:
        return true;
    }
}

// Whether it may be picked: the Gram form reads no z, so it needs the promise that z says nothing else than x does.
bool allowed(const Query& q, Algorithm algorithm) {
    return fits(q.geometry, algorithm) && (algorithm != Algorithm::kGram || !q.z_present || q.z_is_output);
}

std::string list(const Triple& t, int dims) {
    std::string text;
    for (int i = 3 - dims; i < 3; ++i) {
        if (!text.empty()) text += 'x';
        text += std::to_string(t[i]);
    }
    return text;
}

template <double Candidate::* Cost>
void pick_cheapest(Plan& plan, const char* how) {
    const Candidate* best = nullptr;
    const Candidate* second = nullptr;
    for (const Candidate& c : plan.candidates) {
        if (!c.automatic) continue;
        if (!best || c.*Cost < best->*Cost)
            second = best, best = &c;
        else if (!second || c.*Cost < second->*Cost)
            second = &c;
    }
    plan.pick = best->algorithm;
    char text[160];
    if (second)
        std::snprintf(text, sizeof text, "%s %.0f us, next %s %.0f us", how, best->*Cost, algorithm_name(second->algorithm),
                      second->*Cost);
    else
        std::snprintf(text, sizeof text, "%s %.0f us, nothing else is eligible", how, best->*Cost);
    plan.reason = text;
}

} // namespace

const char* algorithm_name(Algorithm algorithm) {
    switch (algorithm) {
    case Algorithm::kGram:
        return "gram";
    case Algorithm::kDepthwise:
        return "depthwise";
    case Algorithm::kWinograd:
        return "winograd";
    case Algorithm::kDirect:
        return "direct";
    default:
        return "library";
    }
}

Cpu this_cpu() {
    Cpu cpu;
    cpu.wide = has_wide_registers();
#ifdef LOCALSGD_HAS_TARGETS
    static const bool amd = __builtin_cpu_is("amd");
    cpu.amd = amd;
#endif
    cpu.bf16 = has_tiles() ? Cpu::Bf16::kTiles : has_dots() ? Cpu::Bf16::kDots : Cpu::Bf16::kEmulated;
    return cpu;
}

const Candidate& Plan::candidate(Algorithm algorithm) const {
    return *std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& c) { return c.algorithm == algorithm; });
}

Candidate candidate_of(const Query& q, Algorithm algorithm) {
    Candidate c;
    c.algorithm = algorithm;
    c.eligible = fits(q.geometry, algorithm);
    c.automatic = allowed(q, algorithm);
    if (!c.eligible)
        c.why_not = algorithm == Algorithm::kGram        ? "needs a kernel of size 1 or a linear layer"
                    : algorithm == Algorithm::kDepthwise ? "needs groups == in_channels > 1"
                                                         : "needs a 2-d kernel of 3x3, stride, dilation and groups of 1";
    else if (!c.automatic)
        c.why_not = "ignores z, which was not promised to be the layer's output (z_is_output=True)";
    return c;
}

Plan make_plan(const Query& query) {
    Plan plan;
    plan.query = query;
    for (const Algorithm algorithm : kAlgorithms) {
        plan.candidates.push_back(candidate_of(query, algorithm));
        plan.candidates.back().estimated_us = cpu::estimate_us(query, algorithm);
    }
    pick_by_estimate(plan);
    return plan;
}

Algorithm cheapest(const Query& query) {
    Algorithm best = Algorithm::kDirect;
    double least = std::numeric_limits<double>::infinity();
    for (const Algorithm algorithm : kAlgorithms) {
        if (!allowed(query, algorithm)) continue;
        const double us = cpu::estimate_us(query, algorithm);
        if (us < least) least = us, best = algorithm;
    }
    return best;
}

void pick_by_estimate(Plan& plan) { pick_cheapest<&Candidate::estimated_us>(plan, "estimated"); }

void pick_by_measurement(Plan& plan) { pick_cheapest<&Candidate::measured_us>(plan, "measured"); }

std::string describe(const Geometry& g) {
    if (g.dims == 0) {
        return "linear " + std::to_string(g.in_channels) + "->" + std::to_string(g.out_channels) + " x " +
               std::to_string(g.positions()) + " rows";
    }
    return "conv" + std::to_string(g.dims) + "d " + std::to_string(g.in_channels) + "->" + std::to_string(g.out_channels) +
           " k" + list(g.kernel, g.dims) + " s" + list(g.stride, g.dims) + " p" + list(g.pad, g.dims) + " d" +
           list(g.dilation, g.dims) + " g" + std::to_string(g.groups) + " " + std::to_string(g.batch) + "x(" +
           list(g.input, g.dims) + "->" + list(g.output, g.dims) + ")";
}

std::string plan_key(const Query& q) {
    return describe(q.geometry) + " " + kind_name(q.x_kind) + " " + kind_name(q.z_kind) + (q.z_present ? "" : " no-z") +
           (q.z_is_output ? " output" : "") + (q.channels_last ? " channels_last " : " ") + std::to_string(q.threads) +
           " threads";
}

} // namespace localsgd
