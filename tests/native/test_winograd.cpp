// Minimal filtering against loops, in all tiles.
#include "cpu/winograd.h"
#include "problems.h"

using namespace localsgd;

namespace {

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

int main() {
    minimal_filtering();
    return test::finish("winograd");
}
