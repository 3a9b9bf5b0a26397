// Layers with random operands, and the correlation by its definition, written as loops.
#pragma once

#include "check.h"
#include "cpu/patches.h"

#include <cmath>

namespace localsgd {

struct Problem {
    Geometry g;
    std::vector<double> x, z; // channels first
};

inline Problem problem(const Geometry& g) {
    return {g, test::random_values(g.batch * g.in_channels * product(g.input), 1),
            test::random_values(g.positions() * g.out_channels, 2)};
}

// The same with values that are of type T.
template <typename T>
Problem problem_of(const Geometry& g) {
    Problem p = problem(g);
    for (std::vector<double>* values : {&p.x, &p.z})
        for (double& value : *values) {
            T rounded;
            store(rounded, value);
            value = static_cast<double>(to_float(rounded));
        }
    return p;
}

template <typename T>
constexpr Kind kStored = sizeof(T) == 2   ? Kind::bf16
                         : sizeof(T) == 4 ? Kind::f32
                                          : Kind::f64;

inline double x_at(const Problem& p, int64_t n, int64_t c, const Triple& i) {
    const Geometry& g = p.g;
    for (int d = 0; d < 3; ++d)
        if (i[d] < 0 || i[d] >= g.input[d]) return 0;
    return p.x[((n * g.in_channels + c) * g.input[0] + i[0]) * g.input[1] * g.input[2] + i[1] * g.input[2] + i[2]];
}

// visit(n, position in its image, tap, input index)
template <typename Visit>
void for_each_product(const Geometry& g, const Visit& visit) {
    for (int64_t n = 0; n < g.batch; ++n)
        for (int64_t p = 0; p < g.image_positions(); ++p)
            for (int64_t t = 0; t < g.taps(); ++t) {
                const Triple out{p / (g.output[1] * g.output[2]), p / g.output[2] % g.output[1], p % g.output[2]};
                const Triple tap{t / (g.kernel[1] * g.kernel[2]), t / g.kernel[2] % g.kernel[1], t % g.kernel[2]};
                Triple in;
                for (int d = 0; d < 3; ++d) in[d] = out[d] * g.stride[d] + tap[d] * g.dilation[d] - g.pad[d];
                visit(n, p, t, in);
            }
}

template <typename T>
std::vector<T> arranged(const std::vector<double>& values, int64_t batch, int64_t channels, const Triple& space, bool last) {
    std::vector<T> out(values.size());
    const int64_t plane = product(space);
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < plane; ++i)
                store(out[last ? (n * plane + i) * channels + c : (n * channels + c) * plane + i],
                      values[(n * channels + c) * plane + i]);
    return out;
}

// D [K, C/groups, taps]
inline std::vector<double> by_loops(const Problem& p) {
    const Geometry& g = p.g;
    const int64_t channels = g.in_per_group(), taps = g.taps();
    std::vector<double> d(g.out_channels * g.patch());
    for_each_product(g, [&](int64_t n, int64_t position, int64_t tap, const Triple& in) {
        for (int64_t k = 0; k < g.out_channels; ++k) {
            const double z = p.z[(n * g.out_channels + k) * g.image_positions() + position];
            for (int64_t c = 0; c < channels; ++c)
                d[k * g.patch() + c * taps + tap] += z * x_at(p, n, k / g.out_per_group() * channels + c, in);
        }
    });
    return d;
}

// `taps_first`: d is [K, taps, C/groups].
template <typename Acc>
void check_close(const Geometry& g, const std::vector<Acc>& d, const std::vector<double>& expected, bool taps_first,
                 double tolerance) {
    const int64_t channels = g.in_per_group(), taps = g.taps();
    for (int64_t i = 0; i < int64_t(d.size()); ++i) {
        const int64_t k = i / g.patch(), c = i / taps % channels, tap = i % taps;
        const int64_t at = taps_first ? k * g.patch() + tap * channels + c : i;
        CHECK(std::abs(d[at] - expected[i]) <= tolerance * std::sqrt(double(g.positions())));
    }
}

} // namespace localsgd
