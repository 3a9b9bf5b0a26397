// What a correlation costs on a CPU, by a model.
#pragma once

#include "../select.h"

namespace localsgd::cpu {

// Microseconds. Where z is absent and the algorithm reads it, the layer's forward is included.
double estimate_us(const Query& query, Algorithm algorithm);

} // namespace localsgd::cpu
