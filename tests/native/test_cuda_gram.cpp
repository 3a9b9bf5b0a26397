// The Gram kernels on the emulated GPU against fp64 loops. Compiled once more by test_cuda_gram_sm75.cpp, for an architecture
// that only has some of the instructions.
#include "../../csrc/kernels/gram.cu"
#include "../../csrc/kernels/gram_mma_bf16.cu"
#include "../../csrc/kernels/gram_mma_f16.cu"
#include "../../csrc/kernels/gram_mma_tf32.cu"

#include "gram_launches.h"

namespace {

using namespace launches;

constexpr int kCompute = LOCALSGD_ARCH / 10;

GramChip chip_of(int multiprocessors, int small, int large, int compute = 0) {
    GramChip chip{multiprocessors, true, {}, compute};
    for (int i = 0; i < kGramKernels; ++i) chip.blocks[i] = gram_kernel_variant(i).tile == 64 ? small : large;
    return chip;
}
const GramChip kChip = chip_of(3, 2, 2);

void test_ffma() {
    const Kind kinds[] = {Kind::f32, Kind::f16, Kind::bf16};
    unsigned seed = 1;
    for (const Case& c : gram_cases())
        for (const Layout layout : {Layout::nchw, Layout::nhwc, Layout::sliced}) {
            // Each case and layout in another mixture of dtypes and another number of splits.
            Memory m(c, kinds[seed % 3], kinds[seed / 2 % 3], kinds[seed / 3 % 3], layout, seed % 4 != 0,
                     seed % 2 ? Flush::begin : Flush::end);
            CHECK(unsupported(m.problem) == nullptr);
            GramConfig config = get_best_config(m.problem, kChip);
            if (seed % 4) split(config, m.problem, static_cast<int>(seed % 4 == 3 ? 9 : seed % 4));
            use(seed, true);
            check_launches(m, config, m.oracle(), seed, describe(m, layout, config), tolerance_of(config));
            ++seed;
        }
}

// One of a core's kernels for a problem, chosen or not.
GramConfig config_with(const GramProblem& problem, Core core, int tile) {
    for (int i = 0; i < kGramKernels; ++i) {
        const GramVariant& v = gram_kernel_variant(i);
        if (v.core == core && v.tile == tile && runs_on(v, kCompute) && allowed(core, problem) && reads(v, problem, kCompute))
            return with_kernel(problem, i);
    }
    CHECK_THAT(false, std::string("no kernel of ") + core_name(core));
    return get_best_config(problem, kChip);
}

std::vector<Core> mma_cores() {
    if (kCompute < 80) return {Core::mma_f16};
    return {Core::mma_bf16, Core::mma_f16, Core::mma_tf32};
}

// As a caller would have to allow it for the core.
void allow(GramProblem& problem, Core core) {
    problem.allow_tf32 = core == Core::mma_tf32;
    problem.allow_lower = core != Core::mma_tf32;
}

// Whole chunks of 16 bytes in NHWC, and more steps than the pipeline has stages.
std::vector<Case> chunk_cases() {
    using layers::layer;
    return {
        layer("1x1, chunks", 3, 72, 136, {1, 7, 7}, {1, 1, 1}),
        layer("1x1 stride 2, padded, chunks", 3, 24, 8, {1, 15, 13}, {1, 1, 1}, {1, 2, 2}, {0, 1, 0}),
        layer("grouped, chunks", 2, 48, 30, {1, 9, 9}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 3),
        layer("linear, chunks", 1, 136, 72, {1, 1, 197}, {1, 1, 1}),
    };
}

void test_mma() {
    unsigned seed = 1;
    for (const Core core : mma_cores()) {
        const Kind own = operand_kind(core);
        std::vector<Case> all = gram_cases();
        for (const Case& c : chunk_cases()) all.push_back(c);
        for (const Case& c : all)
            for (const Layout layout : {Layout::nhwc, seed % 2 ? Layout::nchw : Layout::sliced}) {
                // Now and then an fp32 x that is rounded, a W that the forward did not round (and that takes several parts),
                // one in the other half precision.
                const Kind z = seed % 5 == 0 ? Kind::f32 : own, other = own == Kind::bf16 ? Kind::f16 : Kind::bf16;
                const Kind x = seed % 3 == 1 && z == own ? Kind::f32 : own;
                const Kind weight = seed % 5 == 1 ? other : seed % 2 ? own : Kind::f32;
                Memory m(c, x, weight, z, layout, seed % 4 != 0, seed % 2 ? Flush::begin : Flush::end);
                allow(m.problem, core);
                GramConfig config = config_with(m.problem, core, seed % 7 == 0 ? 128 : 64);
                split(config, m.problem, static_cast<int>(seed % 4 == 3 ? 9 : seed % 4 + 1));
                use(seed, true);
                check_launches(m, config, m.oracle(core), seed, describe(m, layout, config), tolerance_of(config));
                ++seed;
            }
    }
}

// Tiles are chosen by shape; every one of them, with every access, has to have run: here on two and on three strips.
void test_every_kernel() {
    const Case c = layers::layer("every kernel", 2, 140, 132, {1, 2, 6}, {1, 1, 1});
    const Case in_chunks = layers::layer("every kernel, chunks", 2, 136, 132, {1, 7, 12}, {1, 1, 1});
    int ran = 0;
    for (int kernel = 0; kernel < kGramKernels; ++kernel) {
        const GramVariant& v = gram_kernel_variant(kernel);
        if (!runs_on(v, kCompute)) continue;
        ++ran;
        const Layout layout = v.access == Access::positions4 ? Layout::nchw : Layout::nhwc;
        const auto seed = static_cast<unsigned>(kernel + 1);
        const Kind kind = operand_kind(v.core);
        Memory m(v.access == Access::chunks16 ? in_chunks : c, kind, Kind::f32, kernel % 4 == 3 ? kind : Kind::bf16, layout,
                 true, Flush::end);
        allow(m.problem, v.core);
        GramConfig config = with_kernel(m.problem, kernel);
        split(config, m.problem, 2);
        use(seed, true);
        check_launches(m, config, m.oracle(v.core), seed, describe(m, layout, config), tolerance_of(config));
    }
    CHECK(ran == (kCompute >= 80 ? kGramKernels - 6 : kGramFfmaKernels + 6));
}

// Elements of G far beyond fp16's range, rows of W that cancel most of them.
void test_range() {
    const Case c = layers::layer("range", 2, 40, 24, {1, 9, 8}, {1, 1, 1});
    for (const Core core : mma_cores()) {
        use(2, true);
        const Kind kind = operand_kind(core);
        Memory m(c, kind, Kind::f32, kind, Layout::nhwc, true, Flush::end);
        allow(m.problem, core);
        std::vector<float> x = m.x.floats();
        for (size_t i = 0; i < x.size(); ++i) m.x.set(i, (x[i] + 2) * 1000);
        GramConfig config = config_with(m.problem, core, 64);
        split(config, m.problem, 3);
        check_launches(m, config, m.oracle(core), 3, describe(m, Layout::nhwc, config), tolerance_of(config));
    }
}

void test_bad_batches() {
    const Case c = layers::layer("1x1", 2, 16, 7, {1, 4, 5}, {1, 1, 1});
    std::vector<Core> cores = mma_cores();
    cores.push_back(Core::ffma);
    for (const Core core : cores)
        for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
            use(1, true);
            const Kind kind = operand_kind(core);
            Memory m(c, kind, Kind::f32, kind, layout, true, Flush::end);
            allow(m.problem, core);
            GramConfig config = config_with(m.problem, core, 64);
            split(config, m.problem, 2);
            check_bad_batches(m, config, m.x, m.oracle(core));
        }
}

// Kernels of instructions that the architecture lacks end the launch.
void test_missing_instructions() {
    const Case c = chunk_cases()[0];
    for (int kernel = 0; kernel < kGramKernels; ++kernel) {
        const GramVariant& v = gram_kernel_variant(kernel);
        if (runs_on(v, kCompute) || v.tile != 64) continue;
        use(0, true);
        Memory m(c, operand_kind(v.core), Kind::f32, operand_kind(v.core), Layout::nhwc, false, Flush::end);
        GramConfig config = with_kernel(m.problem, kernel);
        split(config, m.problem, 1);
        check_traps(m, config);
    }
}

void test_query() {
    use(0, true);
    emulation::options().ptx_version = kCompute;
    GramChip chip{};
    CHECK(query_chip(chip) == cudaSuccess && chip.compute == kCompute && chip.multiprocessors == 3 && chip.cooperative);
    for (int i = 0; i < kGramKernels; ++i) {
        const GramVariant& v = gram_kernel_variant(i);
        CHECK(chip.blocks[i] == (runs_on(v, kCompute) ? 2 : 0));
        CHECK(v.shared_bytes <= (v.compute < 80 ? 48 : 99) << 10); // what every such multiprocessor has for a block
    }
}

// C -> K channels, 1x1, batch 64, on a chip of 132 multiprocessors.
GramProblem layer_of(int64_t in, int64_t out, int64_t size, Kind x, Kind z, bool channels_last) {
    GramProblem p{};
    p.geometry = test::geometry(64, in, out, 1, {1, size, size}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0});
    p.x = {nullptr, x, (channels_last ? test::channels_last : test::channels_first)(in, {1, size, size})};
    p.weight_kind = p.bias_kind = Kind::f32;
    p.z_kind = z;
    return p;
}

void test_choice() {
    const Kind h = Kind::f16, b = Kind::bf16, f = Kind::f32;
    const auto choose = [](GramProblem p, int compute, bool tf32 = false, bool lower = false) {
        p.allow_tf32 = tf32;
        p.allow_lower = lower;
        return get_best_config(p, chip_of(132, 4, 2, compute));
    };
    const auto wide = [](Kind x, Kind z, bool channels_last) { return layer_of(512, 1024, 14, x, z, channels_last); };
    for (const bool channels_last : {false, true}) {
        for (const int compute : {0, 61, 70, 75, 80, 90}) {
            const auto core = [&](Kind x, Kind z, bool tf32, bool lower) {
                return choose(wide(x, z, channels_last), compute, tf32, lower).core;
            };
            CHECK(core(b, b, true, true) == (compute >= 80 ? Core::mma_bf16 : Core::ffma));
            CHECK(core(h, h, true, true) == (compute >= 75 ? Core::mma_f16 : Core::ffma));
            CHECK(core(f, f, true, true) == (compute >= 80 ? Core::mma_tf32 : Core::ffma));
            CHECK(core(f, b, false, true) == (compute >= 80 ? Core::mma_bf16 : Core::ffma));
            // Nothing is rounded that the caller does not allow.
            CHECK(core(f, f, false, true) == Core::ffma);
            CHECK(core(f, b, false, false) == Core::ffma);
        }
        CHECK(choose(wide(h, h, channels_last), 75).product == Core::ffma);
        CHECK(choose(wide(h, h, channels_last), 80).product == Core::mma_tf32);
        CHECK(choose(wide(h, h, channels_last), 80).product_pairs == 2);
        CHECK(choose(wide(b, b, channels_last), 80).product == Core::mma_bf16);
        CHECK(choose(wide(b, b, channels_last), 80).product_pairs == 2);
        CHECK(choose(wide(b, f, channels_last), 80).product_pairs == 7);
        CHECK(choose(wide(h, f, channels_last), 80).product_pairs == 3);
        CHECK(choose(wide(f, f, channels_last), 80, true).product_pairs == 2);
    }
    CHECK(choose(wide(b, b, true), 90).access == Access::chunks16);
    CHECK(choose(wide(f, f, true), 90, true).access == Access::chunks16);
    CHECK(choose(wide(f, b, true), 90, false, true).access == Access::channels4);
    CHECK(choose(wide(h, h, true), 75).access == Access::channels4); // no cp.async
    CHECK(choose(wide(b, b, false), 90).access == Access::positions4);
    CHECK(choose(layer_of(516, 1024, 14, b, b, true), 90).access == Access::channels4);
    CHECK(choose(layer_of(513, 1024, 14, b, b, true), 90).access == Access::scalar);
    for (const GramProblem& p : {layer_of(1024, 2048, 14, b, b, true), layer_of(1024, 2048, 14, h, h, true),
                                 layer_of(1024, 2048, 14, f, f, true), layer_of(64, 256, 56, b, b, true)}) {
        const GramConfig c = choose(p, 90, true);
        std::printf("  %.0f clocks: %s\n", c.estimated_clocks, c.text().c_str());
        CHECK(int64_t{c.splits} * c.split_positions >= p.geometry.positions());
        CHECK(int64_t{c.product_splits} * c.product_split_length >= c.product_pairs * inner_of(p));
        CHECK(c.blocks >= 132);
    }
}

void test_triangle() {
    unsigned tile = 0;
    for (unsigned row = 0; tile < 3000000; ++row) {
        if (triangle_row(tile) != row || triangle_row(tile + row) != row) {
            CHECK_THAT(false, "triangle_row(" + std::to_string(tile) + ")");
            return;
        }
        tile += row + 1;
    }
}

void test_configurations() {
    // An H100: 64 -> 256 channels, 1x1, 56x56, batch 64: the whole chip has work.
    const GramChip big = chip_of(132, 8, 2);
    GramProblem p{};
    p.geometry.batch = 64;
    p.geometry.in_channels = 64;
    p.geometry.out_channels = 256;
    p.geometry.input = p.geometry.output = {1, 56, 56};
    p.x = {nullptr, Kind::bf16, {56 * 56 * 64, 1, {56 * 56 * 64, 56 * 64, 64}}};
    p.weight_kind = p.bias_kind = p.z_kind = Kind::f32;
    GramConfig c = get_best_config(p, big);
    std::printf("  %s\n", c.text().c_str());
    CHECK(c.access == Access::channels4 && c.tile == 64 && c.tiles == 1 && c.blocks >= 132);
    CHECK(int64_t{c.splits} * c.split_positions >= p.geometry.positions() && c.product_split_length * c.product_splits >= 64);
    p.geometry.batch = 1 << 20;
    CHECK(unsupported(p) != nullptr);
    p.geometry.batch = 1;
    CHECK(unsupported(p) == nullptr);
    p.z_kind = Kind::f64;
    CHECK(unsupported(p) != nullptr);
    p.z_kind = Kind::f32;
    p.geometry.kernel = {1, 1, 3};
    CHECK(unsupported(p) != nullptr);
    p.geometry.kernel = {1, 1, 1};
    p.geometry.in_channels = 50000;
    CHECK(unsupported(p) != nullptr);
}

} // namespace

int main() {
    test_triangle();
    test_query();
    test_configurations();
    test_choice();
    test_missing_instructions();
    test_every_kernel();
    test_range();
    test_ffma();
    test_mma();
    test_bad_batches();
    return test::finish("test_cuda_gram");
}
