// The choice of a Gram kernel and its launch; the kernels of the fp32 core.
#include "gram.cuh"
#include "gram_variants.h"

// Every Gram kernel of that core: size of its square tiles, access to x.
#define LOCALSGD_GRAM_KERNELS(X) \
    X(128, Access::channels4)    \
    X(128, Access::positions4)   \
    X(128, Access::scalar)       \
    X(64, Access::channels4)     \
    X(64, Access::positions4)    \
    X(64, Access::scalar)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(size, access) \
    template __global__ void gram_kernel<Core::ffma, size, access, Core::ffma>(GramParams);
LOCALSGD_GRAM_KERNELS(LOCALSGD_INSTANTIATE)
} // namespace localsgd::cuda
#else
#include "estimate.h"
#include "gram.h"
#include "launch.h"

namespace localsgd::cuda {
namespace {

#define LOCALSGD_VARIANT(size, access)                                                                   \
    gram_variant<Core::ffma, size, access, Core::ffma, GramPaths<Core::ffma, size, access, Core::ffma>>( \
        0, 1 << 30, gram_kernel<Core::ffma, size, access, Core::ffma>),
constexpr GramVariant kGramFfmaVariants[kGramFfmaKernels] = {LOCALSGD_GRAM_KERNELS(LOCALSGD_VARIANT)};
#undef LOCALSGD_VARIANT

const GramVariant& gram_kernel_variant(int kernel) {
    if (kernel < kGramFfmaKernels) return kGramFfmaVariants[kernel];
    kernel -= kGramFfmaKernels;
    if (kernel < kGramBf16Kernels) return kGramBf16Variants[kernel];
    kernel -= kGramBf16Kernels;
    return kernel < kGramF16Kernels ? kGramF16Variants[kernel] : kGramTf32Variants[kernel - kGramF16Kernels];
}

bool runs_on(const GramVariant& v, int compute) { return v.compute <= compute && compute < v.compute_end; }

// Whether a core takes x without rounding it more than the caller allows.
bool allowed(Core core, const GramProblem& p) {
    const auto takes = [&](Kind kind) {
        return p.x.kind == kind || (p.x.kind == Kind::f32 && p.z_kind == kind && p.allow_lower);
    };
    switch (core) {
    case Core::mma_bf16:
        return takes(Kind::bf16);
    case Core::mma_f16:
        return takes(Kind::f16);
    case Core::mma_tf32:
        return p.x.kind == Kind::f32 && p.allow_tf32;
    case Core::ffma:
        return true;
    }
    return false;
}

// Whether a kernel that runs reads x as that lies in memory: by chunks of 16 bytes if possible, which cp.async can copy where
// they are of the type that the matrix units take.
bool reads(const GramVariant& v, const GramProblem& p, int compute) {
    const auto [geometry, strides] = collapse(p.geometry, p.x.strides);
    const bool copied =
        v.core != Core::ffma && p.x.kind == operand_kind(v.core) && compute >= 80 && in_chunks(p.x, geometry, strides);
    return v.access == (copied ? Access::chunks16 : access_of(p.x, geometry, strides));
}

int64_t eights(int64_t n) { return ceil_div(n, 8) * 8; }
int64_t pitch_of(const Geometry& g) { return eights(g.in_per_group()); }
int64_t rows_of(const Geometry& g) { return eights(g.out_per_group()); }

// Length of the product's sums over one pair of parts: with a bias there is more to it than G.
int64_t inner_of(const GramProblem& problem) { return pitch_of(problem.geometry) + (problem.bias ? 8 : 0); }

int64_t triangle(int64_t rows) { return rows * (rows + 1) / 2; }

// Parts of W and G, and how many pairs of them count: see parts.cuh.
struct PartCounts {
    int weight, matrix, pairs;
};

PartCounts parts_of(const GramProblem& p, Core core, Core product) {
    const Kind weight = kind_size(p.z_kind) < kind_size(p.weight_kind) ? p.z_kind : p.weight_kind; // as the forward used it
    switch (product) {
    case Core::mma_bf16:
        if (weight == Kind::bf16) return p.z_kind == Kind::bf16 ? PartCounts{1, 2, 2} : PartCounts{1, 3, 3};
        return {3, 3, 7};
    case Core::mma_tf32:
        if (weight != Kind::f32 || core == Core::mma_tf32) return {1, 2, 2};
        return {2, 2, 3};
    default:
        return {1, 1, 1};
    }
}

int64_t part_size(Core product) { return product == Core::mma_bf16 ? 2 : 4; }

// What a workspace holds behind its partial tiles, which those of G and then those of D use: floats from there.
struct GramLayout {
    size_t partials, matrix, weights, sum_partials;
    size_t floats() const { return partials + matrix + weights + sum_partials; }
};

GramLayout layout_of(const GramProblem& problem, const GramConfig& c) {
    const Geometry& g = problem.geometry;
    const PartCounts parts = parts_of(problem, c.core, c.product);
    const auto whole = [](int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 256) * 64); };
    const int64_t partials = std::max(int64_t{c.tiles} * c.splits * c.tile * c.tile,
                                      int64_t{c.product_tiles} * c.product_splits * c.product_m * c.product_n);
    const int64_t part_bytes = g.groups * inner_of(problem) * part_size(c.product), shares = c.threads / c.tile;
    return {whole(partials * 4), whole(part_bytes * parts.matrix * pitch_of(g)), whole(part_bytes * parts.weight * rows_of(g)),
            whole(problem.bias ? g.groups * pitch_of(g) * c.splits * shares * 4 : 0)};
}

// The forward casts parameters to its compute dtype, which is z's wherever that is lower (autocast).
Element rounding_of(Kind parameter, Kind z) { return kind_size(z) < kind_size(parameter) ? element_of(z) : Element::f32; }

// An operand of the product: channel c of a pair of parts at position pair * inner + c. Pairs run over the parts of W, then of
// G, so that each operand stands still in one of the two dimensions.
Patches parts_patches(const void* data, int parts, const PartCounts& counts, int inner, int columns, bool outer) {
    const int part = inner * columns;
    Patches p{};
    p.data = data;
    p.element = Element::f32;
    p.positions = counts.pairs * inner;
    p.columns = columns;
    p.batch_stride = outer ? part : 0;
    p.group_stride = parts * part;
    p.channel_stride = 1;
    p.space_stride[0] = outer ? 0 : part;
    p.space_stride[2] = columns;
    p.image = fast_div(std::max(1, counts.matrix * inner));
    p.plane = p.row = fast_div(std::max(1, inner));
    p.flat = counts.matrix == 1;
    p.in_place = counts.weight == 1 && (!outer || counts.pairs == 1);
    p.channels_fastest = true;
    p.column_inner = fast_div(std::max(1, columns));
    p.tap_plane = p.tap_row = fast_div(1);
    for (int d = 0; d < 3; ++d) p.stride[d] = p.dilation[d] = p.input[d] = 1;
    p.input[0] = counts.matrix;
    p.input[2] = inner;
    return p;
}

GramParams params_of(const GramProblem& problem, const GramConfig& c, const Target& target, const Scratch& workspace) {
    const Geometry& g = problem.geometry;
    const PartCounts parts = parts_of(problem, c.core, c.product);
    GramParams p{};
    p.x = patches_of(problem.x, g);
    p.gram = tile_grid(g.groups, 1, triangle(ceil_div(g.in_per_group(), c.tile)), c.splits, c.split_positions, c.sharers);
    p.product = tile_grid(g.groups, ceil_div(g.out_per_group(), c.product_m), ceil_div(g.in_per_group(), c.product_n),
                          c.product_splits, c.product_split_length, c.product_sharers);
    p.workspace = lay_out(workspace, static_cast<size_t>(c.blocks));
    const GramLayout layout = layout_of(problem, c);
    float* const matrix = p.workspace.partials + layout.partials;
    float* const weights = matrix + layout.matrix;
    p.matrix_data = matrix;
    p.weights_data = weights;
    p.sum_partials = weights + layout.weights;
    p.outputs = static_cast<int>(g.out_per_group());
    p.rows = static_cast<int>(rows_of(g));
    p.pitch = static_cast<int>(pitch_of(g));
    p.inner = static_cast<int>(inner_of(problem));
    p.weights = parts_patches(weights, parts.weight, parts, p.inner, p.rows, true);
    p.matrix = parts_patches(matrix, parts.matrix, parts, p.inner, p.pitch, false);
    p.weight_parts = parts.weight;
    p.matrix_parts = parts.matrix;
    p.by_pitch = fast_div(std::max(1, p.pitch));
    p.by_row_quads = fast_div(std::max(1, p.rows / 4));
    p.by_inner_octets = fast_div(std::max(1, p.inner / 8));
    p.weight = problem.weight;
    p.weight_element = element_of(problem.weight_kind);
    p.weight_out_stride = problem.weight_out_stride;
    p.weight_channel_stride = problem.weight_channel_stride;
    p.bias = problem.bias;
    p.bias_element = element_of(problem.bias_kind);
    p.weight_rounding = rounding_of(problem.weight_kind, problem.z_kind);
    p.bias_rounding = rounding_of(problem.bias_kind, problem.z_kind);
    p.target = target;
    p.target.in_quads = takes_quads(target, p.x, g);
    return p;
}

cudaError_t run(const GramParams& p, const GramConfig& c, GramPhase last, cudaStream_t stream) {
    const GramVariant& v = gram_kernel_variant(c.kernel);
    return launch_phases(v.kernel, {c.blocks, c.threads, static_cast<size_t>(v.shared_bytes), c.cooperative}, p, kGramTiles,
                         last, stream);
}

// All that follows from the kernel and the problem, without a choice.
GramConfig config_of(const GramProblem& problem, int kernel) {
    const Geometry& g = problem.geometry;
    const GramVariant& v = gram_kernel_variant(kernel);
    GramConfig c;
    c.kernel = kernel;
    c.core = v.core;
    c.tile = v.tile;
    c.threads = v.threads;
    c.access = v.access;
    c.tiles = static_cast<int>(g.groups * triangle(ceil_div(g.in_per_group(), v.tile)));
    c.product = v.product;
    c.product_m = v.product_m;
    c.product_n = v.product_n;
    c.product_pairs = parts_of(problem, v.core, v.product).pairs;
    c.product_tiles =
        static_cast<int>(g.groups * ceil_div(g.out_per_group(), v.product_m) * ceil_div(g.in_per_group(), v.product_n));
    return c;
}

} // namespace

std::string GramConfig::text() const {
    const auto number = [](int n) { return std::to_string(n); };
    return std::string("gram ") + core_name(core) + " " + number(tile) + "x" + number(tile) + ", x by " + access_name(access) +
           ", " + number(tiles) + " tiles, " + number(splits) + " splits of " + number(split_positions) +
           " positions; product " + core_name(product) + " " + number(product_m) + "x" + number(product_n) + ", " +
           number(product_pairs) + " pairs of parts, " + number(product_tiles) + " tiles, " + number(product_splits) +
           " splits of " + number(product_split_length) + "; " + number(blocks) + " blocks of " + number(threads) +
           (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(GramChip& chip) {
    cudaError_t error = query_device(chip.multiprocessors, chip.cooperative);
    if (error == cudaSuccess) error = query_compute(chip.compute, gram_kernel_variant(0).kernel);
    for (int i = 0; i < kGramKernels && error == cudaSuccess; ++i) {
        const GramVariant& v = gram_kernel_variant(i);
        chip.blocks[i] = 0;
        if (runs_on(v, chip.compute)) error = query_blocks(chip.blocks[i], v.kernel, v.threads, v.shared_bytes);
    }
    return error;
}

const char* unsupported(const GramProblem& problem) {
    const Geometry& g = problem.geometry;
    if (!g.pointwise()) return "a kernel of more than one tap";
    for (const Kind kind : {problem.x.kind, problem.weight_kind, problem.z_kind, problem.bias ? problem.bias_kind : Kind::f32})
        if (kind == Kind::f64) return "float64 operands";
    if (g.positions() > kMaxPositions) return "more than 2^31 - 2^20 output positions";
    if (g.in_channels > kMaxInt / 16 || g.out_channels > kMaxInt / 16) return "more than 2^27 channels";
    // In three parts each.
    if (g.groups * rows_of(g) * inner_of(problem) > kMaxInt / 3) return "more than 2^31 / 3 weights";
    if (g.groups * pitch_of(g) * inner_of(problem) > kMaxInt / 3) return "a Gram matrix of more than 2^31 / 3 elements";
    if (!countable(g.groups, g.in_per_group(), g.in_per_group())) return "a Gram matrix of more than 2^33 elements in tiles";
    if (!countable(g.groups, g.out_per_group(), g.in_per_group())) return "a correlation of more than 2^33 elements in tiles";
    if (!fits(problem.x, g)) return "an image of x that spans more than 2^31 elements";
    return nullptr;
}

GramConfig get_best_config(const GramProblem& problem, const GramChip& chip) {
    const Geometry& g = problem.geometry;
    const int multiprocessors = std::max(1, chip.multiprocessors);
    GramConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kGramKernels; ++i) {
        const GramVariant& v = gram_kernel_variant(i);
        if (!runs_on(v, chip.compute) || !allowed(v.core, problem) || !reads(v, problem, chip.compute)) continue;
        GramConfig c = config_of(problem, i);
        const int resident = std::max(1, chip.blocks[i]);
        const int64_t rows = ceil_div(g.in_per_group(), v.tile);
        const double off_diagonal = rows ? 1 - double(rows) / double(triangle(rows)) : 0;
        const MainLoop loop{v.core,   v.tile,       v.tile,          v.threads, v.step_positions, v.access,
                            v.access, off_diagonal, multiprocessors, resident,  chip.compute};
        const Access parts = v.product == Core::ffma ? Access::channels4 : Access::chunks16;
        const MainLoop product_loop{v.product, v.product_m, v.product_n,     v.threads, v.product_step, parts,
                                    parts,     1,           multiprocessors, resident,  chip.compute};
        const Split gram = best_split(loop, c.tiles, g.positions(), 0); // G is put together anyhow
        const Split product = best_split(product_loop, c.product_tiles, c.product_pairs * inner_of(problem), kBarrierClocks);
        c.estimated_clocks = gram.clocks + product.clocks;
        if (c.estimated_clocks >= best.estimated_clocks) continue;
        c.splits = static_cast<int>(gram.splits);
        c.split_positions = static_cast<int>(gram.positions);
        c.product_splits = static_cast<int>(product.splits);
        c.product_split_length = static_cast<int>(product.positions);
        const int64_t units = std::max(gram.units(), product.units());
        c.blocks = static_cast<int>(std::clamp<int64_t>(units, 1, int64_t{multiprocessors} * resident));
        best = c;
    }
    best.estimated_clocks += 3 * kBarrierClocks;
    best.cooperative = chip.cooperative;
    const int64_t threads = int64_t{best.blocks} * best.threads;
    best.sharers = sharers_of(int64_t{best.tile} * best.tile, best.tiles, best.splits, threads);
    best.product_sharers =
        sharers_of(int64_t{best.product_m} * best.product_n, best.product_tiles, best.product_splits, threads);
    return best;
}

size_t workspace_bytes(const GramProblem& problem, const GramConfig& config) {
    return layout_bytes(static_cast<size_t>(config.blocks), layout_of(problem, config).floats());
}

cudaError_t correlate(const GramProblem& problem, const GramConfig& config, const Target& target, const Scratch& workspace,
                      cudaStream_t stream) {
    GramParams p = params_of(problem, config, target, workspace);
    p.to_target = true;
    return run(p, config, kGramReduce, stream);
}

cudaError_t correlate_and_update(const GramProblem& problem, const GramConfig& config, const Target& target, const Step& step,
                                 const Scratch& workspace, cudaStream_t stream) {
    GramParams p = params_of(problem, config, target, workspace);
    p.step = step;
    return run(p, config, kGramWrite, stream);
}

} // namespace localsgd::cuda
#endif
