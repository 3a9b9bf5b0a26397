// Layers as the kernels' launchers want them.
#pragma once

#include "../canonical.h"
#include "../select.h"
#include "device.h"

namespace localsgd::cuda {

// Where z is absent the operand has the dtype and the layout that the layer's forward would give it, and no data.
DirectProblem direct_problem(const Layer& layer);
GramProblem gram_problem(const Layer& layer);
DepthwiseProblem depthwise_problem(const Layer& layer);

// The dtype of z, or what the layer's forward would give it.
Kind output_kind(const Layer& layer);

// Whether fp32 operands may be rounded to tf32: as torch's own flags have it, cuDNN's for convolutions, matmul's for linear.
bool tf32_allowed(const Layer& layer);

// An fp32 or lower-precision tensor with a weight's shape as something that kernels write.
Target target_of(const at::Tensor& weight);

// Everything that configurations and plans depend on.
Key key_of(const Layer& layer);

} // namespace localsgd::cuda
