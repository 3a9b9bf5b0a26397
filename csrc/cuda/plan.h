// What the algorithms would cost on a GPU.
#pragma once

#include "problems.h"

namespace localsgd::cuda {

// Eligibility, estimates and the pick by estimate.
Plan estimated_plan(const Layer& layer, const Query& query, const Chips& chips);

} // namespace localsgd::cuda
