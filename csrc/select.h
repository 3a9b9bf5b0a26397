// Which algorithm computes a layer's correlation, as a value that can be printed.
#pragma once

#include <string>
#include <vector>

#include "cpu/elements.h"
#include "geometry.h"

namespace localsgd {

enum class Algorithm { kGram, kDepthwise, kWinograd, kDirect, kLibrary };
constexpr Algorithm kAlgorithms[] = {Algorithm::kGram, Algorithm::kDepthwise, Algorithm::kWinograd, Algorithm::kDirect,
                                     Algorithm::kLibrary};

const char* algorithm_name(Algorithm algorithm);

// What a CPU multiplies fast with.
struct Cpu {
    enum class Bf16 { kEmulated, kDots, kTiles }; // the latter two: AVX-512's and AMX's instructions
    bool wide = false;                            // registers of 64 bytes
    bool amd = false;                             // MKL keeps to AVX2 there
    Bf16 bf16 = Bf16::kEmulated;
};
Cpu this_cpu();

// What the choice depends on besides the shape.
struct Query {
    Geometry geometry;
    Kind x_kind = Kind::f32;
    Kind z_kind = Kind::f32; // where z is absent: the dtype the forward would give it
    bool z_present = true;
    bool z_is_output = false;   // z equals conv(x, W) + b up to rounding
    bool channels_last = false; // x's channel stride is 1
    Cpu cpu;
    int threads = 1;
};

struct Candidate {
    Algorithm algorithm;
    bool eligible = false;  // by geometry: may be asked for explicitly
    bool automatic = false; // may be picked by "auto"
    std::string why_not;    // where not eligible or not automatic
    double estimated_us = 0;
    double measured_us = -1;   // negative: never timed
    std::string configuration; // of the kernels: tiles, splits, launches; empty where there is nothing to choose

    // Why it may not be asked for, or "".
    std::string obstacle() const { return eligible ? std::string() : why_not; }
};

struct Plan {
    Query query;
    std::vector<Candidate> candidates;
    Algorithm pick = Algorithm::kLibrary;
    std::string reason;

    const Candidate& candidate(Algorithm algorithm) const;
};

// Whether an algorithm fits the layer on any device; no estimate.
Candidate candidate_of(const Query& query, Algorithm algorithm);

// Eligibility, cost estimates for a CPU and the pick by estimate.
Plan make_plan(const Query& query);

// That plan's pick alone, without words: what each update asks for.
Algorithm cheapest(const Query& query);

void pick_by_estimate(Plan& plan);
void pick_by_measurement(Plan& plan);

// "conv2d 64->256 k1x1 s1x1 p0x0 d1x1 g1 8x(56x56->56x56)"
std::string describe(const Geometry& geometry);

// Everything the choice depends on: the key under which measurements are kept.
std::string plan_key(const Query& query);

} // namespace localsgd
