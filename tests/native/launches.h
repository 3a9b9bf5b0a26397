// What the tests of correlation kernels share: the emulated chip, and D and the
// updated weight against fp64.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "emulation/cuda.h"
#include "layers.h"

namespace launches {

// The next launches run on 3 multiprocessors of 2 blocks each, in this order of
// blocks and threads.
inline void use(unsigned seed, bool cooperative) {
    emulation::options().seed = seed;
    emulation::options().multiprocessors = 3;
    emulation::options().blocks_per_multiprocessor = 2;
    emulation::options().cooperative = cooperative;
}

inline double norm_of(const std::vector<double>& values) {
    double squares = 0;
    for (const double v : values) squares += v * v;
    return std::sqrt(squares);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Some hundred products of about unit size, added in fp32: rounding errors grow
// as a random walk.
constexpr double kTolerance = 2e-6;

inline void check_d(const emulation::Guarded<float>& d, const std::vector<double>& oracle, const std::string& what) {
    double difference = 0;
    for (size_t i = 0; i < oracle.size(); ++i) difference += (d[i] - oracle[i]) * (d[i] - oracle[i]);
    const double norm = norm_of(oracle), error = std::sqrt(difference) / (norm > 0 ? norm : 1);
    CHECK_THAT(error <= kTolerance, what + ": error " + std::to_string(error));
}

// W + lr * D / ||D||, rounded once to the weight's dtype.
inline void check_weight(const std::vector<float>& after, localsgd::Kind kind, const std::vector<float>& before,
                         const std::vector<double>& oracle, double lr, const std::string& what) {
    using localsgd::Kind;
    const double half_ulp = kind == Kind::f32 ? 0x1p-24 : kind == Kind::f16 ? 0x1p-11 : 0x1p-8, norm = norm_of(oracle);
    for (size_t i = 0; i < oracle.size(); ++i) {
        const double expected = before[i] + lr * oracle[i] / norm;
        const double allowed =
            1.01 * half_ulp * std::max(1e-3, std::fabs(expected)) + 1e-6 * std::fabs(lr); // and D's own error
        if (std::fabs(after[i] - expected) <= allowed) continue;
        CHECK_THAT(false, what + ": weight " + std::to_string(i) + " is " + std::to_string(after[i]) + ", not " +
                              std::to_string(expected));
        return;
    }
}

} // namespace launches
