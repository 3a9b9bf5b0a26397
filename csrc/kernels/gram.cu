#include "gram.cuh"

// Every Gram kernel: size of its square tiles, access to x.
#define LOCALSGD_GRAM_KERNELS(X) \
    X(128, Access::channels4)    \
    X(128, Access::positions4)   \
    X(128, Access::scalar)       \
    X(64, Access::channels4)     \
    X(64, Access::positions4)    \
    X(64, Access::scalar)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(size, access) template __global__ void gram_kernel<size, access>(GramParams);
LOCALSGD_GRAM_KERNELS(LOCALSGD_INSTANTIATE)
} // namespace localsgd::cuda
#else
#include <algorithm>
#include <limits>

#include "gram.h"

namespace localsgd::cuda {
namespace {

struct GramVariant {
    int tile, threads;
    Access access;
    void (*kernel)(GramParams);
};

#define LOCALSGD_VARIANT(size, access) {size, Tile<size, size>::kThreads, access, gram_kernel<size, access>},
constexpr GramVariant kGramVariants[] = {LOCALSGD_GRAM_KERNELS(LOCALSGD_VARIANT)};
#undef LOCALSGD_VARIANT
constexpr double kBarrierClocks = 2500;
constexpr int kGramKernels = kGramSizes * kGramAccesses;
static_assert(sizeof(kGramVariants) / sizeof(kGramVariants[0]) == kGramKernels);

int64_t pitch_of(const Geometry& g) { return ceil_div(g.in_per_group(), 4) * 4; }

// Length of the product's sums: with a bias one more, which takes another quad.
int64_t inner_of(const GramProblem& problem) { return pitch_of(problem.geometry) + (problem.bias ? 4 : 0); }

int64_t triangle(int64_t rows) { return rows * (rows + 1) / 2; }

// What a workspace holds behind its partial tiles, which those of G and then those of D use: floats from there.
struct GramLayout {
    size_t partials, matrix, rounded, sum_partials;
};

GramLayout layout_of(const GramProblem& problem, const GramConfig& c) {
    const Geometry& g = problem.geometry;
    const auto whole = [](int64_t floats) { return static_cast<size_t>(ceil_div(floats, 64) * 64); }; // 256 bytes
    const int64_t units = std::max(int64_t{c.tiles} * c.splits, int64_t{c.product_tiles} * c.product_splits);
    const int64_t columns = g.groups * pitch_of(g);
    return {whole(units * c.tile * c.tile), whole(columns * inner_of(problem)), whole(g.out_channels * inner_of(problem)),
            whole(problem.bias ? columns * c.splits : 0)};
}

// A matrix product split over its summed index, whose length is counted in steps of kStepPositions.
struct Split {
    int64_t tiles, splits, length;
    double clocks;
};

// Clocks of the busiest multiprocessor: as for direct kernels, multiply-adds (128 a clock, of which a good kernel gets 85 %,
// less with few warps), reading `strips` operands from the second-level cache where it is not hidden, partial tiles out and in.
// For comparing configurations, not for promises.
double estimate(const GramVariant& v, const Split& s, double strips, int multiprocessors, int resident) {
    constexpr double kFlopsShare = 0.85, kBytesPerClock = 32, kUnitClocks = 1500;
    const double units = double(s.tiles) * s.splits, area = double(v.tile) * v.tile;
    const double each = std::max<double>(1, ceil_div(s.tiles * s.splits, multiprocessors));
    const double alive = std::min<double>(each, resident);
    const double multiply = double(s.length) * area / 128 / (kFlopsShare * std::min(1.0, alive * v.threads / 256.0));
    const double read = double(s.length) * v.tile * strips * 4 / kBytesPerClock;
    return each * (std::max(multiply, read) + 0.25 * std::min(multiply, read) + kUnitClocks / alive) +
           units * area * 4 * 2 / (kBytesPerClock * multiprocessors);
}

Split best_split(const GramVariant& v, int64_t tiles, int64_t length, double strips, int multiprocessors, int resident) {
    const int64_t steps = ceil_div(length, kStepPositions);
    // One, two or three rounds of blocks at most: further ones only add partial tiles.
    const int64_t rounds = 3 * int64_t{multiprocessors} * resident;
    const int64_t most = std::max<int64_t>(1, std::min(steps, tiles ? ceil_div(rounds, tiles) : 1));
    Split best{tiles, 1, 0, std::numeric_limits<double>::infinity()};
    for (int64_t splits = 1; splits <= most; ++splits) {
        const int64_t split_steps = std::max<int64_t>(1, ceil_div(steps, splits));
        if (splits > 1 && ceil_div(steps, split_steps) != splits) continue; // the last ones would be empty
        Split s{tiles, splits, split_steps * kStepPositions, 0};
        s.clocks = estimate(v, s, strips, multiprocessors, resident);
        if (s.clocks < best.clocks) best = s;
    }
    return best;
}

int sharers_of(int64_t tiles, int64_t splits, const GramConfig& c) {
    const int64_t quads = tiles * c.tile * c.tile / 4, threads = int64_t{c.blocks} * c.threads;
    int sharers = 1;
    while (sharers < 16 && sharers * 2 <= splits && quads * sharers * 2 <= threads) sharers *= 2;
    return sharers;
}

TileGrid tile_grid(int64_t groups, int64_t tiles_m, int64_t tiles_n, int splits, int split_positions, int sharers) {
    TileGrid grid{};
    grid.groups = static_cast<int>(groups);
    grid.tiles_m = static_cast<int>(tiles_m);
    grid.tiles_n = static_cast<int>(tiles_n);
    grid.splits = splits;
    grid.split_positions = split_positions;
    grid.units = static_cast<int>(groups * tiles_m * tiles_n * splits);
    grid.sharers = sharers;
    grid.by_splits = fast_div(splits);
    grid.by_tiles_n = fast_div(std::max<int64_t>(1, tiles_n));
    grid.by_tiles_m = fast_div(std::max<int64_t>(1, tiles_m));
    return grid;
}

// The forward casts parameters to its compute dtype, which is z's wherever that is lower (autocast).
Element rounding_of(Kind parameter, Kind z) { return kind_size(z) < kind_size(parameter) ? element_of(z) : Element::f32; }

GramParams params_of(const GramProblem& problem, const GramConfig& c, const Target& target, void* workspace) {
    const Geometry& g = problem.geometry;
    const int64_t rows = ceil_div(g.in_per_group(), c.tile);
    GramParams p{};
    p.x = patches_of(problem.x, g);
    p.z.columns = static_cast<int>(g.out_per_group());
    p.gram = tile_grid(g.groups, 1, triangle(rows), c.splits, c.split_positions, c.sharers);
    p.product = tile_grid(g.groups, ceil_div(g.out_per_group(), c.tile), rows, c.product_splits, c.product_split_channels,
                          c.product_sharers);
    p.pitch = static_cast<int>(pitch_of(g));
    p.inner = static_cast<int>(inner_of(problem));
    p.by_pitch = fast_div(std::max(1, p.pitch));
    p.by_inner = fast_div(std::max(1, p.inner));
    p.weight = problem.weight;
    p.weight_element = element_of(problem.weight_kind);
    p.weight_out_stride = problem.weight_out_stride;
    p.weight_channel_stride = problem.weight_channel_stride;
    p.bias = problem.bias;
    p.bias_element = element_of(problem.bias_kind);
    p.weight_rounding = rounding_of(problem.weight_kind, problem.z_kind);
    p.bias_rounding = rounding_of(problem.bias_kind, problem.z_kind);
    p.workspace = lay_out(workspace, static_cast<size_t>(c.blocks));
    const GramLayout layout = layout_of(problem, c);
    p.gram_matrix = p.workspace.partials + layout.partials;
    p.rounded = p.gram_matrix + layout.matrix;
    p.sum_partials = p.rounded + layout.rounded;
    p.target = target;
    return p;
}

cudaError_t run(const GramParams& params, const GramConfig& c, GramPhase last, cudaStream_t stream) {
    GramParams p = params;
    for (int phase = kGramTiles; phase <= last; ++phase) {
        p.first = static_cast<GramPhase>(phase);
        p.last = c.cooperative ? last : p.first;
        const cudaError_t error =
            launch(kGramVariants[c.kernel].kernel, dim3(c.blocks), dim3(c.threads), 0, c.cooperative, stream, p);
        if (error != cudaSuccess || c.cooperative) return error;
    }
    return cudaSuccess;
}

} // namespace

std::string GramConfig::text() const {
    const auto number = [](int n) { return std::to_string(n); };
    return "gram ffma " + number(tile) + "x" + number(tile) + ", x by " + access_name(access) + ", " + number(tiles) +
           " tiles, " + number(splits) + " splits of " + number(split_positions) + " positions; product " +
           number(product_tiles) + " tiles, " + number(product_splits) + " splits of " + number(product_split_channels) +
           " channels; " + number(blocks) + " blocks of " + number(threads) +
           (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(GramChip& chip) {
    int device = 0, cooperative = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    chip.cooperative = cooperative != 0;
    for (int i = 0; i < kGramKernels && error == cudaSuccess; ++i)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&chip.blocks[i], kGramVariants[i].kernel,
                                                              kGramVariants[i].threads, 0);
    return error;
}

const char* unsupported(const GramProblem& problem) {
    const Geometry& g = problem.geometry;
    if (!g.pointwise()) return "a kernel of more than one tap";
    for (const Kind kind : {problem.x.kind, problem.weight_kind, problem.z_kind, problem.bias ? problem.bias_kind : Kind::f32})
        if (kind == Kind::f64) return "float64 operands";
    if (g.positions() > kMaxPositions) return "more than 2^31 - 2^20 output positions";
    if (g.in_channels > kMaxInt / 8 || g.out_channels > kMaxInt / 8) return "more than 2^28 channels";
    if (g.out_channels * inner_of(problem) > kMaxInt) return "more than 2^31 weights";
    if (g.groups * pitch_of(g) * inner_of(problem) > kMaxInt) return "a Gram matrix of more than 2^31 elements";
    if (!fits(problem.x, g)) return "an image of x that spans more than 2^31 elements";
    return nullptr;
}

GramConfig get_best_config(const GramProblem& problem, const GramChip& chip) {
    const Geometry& g = problem.geometry;
    const auto [x_geometry, x_strides] = collapse(g, problem.x.strides);
    const Access access = access_of(problem.x, x_geometry, x_strides);
    const int multiprocessors = std::max(1, chip.multiprocessors);
    GramConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kGramKernels; ++i) {
        const GramVariant& v = kGramVariants[i];
        if (v.access != access) continue;
        const int64_t rows = ceil_div(g.in_per_group(), v.tile);
        const int resident = std::max(1, chip.blocks[i]);
        // On the diagonal a tile reads one strip, elsewhere two.
        const double strips = rows ? 2 - double(rows) / double(triangle(rows)) : 1;
        const Split gram = best_split(v, g.groups * triangle(rows), g.positions(), strips, multiprocessors, resident);
        const Split product = best_split(v, g.groups * ceil_div(g.out_per_group(), v.tile) * rows, inner_of(problem), 2,
                                         multiprocessors, resident);
        if (gram.clocks + product.clocks >= best.estimated_clocks) continue;
        best.estimated_clocks = gram.clocks + product.clocks;
        best.kernel = i;
        best.tile = v.tile;
        best.threads = v.threads;
        best.access = access;
        best.tiles = static_cast<int>(gram.tiles);
        best.splits = static_cast<int>(gram.splits);
        best.split_positions = static_cast<int>(gram.length);
        best.product_tiles = static_cast<int>(product.tiles);
        best.product_splits = static_cast<int>(product.splits);
        best.product_split_channels = static_cast<int>(product.length);
        const int64_t units = std::max(gram.tiles * gram.splits, product.tiles * product.splits);
        best.blocks = static_cast<int>(std::clamp<int64_t>(units, 1, int64_t{multiprocessors} * resident));
    }
    best.estimated_clocks += 4 * kBarrierClocks;
    best.cooperative = chip.cooperative;
    best.sharers = sharers_of(best.tiles, best.splits, best);
    best.product_sharers = sharers_of(best.product_tiles, best.product_splits, best);
    return best;
}

size_t workspace_bytes(const GramProblem& problem, const GramConfig& config) {
    const GramLayout l = layout_of(problem, config);
    return layout_bytes(static_cast<size_t>(config.blocks), l.partials + l.matrix + l.rounded + l.sum_partials);
}

cudaError_t correlate(const GramProblem& problem, const GramConfig& config, const Target& target, void* workspace,
                      cudaStream_t stream) {
    GramParams p = params_of(problem, config, target, workspace);
    p.to_target = true;
    return run(p, config, kGramReduce, stream);
}

cudaError_t correlate_and_update(const GramProblem& problem, const GramConfig& config, const Target& target, const Step& step,
                                 void* workspace, cudaStream_t stream) {
    GramParams p = params_of(problem, config, target, workspace);
    p.step = step;
    return run(p, config, kGramWrite, stream);
}

} // namespace localsgd::cuda
#endif
