#include "hebbian.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cpu/correlate.h"

namespace localsgd {
namespace {

// The caller's grad mode and autocast state do not matter here.
struct Plain {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

bool is_empty(const Layer& layer) {
    return layer.x.numel() == 0 || layer.weight.numel() == 0 || layer.geometry.positions() == 0;
}

at::Tensor no_correlation(const Layer& layer) {
    return at::zeros(layer.weight.sizes(), layer.weight.options().dtype(layer.accumulate));
}

// z where the caller left it out: what the layer computes outside autocast.
at::Tensor forward(const Layer& layer) {
    const Geometry& g = layer.geometry;
    const auto common = c10::promoteTypes(layer.x.scalar_type(), layer.weight.scalar_type());
    const at::Tensor x = layer.x.to(common), w = layer.weight.to(common);
    std::optional<at::Tensor> b;
    if (layer.bias) b = layer.bias->to(common);
    if (g.dims == 0) return at::linear(x, w, b);
    const auto tail = [&](const Triple& t) { return std::vector<int64_t>(t.end() - g.dims, t.end()); };
    if (layer.even_padding)
        return at::convolution(x, w, b, tail(g.stride), tail(g.pad), tail(g.dilation), false, std::vector<int64_t>(g.dims, 0),
                               g.groups);
    // Zeros on both sides to the larger amount, then the outputs that start too early are dropped ('same', stride 1).
    std::vector<int64_t> pads;
    for (int i = 3 - g.dims; i < 3; ++i) pads.push_back((g.kernel[i] - 1) * g.dilation[i] - g.pad[i]);
    at::Tensor z =
        at::convolution(x, w, b, tail(g.stride), pads, tail(g.dilation), false, std::vector<int64_t>(g.dims, 0), g.groups);
    for (int i = 3 - g.dims; i < 3; ++i) z = z.narrow(i - 1 + g.dims, pads[i - 3 + g.dims] - g.pad[i], g.output[i]);
    return z;
}

Query query_of(const Layer& layer) {
    Query q;
    q.geometry = layer.geometry;
    q.x_kind = kind_of(layer.x);
    const auto forward_type = c10::promoteTypes(layer.x.scalar_type(), layer.weight.scalar_type());
    q.z_kind = layer.z ? kind_of(*layer.z) : forward_type == at::kDouble ? Kind::f64 : kind_of(layer.weight);
    q.z_present = layer.z.has_value();
    q.z_is_output = layer.z_is_output;
    q.channels_last = strides_of(layer.x).channel == 1 && layer.geometry.in_channels > 1;
    q.fast_bf16 = cpu_multiplies_bf16();
    q.threads = at::get_num_threads();
    return q;
}

at::Tensor compute(Layer layer, Algorithm algorithm) {
    if (algorithm != Algorithm::kGram && !layer.z) layer.z = forward(layer);
    return cpu::correlate(layer, algorithm);
}

double median_us(const Layer& layer, Algorithm algorithm) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> times;
    for (int run = 0; run < 6; ++run) {
        const auto start = Clock::now();
        compute(layer, algorithm);
        if (run > 0) times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count()); // 0: warm-up
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

// Every eligible algorithm timed once per key.
Plan measured_plan(const Layer& layer, const Query& query) {
    static std::mutex mutex;
    static std::unordered_map<std::string, Plan> plans;
    const std::string key = plan_key(query);
    {
        const std::lock_guard lock(mutex);
        if (const auto found = plans.find(key); found != plans.end()) return found->second;
    }
    Plan plan = make_plan(query);
    for (Candidate& candidate : plan.candidates)
        if (candidate.automatic) candidate.measured_us = median_us(layer, candidate.algorithm);
    pick_by_measurement(plan);
    const std::lock_guard lock(mutex);
    return plans.emplace(key, std::move(plan)).first->second; // another thread's timing, if it came first
}

Plan plan_of(const Layer& layer, bool benchmark) {
    const Query query = query_of(layer);
    return benchmark ? measured_plan(layer, query) : make_plan(query);
}

std::optional<Algorithm> parse(const std::string& name) {
    if (name == "auto") return std::nullopt;
    for (const Algorithm algorithm : kAlgorithms)
        if (name == algorithm_name(algorithm)) return algorithm;
    TORCH_CHECK_VALUE(false, "algorithm must be one of auto, gram, direct, depthwise, library, got '", name, "'");
}

Algorithm choose(const Layer& layer, const std::string& name, bool benchmark) {
    const auto asked = parse(name);
    if (!asked) return is_empty(layer) ? Algorithm::kDirect : plan_of(layer, benchmark).pick;
    const Plan plan = make_plan(query_of(layer));
    const Candidate& candidate = plan.candidate(*asked);
    TORCH_CHECK_VALUE(candidate.eligible, "algorithm '", name, "' ", candidate.why_not, ", got weight of shape ",
                      text(layer.weight.sizes()), " and groups=", layer.geometry.groups);
    return *asked;
}

at::Tensor correlate(const Layer& layer, const std::string& algorithm, bool benchmark) {
    const Algorithm chosen = choose(layer, algorithm, benchmark);
    return is_empty(layer) ? no_correlation(layer) : compute(layer, chosen);
}

double finite(double lr) {
    TORCH_CHECK_VALUE(std::isfinite(lr), "lr must be finite, got ", lr);
    return lr;
}

double value_of(const Lr& lr) {
    if (const auto* number = std::get_if<double>(&lr)) return finite(*number);
    const auto& tensor = std::get<at::Tensor>(lr);
    TORCH_CHECK_VALUE(tensor.numel() == 1, "lr must be a float or a tensor of one element, got shape ", text(tensor.sizes()));
    TORCH_CHECK_VALUE(tensor.is_cpu(), "lr must be on the weight's device cpu, got ", tensor.device());
    return finite(tensor.item<double>());
}

// Sufficient, not necessary: walked from the smallest stride up, no dimension steps back into the one before.
bool may_overlap(const at::Tensor& t) {
    std::vector<int64_t> order(t.dim());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
    int64_t extent = 1;
    for (const int64_t dim : order) {
        if (t.size(dim) <= 1) continue;
        if (t.stride(dim) < extent) return true;
        extent += (t.size(dim) - 1) * t.stride(dim);
    }
    return false;
}

void check_weight(const at::Tensor& weight) {
    TORCH_CHECK_VALUE(!may_overlap(weight), "weight must not overlap itself in memory, got shape ", text(weight.sizes()),
                      " with strides ", text(weight.strides()));
}

void check_skipped(const std::optional<at::Tensor>& skipped, int64_t weights, at::Device device) {
    if (!skipped) return;
    TORCH_CHECK_TYPE(skipped->scalar_type() == at::kLong, "skipped must be int64, got ", toString(skipped->scalar_type()));
    TORCH_CHECK_VALUE(skipped->device() == device, "skipped must be on the weight's device ", device, ", got ",
                      skipped->device());
    TORCH_CHECK_VALUE(skipped->dim() <= 1 && (skipped->numel() == 1 || skipped->numel() == weights),
                      "skipped must have 1 element", weights == 1 ? "" : " or one per weight", ", got shape ",
                      text(skipped->sizes()));
    TORCH_CHECK_VALUE(!may_overlap(*skipped), "skipped must not overlap itself in memory");
}

// The write of every operation. A raw-pointer write goes unseen by autograd, hence the version counters.
void write(const at::Tensor& weight, const at::Tensor& d, double lr, bool normalize, const std::optional<at::Tensor>& skipped,
           int64_t index) {
    weight.unsafeGetTensorImpl()->bump_version();
    if (d.numel() > 0 && cpu::apply_update(weight, d, lr, normalize)) return;
    if (!skipped) return;
    skipped->unsafeGetTensorImpl()->bump_version();
    skipped->reshape({-1}).select(0, skipped->numel() == 1 ? 0 : index).add_(1);
}

} // namespace

at::Tensor correlation(const LayerArguments& arguments, const std::string& algorithm, bool benchmark) {
    const Plain plain;
    return correlate(canonical(arguments), algorithm, benchmark);
}

void hebbian_update_(const LayerArguments& arguments, const Lr& lr, bool normalize, const std::string& algorithm,
                     const std::optional<at::Tensor>& skipped, bool benchmark) {
    const Plain plain;
    check_floating(arguments.weight, "weight");
    check_weight(arguments.weight);
    check_skipped(skipped, 1, arguments.weight.device());
    const double step = value_of(lr);
    const at::Tensor d = correlate(canonical(arguments), algorithm, benchmark);
    write(arguments.weight, d, step, normalize, skipped, 0);
}

void apply_update_(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& correlations, const Lr& lr,
                   bool normalize, const std::optional<at::Tensor>& skipped) {
    const Plain plain;
    TORCH_CHECK_VALUE(weights.size() == correlations.size(), "weights and correlations must have the same length, got ",
                      weights.size(), " and ", correlations.size());
    for (size_t i = 0; i < weights.size(); ++i) { // everything is checked before anything is written
        const at::Tensor &weight = weights[i], &d = correlations[i];
        check_floating(weight, "weight");
        check_weight(weight);
        TORCH_CHECK_TYPE(d.scalar_type() == at::kFloat || d.scalar_type() == at::kDouble, "correlations[", i,
                         "] must be float32 or float64, got ", toString(d.scalar_type()));
        TORCH_CHECK_VALUE(d.sizes() == weight.sizes(), "correlations[", i, "] must have shape ", text(weight.sizes()), ", got ",
                          text(d.sizes()));
        TORCH_CHECK_VALUE(d.device() == weight.device() && weight.device() == weights[0].device(), "weights[", i,
                          "] and correlations[", i, "] must be on ", weights[0].device(), ", got ", weight.device(), " and ",
                          d.device());
    }
    if (weights.empty()) return;
    check_skipped(skipped, static_cast<int64_t>(weights.size()), weights[0].device());
    const double step = value_of(lr);
    for (size_t i = 0; i < weights.size(); ++i)
        write(weights[i], correlations[i], step, normalize, skipped, static_cast<int64_t>(i));
}

Plan plan(const LayerArguments& arguments, bool benchmark) {
    const Plain plain;
    const Layer layer = canonical(arguments);
    return plan_of(layer, benchmark && !is_empty(layer));
}

} // namespace localsgd
