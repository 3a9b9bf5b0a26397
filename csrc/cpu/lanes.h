// Sums that are kept a vector wide.
#pragma once

#include <cstdint>

namespace localsgd {

// sums[i] += in_lanes[i][0] + ... in double, always in the same order; then in_lanes is zero. `wide`: of 64 bytes, else of 32.
template <typename Acc>
void add_lanes(bool wide, Acc* in_lanes, int64_t count, double* sums);

} // namespace localsgd
