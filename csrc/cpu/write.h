// The normalised write of many tensors on the CPU, in one go.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

namespace localsgd::cpu {

// For weights that share no memory: weights[i] += lr * ds[i] / ||ds[i]||, each ds[i] a float or double tensor of the weight's
// shape; false for those whose norm is 0 or not finite, which are left untouched.
std::vector<bool> apply_updates(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& ds, double lr,
                                bool normalize);

} // namespace localsgd::cpu
