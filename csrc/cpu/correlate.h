// The correlation on the CPU, one function per algorithm. All return D with the weight's shape, contiguous or, `as_weight`, as
// the weight lies in memory where that costs nothing, in layer.accumulate; z, where all but `gram` read it and the caller left
// it out, is computed. Neither batch nor any channel count may be 0.
#pragma once

#include "../canonical.h"
#include "../select.h"

namespace localsgd::cpu {

at::Tensor correlate(const Layer& layer, Algorithm algorithm, bool as_weight = false);

// weight += lr * D / ||D|| for the layer's weight and D, which need not exist for it; false if its norm is 0 or not finite, the
// weight then being untouched.
bool update(const Layer& layer, Algorithm algorithm, double lr, bool normalize);

} // namespace localsgd::cpu
