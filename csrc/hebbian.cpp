#include "hebbian.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cpu/correlate.h"
#include "cpu/plan.h"
#include "cpu/write.h"
#if defined(LOCALSGD_WITH_CUDA)
#include "cuda/correlate.h"
#include "cuda/device.h"
#endif

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

// Whether the CUDA kernels are to run.
[[maybe_unused]] bool on_gpu(const at::Tensor& tensor) {
#if defined(LOCALSGD_WITH_CUDA)
    return tensor.device().type() == cuda::kDeviceType;
#else
    (void)tensor;
    return false;
#endif
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
    q.cpu = this_cpu();
    q.threads = at::get_num_threads();
    return q;
}

std::optional<Algorithm> parse(const std::string& name) {
    if (name == "auto") return std::nullopt;
    for (const Algorithm algorithm : kAlgorithms)
        if (name == algorithm_name(algorithm)) return algorithm;
    TORCH_CHECK_VALUE(false, "algorithm must be one of auto, gram, direct, depthwise, winograd, library, got '", name, "'");
}

Plan plan_of(const Layer& layer, bool benchmark) {
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(layer.weight)) return cuda::plan(layer, query_of(layer), benchmark);
#endif
    return cpu::plan(layer, query_of(layer), benchmark);
}

Algorithm pick(const Layer& layer, bool benchmark) {
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(layer.weight)) return cuda::pick(layer, query_of(layer), benchmark);
#endif
    return benchmark ? plan_of(layer, benchmark).pick : cheapest(query_of(layer));
}

std::string why_not(const Layer& layer, Algorithm algorithm) {
    if (is_empty(layer)) return candidate_of(query_of(layer), algorithm).obstacle();
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(layer.weight)) return cuda::why_not(layer, query_of(layer), algorithm);
#endif
    return candidate_of(query_of(layer), algorithm).obstacle();
}

Algorithm choose(const Layer& layer, const std::string& name, bool benchmark) {
    const auto asked = parse(name);
    if (!asked) return is_empty(layer) ? Algorithm::kDirect : pick(layer, benchmark);
    const std::string reason = why_not(layer, *asked);
    if (reason.empty()) return *asked;
    const Geometry& g = layer.geometry;
    const auto given = [&](const Triple& t) { return text(at::IntArrayRef(t.data() + 3 - g.dims, g.dims)); };
    const std::string steps =
        *asked == Algorithm::kWinograd ? ", stride=" + given(g.stride) + ", dilation=" + given(g.dilation) : "";
    TORCH_CHECK_VALUE(false, "algorithm '", name, "' ", reason, ", got weight of shape ", text(layer.weight.sizes()), steps,
                      " and groups=", g.groups);
}

at::Tensor correlate(const Layer& layer, const std::string& algorithm, bool benchmark) {
    const Algorithm chosen = choose(layer, algorithm, benchmark);
    if (is_empty(layer)) return no_correlation(layer);
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(layer.weight)) return cuda::correlate(layer, chosen);
#endif
    return cpu::correlate(layer, chosen);
}

double finite(double lr) {
    TORCH_CHECK_VALUE(std::isfinite(lr), "lr must be finite, got ", lr);
    return lr;
}

// A number that is known here. What lies on a GPU is not waited for: kernels read it.
Lr checked(const Lr& lr, at::Device device) {
    if (const auto* number = std::get_if<double>(&lr)) return finite(*number);
    const auto& tensor = std::get<at::Tensor>(lr);
    TORCH_CHECK_VALUE(tensor.numel() == 1, "lr must be a float or a tensor of one element, got shape ", text(tensor.sizes()));
#if defined(LOCALSGD_WITH_CUDA)
    if (device.type() == cuda::kDeviceType && tensor.device() == device) return lr;
#endif
    TORCH_CHECK_VALUE(tensor.is_cpu(), "lr must be on the CPU or on the weight's device ", device, ", got ", tensor.device());
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

// Whether two of them lie in one storage, and so might overlap.
bool share_memory(const std::vector<at::Tensor>& tensors) {
    std::vector<const void*> storages;
    for (const at::Tensor& t : tensors)
        if (t.numel() > 0) storages.push_back(t.storage().data());
    std::sort(storages.begin(), storages.end());
    return std::adjacent_find(storages.begin(), storages.end()) != storages.end();
}

// A raw-pointer write goes unseen by autograd, hence the version counters.
void bump(const at::Tensor& tensor) { tensor.unsafeGetTensorImpl()->bump_version(); }

void count_skip(const std::optional<at::Tensor>& skipped, int64_t index) {
    if (!skipped) return;
    bump(*skipped);
    skipped->reshape({-1}).select(0, skipped->numel() == 1 ? 0 : index).add_(1);
}

void write_on_cpu(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& correlations, double lr,
                  bool normalize, const std::optional<at::Tensor>& skipped) {
    for (const at::Tensor& weight : weights) bump(weight);
    const std::vector<bool> usable = cpu::apply_updates(weights, correlations, lr, normalize);
    for (size_t i = 0; i < weights.size(); ++i)
        if (!usable[i]) count_skip(skipped, static_cast<int64_t>(i));
}

#if defined(LOCALSGD_WITH_CUDA)
void check_gpu_dtype(const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_TYPE(tensor.scalar_type() != at::kDouble, name, " must not be float64 on a GPU, whose kernels sum in float32");
}

// What kernels write: whether they counted a skip is not known here.
void bump_written(const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& skipped) {
    for (const at::Tensor& weight : weights) bump(weight);
    if (skipped) bump(*skipped);
}
#endif

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
    const Lr step = checked(lr, arguments.weight.device());
    const Layer layer = canonical(arguments);
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(arguments.weight)) {
        check_gpu_dtype(layer.weight, "weight");
        check_gpu_dtype(layer.x, "x");
        if (layer.z) check_gpu_dtype(*layer.z, "z");
        const Algorithm chosen = choose(layer, algorithm, benchmark);
        if (is_empty(layer)) return count_skip(skipped, 0);
        bump_written({arguments.weight}, skipped); // first: where that is forbidden (inference mode), nothing is written
        return cuda::update(layer, chosen, {step, normalize, skipped});
    }
#endif
    const Algorithm chosen = choose(layer, algorithm, benchmark);
    bump(arguments.weight);
    if (is_empty(layer) || !cpu::update(layer, chosen, std::get<double>(step), normalize)) count_skip(skipped, 0);
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
    const Lr step = checked(lr, weights[0].device());
    if (weights.size() > 1 && share_memory(weights)) { // one after the other
        for (size_t i = 0; i < weights.size(); ++i) {
            const bool each = skipped && skipped->numel() > 1;
            const auto counter = each ? skipped->reshape({-1}).narrow(0, static_cast<int64_t>(i), 1) : skipped;
            apply_update_({weights[i]}, {correlations[i]}, step, normalize, counter);
        }
        return;
    }
#if defined(LOCALSGD_WITH_CUDA)
    if (on_gpu(weights[0])) {
        for (size_t i = 0; i < weights.size(); ++i) {
            check_gpu_dtype(weights[i], "weight");
            check_gpu_dtype(correlations[i], "correlation");
        }
        bump_written(weights, skipped); // as above
        return cuda::apply_update(weights, correlations, {step, normalize, skipped});
    }
#endif
    write_on_cpu(weights, correlations, std::get<double>(step), normalize, skipped);
}

at::Tensor gram_sums(const LayerArguments& arguments) {
    const Plain plain;
    const Layer layer = canonical(arguments);
    const std::string reason = candidate_of(query_of(layer), Algorithm::kGram).obstacle();
    TORCH_CHECK_VALUE(reason.empty(), "gram_sums ", reason, ", got weight of shape ", text(layer.weight.sizes()));
    TORCH_CHECK_VALUE(layer.weight.is_cpu(), "gram_sums needs tensors on the CPU, got ", layer.weight.device());
    if (is_empty(layer))
        return at::zeros({cpu::gram_sums_size(layer.geometry, layer.bias.has_value())},
                         layer.weight.options().dtype(layer.accumulate));
    return cpu::gram_sums(layer);
}

at::Tensor correlation_of_gram_sums(const at::Tensor& sums, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    int64_t groups) {
    const Plain plain;
    check_floating(weight, "weight");
    Geometry g;
    g.groups = groups;
    g.in_channels = groups * (weight.dim() > 1 ? weight.size(1) : 1);
    TORCH_CHECK_VALUE(
        weight.dim() > 1 && weight.numel() == weight.size(0) * weight.size(1) && groups >= 1 && weight.size(0) % groups == 0,
        "weight must have a kernel of size 1 and ", groups, " groups of rows, got shape ", text(weight.sizes()));
    TORCH_CHECK_TYPE(sums.scalar_type() == at::kFloat || sums.scalar_type() == at::kDouble,
                     "sums must be float32 or float64, got ", toString(sums.scalar_type()));
    const int64_t wanted = cpu::gram_sums_size(g, bias.has_value());
    TORCH_CHECK_VALUE(sums.dim() == 1 && sums.size(0) == wanted, "sums must have shape (", wanted, ",), got ",
                      text(sums.sizes()));
    TORCH_CHECK_VALUE(!bias || bias->sizes() == weight.sizes().slice(0, 1), "bias must have shape (", weight.size(0),
                      ",), got ", bias ? text(bias->sizes()) : "");
    TORCH_CHECK_VALUE(sums.is_cpu() && weight.is_cpu() && (!bias || bias->is_cpu()),
                      "sums, weight and bias must be on the CPU");
    if (weight.numel() == 0) return at::zeros(weight.sizes(), sums.options());
    return cpu::correlation_of_gram_sums(sums, weight, bias, groups);
}

Plan plan(const LayerArguments& arguments, bool benchmark) {
    const Plain plain;
    const Layer layer = canonical(arguments);
    return plan_of(layer, benchmark && !is_empty(layer));
}

} // namespace localsgd
