// The direct kernels on matrix units, on the emulated GPU against fp64 loops. Compiled once more by test_cuda_mma_sm75.cpp, for
// an architecture that only has some of the instructions.
#include "../../csrc/kernels/direct.cu"
#include "../../csrc/kernels/direct_mma_bf16.cu"
#include "../../csrc/kernels/direct_mma_f16.cu"
#include "../../csrc/kernels/direct_mma_tf32.cu"

#include "direct_launches.h"

namespace {

using namespace launches;

constexpr int kCompute = LOCALSGD_ARCH / 10;
constexpr Core kMmaCores[] = {Core::mma_bf16, Core::mma_f16, Core::mma_tf32};

Chip chip_of(int multiprocessors, int compute) {
    Chip chip{multiprocessors, true, {}, compute};
    for (int& blocks : chip.blocks) blocks = 2;
    return chip;
}

void round_into(layers::Tensor& to, const layers::Tensor& from, Kind kind, Core core) {
    const std::vector<float> values = from.floats();
    for (size_t i = 0; i < values.size(); ++i) to.set(i, kind == Kind::f32 ? rounded_by(core, values[i]) : values[i]);
}

std::vector<double> oracle_of(const Case& c, const Memory& m, Core core) {
    layers::Tensor x(layers::input(c), Kind::f32, Layout::nchw, Flush::end, 0);
    layers::Tensor z(layers::output(c), Kind::f32, Layout::nchw, Flush::end, 0);
    round_into(x, m.x, m.problem.x.kind, core);
    round_into(z, m.z, m.problem.z.kind, core);
    return layers::correlation(c.geometry, x, z);
}

// Chosen as usual among the kernels of one core.
DirectConfig config_of(const DirectProblem& problem, Core core) {
    DirectConfig best = get_best_config(problem, chip_of(3, kCompute));
    if (best.core == core) return best;
    // A layer so small that the estimate prefers fp32: the same tile and accesses, other instructions.
    for (int i = kFfmaKernels; i < kDirectKernels; ++i) {
        const Variant& v = variant(i);
        if (v.core != core || v.tile_m != best.tile_m || v.tile_n != best.tile_n) continue;
        if (v.z != best.z_access || v.x != best.x_access) continue;
        best.kernel = i;
        best.core = core;
        best.threads = v.threads;
        return best;
    }
    CHECK_THAT(false, "no kernel for " + best.text());
    return best;
}

std::string describe(const Case& c, const DirectProblem& p, Layout layout, const DirectConfig& config) {
    return std::string(c.name) + " " + kind_name(p.x.kind) + "/" + kind_name(p.z.kind) + " " + layers::name_of(layout) + ": " +
           config.text();
}

void run_case(const Case& c, Core core, Kind x_kind, Kind z_kind, Layout layout, unsigned seed, int splits) {
    use(seed, true);
    Memory m(c, x_kind, z_kind, layout, seed % 2 ? Flush::begin : Flush::end);
    m.problem.allow_tf32 = core == Core::mma_tf32;
    m.problem.allow_lower = core != Core::mma_tf32;
    DirectConfig config = config_of(m.problem, core);
    if (splits > 0) split(config, c.geometry, splits, variant(config.kernel).step_positions);
    check_launches(m, config, oracle_of(c, m, core), seed, describe(c, m.problem, layout, config));
}

// Whole chunks of 16 bytes in NHWC, and more steps than the pipeline has stages.
std::vector<Case> chunk_cases() {
    using layers::layer;
    return {
        layer("3x3, chunks", 2, 16, 24, {1, 13, 13}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        layer("3x3 dilated, chunks", 3, 8, 40, {1, 12, 9}, {1, 3, 3}, {1, 2, 1}, {0, 2, 1}, {1, 2, 2}),
        layer("grouped, chunks", 2, 32, 16, {1, 9, 9}, {1, 3, 2}, {1, 1, 1}, {0, 1, 0}, {1, 1, 1}, 2),
        layer("linear, chunks", 1, 136, 72, {1, 1, 197}, {1, 1, 1}),
        layer("1x1, chunks", 3, 72, 136, {1, 7, 7}, {1, 1, 1}),
        layer("1x1 stride 2, chunks", 3, 24, 8, {1, 15, 13}, {1, 1, 1}, {1, 2, 2}, {0, 1, 0}),
        layer("conv1d, chunks", 3, 8, 16, {1, 1, 60}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}),
        layer("conv3d, chunks", 1, 16, 8, {5, 6, 7}, {2, 3, 3}, {1, 1, 2}, {1, 1, 1}),
    };
}

bool exists(Core core) { return core == Core::mma_f16 ? kCompute >= 75 : kCompute >= 80; }

void test_layers() {
    unsigned seed = 0;
    for (const Core core : kMmaCores) {
        if (!exists(core)) continue;
        const Kind own = operand_kind(core);
        for (const Case& c : layers::cases())
            for (const Layout layout : {Layout::nchw, Layout::nhwc, Layout::sliced}) {
                // Every third time a mixture: tf32 holds all others, and 16-bit cores round fp32.
                const Kind other = core != Core::mma_tf32 ? Kind::f32 : seed % 2 ? Kind::bf16 : Kind::f16;
                const Kind x = seed % 3 == 1 ? other : own, z = core == Core::mma_tf32 && seed % 6 == 1 ? Kind::f16 : own;
                run_case(c, core, x, z, layout, seed, static_cast<int>(seed % 4 == 3 ? 9 : seed % 4));
                ++seed;
            }
        for (const Case& c : chunk_cases())
            for (const int splits : {1, 3, 0}) run_case(c, core, own, own, Layout::nhwc, seed++, splits);
    }
}

// Tiles are chosen by shape; every one of them, with every pair of accesses, has to have run.
void test_every_kernel() {
    const Case many = layers::layer("every access", 3, 136, 152, {1, 4, 10}, {1, 1, 1}), few = segment_cases()[0];
    for (int kernel = kFfmaKernels; kernel < kDirectKernels; ++kernel) {
        const Variant& v = variant(kernel);
        if (v.compute > kCompute) continue;
        use(5 + static_cast<unsigned>(kernel), true);
        const Kind kind = operand_kind(v.core);
        const Layout layout = v.z == Access::positions4 ? Layout::nchw : Layout::nhwc;
        const Case& c = by_segments(v.x) ? few : many;
        Memory m(c, v.x == Access::segments32 ? Kind::f32 : kind, kind, layout, Flush::end);
        const DirectConfig config = config_with(kernel, c, 2);
        m.make_workspace(config);
        CHECK(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess);
        CHECK_THAT(m.intact(), config.text());
        check_d(m.d, oracle_of(c, m, v.core), config.text());
    }
}

void test_missing_instructions() {
    const Case c = chunk_cases()[0];
    int missing = 0;
    for (int kernel = kFfmaKernels; kernel < kDirectKernels; ++kernel) {
        const Variant& v = variant(kernel);
        if (v.compute <= kCompute) continue;
        ++missing;
        if (v.tile_m != 64 || v.tile_n != 64) continue;
        use(0, true);
        Memory m(c, operand_kind(v.core), operand_kind(v.core), Layout::nhwc, Flush::end);
        DirectConfig config = get_best_config(m.problem, chip_of(3, 0));
        config.kernel = kernel;
        config.threads = v.threads;
        check_traps(m, config);
    }
    CHECK(missing == (kCompute >= 80   ? 0
                      : kCompute >= 75 ? kHalfKernels + kTf32Kernels + kDirectTiles + kHalfSegmentKernels
                                       : 2 * kHalfKernels + kTf32Kernels));
}

// 128 -> 256 channels, 3x3, 28x28, batch 64, on a chip of 132 multiprocessors.
DirectProblem wide_problem(Kind x, Kind z, bool channels_last) {
    DirectProblem p{};
    p.geometry = test::geometry(64, 128, 256, 1, {1, 28, 28}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1});
    const auto strides = channels_last ? test::channels_last : test::channels_first;
    p.x = {nullptr, x, strides(128, {1, 28, 28})};
    p.z = {nullptr, z, strides(256, {1, 28, 28})};
    return p;
}

void test_choice() {
    const Kind h = Kind::f16, b = Kind::bf16, f = Kind::f32;
    const auto choose = [](DirectProblem p, int compute, bool tf32 = false, bool lower = false) {
        p.allow_tf32 = tf32;
        p.allow_lower = lower;
        return get_best_config(p, chip_of(132, compute));
    };
    for (const int compute : {0, 61, 70, 75, 80, 90}) {
        CHECK(choose(wide_problem(b, b, true), compute, true, true).core == (compute >= 80 ? Core::mma_bf16 : Core::ffma));
        CHECK(choose(wide_problem(h, h, true), compute, true, true).core == (compute >= 75 ? Core::mma_f16 : Core::ffma));
        CHECK(choose(wide_problem(f, f, true), compute, true, true).core == (compute >= 80 ? Core::mma_tf32 : Core::ffma));
    }
    for (const bool channels_last : {false, true}) {
        // Nothing is rounded that the caller does not allow.
        CHECK(choose(wide_problem(f, f, channels_last), 90).core == Core::ffma);
        CHECK(choose(wide_problem(f, b, channels_last), 90).core == Core::ffma);
        CHECK(choose(wide_problem(f, f, channels_last), 90, false, true).core == Core::ffma);
        CHECK(choose(wide_problem(f, b, channels_last), 90, true).core == Core::mma_tf32);
        CHECK(choose(wide_problem(f, b, channels_last), 90, false, true).core == Core::mma_bf16);
        CHECK(choose(wide_problem(h, f, channels_last), 90, false, true).core == Core::mma_f16);
        CHECK(choose(wide_problem(h, b, channels_last), 90).core == Core::mma_tf32); // holds both exactly
    }
    DirectConfig c = choose(wide_problem(b, b, true), 90);
    std::printf("  %s\n", c.text().c_str());
    CHECK(c.z_access == Access::chunks16 && c.text().rfind("mma_bf16 128x128", 0) == 0 && c.split_positions % 32 == 0);
    CHECK(choose(wide_problem(h, h, true), 75).z_access == Access::channels4); // no cp.async
    CHECK(choose(wide_problem(b, b, false), 90).z_access == Access::positions4);
    DirectProblem p = wide_problem(b, b, true);
    p.x.data = reinterpret_cast<const void*>(uintptr_t{8}); // aligned for 4 elements, not for 16 bytes
    CHECK(choose(p, 90).x_access == Access::channels4);
    p = wide_problem(b, b, true);
    p.geometry.in_channels = 132, p.x.strides = test::channels_last(132, {1, 28, 28});
    CHECK(choose(p, 90).x_access == Access::channels4);
}

// The first layers of ResNet, MobileNetV2 and a vision transformer, which would be gathered element by element.
void test_few_channels() {
    const auto choose = [](int64_t out, int64_t kernel, int64_t stride, int64_t pad, Kind kind, bool autocast = false) {
        DirectProblem p{};
        p.geometry =
            test::geometry(64, 3, out, 1, {1, 224, 224}, {1, kernel, kernel}, {1, stride, stride}, {1, 1, 1}, {0, pad, pad});
        p.x = {nullptr, autocast ? Kind::f32 : kind, test::channels_last(3, {1, 224, 224})};
        p.z = {nullptr, kind, test::channels_last(out, p.geometry.output)};
        p.allow_tf32 = true;
        p.allow_lower = autocast;
        return get_best_config(p, chip_of(132, 90));
    };
    for (const Kind kind : {Kind::bf16, Kind::f32}) {
        const DirectConfig resnet = choose(64, 7, 2, 3, kind), mobilenet = choose(32, 3, 2, 1, kind);
        CHECK(resnet.x_access == Access::segments && resnet.tile_n == 160 && resnet.tiles == 1);
        CHECK(mobilenet.x_access == Access::segments && mobilenet.tile_n == 32);
        CHECK(choose(768, 16, 16, 0, kind).x_access == Access::chunks16); // windows side by side
    }
    const DirectConfig cast = choose(64, 7, 2, 3, Kind::bf16, true);
    CHECK(cast.core == Core::mma_bf16 && cast.x_access == Access::segments32 && cast.tile_n == 160);
}

void test_shared_memory() {
    use(0, true);
    emulation::options().ptx_version = kCompute;
    const Case c = chunk_cases()[0];
    Memory m(c, Kind::bf16, Kind::bf16, Layout::nhwc, Flush::end);
    Chip chip{};
    CHECK(query_chip(chip) == cudaSuccess && chip.compute == kCompute);
    for (int i = 0; i < kDirectKernels; ++i) {
        const Variant& v = variant(i);
        CHECK(chip.blocks[i] == (v.compute <= kCompute ? 2 : 0));
        CHECK(v.shared_bytes <= (v.compute < 80 ? 48 : 99) << 10); // what every such multiprocessor has for a block
    }
}

} // namespace

int main() {
    test_shared_memory();
    test_choice();
    if (kCompute >= 80) test_few_channels();
    test_missing_instructions();
    test_every_kernel();
    check_segments(kFfmaKernels, kDirectKernels, kCompute, oracle_of);
    test_layers();
    return test::finish("test_cuda_mma");
}
