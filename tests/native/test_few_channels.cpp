// First layers, summed over columns, against loops.
#include "cpu/few_channels.h"
#include "problems.h"

using namespace localsgd;

namespace {

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

} // namespace

int main() {
    first_layers();
    return test::finish("few channels");
}
