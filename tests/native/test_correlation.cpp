// Depthwise kernels, Gram matrices, implicit GEMMs and minimal filtering against the definition of the correlation, written as
// loops. With the argument "tiles": products on AMX's tiles alone.
#include "check.h"
#include "cpu/depthwise.h"
#include "cpu/direct.h"
#include "cpu/few_channels.h"
#include "cpu/gram.h"
#include "cpu/winograd.h"

#include <string>
#include <string_view>

using namespace localsgd;

namespace {

struct Problem {
    Geometry g;
    std::vector<double> x, z; // channels first
};

Problem problem(const Geometry& g) {
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

std::vector<Unit> tested;

const std::vector<Unit>& units() { return tested; }
bool bf16_alone() { return only_bf16(tested.front()); }

double x_at(const Problem& p, int64_t n, int64_t c, const Triple& i) {
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

std::vector<double> depthwise_by_loops(const Problem& p) {
    const Geometry& g = p.g;
    std::vector<double> d(g.out_channels * g.taps());
    for_each_product(g, [&](int64_t n, int64_t position, int64_t tap, const Triple& in) {
        for (int64_t k = 0; k < g.out_channels; ++k)
            d[k * g.taps() + tap] +=
                p.z[(n * g.out_channels + k) * g.image_positions() + position] * x_at(p, n, k / g.out_per_group(), in);
    });
    return d;
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

template <typename Acc, typename T = Acc>
void check_depthwise(const Geometry& g, double tolerance) {
    const Problem p = problem_of<T>(g);
    const auto expected = depthwise_by_loops(p);
    for (const bool last : {false, true}) {
        const auto x = arranged<T>(p.x, g.batch, g.in_channels, g.input, last);
        const auto z = arranged<T>(p.z, g.batch, g.out_channels, g.output, last);
        const Kind kind = kStored<T>;
        const auto strides = last ? test::channels_last : test::channels_first;
        const DepthwiseArgs args{
            g, x.data(), kind, strides(g.in_channels, g.input), z.data(), kind, strides(g.out_channels, g.output)};
        const auto close = [&](const std::vector<Acc>& d, const char* which) {
            for (size_t i = 0; i < d.size(); ++i)
                CHECK_THAT(std::abs(d[i] - expected[i]) <= tolerance * std::sqrt(double(g.positions())),
                           std::string(which) + " " + std::to_string(d[i]) + " != " + std::to_string(expected[i]));
        };
        std::vector<Acc> d(expected.size(), Acc(NAN));
        depthwise_planes(args, 0, g.in_channels / 2, d.data());
        depthwise_planes(args, g.in_channels / 2, g.in_channels, d.data());
        close(d, "planes");
        if (!pixels_eligible(args)) continue;
        CHECK(last || g.in_channels == 1);
        const PixelTasks tasks = pixel_tasks(g);
        std::vector<double> partials(tasks.parts * d.size(), NAN);
        for (int64_t task = tasks.count() - 1; task >= 0; --task) depthwise_pixels<Acc>(args, task, partials.data());
        std::vector<Acc> e(expected.size(), Acc(NAN));
        reduce_pixels(g, partials.data(), g.in_channels / 2, g.in_channels, e.data());
        reduce_pixels(g, partials.data(), 0, g.in_channels / 2, e.data());
        close(e, "pixels");
    }
}

template <typename Acc, typename T = Acc>
void check_gram(const Geometry& g, double tolerance) {
    const Problem p = problem_of<T>(g);
    const int64_t channels = g.in_per_group(), whole = g.groups * channels * channels;
    std::vector<double> expected(whole), expected_sums(g.in_channels);
    for_each_product(g, [&](int64_t n, int64_t, int64_t, const Triple& in) {
        for (int64_t i = 0; i < g.in_channels; ++i) {
            expected_sums[i] += x_at(p, n, i, in);
            for (int64_t j = i / channels * channels; j <= i; ++j) {
                const double product = x_at(p, n, i, in) * x_at(p, n, j, in);
                expected[i * channels + j % channels] += product;
                if (j < i) expected[j * channels + i % channels] += product;
            }
        }
    });
    for (const bool last : {false, true})
        for (const Unit unit : units())
            for (const int64_t threads : {1, 3}) {
                const auto x = arranged<T>(p.x, g.batch, g.in_channels, g.input, last);
                const auto strides = last ? test::channels_last : test::channels_first;
                const PatchSource source{x.data(), kStored<T>, g, strides(g.in_channels, g.input)};
                const Tasks tasks = gram_tasks(g, threads, unit);
                std::vector<Acc> gram(tasks.parts * whole, Acc(NAN)), sums(tasks.parts * g.in_channels, Acc(NAN));
                for (int64_t task = tasks.count(g) - 1; task >= 0; --task)
                    gram_part(source, tasks, task, gram.data(), sums.data(), unit);
                for (int64_t task = gram_rows(g) - 1; task >= 0; --task) finish_gram(g, tasks.parts, task, gram.data());
                const auto allowed = [&](double value) {
                    return tolerance * (std::sqrt(double(g.positions())) + 0.1 * std::abs(value));
                };
                for (int64_t i = 0; i < whole; ++i) CHECK(std::abs(gram[i] - expected[i]) <= allowed(expected[i]));
                for (int64_t i = 0; i < g.in_channels; ++i) {
                    double sum = 0;
                    for (int64_t part = 0; part < tasks.parts; ++part) sum += sums[part * g.in_channels + i];
                    CHECK(std::abs(sum - expected_sums[i]) <= allowed(expected_sums[i]));
                }
            }
}

// D = W G on tiles is as exact as fp32, though tiles multiply bf16.
void check_gram_product(int64_t groups, int64_t outputs, int64_t channels) {
    const Geometry g =
        test::geometry(1, groups * channels, groups * outputs, groups, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
    const auto values = test::random_values(groups * outputs * channels, 1),
               sums = test::random_values(groups * channels * channels, 2);
    std::vector<BFloat16> weight(values.size());
    std::vector<float> gram(sums.begin(), sums.end()), d(values.size(), NAN);
    for (size_t i = 0; i < values.size(); ++i) store(weight[i], values[i]);
    for (int64_t task = gram_product_tasks(g) - 1; task >= 0; --task)
        gram_product(g, reinterpret_cast<const uint16_t*>(weight.data()), gram.data(), task, d.data());
    for (int64_t row = 0; row < groups * outputs; ++row)
        for (int64_t column = 0; column < channels; ++column) {
            double expected = 0;
            for (int64_t j = 0; j < channels; ++j)
                expected += double(to_float(weight[row * channels + j])) *
                            double(gram[(row / outputs * channels + j) * channels + column]);
            CHECK(std::abs(d[row * channels + column] - expected) <= 1e-6 * std::sqrt(double(channels)));
        }
}

// Not finite sums stay so, and others next to them as they are.
void gram_product_of_nan() {
    const Geometry g = test::geometry(1, 2, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
    const uint16_t weight[] = {0x3f80, 0}; // 1, 0
    for (const float bad :
         {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), bit_cast<float>(0x7f800001u)}) {
        const float gram[] = {bad, 2, 2, 3};
        float d[2] = {};
        gram_product(g, weight, gram, 0, d);
        CHECK(std::isnan(bad) ? std::isnan(d[0]) : std::isinf(d[0]));
        CHECK(d[1] == 2);
    }
    const float most = std::numeric_limits<float>::max(), gram[] = {most, 0, 0, 0};
    float d[2] = {};
    gram_product(g, weight, gram, 0, d);
    CHECK(d[0] == most);
}

// D [K, C/groups, taps]
std::vector<double> by_loops(const Problem& p) {
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

template <typename Acc, typename T = Acc>
void check_direct(const Geometry& g, double tolerance) {
    const Problem p = problem_of<T>(g);
    const std::vector<double> expected = by_loops(p);
    for (const bool x_last : {false, true})
        for (const bool z_last : {false, true})
            for (const Unit unit : units())
                for (const int64_t threads : {1, 3}) {
                    const auto x = arranged<T>(p.x, g.batch, g.in_channels, g.input, x_last);
                    const auto z = arranged<T>(p.z, g.batch, g.out_channels, g.output, z_last);
                    const auto strides = [](bool last) { return last ? test::channels_last : test::channels_first; };
                    const DirectArgs args{
                        {x.data(), kStored<T>, g, strides(x_last)(g.in_channels, g.input)},
                        {z.data(), kStored<T>, output_geometry(g), strides(z_last)(g.out_channels, g.output)}};
                    const Tasks tasks = direct_tasks(g, threads, unit);
                    std::vector<Acc> partials(tasks.parts * direct_elements<Acc>(g), Acc(NAN)), d(expected.size(), Acc(NAN));
                    for (int64_t task = tasks.count(g) - 1; task >= 0; --task)
                        direct_part(args, tasks, task, partials.data(), unit);
                    const bool taps_first = x_last && z_last;
                    for (int64_t block = direct_blocks(g) - 1; block >= 0; --block)
                        finish_direct(g, tasks.parts, block, partials.data(), d.data(), taps_first);
                    check_close(g, d, expected, taps_first, tolerance);
                }
}

template <typename Acc, typename T = Acc>
void check_few_channels(const Geometry& g, double tolerance) {
    const Problem p = problem_of<T>(g);
    const std::vector<double> expected = by_loops(p);
    const auto z = arranged<T>(p.z, g.batch, g.out_channels, g.output, false);
    for (const bool x_last : {false, true}) {
        const auto x = arranged<T>(p.x, g.batch, g.in_channels, g.input, x_last);
        const auto strides = x_last ? test::channels_last : test::channels_first;
        const DirectArgs args{{x.data(), kStored<T>, g, strides(g.in_channels, g.input)},
                              {z.data(), kStored<T>, output_geometry(g), test::channels_first(g.out_channels, g.output)}};
        CHECK(few_channels_fit<Acc>(args));
        using Other = std::conditional_t<sizeof(Acc) == 4, double, float>;
        CHECK(!few_channels_fit<Other>(args)); // z would be read as another type
        for (const bool wide : {false, has_wide_registers()})
            for (const int64_t parts : {few_channels_parts(g), int64_t(3)}) {
                std::vector<double> partials(parts * expected.size(), NAN);
                std::vector<Acc> d(expected.size(), Acc(NAN));
                for (int64_t part = parts - 1; part >= 0; --part)
                    few_channels_part<Acc>(args, parts, part, wide, partials.data());
                for (int64_t k = g.out_channels - 1; k >= 0; --k)
                    finish_few_channels(g, parts, k, partials.data(), d.data(), x_last);
                check_close(g, d, expected, x_last, tolerance);
            }
    }
}

// Tasks in reverse, memory poisoned.
template <typename Acc>
std::vector<Acc> winograd_of(const WinogradArgs& args, const WinogradPlan& plan, bool taps_first) {
    const Geometry& g = args.x.geometry;
    const int64_t each = winograd_block_elements<Acc>(g, plan), of_part = winograd_sum_elements<Acc>(g, plan);
    std::vector<Acc> transformed(plan.blocks * each), sums(plan.parts * of_part, Acc(NAN));
    std::vector<Acc> d(g.out_channels * g.patch(), Acc(NAN));
    for (int64_t part = plan.parts - 1; part >= 0; --part)
        for (int64_t begin = plan.begin(part), end = plan.begin(part + 1); begin < end; begin += plan.blocks * kTilesAtOnce) {
            const int64_t count = std::min(plan.blocks * kTilesAtOnce, end - begin);
            std::fill(transformed.begin(), transformed.end(), Acc(NAN));
            for (int64_t block = ceil_div(count, kTilesAtOnce) - 1; block >= 0; --block)
                for (int64_t task = winograd_transforms(g) - 1; task >= 0; --task)
                    winograd_transform(args, plan, task, begin + block * kTilesAtOnce, transformed.data() + block * each);
            for (int64_t task = winograd_products<Acc>(g, plan) - 1; task >= 0; --task)
                winograd_multiply(args, plan, task, count, transformed.data(), begin > plan.begin(part),
                                  sums.data() + part * of_part);
        }
    for (int64_t task = winograd_finishes(g) - 1; task >= 0; --task)
        winograd_finish(g, plan, task, sums.data(), d.data(), taps_first);
    return d;
}

// The same bits from any number of blocks at once.
template <typename Acc, typename T = Acc>
void check_winograd(const Geometry& g, double tolerance) {
    CHECK(winograd_fits(g));
    const Problem p = problem_of<T>(g);
    const std::vector<double> expected = by_loops(p);
    for (const bool x_last : {false, true})
        for (const bool z_last : {false, true}) {
            const auto x = arranged<T>(p.x, g.batch, g.in_channels, g.input, x_last);
            const auto z = arranged<T>(p.z, g.batch, g.out_channels, g.output, z_last);
            const auto strides = [](bool last) { return last ? test::channels_last : test::channels_first; };
            const WinogradArgs args{{x.data(), kStored<T>, g, strides(x_last)(g.in_channels, g.input)},
                                    {z.data(), kStored<T>, output_geometry(g), strides(z_last)(g.out_channels, g.output)}};
            const bool taps_first = x_last && z_last;
            for (const WinogradTile& tile : kWinogradTiles) {
                for (const bool wide : {false, true}) {
                    std::vector<Acc> first;
                    for (const int64_t blocks : {1, 2, 5}) {
                        WinogradPlan plan = winograd_plan(g, 1, tile);
                        plan.wide = wide;
                        plan.blocks = blocks;
                        const std::vector<Acc> d = winograd_of<Acc>(args, plan, taps_first);
                        check_close(g, d, expected, taps_first, tolerance);
                        if (first.empty()) first = d;
                        CHECK(first == d);
                    }
                }
            }
        }
}

// Of a long row what is read is turned to channels_last, and what two calls read is turned once.
void long_rows_are_turned_once() {
    constexpr int64_t kLength = 1000, kChannels = 3, kPad = 4;
    const Geometry g = test::geometry(1, kChannels, 1, 1, {1, 1, kLength}, {1, 1, 9}, {1, 1, 1}, {1, 1, 1}, {0, 0, kPad});
    std::vector<uint16_t> x(kChannels * kLength);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i + 1);
    const std::vector<uint16_t> original = x;
    ChannelsLast turned({x.data(), Kind::bf16, g, test::channels_first(kChannels, g.input)});
    CHECK(turned.useful());
    for (int64_t first = 0; first < kLength; first += kTilePositions) {
        const int64_t count = std::min(kTilePositions, kLength - first);
        const PatchSource part = turned.of(first, count);
        const int64_t begin = std::max<int64_t>(0, first - kPad), end = std::min(kLength, first + count + kPad);
        for (int64_t c = 0; c < kChannels; ++c)
            for (int64_t at = begin; at < end; ++at) {
                CHECK(static_cast<const uint16_t*>(part.data)[at * part.strides.space[2] + c] == original[c * kLength + at]);
                x[c * kLength + at] = 0; // whoever reads it again is wrong from here on
            }
    }
}

void ranges() {
    for (int64_t output = 0; output < 5; ++output)
        for (int64_t input = 0; input < 7; ++input)
            for (int64_t stride = 1; stride < 4; ++stride)
                for (int64_t offset = -5; offset < 9; ++offset) {
                    const Range r = valid_outputs(output, input, stride, offset);
                    CHECK(0 <= r.begin && r.begin <= r.end && r.end <= output);
                    for (int64_t q = 0; q < output; ++q) {
                        const int64_t i = q * stride + offset;
                        CHECK((q >= r.begin && q < r.end) == (i >= 0 && i < input));
                    }
                }
}

void merging() {
    const auto merged = [](const Triple& kernel, const Triple& space) {
        Geometry g = test::geometry(2, 3, 4, 1, {2, 4, 6}, kernel, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
        Strides strides{1000, 300, space};
        merge_space(g, strides);
        return g.input;
    };
    CHECK((merged({1, 1, 1}, {24, 6, 1}) == Triple{1, 1, 48}));
    CHECK((merged({1, 1, 1}, {48, 12, 2}) == Triple{1, 1, 48}));
    CHECK((merged({1, 1, 1}, {100, 6, 1}) == Triple{2, 1, 24})); // a slice of depths
    CHECK((merged({1, 1, 1}, {100, 20, 1}) == Triple{2, 4, 6})); // a slice of columns
    CHECK((merged({2, 1, 1}, {24, 6, 1}) == Triple{2, 1, 24}));
    CHECK((merged({1, 1, 3}, {24, 6, 1}) == Triple{2, 4, 6}));
}

void depthwise_layers() {
    const auto depthwise = [](int64_t batch, int64_t channels, int64_t multiplier, Triple input, Triple kernel, Triple stride,
                              Triple dilation, Triple pad) {
        const Geometry g =
            test::geometry(batch, channels, channels * multiplier, channels, input, kernel, stride, dilation, pad);
        check_depthwise<float>(g, 1e-5);
        check_depthwise<double>(g, 1e-13);
        check_depthwise<float, BFloat16>(g, 1e-5);
    };
    depthwise(2, 19, 1, {1, 9, 33}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});
    depthwise(2, 70, 1, {1, 17, 7}, {1, 3, 3}, {1, 2, 2}, {1, 1, 1}, {0, 1, 1});
    depthwise(1, 5, 3, {1, 20, 40}, {1, 5, 5}, {1, 1, 1}, {1, 1, 1}, {0, 2, 2});
    depthwise(1, 66, 1, {1, 12, 18}, {1, 7, 7}, {1, 1, 1}, {1, 1, 1}, {0, 3, 3});
    depthwise(3, 4, 1, {1, 23, 29}, {1, 4, 11}, {1, 3, 2}, {1, 2, 2}, {0, 5, 7});
    depthwise(2, 3, 1, {1, 1, 151}, {1, 1, 31}, {1, 1, 3}, {1, 1, 1}, {0, 0, 15});
    depthwise(2, 8, 2, {6, 7, 9}, {3, 2, 3}, {2, 1, 2}, {2, 1, 1}, {2, 0, 1});
    depthwise(1, 5, 1, {4, 1, 1}, {2, 3, 1}, {1, 1, 1}, {1, 1, 1}, {0, 1, 0});   // copied planes that outlast a sweep
    depthwise(2, 5, 1, {1, 40, 56}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 2, 0}); // bands of strips, taps above and below
    depthwise(2, 5, 1, {1, 41, 115}, {1, 3, 3}, {1, 2, 2}, {1, 1, 1}, {0, 3, 1});
    depthwise(1, 17, 1, {5, 6, 7}, {3, 3, 3}, {1, 1, 1}, {1, 2, 1}, {1, 2, 1});
    depthwise(1, 2, 1, {1, 4, 4}, {1, 1, 1}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2});
    depthwise(2, 20, 1, {1, 1, 9}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});   // a row, pixels left over
    depthwise(1, 403, 1, {1, 2, 3}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 2, 2});  // taps beyond both edges, blocks of channels
    depthwise(1, 8833, 1, {1, 3, 5}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // a last block narrower than a vector
    depthwise(2, 17, 1, {1, 9, 11}, {1, 2, 3}, {1, 2, 1}, {1, 3, 1}, {0, 3, 0});
    depthwise(2, 3, 1, {1, 200, 300}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // several bands
    depthwise(3, 401, 1, {1, 7, 7}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // a row at once, planes that share their sums
    for (const int64_t width : {13, 14, 21, 27})                                 // of seven, four and single pixels
        for (const int64_t pad : {0, 1, 2})
            for (const int64_t step : {1, 2})
                depthwise(1, 33, 1, {1, 5, width}, {1, 3, 3}, {1, 3 - step, step}, {1, 1, 1}, {0, 1, pad});
    depthwise(2, 24, 1, {3, 8, 15}, {2, 3, 3}, {1, 2, 2}, {1, 2, 1}, {1, 1, 1});
}

void gram_matrices() {
    const auto gram = [](int64_t batch, int64_t channels, int64_t groups, Triple input, Triple stride, Triple pad) {
        const Geometry g = test::geometry(batch, channels, groups, groups, input, {1, 1, 1}, stride, {1, 1, 1}, pad);
        check_gram<float, BFloat16>(g, 1e-5);
        if (bf16_alone()) return;
        check_gram<float>(g, 1e-5);
        check_gram<double>(g, 1e-13);
    };
    gram(2, 37, 1, {1, 9, 15}, {1, 1, 1}, {0, 0, 0}); // 270 positions: two tiles and a rest
    gram(3, 48, 3, {1, 7, 7}, {1, 1, 1}, {0, 0, 0});
    gram(2, 67, 1, {1, 19, 21}, {1, 2, 3}, {0, 2, 1});
    gram(2, 5, 5, {3, 5, 4}, {2, 1, 2}, {1, 0, 3});
    gram(1, 1, 1, {1, 1, 300}, {1, 1, 1}, {0, 0, 0});
    gram(1, 64, 1, {1, 70, 75}, {1, 1, 1}, {0, 0, 0});  // several parts
    gram(1, 271, 1, {1, 10, 13}, {1, 1, 1}, {0, 0, 0}); // strips
}

void gram_products() {
    check_gram_product(1, 256, 64);
    check_gram_product(3, 37, 19);
    check_gram_product(2, 2, 1);
    check_gram_product(1, 300, 271);
    check_gram_product(1, 5, 600);
    gram_product_of_nan();
}

void implicit_gemms() {
    const auto direct = [](int64_t batch, int64_t in, int64_t out, int64_t groups, Triple input, Triple kernel, Triple stride,
                           Triple dilation, Triple pad) {
        const Geometry g = test::geometry(batch, in, out, groups, input, kernel, stride, dilation, pad);
        check_direct<float, BFloat16>(g, 1e-5);
        if (bf16_alone()) return;
        check_direct<float>(g, 1e-5);
        check_direct<double>(g, 1e-13);
    };
    direct(2, 6, 4, 2, {3, 6, 7}, {2, 3, 3}, {1, 2, 1}, {1, 1, 2}, {1, 1, 2});
    direct(2, 19, 37, 1, {1, 9, 15}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // 270 positions: two tiles and a rest
    direct(3, 16, 30, 1, {1, 13, 21}, {1, 3, 3}, {1, 2, 2}, {1, 1, 1}, {0, 1, 1});
    direct(2, 9, 10, 1, {1, 8, 29}, {1, 1, 3}, {1, 1, 3}, {1, 1, 2}, {0, 0, 2});
    direct(2, 3, 64, 1, {1, 20, 20}, {1, 7, 7}, {1, 2, 2}, {1, 1, 1}, {0, 3, 3});
    direct(2, 48, 50, 1, {1, 5, 6}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
    direct(1, 8, 12, 4, {1, 5, 9}, {1, 1, 1}, {1, 2, 3}, {1, 1, 1}, {0, 3, 1});
    direct(1, 24, 40, 1, {1, 60, 60}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // several parts
    direct(2, 5, 9, 1, {1, 1, 1200}, {1, 1, 5}, {1, 1, 2}, {1, 1, 3}, {0, 0, 6});  // one long row
    direct(2, 17, 9, 1, {1, 3, 301}, {1, 1, 3}, {1, 1, 1}, {1, 1, 1}, {0, 2, 1});  // kernels of one row, rows of padding
    direct(1, 7, 9, 1, {1, 6, 400}, {1, 3, 3}, {1, 2, 1}, {1, 2, 1}, {0, 2, 1});   // rows longer than a tile
    direct(1, 70, 9, 1, {1, 6, 7}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});    // several chunks and strips
}

void first_layers() {
    const auto first = [](int64_t batch, int64_t in, int64_t out, Triple input, Triple kernel, Triple stride, Triple dilation,
                          Triple pad) {
        Geometry g = test::geometry(batch, in, out, 1, input, kernel, stride, dilation, pad);
        g.dims = 2;
        check_few_channels<float>(g, 2e-6);
        check_few_channels<double>(g, 1e-14);
        check_few_channels<float, BFloat16>(g, 2e-6);
    };
    first(2, 3, 10, {1, 19, 32}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});       // whole vectors, several bands
    first(2, 3, 9, {1, 35, 37}, {1, 3, 3}, {1, 2, 2}, {1, 1, 1}, {0, 1, 1});        // and a rest of the columns
    first(1, 3, 5, {1, 40, 75}, {1, 7, 7}, {1, 2, 2}, {1, 1, 1}, {0, 3, 3});        // ResNet's
    first(3, 4, 3, {1, 4, 60}, {1, 2, 6}, {1, 1, 3}, {1, 3, 2}, {0, 2, 4});         // taps of five and one, dilated
    first(1, 1, 17, {1, 100, 90}, {1, 1, 11}, {1, 3, 1}, {1, 1, 1}, {0, 0, 9});     // more positions than are summed in lanes
    first(1, 2, 2, {1, 1, 20}, {1, 5, 4}, {1, 1, 1}, {1, 1, 1}, {0, 6, 2});         // rows of padding alone
    first(1, 2, 3, {1, 3, 2}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 20});         // columns of padding alone
    first(1, 2, 3, {1, 3, 330}, {1, 2, 2}, {1, 1 << 20, 20}, {1, 1, 1}, {0, 0, 0}); // most of x is not read
}

void minimal_filtering() {
    const auto winograd = [](int64_t batch, int64_t in, int64_t out, Triple input, Triple pad) {
        Geometry g = test::geometry(batch, in, out, 1, input, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, pad);
        g.dims = 2;
        check_winograd<float>(g, 1e-5);
        check_winograd<double>(g, 1e-13);
        check_winograd<float, BFloat16>(g, 1e-5);
    };
    winograd(1, 1, 1, {1, 3, 3}, {0, 0, 0});    // one output
    winograd(3, 33, 17, {1, 2, 5}, {0, 1, 1});  // a lane more than a panel
    winograd(2, 7, 40, {1, 9, 3}, {0, 0, 2});   // more padding than the taps reach
    winograd(2, 70, 130, {1, 8, 7}, {0, 1, 1}); // several tasks for each operand; outputs behind the last
    winograd(2, 16, 32, {1, 5, 77}, {0, 3, 0}); // rows of several pieces, and rows of padding alone
    winograd(5, 9, 11, {1, 14, 14}, {0, 1, 1}); // several blocks, which begin within a row of tiles
    winograd(2, 9, 11, {1, 33, 48}, {0, 1, 1}); // several parts
    const auto fits = [](int64_t groups, Triple kernel, Triple stride, Triple dilation) {
        Geometry g = test::geometry(2, 4, 4, groups, {1, 9, 9}, kernel, stride, dilation, {0, 1, 1});
        g.dims = 2;
        return winograd_fits(g);
    };
    CHECK(fits(1, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}));
    CHECK(!fits(2, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}) && !fits(1, {1, 3, 2}, {1, 1, 1}, {1, 1, 1}));
    CHECK(!fits(1, {1, 3, 3}, {1, 2, 1}, {1, 1, 1}) && !fits(1, {1, 3, 3}, {1, 1, 1}, {1, 1, 2}));
}

} // namespace

int main(int argc, char** argv) {
    const std::string_view by = argc > 1 ? argv[1] : "vectors";
    const std::string name = "correlation by " + std::string(by);
    if (by == "tiles") {
        if (!has_tiles()) return test::skip(name.c_str(), "no AMX with bf16, or this system does not permit it");
        tested = {Unit::kTiles};
        gram_products();
        long_rows_are_turned_once();
    } else if (by == "dots") {
        if (!has_dots()) return test::skip(name.c_str(), "no AVX-512 with bf16");
        tested = {Unit::kDots};
        long_rows_are_turned_once();
    } else {
        tested = {Unit::kNarrow, Unit::kWide};
        ranges();
        merging();
        depthwise_layers();
        first_layers();
        minimal_filtering();
    }
    gram_matrices();
    implicit_gemms();
    return test::finish(name.c_str());
}
