// The depthwise kernels on the emulated GPU against fp64 loops.
#include "../../csrc/kernels/depthwise.cu"

#include "launches.h"

namespace {

using namespace launches;

DepthwiseChip chip_of(int multiprocessors, int blocks) {
    DepthwiseChip chip{multiprocessors, true, {}};
    for (int& b : chip.blocks) b = blocks;
    return chip;
}
const DepthwiseChip kChip = chip_of(3, 2);

Case depthwise(const char* name, int64_t batch, int64_t channels, int64_t multiplier, Triple input, Triple kernel,
               Triple stride = {1, 1, 1}, Triple pad = {0, 0, 0}, Triple dilation = {1, 1, 1}) {
    return layers::layer(name, batch, channels, channels * multiplier, input, kernel, stride, pad, dilation, channels);
}

std::vector<Case> cases() {
    std::vector<Case> all{
        depthwise("3x3", 2, 36, 1, {1, 9, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("3x3, many tiles", 2, 5, 1, {1, 21, 33}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("3x3 stride 2", 3, 64, 1, {1, 15, 14}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}),
        depthwise("3x3 dilated", 1, 8, 1, {1, 13, 12}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2}, {1, 2, 2}),
        depthwise("3x3 far dilated", 1, 3, 1, {1, 45, 43}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 20, 20}),
        depthwise("3x3 unread last column", 1, 4, 1, {1, 8, 8}, {1, 3, 3}, {1, 2, 2}),
        depthwise("5x5", 1, 33, 1, {1, 9, 9}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}),
        depthwise("7x7", 2, 6, 1, {1, 12, 10}, {1, 7, 7}, {1, 1, 1}, {0, 3, 3}),
        depthwise("9x8", 1, 4, 1, {1, 12, 13}, {1, 9, 8}, {1, 1, 2}, {0, 4, 1}),
        depthwise("4x2, uneven steps", 2, 7, 1, {1, 11, 12}, {1, 4, 2}, {1, 2, 3}, {0, 1, 2}, {1, 1, 2}),
        depthwise("multiplier 2", 2, 18, 2, {1, 8, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("multiplier 5", 1, 3, 5, {1, 6, 9}, {1, 3, 5}, {1, 2, 1}, {0, 1, 2}),
        depthwise("conv1d", 3, 9, 1, {1, 1, 301}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}),
        depthwise("conv1d causal", 2, 35, 1, {1, 1, 40}, {1, 1, 4}, {1, 1, 1}, {0, 0, 3}),
        depthwise("conv3d", 2, 5, 1, {5, 6, 7}, {3, 3, 3}, {2, 1, 1}, {1, 1, 1}, {1, 1, 1}),
        depthwise("conv3d dilated", 1, 4, 2, {6, 5, 8}, {2, 1, 3}, {1, 1, 2}, {2, 0, 1}, {3, 1, 1}),
        depthwise("1x1", 2, 10, 1, {1, 5, 5}, {1, 1, 1}),
        depthwise("one channel", 2, 1, 3, {1, 6, 6}, {1, 3, 3}),
        depthwise("no images", 0, 4, 1, {1, 6, 6}, {1, 3, 3}),
    };
    for (const Case& c : layers::cases())
        if (c.geometry.depthwise()) all.push_back(c);
    return all;
}

struct Memory {
    const Case& layer;
    layers::Tensor x, z, weight; // weight [K, 1, taps]: in NHWC models [K, taps, 1], which is the same
    Guarded<float> d;
    std::unique_ptr<Guarded<unsigned char>> workspace;
    DepthwiseProblem problem;
    Kind weight_kind;
    Target weight_target, d_target;

    Memory(const Case& c, Kind x_kind, Kind z_kind, Kind weight_kind_, Layout layout, Flush flush)
        : layer(c),
          x(layers::input(c), x_kind, layout, flush, 1),
          z(layers::output(c), z_kind, layout, flush, 2),
          weight({c.geometry.out_channels, 1, c.geometry.kernel[0], c.geometry.kernel[1], c.geometry.kernel[2]}, weight_kind_,
                 layout, flush, 3),
          d(static_cast<size_t>(c.geometry.out_channels * c.geometry.taps()), flush),
          weight_kind(weight_kind_) {
        const Geometry& g = c.geometry;
        problem = {g, {x.data(), x_kind, x.strides()}, {z.data(), z_kind, z.strides()}};
        const Strides& w = weight.strides();
        weight_target = {weight.data(), element(weight_kind), w.batch, w.channel, {w.space[0], w.space[1], w.space[2]}};
        d_target = {d.data(), Element::f32, g.taps(), g.taps(), {g.kernel[1] * g.kernel[2], g.kernel[2], 1}};
    }

    void make_workspace(const DepthwiseConfig& config) { workspace = new_workspace(workspace_bytes(config)); }
    bool intact() const { return x.intact() && z.intact() && weight.intact() && d.intact() && workspace->intact(); }
    std::vector<float> floats() const { return weight.floats(); }
    void set_weight(const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); ++i) weight.set(i, values[i]);
    }
    std::vector<double> oracle() const { return layers::correlation(layer.geometry, x, z); }
};

bool walks(const DepthwiseConfig& config) { return kDepthwiseVariants[config.kernel].walk.rows > 0; }

// Another number of splits than the chosen one, in 1 to 6 blocks.
void split(DepthwiseConfig& config, int splits) {
    config.splits = splits;
    config.split_tiles = std::max(1, static_cast<int>(ceil_div(config.tiles, splits)));
    config.blocks = std::clamp(config.slices * config.tap_chunks * splits, 1, 6);
}

// Another tile, and another chunk of taps.
void use_kernel(DepthwiseConfig& config, const Geometry& g, int kernel, int rows, int columns) {
    const DepthwiseVariant& v = kDepthwiseVariants[kernel];
    config.kernel = kernel;
    config.chunk_rows = v.rows;
    config.chunk_columns = v.columns;
    config.tap_chunks = static_cast<int>(g.kernel[0] * ceil_div(g.kernel[1], v.rows) * ceil_div(g.kernel[2], v.columns));
    config.tile_rows = rows;
    config.tile_columns = columns;
    config.tiles = static_cast<int>(g.batch * g.output[0] * ceil_div(g.output[1], rows) * ceil_div(g.output[2], columns));
    config.shared_bytes = shared_bytes(config, v.walk, g);
}

void run_case(Memory& m, DepthwiseConfig config, unsigned seed) {
    use(seed, true);
    const std::string what = std::string(m.layer.name) + " " + kind_name(m.problem.x.kind) + "/" + kind_name(m.problem.z.kind) +
                             ": " + config.text();
    check_launches(m, config, m.oracle(), seed, what);
}

void test_cases() {
    const Kind kinds[] = {Kind::f32, Kind::f16, Kind::bf16};
    unsigned seed = 1;
    for (const Case& c : cases())
        for (const Layout layout : {Layout::nchw, Layout::nhwc, Layout::sliced}) {
            // Each case and layout in another mixture of dtypes and another number of splits.
            Memory m(c, kinds[seed % 3], kinds[seed / 2 % 3], kinds[seed / 3 % 3], layout,
                     seed % 2 ? Flush::begin : Flush::end);
            CHECK(unsupported(m.problem) == nullptr);
            DepthwiseConfig config = get_best_config(m.problem, kChip);
            CHECK_THAT(config.tile_rows > 0 && config.shared_bytes <= kSharedBytes, config.text());
            if (seed % 4) split(config, static_cast<int>(seed % 4 == 3 ? 11 : seed % 4));
            run_case(m, config, seed++);
        }
}

// Chunks are chosen by the kernel's size; every one of them has to have run, on whole and on partial chunks and tiles.
void test_every_kernel() {
    for (const Triple& kernel : {Triple{1, 3, 3}, Triple{1, 8, 4}})
        for (int i = 0; i < kDepthwiseKernels && kDepthwiseVariants[i].walk.rows == 0; ++i)
            for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
                const Case c = depthwise("every kernel", 2, 20, 1, {1, 12, 11}, kernel, {1, 1, 1}, {0, 1, 1});
                Memory m(c, Kind::f32, Kind::bf16, Kind::f32, layout, Flush::end);
                DepthwiseConfig config = get_best_config(m.problem, kChip);
                CHECK(config.x_gather == (layout == Layout::nhwc ? Gather::channels4 : Gather::positions));
                use_kernel(config, c.geometry, i, 3, 4);
                split(config, 4);
                run_case(m, config, static_cast<unsigned>(i + 1));
            }
}

// Tiles of whole and partial runs and rows, padding beyond what a tap reads, lanes without channels; more tiles than walkers.
void test_walkers() {
    const Case layers[] = {
        depthwise("no padding", 2, 34, 1, {1, 10, 13}, {1, 3, 3}),
        depthwise("padding 1", 3, 36, 1, {1, 9, 31}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("padding 2", 1, 64, 1, {1, 7, 33}, {1, 3, 3}, {1, 1, 1}, {0, 2, 2}),
        depthwise("padding 4 and 0", 1, 2, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 4, 0}),
        depthwise("padding 1 and 5", 1, 2, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 5}),
        depthwise("one column", 2, 6, 1, {1, 5, 1}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("many tiles", 5, 4, 1, {1, 35, 17}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}),
        depthwise("stride 2", 3, 40, 1, {1, 15, 30}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}),
        depthwise("stride 2, no padding", 2, 32, 1, {1, 8, 12}, {1, 3, 3}, {1, 2, 2}),
        depthwise("stride 2, padding 2", 1, 6, 1, {1, 11, 63}, {1, 3, 3}, {1, 2, 2}, {0, 2, 2}),
        depthwise("stride 2, padding 0 and 4", 1, 6, 1, {1, 9, 8}, {1, 3, 3}, {1, 2, 2}, {0, 0, 4}),
    };
    unsigned seed = 1;
    for (const Case& c : layers)
        for (const Kind kind : {Kind::f16, Kind::bf16, Kind::f32}) {
            Memory m(c, kind, kind, Kind::f32, Layout::nhwc, seed % 2 ? Flush::begin : Flush::end);
            DepthwiseConfig config = get_best_config(m.problem, kChip);
            const Walk& walk = kDepthwiseVariants[config.kernel].walk;
            CHECK_THAT(walks(config) && walk.kind == kind && walk.stride == c.geometry.stride[2], config.text());
            CHECK_THAT(config.tile_columns >= std::min<int64_t>(14, c.geometry.output[2]), config.text());
            run_case(m, config, seed++);
            // Runs that end in columns of their own.
            config.tile_columns = 5;
            config.tiles = static_cast<int>(c.geometry.batch * ceil_div(c.geometry.output[1], config.tile_rows) *
                                            ceil_div(c.geometry.output[2], 5));
            split(config, static_cast<int>(seed % 3 + 1));
            run_case(m, config, seed);
        }
}

void test_what_cannot_walk() {
    const auto takes = [](const Case& c, Layout layout, Kind x, Kind z, int64_t offset = 0) {
        Memory m(c, x, z, Kind::f32, layout, Flush::end);
        m.problem.x.data = static_cast<const char*>(m.problem.x.data) + offset;
        return walks(get_best_config(m.problem, kChip));
    };
    const Triple plane{1, 8, 8}, taps{1, 3, 3}, one{1, 1, 1}, pad{0, 1, 1};
    const Case plain = depthwise("3x3", 2, 4, 1, plane, taps, one, pad);
    CHECK(takes(plain, Layout::nhwc, Kind::bf16, Kind::bf16));
    CHECK(!takes(plain, Layout::nhwc, Kind::bf16, Kind::f16));
    CHECK(!takes(plain, Layout::nhwc, Kind::bf16, Kind::f32));
    CHECK(!takes(plain, Layout::nhwc, Kind::bf16, Kind::bf16, 2)); // misaligned
    CHECK(takes(plain, Layout::nhwc, Kind::bf16, Kind::bf16, 4));
    CHECK(!takes(plain, Layout::nchw, Kind::bf16, Kind::bf16));
    CHECK(!takes(plain, Layout::sliced, Kind::bf16, Kind::bf16));
    for (const Case& c : {
             depthwise("odd channels", 2, 5, 1, plane, taps, one, pad),
             depthwise("multiplier", 2, 4, 2, plane, taps, one, pad),
             depthwise("dilated", 2, 4, 1, plane, taps, one, pad, {1, 2, 1}),
             depthwise("5x5", 2, 4, 1, plane, {1, 5, 5}, one, pad),
             depthwise("3x2", 2, 4, 1, plane, {1, 3, 2}, one, pad),
             depthwise("uneven stride", 2, 4, 1, plane, taps, {1, 1, 2}, pad),
             depthwise("stride 3", 2, 4, 1, plane, taps, {1, 3, 3}, pad),
             depthwise("conv1d", 2, 4, 1, {1, 1, 8}, {1, 1, 3}, one, {0, 0, 1}),
             depthwise("two planes", 2, 4, 1, {2, 8, 8}, taps, one, pad),
             depthwise("padded planes", 2, 4, 1, plane, taps, {3, 1, 1}, {1, 1, 1}),
         })
        CHECK_THAT(!takes(c, Layout::nhwc, Kind::f32, Kind::f32), c.name);
    // A distance from row to row that 32 bits do not hold.
    DepthwiseProblem far{plain.geometry, {nullptr, Kind::bf16, {64, 1, {0, kMaxInt - 1, 4}}}, {nullptr, Kind::bf16, {}}};
    far.z.strides = {256, 1, {256, 32, 4}};
    CHECK(!walks(get_best_config(far, kChip)));
    far.x.strides.space[1] = 32;
    CHECK(walks(get_best_config(far, kChip)));
}

void test_bad_batches() {
    for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
        use(1, true);
        const Case c = depthwise("3x3", 2, 6, 1, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1});
        Memory m(c, Kind::f32, Kind::f32, Kind::f32, layout, Flush::end);
        check_bad_batches(m, get_best_config(m.problem, kChip), m.z, m.oracle());
    }
}

// What no output reads must not matter, Inf and NaN included: rows or columns 2, 5, 8 and 9. The last tile ends beyond the
// output.
void test_unread_input() {
    for (const bool rows : {true, false})
        for (const Layout layout : {Layout::nchw, Layout::nhwc})
            for (int kernel = 0; kernel < kDepthwiseKernels && kDepthwiseVariants[kernel].walk.rows == 0; ++kernel) {
                const Case c = rows ? depthwise("unread rows", 1, 4, 1, {1, 10, 9}, {1, 2, 2}, {1, 3, 1})
                                    : depthwise("unread columns", 1, 4, 1, {1, 9, 10}, {1, 2, 2}, {1, 1, 3});
                use(3, true);
                Memory m(c, Kind::f32, Kind::f32, Kind::f32, layout, Flush::end);
                const std::vector<double> oracle = m.oracle();
                for (size_t i = 0; i < m.x.size(); ++i) {
                    const size_t line = rows ? i / 9 % 10 : i % 10;
                    if (line % 3 == 2 || line == 9) m.x.set(i, i % 2 ? HUGE_VALF : std::nanf(""));
                }
                DepthwiseConfig config = get_best_config(m.problem, kChip);
                use_kernel(config, c.geometry, kernel, 2, 5);
                split(config, 2);
                m.make_workspace(config);
                CHECK(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess);
                check_d(m.d, oracle, "unread input, " + config.text());
            }
}

// The same of walkers: the last row and column, and the last tile of rows is partial.
void test_unread_by_walkers() {
    for (const Kind kind : {Kind::bf16, Kind::f32}) {
        const Case c = depthwise("unread", 1, 4, 1, {1, 8, 8}, {1, 3, 3}, {1, 2, 2});
        use(3, true);
        Memory m(c, kind, kind, Kind::f32, Layout::nhwc, Flush::end);
        const std::vector<double> oracle = m.oracle();
        for (size_t i = 0; i < m.x.size(); ++i)
            if (i % 8 == 7 || i / 8 % 8 == 7) m.x.set(i, i % 2 ? HUGE_VALF : std::nanf(""));
        const DepthwiseConfig config = get_best_config(m.problem, kChip);
        CHECK(walks(config));
        m.make_workspace(config);
        CHECK(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess);
        check_d(m.d, oracle, "unread input, " + config.text());
    }
}

void test_configurations() {
    // An H100: MobileNetV2's 3x3 over 144 channels at 56x56, batch 64.
    DepthwiseProblem p{};
    p.geometry.batch = 64;
    p.geometry.in_channels = p.geometry.out_channels = p.geometry.groups = 144;
    p.geometry.input = p.geometry.output = {1, 56, 56};
    p.geometry.kernel = {1, 3, 3};
    p.geometry.pad = {0, 1, 1};
    p.x = p.z = {nullptr, Kind::bf16, {56 * 56 * 144, 1, {56 * 56 * 144, 56 * 144, 144}}};
    DepthwiseConfig c = get_best_config(p, chip_of(132, 2));
    std::printf("  %s\n", c.text().c_str());
    CHECK(walks(c) && c.text().find(", walkers, ") != std::string::npos && c.slices == 5);
    CHECK(c.blocks > 200 && c.split_tiles >= kWalkers);
    CHECK(int64_t{c.splits} * c.split_tiles >= c.tiles);
    p.z.kind = Kind::f32; // too unlike to walk
    c = get_best_config(p, chip_of(132, 3));
    std::printf("  %s\n", c.text().c_str());
    CHECK(c.chunk_rows == 3 && c.chunk_columns == 3 && c.tap_chunks == 1 && c.slices == 5 && c.blocks > 2 * 132);
    CHECK(c.x_gather == Gather::channels4 && c.z_gather == Gather::channels4);
    CHECK(int64_t{c.splits} * c.split_tiles >= c.tiles);
    p.geometry.groups = 72;
    CHECK(unsupported(p) != nullptr);
    p.geometry.groups = 144;
    CHECK(unsupported(p) == nullptr);
    p.geometry.batch = 1 << 20;
    CHECK(unsupported(p) != nullptr);
    p.geometry.batch = 1;
    p.z.kind = Kind::f64;
    CHECK(unsupported(p) != nullptr);
}

} // namespace

int main() {
    test_configurations();
    test_every_kernel();
    test_unread_input();
    test_unread_by_walkers();
    test_walkers();
    test_what_cannot_walk();
    test_cases();
    test_bad_batches();
    return test::finish("test_cuda_depthwise");
}
