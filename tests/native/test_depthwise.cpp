// Depthwise kernels against loops.
#include "cpu/depthwise.h"
#include "cpu/tiles.h"
#include "problems.h"

using namespace localsgd;

namespace {

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

bool tested_dots = false;

// Between NaN: what is read of them must not be summed.
template <typename T>
struct Guarded {
    static constexpr int64_t kGuard = 64;
    std::vector<T> all;
    explicit Guarded(const std::vector<T>& values) : all(values.size() + 2 * kGuard) {
        for (T& element : all) store(element, NAN);
        std::copy(values.begin(), values.end(), all.begin() + kGuard);
    }
    const T* data() const { return all.data() + kGuard; }
};

template <typename Acc, typename T = Acc>
void check_depthwise(const Geometry& g, double tolerance) {
    const Problem p = problem_of<T>(g);
    const auto expected = depthwise_by_loops(p);
    for (const bool last : {false, true}) {
        const Guarded x(arranged<T>(p.x, g.batch, g.in_channels, g.input, last));
        const Guarded z(arranged<T>(p.z, g.batch, g.out_channels, g.output, last));
        const Kind kind = kStored<T>;
        const auto strides = last ? test::channels_last : test::channels_first;
        const DepthwiseArgs args{
            g, x.data(), kind, strides(g.in_channels, g.input), z.data(), kind, strides(g.out_channels, g.output), tested_dots};
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

void depthwise_layers() {
    const auto depthwise = [](int64_t batch, int64_t channels, int64_t multiplier, Triple input, Triple kernel, Triple stride,
                              Triple dilation, Triple pad) {
        const Geometry g =
            test::geometry(batch, channels, channels * multiplier, channels, input, kernel, stride, dilation, pad);
        check_depthwise<float>(g, 1e-5);
        check_depthwise<double>(g, 1e-13);
        for (const bool dots : {false, true}) {
            tested_dots = dots && has_dots();
            check_depthwise<float, BFloat16>(g, 1e-5);
        }
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
    // By dot products: pairs of rows and a single one, one to three pixels left over, a last vector over channels summed
    // already.
    for (const int64_t width : {1, 2, 3, 5, 16, 31})
        for (const int64_t stride : {1, 2})
            for (const int64_t pad : {0, 1})
                if (width + 2 * pad >= 3)
                    depthwise(2, 73, 1, {1, 6, width}, {1, 3, 3}, {1, stride, stride}, {1, 1, 1}, {0, 2, pad});
    for (const int64_t stride : {1, 2}) // rows above and below all of x
        depthwise(1, 32, 1, {1, 4, 9}, {1, 3, 3}, {1, stride, stride}, {1, 1, 1}, {0, 9, 1});
    for (const int64_t height : {1, 2, 3, 17})
        for (const int64_t width : {1, 3, 7, 14, 40})
            depthwise(2, 32, 2, {1, height, width}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});
    depthwise(2, 40, 1, {4, 9, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1});
    depthwise(2, 24, 1, {3, 8, 15}, {2, 3, 3}, {1, 2, 2}, {1, 2, 1}, {1, 1, 1});
}

} // namespace

int main() {
    if (!has_dots()) test::skip("bf16 by dot products", "no AVX-512 with bf16");
    depthwise_layers();
    return test::finish("depthwise");
}
