// The Gram kernels on the emulated GPU against fp64 loops.
#include "../../csrc/kernels/gram.cu"

#include <memory>

#include "check.h"
#include "emulation/guarded.h"
#include "layers.h"

namespace {

using namespace localsgd;
using namespace localsgd::cuda;
using emulation::Flush;
using emulation::Guarded;
using layers::Case;
using layers::Layout;

GramChip chip_of(int multiprocessors, int small, int large) {
    GramChip chip{multiprocessors, true, {}};
    for (int i = 0; i < kGramKernels; ++i) chip.blocks[i] = kGramVariants[i].tile == 64 ? small : large;
    return chip;
}
const GramChip kChip = chip_of(3, 2, 2);

void use(unsigned seed, bool cooperative) {
    emulation::options().seed = seed;
    emulation::options().multiprocessors = 3;
    emulation::options().blocks_per_multiprocessor = 2;
    emulation::options().cooperative = cooperative;
}

std::vector<Case> cases() {
    using layers::layer;
    std::vector<Case> all{
        layer("1x1 stride 2, padded", 2, 5, 9, {1, 7, 6}, {1, 1, 1}, {1, 2, 2}, {0, 1, 2}),
        layer("1x1 stride 3, quads", 3, 8, 12, {1, 9, 9}, {1, 1, 1}, {1, 3, 3}),
        layer("grouped", 2, 15, 21, {1, 5, 5}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 3),
        layer("grouped, quads, two tiles", 1, 136, 24, {1, 4, 6}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 2),
        layer("three strips", 1, 130, 65, {1, 3, 7}, {1, 1, 1}),
        layer("five strips, quads", 1, 260, 8, {1, 2, 6}, {1, 1, 1}),
        layer("one position", 1, 66, 3, {1, 1, 1}, {1, 1, 1}),
        layer("conv1d", 4, 7, 5, {1, 1, 33}, {1, 1, 1}, {1, 1, 2}),
        layer("strided 1x1x1 conv3d", 2, 4, 6, {3, 4, 5}, {1, 1, 1}, {2, 2, 1}),
        layer("no images", 0, 3, 4, {1, 5, 5}, {1, 1, 1}),
        layer("no output channels", 2, 3, 0, {1, 5, 5}, {1, 1, 1}),
    };
    for (const Case& c : layers::cases())
        if (c.geometry.pointwise()) all.push_back(c);
    return all;
}

float rounded_to(Kind kind, Kind own, double value) {
    if (kind_size(kind) >= kind_size(own)) return static_cast<float>(value);
    Half half;
    BFloat16 bfloat;
    store(half, value);
    store(bfloat, value);
    return kind == Kind::f16 ? to_float(half) : to_float(bfloat);
}

Element element(Kind kind) { return kind == Kind::f32 ? Element::f32 : kind == Kind::bf16 ? Element::bf16 : Element::f16; }

// A launch's device memory. Buffers lie against unmapped pages and are poisoned; the workspace is, but for its header.
struct Memory {
    const Case& layer;
    layers::Tensor x, weight, bias;
    Guarded<float> d;
    std::unique_ptr<Guarded<unsigned char>> workspace;
    GramProblem problem;
    Kind weight_kind, z_kind;
    Target weight_target, d_target;

    Memory(const Case& c, Kind x_kind, Kind weight_kind_, Kind z_kind_, Layout layout, bool has_bias, Flush flush)
        : layer(c),
          x(layers::input(c), x_kind, layout, flush, 1),
          weight({c.geometry.out_channels, c.geometry.patch(), 1, 1, 1}, weight_kind_, layout, flush, 2),
          bias({c.geometry.out_channels, 1, 1, 1, 1}, weight_kind_, Layout::nchw, flush, 3),
          d(static_cast<size_t>(c.geometry.out_channels * c.geometry.patch()), flush),
          weight_kind(weight_kind_),
          z_kind(z_kind_) {
        const Strides& w = weight.strides();
        problem = {c.geometry, {x.data(), x_kind, x.strides()},  weight.data(), weight_kind, w.batch,
                   w.channel,  has_bias ? bias.data() : nullptr, weight_kind,   z_kind};
        weight_target = {weight.data(), element(weight_kind), w.batch, w.channel, {0, 0, 0}};
        d_target = {d.data(), Element::f32, c.geometry.patch(), 1, {0, 0, 0}};
    }

    void make_workspace(const GramConfig& config) {
        workspace = std::make_unique<Guarded<unsigned char>>(workspace_bytes(problem, config));
        std::memset(workspace->data(), 0, kWorkspaceHeader);
    }

    bool intact() const {
        return x.intact() && weight.intact() && bias.intact() && d.intact() && (!workspace || workspace->intact());
    }

    void set_weight(const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); ++i) weight.set(i, values[i]);
    }

    // D[k, c] = sum over positions of z[k] x[c], z = W x + b with W and b as the forward rounded them, in fp64.
    std::vector<double> oracle() const {
        const Geometry& g = layer.geometry;
        const int64_t in = g.in_per_group(), out = g.out_per_group();
        const std::vector<float> w = weight.floats(), b = bias.floats();
        std::vector<double> sum(static_cast<size_t>(g.out_channels * in), 0.0), at(static_cast<size_t>(in));
        for (int64_t n = 0; n < g.batch; ++n)
            for (int64_t p = 0; p < g.image_positions(); ++p) {
                const Triple q{p / (g.output[1] * g.output[2]), p / g.output[2] % g.output[1], p % g.output[2]};
                Triple i;
                bool valid = true;
                for (int a = 0; a < 3; ++a) {
                    i[a] = q[a] * g.stride[a] - g.pad[a];
                    valid = valid && i[a] >= 0 && i[a] < g.input[a];
                }
                if (!valid) continue; // x = 0
                for (int64_t group = 0; group < g.groups; ++group) {
                    for (int64_t c = 0; c < in; ++c) at[c] = x.at(x.index(n, group * in + c, i));
                    for (int64_t k = group * out; k < (group + 1) * out; ++k) {
                        double z = problem.bias ? rounded_to(z_kind, weight_kind, b[k]) : 0.0;
                        for (int64_t c = 0; c < in; ++c) z += at[c] * rounded_to(z_kind, weight_kind, w[k * in + c]);
                        for (int64_t c = 0; c < in; ++c) sum[k * in + c] += z * at[c];
                    }
                }
            }
        return sum;
    }
};

double norm_of(const std::vector<double>& values) {
    double squares = 0;
    for (const double v : values) squares += v * v;
    return std::sqrt(squares);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// fp32 sums of fp32 products, twice one after the other: rounding errors grow as a random walk.
constexpr double kTolerance = 2e-6;

void check_d(const Memory& m, const std::vector<double>& oracle, const std::string& what) {
    double difference = 0;
    for (size_t i = 0; i < oracle.size(); ++i) difference += (m.d[i] - oracle[i]) * (m.d[i] - oracle[i]);
    const double norm = norm_of(oracle), error = std::sqrt(difference) / (norm > 0 ? norm : 1);
    CHECK_THAT(error <= kTolerance, what + ": error " + std::to_string(error));
}

void check_weight(const Memory& m, const std::vector<float>& before, const std::vector<double>& oracle, double lr,
                  const std::string& what) {
    const std::vector<float> after = m.weight.floats();
    const double norm = norm_of(oracle), ulp = m.weight_kind == Kind::f32   ? 0x1p-24
                                               : m.weight_kind == Kind::f16 ? 0x1p-11
                                                                            : 0x1p-8;
    for (size_t i = 0; i < oracle.size(); ++i) {
        const double expected = before[i] + lr * oracle[i] / norm;
        // Rounded once, to half a unit in the last place; and D's own error.
        if (std::fabs(after[i] - expected) <= 1.01 * ulp * std::max(1e-3, std::fabs(expected)) + 1e-6 * std::fabs(lr)) continue;
        CHECK_THAT(false, what + ": weight " + std::to_string(i) + " is " + std::to_string(after[i]) + ", not " +
                              std::to_string(expected));
        return;
    }
}

// Other numbers of splits than the chosen ones: more than blocks, one, and a last one that is short.
void split(GramConfig& config, const GramProblem& problem, int splits) {
    const Geometry& g = problem.geometry;
    config.splits = splits;
    config.split_positions = static_cast<int>(ceil_div(std::max<int64_t>(1, ceil_div(g.positions(), splits)), 8) * 8);
    config.sharers = splits >= 4 ? 4 : 1;
    config.product_splits = splits % 3 + 1;
    config.product_split_channels = static_cast<int>(ceil_div(ceil_div(inner_of(problem), config.product_splits), 8) * 8);
    config.product_sharers = config.product_splits >= 2 ? 2 : 1;
    config.blocks = std::clamp(std::max(config.tiles * splits, config.product_tiles * config.product_splits), 1, 6);
}

void use_kernel(GramConfig& config, const Geometry& g, int kernel) {
    const GramVariant& v = kGramVariants[kernel];
    config.kernel = kernel;
    config.tile = v.tile;
    config.threads = v.threads;
    config.access = v.access;
    const int64_t rows = ceil_div(g.in_per_group(), v.tile);
    config.tiles = static_cast<int>(g.groups * triangle(rows));
    config.product_tiles = static_cast<int>(g.groups * ceil_div(g.out_per_group(), v.tile) * rows);
}

void run_case(Memory& m, GramConfig config, unsigned seed) {
    const Case& c = m.layer;
    use(seed, true);
    const std::vector<double> oracle = m.oracle();
    const double norm = norm_of(oracle);
    const std::string what = std::string(c.name) + " " + kind_name(m.problem.x.kind) + ": " + config.text();
    m.make_workspace(config);
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact(), what);
    check_d(m, oracle, what);

    // Three times with the workspace as the last launch left it, the last time a launch a phase in another order of blocks and
    // threads; the rate from the host, then from the device.
    const std::vector<float> before = m.weight.floats();
    const float rate = -0.5f;
    std::vector<float> after;
    for (int repeat = 0; repeat < 3; ++repeat) {
        m.set_weight(before);
        Guarded<uint64> skipped(1);
        skipped[0] = 7;
        Step step;
        step.rate.value = 0.25;
        if (repeat) step.rate.device_float = &rate;
        step.skipped = skipped.data();
        config.cooperative = repeat < 2;
        use(seed + 31 * static_cast<unsigned>(repeat), config.cooperative);
        CHECK_THAT(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess,
                   what);
        CHECK_THAT(m.intact() && skipped.intact(), what);
        CHECK_THAT(skipped[0] == (norm > 0 ? 7u : 8u), what);
        if (norm > 0)
            check_weight(m, before, oracle, repeat ? rate : 0.25, what);
        else
            CHECK_THAT(same_bits(before, m.weight.floats()), what);
        if (repeat == 2) CHECK_THAT(same_bits(after, m.weight.floats()), what + ": other bits in separate launches");
        after = m.weight.floats();
    }
    m.set_weight(before);
    const std::vector<float> d = m.d.values();
    use(seed + 17, false);
    CHECK_THAT(cuda::correlate(m.problem, config, m.d_target, m.workspace->data(), nullptr) == cudaSuccess, what);
    CHECK_THAT(m.intact() && same_bits(d, m.d.values()), what + ": other bits in separate launches");
}

void test_cases() {
    const Kind kinds[] = {Kind::f32, Kind::f16, Kind::bf16};
    unsigned seed = 1;
    for (const Case& c : cases())
        for (const Layout layout : {Layout::nchw, Layout::nhwc, Layout::sliced}) {
            // Each case and layout in another mixture of dtypes and another number of splits.
            Memory m(c, kinds[seed % 3], kinds[seed / 2 % 3], kinds[seed / 3 % 3], layout, seed % 4 != 0,
                     seed % 2 ? Flush::begin : Flush::end);
            CHECK(unsupported(m.problem) == nullptr);
            GramConfig config = get_best_config(m.problem, kChip);
            if (seed % 4) split(config, m.problem, static_cast<int>(seed % 4 == 3 ? 9 : seed % 4));
            run_case(m, config, seed++);
        }
}

// Tiles are chosen by shape; every one of them, with every access, has to have run: here on three and on five strips.
void test_every_kernel() {
    const Case c = layers::layer("every kernel", 2, 268, 140, {1, 2, 6}, {1, 1, 1});
    for (int kernel = 0; kernel < kGramKernels; ++kernel) {
        const Access access = kGramVariants[kernel].access;
        Memory m(c, Kind::f32, Kind::f32, Kind::bf16, access == Access::positions4 ? Layout::nchw : Layout::nhwc, true,
                 Flush::end);
        GramConfig config = get_best_config(m.problem, kChip);
        CHECK(access == Access::scalar || config.access == access);
        use_kernel(config, c.geometry, kernel);
        split(config, m.problem, 2);
        run_case(m, config, static_cast<unsigned>(kernel + 1));
    }
}

// A batch that holds NaN or Inf, or whose correlation is zero, must not move the weight, and the next one must.
void test_bad_batches() {
    const Case c = layers::layer("1x1", 2, 10, 7, {1, 4, 5}, {1, 1, 1});
    for (const float poison : {std::nanf(""), HUGE_VALF, 0.0f}) {
        use(1, true);
        Memory m(c, Kind::f32, Kind::f32, Kind::f32, Layout::nchw, true, Flush::end);
        const GramConfig config = get_best_config(m.problem, kChip);
        m.make_workspace(config);
        Guarded<uint64> skipped(1);
        skipped[0] = 0;
        Step step;
        step.rate.value = 0.1;
        step.skipped = skipped.data();
        const std::vector<float> good = m.x.floats(), before = m.weight.floats();
        if (poison == 0)
            m.x.fill(0);
        else
            m.x.set(m.x.size() / 2, poison);
        CHECK(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess);
        CHECK(skipped[0] == 1);
        CHECK(same_bits(before, m.weight.floats()));
        for (size_t i = 0; i < good.size(); ++i) m.x.set(i, good[i]);
        CHECK(correlate_and_update(m.problem, config, m.weight_target, step, m.workspace->data(), nullptr) == cudaSuccess);
        CHECK(skipped[0] == 1);
        check_weight(
            m, before,
            [&] {
                Memory fresh(c, Kind::f32, Kind::f32, Kind::f32, Layout::nchw, true, Flush::end);
                return fresh.oracle();
            }(),
            0.1, "after a bad batch");
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
    CHECK(int64_t{c.splits} * c.split_positions >= p.geometry.positions() && c.product_split_channels * c.product_splits >= 64);
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
    test_configurations();
    test_every_kernel();
    test_cases();
    test_bad_batches();
    return test::finish("test_cuda_gram");
}
