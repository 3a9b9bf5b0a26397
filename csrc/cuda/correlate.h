// The operations on a GPU: a fused kernel, or PyTorch's weight gradient and our write. Nothing here waits for the device,
// except a plan that is measured.
#pragma once

#include <variant>

#include "../canonical.h"
#include "../select.h"

namespace localsgd::cuda {

using Lr = std::variant<at::Tensor, double>;

// How a correlation becomes an update.
struct Rule {
    const Lr& lr; // a tensor is read by the kernels if it is on the device
    bool normalize;
    const std::optional<at::Tensor>& skipped; // int64: one element, or one per weight
};

// What each algorithm would cost, and the pick; by timing if `benchmark`. Kept per geometry, dtypes, strides and alignments.
Plan plan(const Layer& layer, const Query& query, bool benchmark);

// That plan's pick, and why an algorithm may not be asked for, or "": without copying the plan.
Algorithm pick(const Layer& layer, const Query& query, bool benchmark);
std::string why_not(const Layer& layer, const Query& query, Algorithm algorithm);

// D with the weight's shape, contiguous, fp32. z, where the algorithm reads it and the caller left it out, is computed.
at::Tensor correlate(const Layer& layer, Algorithm algorithm);

// weight += lr * D / ||D||, in one launch where the grid fits the chip.
void update(const Layer& layer, Algorithm algorithm, const Rule& rule);

// Correlations of any floating dtype.
void apply_update(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& correlations, const Rule& rule);

} // namespace localsgd::cuda
