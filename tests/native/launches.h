// What the tests of correlation kernels share: the emulated chip, and what must hold of every launch.
//
// A test's `Memory` is a launch's device memory: `problem`, `workspace`, targets, D as `d`, and the weight by `floats()` and
// `set_weight()` in D's order. Buffers lie against unmapped pages and are poisoned; the workspace is, but for its header.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "emulation/cuda.h"
#include "emulation/guarded.h"
#include "layers.h"

namespace launches {

using namespace localsgd;
using namespace localsgd::cuda;
using emulation::Flush;
using emulation::Guarded;
using layers::Case;
using layers::Layout;

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

// Some hundred products of about unit size, added in fp32: rounding errors grow as a random walk. And with G in two parts of
// bf16.
constexpr double kTolerance = 2e-6, kTwoPartsTolerance = 4e-6;

// ||D - D64|| / ||D64||
inline double error_of(const Guarded<float>& d, const std::vector<double>& oracle) {
    double difference = 0;
    for (size_t i = 0; i < oracle.size(); ++i) difference += (d[i] - oracle[i]) * (d[i] - oracle[i]);
    const double norm = norm_of(oracle);
    return std::sqrt(difference) / (norm > 0 ? norm : 1);
}

inline void check_d(const Guarded<float>& d, const std::vector<double>& oracle, const std::string& what,
                    double tolerance = kTolerance) {
    const double error = error_of(d, oracle);
    CHECK_THAT(error <= tolerance, what + ": error " + std::to_string(error * 1e6) + "e-6");
}

inline Element element(Kind kind) {
    return kind == Kind::f32 ? Element::f32 : kind == Kind::bf16 ? Element::bf16 : Element::f16;
}

// An fp32 operand as a core rounds it; lower ones are exact in the cores that are chosen for them.
inline float rounded_by(Core core, float value) {
    if (core != Core::mma_tf32) return layers::rounded_to(core == Core::ffma ? Kind::f32 : operand_kind(core), value);
    return __uint_as_float((__float_as_uint(value) + 0x1000u) & 0xffffe000u); // ties away from zero
}

inline std::unique_ptr<Guarded<unsigned char>> new_workspace(size_t bytes) {
    auto workspace = std::make_unique<Guarded<unsigned char>>(bytes);
    std::memset(workspace->data(), 0, kWorkspaceHeader);
    return workspace;
}

// W + lr * D / ||D||, rounded once to the weight's dtype.
inline void check_weight(const std::vector<float>& after, Kind kind, const std::vector<float>& before,
                         const std::vector<double>& oracle, double lr, const std::string& what) {
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

// D; the update three times with the workspace as the last launch left it, the last time a launch a phase in another order of
// blocks and threads, the rate from the host, then from the device; D again by a launch a phase. The same bits whenever.
template <class Memory, class Config>
void check_launches(Memory& m, Config config, const std::vector<double>& oracle, unsigned seed, const std::string& what,
                    double tolerance = kTolerance) {
    const double norm = norm_of(oracle);
    m.make_workspace(config);
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact(), what);
    check_d(m.d, oracle, what, tolerance);

    const std::vector<float> before = m.floats();
    const float rate = -0.5f;
    std::vector<float> after;
    for (int repeat = 0; repeat < 3; ++repeat) {
        m.set_weight(before);
        Guarded<uint64> skipped(1);
        skipped[0] = 7;
        Step step;
        step.rate.value = 0.25;
        if (repeat) step.rate.device_float = &rate;
        step.skipped = skipped.data();
        config.cooperative = repeat < 2;
        use(seed + 31 * static_cast<unsigned>(repeat), config.cooperative);
        CHECK_THAT(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess,
                   what);
        CHECK_THAT(m.intact() && skipped.intact(), what);
        CHECK_THAT(skipped[0] == (norm > 0 ? 7u : 8u), what);
        if (norm > 0)
            check_weight(m.floats(), m.weight_kind, before, oracle, repeat ? rate : 0.25, what);
        else
            CHECK_THAT(same_bits(before, m.floats()), what);
        if (repeat == 2) CHECK_THAT(same_bits(after, m.floats()), what + ": other bits in separate launches");
        after = m.floats();
    }
    m.set_weight(before);
    const std::vector<float> d = m.d.values();
    use(seed + 17, false);
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact() && same_bits(d, m.d.values()), what + ": other bits in separate launches");
}

// A batch that holds NaN or Inf, or whose correlation is zero, must not move the weight, and the next one must.
template <class Memory, class Config>
void check_bad_batches(Memory& m, const Config& config, layers::Tensor& poisoned, const std::vector<double>& oracle) {
    m.make_workspace(config);
    const std::vector<float> good = poisoned.floats();
    for (const float poison : {std::nanf(""), HUGE_VALF, 0.0f}) {
        const std::string what = "with " + std::to_string(poison) + ": " + config.text();
        Guarded<uint64> skipped(1);
        skipped[0] = 0;
        Step step;
        step.rate.value = 0.1;
        step.skipped = skipped.data();
        const std::vector<float> before = m.floats();
        if (poison == 0)
            poisoned.fill(0);
        else
            poisoned.set(poisoned.size() / 2, poison);
        CHECK_THAT(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess,
                   what);
        CHECK_THAT(skipped[0] == 1 && same_bits(before, m.floats()), what);
        for (size_t i = 0; i < good.size(); ++i) poisoned.set(i, good[i]);
        CHECK_THAT(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess,
                   what);
        CHECK_THAT(skipped[0] == 1, what);
        check_weight(m.floats(), m.weight_kind, before, oracle, 0.1, what);
        m.set_weight(before); // on which the Gram form's oracle depends
    }
}

// Whether `body` ends the process that runs it.
template <class Body>
bool aborts(const Body& body) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        if (!std::freopen("/dev/null", "w", stderr)) _exit(0); // what it reports is expected
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status);
}

// Kernels of instructions that the architecture lacks end the launch.
template <class Memory, class Config>
void check_traps(Memory& m, const Config& config) {
    m.make_workspace(config);
    CHECK_THAT(aborts([&] {
                   if (cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) != cudaSuccess) _exit(0);
               }),
               "ran without its instructions: " + config.text());
}

} // namespace launches
