// PyTorch's own weight gradient (oneDNN, cuDNN) as an algorithm.
#pragma once

#include "canonical.h"

namespace localsgd {

// The weight gradient as the library leaves it, in its dtype and order; layer.z must be there.
at::Tensor library_gradient(const Layer& layer);

// The same as D: contiguous, in layer.accumulate.
at::Tensor library_correlation(const Layer& layer);

} // namespace localsgd
