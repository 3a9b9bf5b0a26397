#include "apply.h"

namespace localsgd {
namespace {

template <typename T>
LOCALSGD_INLINE double squares(const T* d, int64_t count) {
    constexpr int64_t kLanes = 16; // independent sums: the compiler may not reorder one
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(d[i + l]) * static_cast<double>(d[i + l]);
    double sum = 0;
    for (; i < count; ++i) sum += static_cast<double>(d[i]) * static_cast<double>(d[i]);
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    return sum;
}

template <typename W, typename D>
LOCALSGD_INLINE void add(W* __restrict w, const D* __restrict d, int64_t count, double scale) {
    for (int64_t i = 0; i < count; ++i) store(w[i], static_cast<double>(to_float(w[i])) + scale * static_cast<double>(d[i]));
}

template <typename D>
LOCALSGD_INLINE void add_to(void* w, Kind kind, const D* d, int64_t count, double scale) {
    switch (kind) {
    case Kind::f16:
        return add(static_cast<Half*>(w), d, count, scale);
    case Kind::bf16:
        return add(static_cast<BFloat16*>(w), d, count, scale);
    case Kind::f32:
        return add(static_cast<float*>(w), d, count, scale);
    case Kind::f64:
        return add(static_cast<double*>(w), d, count, scale);
    }
}

} // namespace

LOCALSGD_MULTIVERSION
double sum_of_squares(const float* d, int64_t count) { return squares(d, count); }

LOCALSGD_MULTIVERSION
double sum_of_squares(const double* d, int64_t count) { return squares(d, count); }

LOCALSGD_MULTIVERSION
void add_scaled(void* w, Kind kind, const float* d, int64_t count, double scale) { add_to(w, kind, d, count, scale); }

LOCALSGD_MULTIVERSION
void add_scaled(void* w, Kind kind, const double* d, int64_t count, double scale) { add_to(w, kind, d, count, scale); }

} // namespace localsgd
