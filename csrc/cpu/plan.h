// Which algorithm a layer runs with on the CPU.
#pragma once

#include "correlate.h"

namespace localsgd::cpu {

// By cost model or, with `benchmark`, every eligible algorithm timed once per geometry, dtypes, layout and number of threads.
Plan plan(const Layer& layer, const Query& query, bool benchmark);

} // namespace localsgd::cpu
