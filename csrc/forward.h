// z where the caller left it out: what the layer computes outside autocast.
#pragma once

#include "canonical.h"

namespace localsgd {

at::Tensor forward(const Layer& layer);

} // namespace localsgd
