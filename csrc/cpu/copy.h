// Runs of elements, strided and of any type, gathered into the accumulation type.
#pragma once

#include <cstdint>

#include "elements.h"

namespace localsgd {

// to[i] = from[i * stride], converted; `from` points at elements of type `kind`. fp64 never comes with a float destination.
void copy_run(float* to, const void* from, Kind kind, int64_t count, int64_t stride);
void copy_run(double* to, const void* from, Kind kind, int64_t count, int64_t stride);

inline const void* offset(const void* data, Kind kind, int64_t elements) {
    return static_cast<const char*>(data) + elements * kind_size(kind);
}

} // namespace localsgd
