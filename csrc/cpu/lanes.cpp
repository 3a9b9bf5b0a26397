#include "lanes.h"

#include <algorithm>

#include "vectors.h"

namespace localsgd {
namespace {

template <typename Acc, int kBytes>
LOCALSGD_INLINE void add_vectors(Acc* in_lanes, int64_t count, double* sums) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    for (int64_t i = 0; i < count; ++i) {
        double lanes[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<double>(in_lanes[i * kLanes + l]);
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
            for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
        sums[i] += lanes[0];
    }
    std::fill_n(in_lanes, count * kLanes, Acc(0));
}

template <typename Acc>
LOCALSGD_WIDE void add_wide(Acc* in_lanes, int64_t count, double* sums) {
    add_vectors<Acc, kWideBytes>(in_lanes, count, sums);
}
LOCALSGD_NARROW
void add_narrow(float* in_lanes, int64_t count, double* sums) { add_vectors<float, kNarrowBytes>(in_lanes, count, sums); }
LOCALSGD_NARROW
void add_narrow(double* in_lanes, int64_t count, double* sums) { add_vectors<double, kNarrowBytes>(in_lanes, count, sums); }

} // namespace

template <typename Acc>
void add_lanes(bool wide, Acc* in_lanes, int64_t count, double* sums) {
    wide ? add_wide(in_lanes, count, sums) : add_narrow(in_lanes, count, sums);
}

template void add_lanes<float>(bool, float*, int64_t, double*);
template void add_lanes<double>(bool, double*, int64_t, double*);

} // namespace localsgd
