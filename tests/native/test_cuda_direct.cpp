// The direct kernels on the emulated GPU against fp64 loops.
#include "../../csrc/kernels/direct.cu"
#include "../../csrc/kernels/direct_mma_bf16.cu"
#include "../../csrc/kernels/direct_mma_f16.cu"
#include "../../csrc/kernels/direct_mma_tf32.cu"

#include <random>

#include "direct_launches.h"

namespace {

using namespace launches;

// `threads`: as many blocks of each kernel as have those.
Chip chip_of(int multiprocessors, int threads) {
    Chip chip{multiprocessors, true, {}};
    for (int i = 0; i < kFfmaKernels; ++i) chip.blocks[i] = threads / variant(i).threads;
    return chip;
}
const Chip kChip = [] {
    Chip chip{3, true, {}};
    std::fill(std::begin(chip.blocks), std::end(chip.blocks), 2);
    return chip;
}();

void run_case(const Case& c, Kind x_kind, Kind z_kind, Layout layout, unsigned seed, int splits) {
    use(seed, true);
    const Flush flush = seed % 2 ? Flush::begin : Flush::end;
    Memory m(c, x_kind, z_kind, layout, flush);
    const std::vector<double> oracle = layers::correlation(c.geometry, m.x, m.z);
    CHECK(unsupported(m.problem) == nullptr);
    DirectConfig config = get_best_config(m.problem, kChip);
    if (splits > 0) split(config, c.geometry, splits, kStepPositions);
    const std::string what = std::string(c.name) + " " + kind_name(x_kind) + "/" + kind_name(z_kind) + " " +
                             layers::name_of(layout) + ": " + config.text();
    check_launches(m, config, oracle, seed, what);
}

void test_bad_batches() {
    use(1, true);
    const Case c = layers::cases()[0];
    Memory m(c, Kind::f32, Kind::f32, Layout::nchw, Flush::end);
    check_bad_batches(m, get_best_config(m.problem, kChip), m.z, layers::correlation(c.geometry, m.x, m.z));
}

void test_half_weights() {
    use(3, true);
    const Case c = layers::cases()[0];
    for (const Kind kind : {Kind::f16, Kind::bf16}) {
        Memory m(c, kind, kind, Layout::nhwc, Flush::end);
        const std::vector<double> oracle = layers::correlation(c.geometry, m.x, m.z);
        const std::vector<float> start = layers::random(static_cast<int64_t>(oracle.size()), 5);
        layers::Tensor weight({{static_cast<int64_t>(oracle.size()), 1, 1, 1, 1}}, kind, Layout::nchw, Flush::end, 5);
        const DirectConfig config = get_best_config(m.problem, kChip);
        m.make_workspace(config);
        Target target = m.d_target;
        target.data = weight.data();
        target.element = element(kind);
        const std::vector<float> before = weight.floats();
        Step step;
        step.rate.value = 3;
        CHECK(correlate_and_update(m.problem, config, target, step, m.workspace->data(), nullptr) == cudaSuccess);
        double norm = 0, worst = 0;
        for (const double v : oracle) norm += v * v;
        for (size_t i = 0; i < oracle.size(); ++i) {
            const double expected = before[i] + 3 * oracle[i] / std::sqrt(norm);
            worst = std::max(worst, std::fabs(weight.floats()[i] - expected) / std::max(0.1, std::fabs(expected)));
        }
        CHECK(worst <= (kind == Kind::f16 ? 0.51 / 1024 : 0.51 / 128)); // rounded once
        CHECK(weight.intact());
    }
}

// Division by multiplication, exact over its whole range.
void test_fast_div() {
    std::mt19937 random(1);
    for (int i = 0; i < 20000; ++i) {
        const unsigned by = i < 300 ? i + 1 : (random() >> (random() % 31) & 0x7fffffff) | 1;
        const unsigned any = random() & 0x7fffffff;
        for (const unsigned n : {0u, by - 1, by, any, any / by * by, any / by * by - 1 + !(any / by), 0x7fffffffu})
            if (quotient(n, fast_div(by)) != n / by) {
                CHECK_THAT(false, std::to_string(n) + " / " + std::to_string(by));
                return;
            }
    }
}

void test_configurations() {
    // An H100: 64 -> 64 channels, 3x3, 56x56, batch 64. The whole chip has work, tiles are not all padding.
    const Chip big = chip_of(132, 512);
    DirectProblem p{};
    p.geometry.batch = 64;
    p.geometry.in_channels = p.geometry.out_channels = 64;
    p.geometry.kernel = {1, 3, 3};
    p.geometry.pad = {0, 1, 1};
    p.geometry.input = p.geometry.output = {1, 56, 56};
    p.x = p.z = {nullptr, Kind::bf16, {56 * 56 * 64, 1, {56 * 56 * 64, 56 * 64, 64}}};
    DirectConfig c = get_best_config(p, big);
    std::printf("  %s\n", c.text().c_str());
    CHECK(c.z_access == Access::channels4 && c.x_access == Access::channels4);
    CHECK(c.tile_m == 64 && c.blocks >= 132 && int64_t{c.splits} * c.split_positions >= p.geometry.positions());
    p.x.strides = p.z.strides = {56 * 56 * 64, 56 * 56, {56 * 56, 56, 1}};
    c = get_best_config(p, big);
    CHECK(c.z_access == Access::positions4 && c.x_access == Access::scalar);
    for (const bool channels_last : {true, false}) { // ResNet's first layer
        DirectProblem stem{};
        stem.geometry = test::geometry(64, 3, 64, 1, {1, 224, 224}, {1, 7, 7}, {1, 2, 2}, {1, 1, 1}, {0, 3, 3});
        const auto strides = channels_last ? test::channels_last : test::channels_first;
        stem.x = {nullptr, Kind::f32, strides(3, {1, 224, 224})};
        stem.z = {nullptr, Kind::f32, strides(64, stem.geometry.output)};
        c = get_best_config(stem, big);
        CHECK(c.z_access == (channels_last ? Access::channels4 : Access::positions4) && c.x_access == Access::segments);
    }
    p.geometry.batch = 1 << 20;
    CHECK(unsupported(p) != nullptr);
    p.geometry.batch = 1;
    p.x.strides.channel = int64_t{1} << 31;
    CHECK(unsupported(p) != nullptr);
    p.x.kind = Kind::f64;
    CHECK(unsupported(p) != nullptr);
}

// Tiles are chosen by shape; every one of them, with every pair of accesses, has to have run.
void test_every_kernel() {
    const Case c = layers::every_access();
    for (int kernel = 0; kernel < kFfmaKernels; ++kernel) {
        const Variant& v = variant(kernel);
        if (v.x == Access::segments) continue; // see check_segments
        use(5, true);
        const bool planes = v.z == Access::positions4;
        Memory m(c, Kind::f32, Kind::f32, planes ? Layout::nchw : Layout::nhwc, Flush::end);
        const DirectConfig chosen = get_best_config(m.problem, kChip), config = config_with(kernel, c, 4);
        CHECK(chosen.z_access == (planes ? Access::positions4 : Access::channels4) && chosen.x_access == chosen.z_access);
        m.make_workspace(config);
        CHECK(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess);
        CHECK_THAT(m.intact(), config.text());
        check_d(m.d, layers::correlation(c.geometry, m.x, m.z), config.text());
    }
}

} // namespace

int main() {
    test_fast_div();
    test_configurations();
    test_every_kernel();
    check_segments(0, kFfmaKernels, 61, [](const Case& c, const Memory& m, Core) {
        return layers::correlation(c.geometry, layers::Tensor(layers::input(c), Kind::f32, Layout::nchw, Flush::end, 1), m.z);
    });
    const Kind kinds[] = {Kind::f32, Kind::f16, Kind::bf16};
    unsigned seed = 0;
    for (const Case& c : layers::cases())
        for (const Layout layout : {Layout::nchw, Layout::nhwc, Layout::sliced}) {
            // Each case and layout in another mixture of dtypes and another number of splits.
            const Kind x = kinds[seed % 3], z = kinds[seed / 3 % 3];
            run_case(c, x, z, layout, seed, static_cast<int>(seed % 4 == 3 ? 9 : seed % 4));
            ++seed;
        }
    test_bad_batches();
    test_half_weights();
    return test::finish("test_cuda_direct");
}
