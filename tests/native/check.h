// The little that the native tests need: checks that say where and what, and a count of failures, or a skip, as the exit
// status.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "geometry.h"

namespace test {

inline int failures = 0;

inline void check(bool ok, const std::string& what, const char* file, int line) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what.c_str());
}

inline int finish(const char* name) {
    std::printf("%s: %s\n", name, failures ? "FAILED" : "passed");
    return failures ? 1 : 0;
}

// The exit status of a test that cannot be made here, which CTest then calls skipped.
inline int skip(const char* name, const char* missing) {
    std::printf("%s: skipped: %s\n", name, missing);
    return 77;
}

inline std::vector<double> random_values(int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<double> values(count);
    for (double& v : values) v = normal(generator);
    return values;
}

// Output sizes for `pad` zeros on both sides.
inline localsgd::Geometry geometry(int64_t batch, int64_t in, int64_t out, int64_t groups, localsgd::Triple input,
                                   localsgd::Triple kernel, localsgd::Triple stride, localsgd::Triple dilation,
                                   localsgd::Triple pad) {
    localsgd::Geometry g;
    g.dims = 3;
    g.batch = batch, g.in_channels = in, g.out_channels = out, g.groups = groups;
    g.input = input, g.kernel = kernel, g.stride = stride, g.dilation = dilation, g.pad = pad;
    for (int i = 0; i < 3; ++i) g.output[i] = (input[i] + 2 * pad[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
    return g;
}

inline localsgd::Strides channels_first(int64_t channels, const localsgd::Triple& s) {
    return {channels * localsgd::product(s), localsgd::product(s), {s[1] * s[2], s[2], 1}};
}

inline localsgd::Strides channels_last(int64_t channels, const localsgd::Triple& s) {
    return {channels * localsgd::product(s), 1, {s[1] * s[2] * channels, s[2] * channels, channels}};
}

} // namespace test

#define CHECK(condition) test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_THAT(condition, message) test::check((condition), (message), __FILE__, __LINE__)
