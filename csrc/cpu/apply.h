// Norm and normalised write, on contiguous runs.
#pragma once

#include <cstdint>

#include "elements.h"

namespace localsgd {

// Elements per partial sum: fixed, so that a norm has the same bits whatever the number of threads.
constexpr int64_t kNormChunk = 16384;

// sum d[i]^2, accumulated in double: squares of fp32 neither overflow nor vanish.
double sum_of_squares(const float* d, int64_t count);
double sum_of_squares(const double* d, int64_t count);

// w[i] += scale * d[i] for weights of type `kind`: computed in double, rounded once.
void add_scaled(void* w, Kind kind, const float* d, int64_t count, double scale);
void add_scaled(void* w, Kind kind, const double* d, int64_t count, double scale);

} // namespace localsgd
