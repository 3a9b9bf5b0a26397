#include "copy.h"

namespace localsgd {
namespace {

template <typename To, typename From>
LOCALSGD_INLINE void run(To* __restrict to, const From* __restrict from, int64_t count, int64_t stride) {
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(to_float(from[i]));
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(to_float(from[i * stride]));
    }
}

template <typename To>
LOCALSGD_INLINE void run_of(To* to, const void* from, Kind kind, int64_t count, int64_t stride) {
    switch (kind) {
    case Kind::f16:
        return run(to, static_cast<const Half*>(from), count, stride);
    case Kind::bf16:
        return run(to, static_cast<const BFloat16*>(from), count, stride);
    case Kind::f32:
        return run(to, static_cast<const float*>(from), count, stride);
    case Kind::f64:
        return run(to, static_cast<const double*>(from), count, stride);
    }
}

} // namespace

LOCALSGD_MULTIVERSION
void copy_run(float* to, const void* from, Kind kind, int64_t count, int64_t stride) { run_of(to, from, kind, count, stride); }

LOCALSGD_MULTIVERSION
void copy_run(double* to, const void* from, Kind kind, int64_t count, int64_t stride) { run_of(to, from, kind, count, stride); }

} // namespace localsgd
