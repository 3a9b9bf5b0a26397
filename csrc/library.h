// PyTorch's own weight gradient (oneDNN, cuDNN) as an algorithm.
#pragma once

#include "canonical.h"

namespace localsgd {

// D with the weight's shape, contiguous, in layer.accumulate; layer.z must be there.
at::Tensor library_correlation(const Layer& layer);

} // namespace localsgd
