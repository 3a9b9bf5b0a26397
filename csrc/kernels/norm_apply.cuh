// The normalised, signed, guarded step: W += lr * D / ||D||.
#pragma once

#include "grid.cuh"

namespace localsgd::cuda {

LOCALSGD_DEVICE double value_of(const Rate& rate) {
    return rate.device_double ? *rate.device_double : rate.device_float ? static_cast<double>(*rate.device_float) : rate.value;
}

LOCALSGD_DEVICE bool finite(double value) { return value >= -1.7976931348623157e308 && value <= 1.7976931348623157e308; }

// Whether there is a step to make. sum D^2 in fp64, where squares of fp32 neither overflow nor vanish: 0 or not finite means
// that there is no direction to go. A rate that lies on the device is seen here first.
LOCALSGD_DEVICE bool usable(const Step& step, double squares) {
    return squares > 0 && finite(squares) && finite(value_of(step.rate));
}

LOCALSGD_DEVICE double step_scale(const Step& step, double squares) {
    const double rate = value_of(step.rate);
    return step.normalize ? rate / sqrt(squares) : rate;
}

LOCALSGD_DEVICE void count_skip(uint64* skipped) {
    if (skipped) atomicAdd(skipped, uint64{1});
}

} // namespace localsgd::cuda
