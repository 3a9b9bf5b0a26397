#include "correlate.h"

#include <algorithm>
#if defined(LOCALSGD_EMULATION)
#include <chrono>
#endif

#include <ATen/ops/empty_like.h>

#include "../forward.h"
#include "../library.h"
#include "plan.h"

namespace localsgd::cuda {
namespace {

const DirectConfig& config_of(Prepared& kept, const DirectProblem& problem, const Chips& chips) {
    if (!kept.direct) kept.direct = get_best_config(problem, chips.direct);
    return *kept.direct;
}
const GramConfig& config_of(Prepared& kept, const GramProblem& problem, const Chips& chips) {
    if (!kept.gram) kept.gram = get_best_config(problem, chips.gram);
    return *kept.gram;
}
const DepthwiseConfig& config_of(Prepared& kept, const DepthwiseProblem& problem, const Chips& chips) {
    if (!kept.depthwise) kept.depthwise = get_best_config(problem, chips.depthwise);
    return *kept.depthwise;
}

size_t bytes_of(const DirectProblem&, const DirectConfig& config) { return workspace_bytes(config); }
size_t bytes_of(const GramProblem& problem, const GramConfig& config) { return workspace_bytes(problem, config); }
size_t bytes_of(const DepthwiseProblem&, const DepthwiseConfig& config) { return workspace_bytes(config); }

// D to the target, or with a step the update of it.
template <class Problem>
void launch(const Problem& problem, const Layer& layer, const Target& target, const Step* step) {
    const at::Device where = layer.weight.device();
    Device& device = state_of(where);
    const auto config =
        device.with_prepared(key_of(layer), [&](Prepared& kept) { return config_of(kept, problem, device.chips()); });
    const Stream stream = current_stream(where);
    device.with_workspace(bytes_of(problem, config), stream, [&](const Scratch& workspace) {
        check(step ? correlate_and_update(problem, config, target, *step, workspace, stream.raw)
                   : cuda::correlate(problem, config, target, workspace, stream.raw),
              "launch of a correlation kernel");
    });
}

void launch(const Layer& layer, Algorithm algorithm, const Target& target, const Step* step) {
    switch (algorithm) {
    case Algorithm::kGram:
        return launch(gram_problem(layer), layer, target, step);
    case Algorithm::kDepthwise:
        return launch(depthwise_problem(layer), layer, target, step);
    default:
        return launch(direct_problem(layer), layer, target, step);
    }
}

Layer with_output(Layer layer, Algorithm algorithm) {
    if (algorithm != Algorithm::kGram && !layer.z) layer.z = forward(layer);
    return layer;
}

// A rule as the kernels read it, and what must live until they are launched.
struct DeviceRule {
    Step step;
    at::Tensor rate;
    int skipped_stride = 0;
};

DeviceRule device_rule(const Rule& rule, at::Device device) {
    DeviceRule r;
    r.step.normalize = rule.normalize;
    if (const auto* number = std::get_if<double>(&rule.lr)) {
        r.step.rate.value = *number;
    } else {
        r.rate = std::get<at::Tensor>(rule.lr);
        if (r.rate.scalar_type() != at::kFloat && r.rate.scalar_type() != at::kDouble) r.rate = r.rate.to(at::kDouble);
        TORCH_INTERNAL_ASSERT(r.rate.device() == device);
        if (r.rate.scalar_type() == at::kFloat)
            r.step.rate.device_float = r.rate.const_data_ptr<float>();
        else
            r.step.rate.device_double = r.rate.const_data_ptr<double>();
    }
    if (rule.skipped) {
        r.step.skipped = reinterpret_cast<uint64*>(rule.skipped->mutable_data_ptr<int64_t>());
        r.skipped_stride = rule.skipped->numel() == 1 ? 0 : static_cast<int>(rule.skipped->stride(0));
    }
    return r;
}

// Whether two tensors of one shape hold their elements in the same order; dimensions of size 1 may have any stride.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
    for (int64_t i = 0; i < a.dim(); ++i)
        if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
    return true;
}

// The elapsed time of what `run` launches.
template <class Run>
double elapsed_us(const Run& run, const Stream& stream) {
#if defined(LOCALSGD_EMULATION)
    (void)stream;
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
#else
    struct Event {
        cudaEvent_t raw = nullptr;
        Event() { check(cudaEventCreate(&raw), "cudaEventCreate"); }
        ~Event() { cudaEventDestroy(raw); }
    } before, after;
    check(cudaEventRecord(before.raw, stream.raw), "cudaEventRecord");
    run();
    check(cudaEventRecord(after.raw, stream.raw), "cudaEventRecord");
    check(cudaEventSynchronize(after.raw), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, before.raw, after.raw), "cudaEventElapsedTime");
    return 1e3 * ms;
#endif
}

// An update as training makes it, on a copy of the weight.
double median_us(const Layer& layer, Algorithm algorithm) {
    Layer copy = layer;
    copy.weight = layer.weight.clone();
    const Lr still = 0.0;
    const std::optional<at::Tensor> uncounted;
    const Stream stream = current_stream(layer.weight.device());
    std::vector<double> times;
    for (int run = 0; run < 8; ++run) {
        const double us = elapsed_us([&] { update(copy, algorithm, {still, true, uncounted}); }, stream);
        if (run > 0) times.push_back(us); // 0: warm-up
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

// Calls read(plan) on the estimated plan or, with `benchmark`, on the one whose algorithms were timed.
template <class Read>
auto with_plan(const Layer& layer, const Query& query, bool benchmark, const Read& read) {
    const at::Device where = layer.weight.device();
    const DeviceGuard guard(where); // the events that measure are the current device's
    Device& device = state_of(where);
    const Key key = key_of(layer);
    const bool measure = benchmark && current_stream(where).capture == 0; // a capture runs nothing that could be timed
    using Result = std::optional<decltype(read(std::declval<const Plan&>()))>;
    const Result known = device.with_prepared(key, [&](Prepared& kept) -> Result {
        if (!kept.estimated) kept.estimated = estimated_plan(layer, query, device.chips());
        if (!measure) return read(*kept.estimated);
        if (kept.measured) return read(*kept.measured);
        return std::nullopt;
    });
    if (known) return *known;
    Plan plan = estimated_plan(layer, query, device.chips());
    for (Candidate& candidate : plan.candidates) {
        if (!candidate.automatic) continue;
        try {
            candidate.measured_us = median_us(layer, candidate.algorithm);
        } catch (const c10::Error& error) { // out of memory, or no such function in the library: the others may do
            candidate.automatic = false;
            candidate.why_not = std::string("failed when timed: ") + error.what_without_backtrace();
        }
    }
    const bool any =
        std::any_of(plan.candidates.begin(), plan.candidates.end(), [](const Candidate& c) { return c.automatic; });
    TORCH_CHECK(any, "no algorithm could be timed; localsgd_ext.benchmark = False leaves the choice to estimates");
    pick_by_measurement(plan);
    return device.with_prepared(key, [&](Prepared& kept) {
        if (!kept.measured) kept.measured = plan; // another thread's timing, if it came first
        return read(*kept.measured);
    });
}

// Which algorithm runs: in a launch of ours, or the library's.
bool is_ours(Algorithm algorithm) { return algorithm != Algorithm::kLibrary; }

} // namespace

Algorithm pick(const Layer& layer, const Query& query, bool benchmark) {
    return with_plan(layer, query, benchmark, [](const Plan& plan) { return plan.pick; });
}

Plan plan(const Layer& layer, const Query& query, bool benchmark) {
    return with_plan(layer, query, benchmark, [](const Plan& plan) { return plan; });
}

std::string why_not(const Layer& layer, const Query& query, Algorithm algorithm) {
    return with_plan(layer, query, false, [&](const Plan& plan) { return plan.candidate(algorithm).obstacle(); });
}

at::Tensor correlate(const Layer& given, Algorithm algorithm) {
    const DeviceGuard guard(given.weight.device());
    const Layer layer = with_output(given, algorithm);
    if (!is_ours(algorithm)) return library_correlation(layer);
    const at::Tensor d = allocate(layer.weight.sizes(), layer.weight.options().dtype(at::kFloat));
    launch(layer, algorithm, target_of(d), nullptr);
    return d;
}

void update(const Layer& given, Algorithm algorithm, const Rule& rule) {
    const DeviceGuard guard(given.weight.device());
    const Layer layer = with_output(given, algorithm);
    if (!is_ours(algorithm)) return apply_update({layer.weight}, {library_gradient(layer)}, rule);
    const DeviceRule device = device_rule(rule, layer.weight.device());
    launch(layer, algorithm, target_of(layer.weight), &device.step);
}

void apply_update(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& correlations, const Rule& rule) {
    const at::Device where = weights.at(0).device();
    const DeviceGuard guard(where);
    const DeviceRule device = device_rule(rule, where);
    std::vector<at::Tensor> dense(weights.size()), ds(weights.size()); // in the order of the weight's memory
    std::vector<ApplyItem> items;
    for (size_t i = 0; i < weights.size(); ++i) {
        const at::Tensor& weight = weights[i];
        dense[i] = weight.is_non_overlapping_and_dense() ? weight : weight.contiguous(); // a slice: through a dense copy
        ds[i] = correlations[i];
        if (ds[i].scalar_type() == at::kDouble || !same_order(ds[i], dense[i])) { // e.g. a channels_last weight
            ds[i] = at::empty_like(dense[i], correlations[i].options().dtype(at::kFloat));
            ds[i].copy_(correlations[i]);
        }
        items.push_back({dense[i].mutable_data_ptr(), element_of(kind_of(weight)), ds[i].const_data_ptr(),
                         element_of(kind_of(ds[i])), dense[i].numel()});
    }
    const int count = static_cast<int>(items.size());
    const Stream stream = current_stream(where);
    Device& state = state_of(where);
    state.with_workspace(apply_workspace_bytes(items.data(), count), stream, [&](const Scratch& workspace) {
        check(cuda::apply_update(items.data(), count, device.step, device.skipped_stride, state.chips().apply, workspace,
                                 stream.raw),
              "launch of the apply kernel");
    });
    for (size_t i = 0; i < weights.size(); ++i)
        if (!dense[i].is_same(weights[i])) weights[i].copy_(dense[i]);
}

} // namespace localsgd::cuda
