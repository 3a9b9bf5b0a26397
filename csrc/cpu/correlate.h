// The correlation on the CPU, one function per algorithm. All return D with the weight's shape, contiguous or, `as_weight`, as
// the weight lies in memory where that costs nothing, in layer.accumulate; z, where all but `gram` read it and the caller left
// it out, is computed. Neither batch nor any channel count may be 0.
#pragma once

#include "../canonical.h"
#include "../select.h"

namespace localsgd::cpu {

at::Tensor correlate(const Layer& layer, Algorithm algorithm, bool as_weight = false);

// What D of a layer of kernel size 1 is linear in, for a sum over processes: of every group the lower half of its Gram matrix,
// row by row, and behind them, where there is a bias, the sums of X's columns. And D of such sums: the same bits, whatever the
// number of threads, as every process makes it for itself.
int64_t gram_sums_size(const Geometry& geometry, bool bias);
at::Tensor gram_sums(const Layer& layer);
at::Tensor correlation_of_gram_sums(const at::Tensor& sums, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    int64_t groups);

// weight += lr * D / ||D|| for the layer's weight and D, which need not exist for it; false if its norm is 0 or not finite, the
// weight then being untouched.
bool update(const Layer& layer, Algorithm algorithm, double lr, bool normalize);

} // namespace localsgd::cpu
