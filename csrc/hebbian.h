// The operations: checks, dispatch to a device's algorithms, version counters.
#pragma once

#include "canonical.h"
#include "select.h"

namespace localsgd {

using Lr = std::variant<at::Tensor, double>; // signed

at::Tensor correlation(const LayerArguments& arguments, const std::string& algorithm, bool benchmark);

void hebbian_update_(const LayerArguments& arguments, const Lr& lr, bool normalize, const std::string& algorithm,
                     const std::optional<at::Tensor>& skipped, bool benchmark);

void apply_update_(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& correlations, const Lr& lr,
                   bool normalize, const std::optional<at::Tensor>& skipped);

// On a CPU only: on a GPU a Gram matrix does not leave the kernel that uses it.
at::Tensor gram_sums(const LayerArguments& arguments);
at::Tensor correlation_of_gram_sums(const at::Tensor& sums, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    int64_t groups);

Plan plan(const LayerArguments& arguments, bool benchmark);

} // namespace localsgd
