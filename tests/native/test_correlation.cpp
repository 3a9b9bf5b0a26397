// Depthwise kernels and im2col tiles against the definition of the correlation, written as loops.
#include "check.h"
#include "cpu/depthwise.h"
#include "cpu/patches.h"

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
                out[last ? (n * plane + i) * channels + c : (n * channels + c) * plane + i] =
                    static_cast<T>(values[(n * channels + c) * plane + i]);
    return out;
}

template <typename Acc>
void check_depthwise(const Geometry& g, double tolerance) {
    const Problem p = problem(g);
    const auto expected = depthwise_by_loops(p);
    for (const bool last : {false, true}) {
        const auto x = arranged<Acc>(p.x, g.batch, g.in_channels, g.input, last);
        const auto z = arranged<Acc>(p.z, g.batch, g.out_channels, g.output, last);
        const Kind kind = sizeof(Acc) == 8 ? Kind::f64 : Kind::f32;
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

void check_patches(const Geometry& g, bool last, int64_t first, int64_t count) {
    const Problem p = problem(g);
    const auto x = arranged<float>(p.x, g.batch, g.in_channels, g.input, last);
    Geometry merged = g;
    Strides strides = last ? test::channels_last(g.in_channels, g.input) : test::channels_first(g.in_channels, g.input);
    merge_space(merged, strides);
    const PatchSource source{x.data(), Kind::f32, merged, strides, last ? TileOrder::kChannelsLast : TileOrder::kChannelsFirst};
    std::vector<float> tile(g.groups * g.patch() * count + 1, NAN);
    const int64_t tasks = pack_tasks(source, count);
    pack(source, first, count, tasks / 3, tasks, tile.data());
    pack(source, first, count, 0, tasks / 3, tile.data());
    CHECK(std::isnan(tile.back()));
    for_each_product(g, [&](int64_t n, int64_t position, int64_t tap, const Triple& in) {
        const int64_t t = n * g.image_positions() + position - first;
        if (t < 0 || t >= count) return;
        for (int64_t c = 0; c < g.in_channels; ++c) {
            const int64_t group = c / g.in_per_group(), within = c % g.in_per_group();
            const int64_t index =
                last ? ((group * count + t) * g.taps() + tap) * g.in_per_group() + within : (c * g.taps() + tap) * count + t;
            CHECK(tile[index] == static_cast<float>(x_at(p, n, c, in)));
        }
    });
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

} // namespace

int main() {
    ranges();
    merging();
    const auto depthwise = [](int64_t batch, int64_t channels, int64_t multiplier, Triple input, Triple kernel, Triple stride,
                              Triple dilation, Triple pad) {
        const Geometry g =
            test::geometry(batch, channels, channels * multiplier, channels, input, kernel, stride, dilation, pad);
        check_depthwise<float>(g, 1e-5);
        check_depthwise<double>(g, 1e-13);
    };
    depthwise(2, 19, 1, {1, 9, 33}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});
    depthwise(2, 70, 1, {1, 17, 7}, {1, 3, 3}, {1, 2, 2}, {1, 1, 1}, {0, 1, 1});
    depthwise(1, 5, 3, {1, 20, 40}, {1, 5, 5}, {1, 1, 1}, {1, 1, 1}, {0, 2, 2});
    depthwise(1, 66, 1, {1, 12, 18}, {1, 7, 7}, {1, 1, 1}, {1, 1, 1}, {0, 3, 3});
    depthwise(3, 4, 1, {1, 23, 29}, {1, 4, 11}, {1, 3, 2}, {1, 2, 2}, {0, 5, 7});
    depthwise(2, 3, 1, {1, 1, 151}, {1, 1, 31}, {1, 1, 3}, {1, 1, 1}, {0, 0, 15});
    depthwise(2, 8, 2, {6, 7, 9}, {3, 2, 3}, {2, 1, 2}, {2, 1, 1}, {2, 0, 1});
    depthwise(1, 17, 1, {5, 6, 7}, {3, 3, 3}, {1, 1, 1}, {1, 2, 1}, {1, 2, 1});
    depthwise(1, 2, 1, {1, 4, 4}, {1, 1, 1}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2});
    depthwise(2, 3, 1, {1, 200, 300}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}); // several bands

    for (const bool last : {false, true}) {
        const Geometry dense = test::geometry(2, 6, 4, 2, {3, 6, 7}, {2, 3, 3}, {1, 2, 1}, {1, 1, 2}, {1, 1, 2});
        check_patches(dense, last, 0, dense.positions());
        check_patches(dense, last, 17, 61);
        const Geometry point = test::geometry(3, 5, 4, 1, {2, 4, 6}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
        check_patches(point, last, 0, point.positions());
        check_patches(point, last, 40, 30);
        const Geometry strided = test::geometry(2, 4, 4, 4, {1, 5, 9}, {1, 1, 1}, {1, 2, 3}, {1, 1, 1}, {0, 3, 1});
        check_patches(strided, last, 0, strided.positions());
    }
    return test::finish("correlation");
}
