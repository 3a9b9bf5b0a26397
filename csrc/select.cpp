#include "select.h"

#include <algorithm>
#include <cstdio>

namespace localsgd {
namespace {

// One core of a current x86 server, fp32. Only ratios matter for the pick; `localsgd_ext.benchmark` measures instead.
constexpr double kGemmFlopsPerUs = 80e3;   // large GEMM
constexpr double kVectorFlopsPerUs = 25e3; // depthwise inner loop, from cache
constexpr double kBytesPerUs = 8e3;        // streaming from memory
constexpr double kGatherBytesPerUs = 4e3;  // im2col, conversions, transposes
constexpr double kCallUs = 4;              // one GEMM through ATen

bool is_wide(const Query& q) { return q.x_kind == Kind::f64 || q.z_kind == Kind::f64; }

double element_bytes(const Query& q) { return is_wide(q) ? 8 : 4; }

double gemm_us(const Query& q, double flops) { return flops / (kGemmFlopsPerUs * (is_wide(q) ? 0.5 : 1) * q.threads); }

double stream_us(const Query& q, double bytes) { return bytes / (kBytesPerUs * std::min(q.threads, 4)); }

double gather_us(const Query& q, double bytes) { return bytes / (kGatherBytesPerUs * q.threads); }

double x_bytes(const Query& q) {
    const Geometry& g = q.geometry;
    return double(g.batch * g.in_channels * product(g.input)) * kind_size(q.x_kind);
}

double z_bytes(const Query& q) { return double(q.geometry.positions() * q.geometry.out_channels) * kind_size(q.z_kind); }

double wgrad_flops(const Geometry& g) { return 2.0 * g.positions() * g.out_channels * g.patch(); }

// Narrow GEMMs run below the peak.
double narrow(double size) { return 1 + 16 / size; }

double forward_us(const Query& q) { return gemm_us(q, wgrad_flops(q.geometry)) + stream_us(q, x_bytes(q) + 2 * z_bytes(q)); }

bool gathers(const Query& q, Kind kind, bool strided) { return strided || kind_size(kind) != element_bytes(q); }

double gram_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double c = g.in_per_group(), rows = g.positions();
    const double triangle = c >= 256 ? 0.625 : 1; // blocked: only the lower blocks
    const bool strided = product(g.stride) > 1 || product(g.pad) > 0;
    const double gather = gathers(q, q.x_kind, strided) ? 2 * rows * g.in_channels * element_bytes(q) : 0;
    return gemm_us(q, 2 * rows * c * c * g.groups * triangle * narrow(c)) + gemm_us(q, 2.0 * g.out_channels * c * c) +
           stream_us(q, x_bytes(q)) + gather_us(q, gather) + 4 * kCallUs;
}

double direct_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double rows = g.positions(), patch = double(g.patch()) * g.groups;
    double gather = gathers(q, q.x_kind, !g.pointwise() || product(g.stride) > 1) ? 2 * rows * patch * element_bytes(q) : 0;
    gather += gathers(q, q.z_kind, false) ? 2 * rows * g.out_channels * element_bytes(q) : 0;
    const double tiles = std::max(1.0, rows * (patch + g.out_channels) * element_bytes(q) / 4e6);
    const double accumulate = tiles * 2 * g.out_channels * g.patch() * element_bytes(q); // D is read and written per tile
    return gemm_us(q, wgrad_flops(g) * narrow(g.out_per_group()) * narrow(g.patch())) + stream_us(q, x_bytes(q) + z_bytes(q)) +
           gather_us(q, gather + accumulate) + tiles * kCallUs * (g.groups > 1 ? g.groups : 1);
}

double depthwise_us(const Query& q) {
    return wgrad_flops(q.geometry) / (kVectorFlopsPerUs * q.threads) + stream_us(q, x_bytes(q) + z_bytes(q)) +
           gather_us(q, x_bytes(q) + z_bytes(q));
}

double library_us(const Query& q) {
    const Geometry& g = q.geometry;
    if (g.dims == 0) return direct_us(q) * 1.05; // the same GEMM, and a conversion of all of x and z at once if any
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16;
    const bool converts = !bf16 && (kind_size(q.x_kind) != element_bytes(q) || kind_size(q.z_kind) != element_bytes(q));
    // oneDNN reorders x and z to its blocked layout; grouped layers are slow there, and so is bf16 that the CPU must emulate.
    const double reorder = (q.channels_last ? 1 : 2) * (converts ? 2 : 1) * (x_bytes(q) + z_bytes(q));
    const double slow = (g.groups > 1 ? 2 : 1) * (g.depthwise() ? 8 : 1) * (g.pointwise() ? 1.3 : 1) *
                        (!bf16         ? 1
                         : q.fast_bf16 ? 0.5
                                       : 3);
    return gemm_us(q, wgrad_flops(g) * slow) + stream_us(q, x_bytes(q) + z_bytes(q)) + gather_us(q, reorder) + 10 * kCallUs;
}

double estimate_us(const Query& q, Algorithm algorithm) {
    const double forward = q.z_present ? 0 : forward_us(q);
    switch (algorithm) {
    case Algorithm::kGram:
        return gram_us(q);
    case Algorithm::kDepthwise:
        return forward + depthwise_us(q);
    case Algorithm::kDirect:
        return forward + direct_us(q);
    default:
        return forward + library_us(q);
    }
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
    case Algorithm::kDirect:
        return "direct";
    default:
        return "library";
    }
}

bool cpu_multiplies_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

const Candidate& Plan::candidate(Algorithm algorithm) const {
    return *std::find_if(candidates.begin(), candidates.end(), [&](const Candidate& c) { return c.algorithm == algorithm; });
}

Candidate candidate_of(const Query& q, Algorithm algorithm) {
    const Geometry& g = q.geometry;
    Candidate c;
    c.algorithm = algorithm;
    c.eligible = c.automatic = true;
    if (algorithm == Algorithm::kGram) {
        c.eligible = g.pointwise();
        c.automatic = c.eligible && (!q.z_present || q.z_is_output);
        if (!c.eligible)
            c.why_not = "needs a kernel of size 1 or a linear layer";
        else if (!c.automatic)
            c.why_not = "ignores z, which was not promised to be the layer's output (z_is_output=True)";
    } else if (algorithm == Algorithm::kDepthwise) {
        c.eligible = c.automatic = g.depthwise();
        if (!c.eligible) c.why_not = "needs groups == in_channels > 1";
    }
    return c;
}

Plan make_plan(const Query& query) {
    Plan plan;
    plan.query = query;
    for (const Algorithm algorithm : kAlgorithms) {
        plan.candidates.push_back(candidate_of(query, algorithm));
        plan.candidates.back().estimated_us = estimate_us(query, algorithm);
    }
    pick_by_estimate(plan);
    return plan;
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
