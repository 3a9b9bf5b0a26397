// Gram matrices and implicit GEMMs against the definition of the correlation, written as loops. With the argument "tiles":
// products on AMX's tiles alone.
#include "cpu/direct.h"
#include "cpu/gram.h"
#include "problems.h"

#include <string>
#include <string_view>

using namespace localsgd;

namespace {

std::vector<Unit> tested;

const std::vector<Unit>& units() { return tested; }
bool bf16_alone() { return only_bf16(tested.front()); }

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
    }
    gram_matrices();
    implicit_gemms();
    return test::finish(name.c_str());
}
