#include "depthwise.cuh"

// Every depthwise kernel: rows and columns of the taps that it adds up at once.
#define LOCALSGD_DEPTHWISE_KERNELS(X) X(3, 3) X(5, 5) X(7, 7) X(1, 3) X(1, 7) X(1, 1)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(r, s) template __global__ void depthwise_kernel<r, s>(DepthwiseParams);
LOCALSGD_DEPTHWISE_KERNELS(LOCALSGD_INSTANTIATE)
} // namespace localsgd::cuda
#else
#include <algorithm>
#include <limits>

#include "depthwise.h"
#include "launch.h"

namespace localsgd::cuda {
namespace {

struct DepthwiseVariant {
    int rows, columns;
    void (*kernel)(DepthwiseParams);
};

#define LOCALSGD_VARIANT(r, s) {r, s, depthwise_kernel<r, s>},
constexpr DepthwiseVariant kDepthwiseVariants[] = {LOCALSGD_DEPTHWISE_KERNELS(LOCALSGD_VARIANT)};
#undef LOCALSGD_VARIANT
static_assert(sizeof(kDepthwiseVariants) / sizeof(kDepthwiseVariants[0]) == kDepthwiseKernels);

// Shared memory of a block: half of what sm_75 has for a multiprocessor, the least of all, so that while one block loads its
// tile another computes. And positions of x and z that fit.
constexpr size_t kSharedBytes = 32 << 10;
constexpr int64_t kSharedPositions = kSharedBytes / (kPitch * sizeof(float));

// Positions of x that a tile of z reads.
int64_t span(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
    return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

bool quads(const Operand& o, const Geometry& g, const Triple& size) {
    bool strides = o.strides.channel == 1 && multiple_of_4(g.out_channels) && (g.batch <= 1 || multiple_of_4(o.strides.batch));
    for (int d = 0; d < 3; ++d) strides = strides && (size[d] == 1 || multiple_of_4(o.strides.space[d]));
    return strides && aligned(o);
}

Gather gather_of(const Operand& o, const Geometry& g, const Triple& size, bool own_channels) {
    if (own_channels && quads(o, g, size)) return Gather::channels4;
    return o.strides.channel <= o.strides.space[2] ? Gather::channels : Gather::positions;
}

DepthwiseOperand operand_of(const Operand& o, const Triple& size, Gather gather) {
    DepthwiseOperand d{o.data, element_of(o.kind), gather, {}, o.strides.batch, o.strides.channel, {}};
    for (int i = 0; i < 3; ++i) {
        d.size[i] = static_cast<int>(size[i]);
        d.space_stride[i] = o.strides.space[i];
    }
    return d;
}

// Clocks that a tile keeps a multiprocessor busy: its instructions (4 a clock, rows dealt to 8 warps) or its bytes (14 of each
// clock), whichever are more. For comparing configurations, not for promises.
double tile_clocks(const DepthwiseProblem& problem, const DepthwiseVariant& v, int64_t rows, int64_t columns, double loads) {
    const Geometry& g = problem.geometry;
    const int64_t x_rows = span(rows, g.stride[1], v.rows, g.dilation[1]),
                  x_columns = span(columns, g.stride[2], v.columns, g.dilation[2]);
    const bool adjacent = g.stride[2] == 1 && g.dilation[2] == 1;
    const double steps = adjacent ? double(columns + v.columns - 1) : double(columns);
    const double each = v.rows * v.columns + (adjacent ? 2 * v.rows + v.columns : 2 * v.rows * v.columns) + 4;
    const double positions = double(x_rows * x_columns) + double(rows * columns);
    const double issue = 2 * double(ceil_div(rows, kDepthwiseWarps)) * steps * each + positions * loads / 4;
    const double memory = (double(rows * columns) * kSlice * kind_size(problem.z.kind) +
                           double(x_rows * x_columns) * kSlice * kind_size(problem.x.kind)) /
                          14;
    return std::max(issue, memory) + 0.25 * std::min(issue, memory) + 300;
}

struct TileChoice {
    int64_t rows, columns, count;
    double clocks; // of one
};

// Widths and heights that divide the plane evenly; for each width the largest height that shared memory has room for.
TileChoice best_tile(const DepthwiseProblem& problem, const DepthwiseVariant& v, double loads) {
    const Geometry& g = problem.geometry;
    const int64_t height = std::max<int64_t>(1, g.output[1]), width = std::max<int64_t>(1, g.output[2]);
    TileChoice best{0, 0, 0, std::numeric_limits<double>::infinity()};
    for (int64_t widest = std::min(width, kSharedPositions), last = 0; widest > 0; --widest) {
        const int64_t columns = ceil_div(width, ceil_div(width, widest));
        if (columns == last) continue;
        last = columns;
        const int64_t x_columns = span(columns, g.stride[2], v.columns, g.dilation[2]);
        int64_t rows = 0;
        while (rows < height &&
               span(rows + 1, g.stride[1], v.rows, g.dilation[1]) * x_columns + (rows + 1) * columns <= kSharedPositions)
            ++rows;
        if (rows == 0) continue;
        rows = ceil_div(height, ceil_div(height, rows));
        const int64_t count = g.batch * g.output[0] * ceil_div(g.output[1], rows) * ceil_div(g.output[2], columns);
        const double clocks = tile_clocks(problem, v, rows, columns, loads);
        if (best.rows == 0 || double(count) * clocks < double(best.count) * best.clocks) best = {rows, columns, count, clocks};
    }
    return best;
}

size_t shared_bytes(const DepthwiseConfig& c, const Geometry& g) {
    const int64_t tile = span(c.tile_rows, g.stride[1], c.chunk_rows, g.dilation[1]) *
                             span(c.tile_columns, g.stride[2], c.chunk_columns, g.dilation[2]) +
                         int64_t{c.tile_rows} * c.tile_columns;
    // A row of taps of every warp as well, on its way to the partial sums.
    return sizeof(float) * static_cast<size_t>(std::max<int64_t>(tile * kPitch, kDepthwiseWarps * c.chunk_columns * kSlice));
}

DepthwiseParams params_of(const DepthwiseProblem& problem, const DepthwiseConfig& c, const Target& target,
                          const Scratch& workspace) {
    const Geometry& g = problem.geometry;
    DepthwiseParams p{};
    p.x = operand_of(problem.x, g.input, c.x_gather);
    p.z = operand_of(problem.z, g.output, c.z_gather);
    p.out_channels = static_cast<int>(g.out_channels);
    p.multiplier = fast_div(std::max<int64_t>(1, g.out_per_group()));
    for (int d = 0; d < 3; ++d) {
        p.stride[d] = static_cast<int>(g.stride[d]);
        p.pad[d] = static_cast<int>(g.pad[d]);
        p.dilation[d] = static_cast<int>(g.dilation[d]);
        p.kernel[d] = static_cast<int>(g.kernel[d]);
    }
    p.tile_rows = c.tile_rows;
    p.tile_columns = c.tile_columns;
    p.x_rows = static_cast<int>(span(c.tile_rows, g.stride[1], c.chunk_rows, g.dilation[1]));
    p.x_columns = static_cast<int>(span(c.tile_columns, g.stride[2], c.chunk_columns, g.dilation[2]));
    p.by_tile_columns = fast_div(p.tile_columns);
    p.by_x_columns = fast_div(p.x_columns);
    p.tiles = c.tiles;
    p.by_planes = fast_div(std::max<int64_t>(1, g.output[0]));
    p.by_down = fast_div(std::max<int64_t>(1, ceil_div(g.output[1], c.tile_rows)));
    p.by_across = fast_div(std::max<int64_t>(1, ceil_div(g.output[2], c.tile_columns)));
    p.slices = c.slices;
    p.tap_chunks = c.tap_chunks;
    p.splits = c.splits;
    p.split_tiles = c.split_tiles;
    p.units = c.slices * c.tap_chunks * c.splits;
    p.by_splits = fast_div(c.splits);
    p.by_tap_chunks = fast_div(c.tap_chunks);
    const int64_t across = ceil_div(g.kernel[2], c.chunk_columns);
    p.by_chunk_plane = fast_div(across * ceil_div(g.kernel[1], c.chunk_rows));
    p.by_chunk_row = fast_div(across);
    p.workspace = lay_out(workspace, static_cast<size_t>(c.blocks));
    p.target = target;
    return p;
}

cudaError_t run(const DepthwiseParams& p, const DepthwiseConfig& c, Phase last, cudaStream_t stream) {
    return launch_phases(kDepthwiseVariants[c.kernel].kernel, {c.blocks, kDepthwiseThreads, c.shared_bytes, c.cooperative}, p,
                         kCorrelate, last, stream);
}

const char* gather_name(Gather gather) {
    return gather == Gather::channels4 ? "4 channels" : gather == Gather::channels ? "channels" : "positions";
}

} // namespace

std::string DepthwiseConfig::text() const {
    const auto number = [](int64_t n) { return std::to_string(n); };
    return "depthwise " + number(chunk_rows) + "x" + number(chunk_columns) + " taps, " + number(tap_chunks) + " chunks, x by " +
           gather_name(x_gather) + ", z by " + gather_name(z_gather) + ", " + number(tiles) + " tiles of " + number(tile_rows) +
           "x" + number(tile_columns) + ", " + number(splits) + " splits of " + number(split_tiles) + " tiles, " +
           number(slices) + " slices, " + number(blocks) + " blocks of " + number(kDepthwiseThreads) +
           (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(DepthwiseChip& chip) {
    cudaError_t error = query_device(chip.multiprocessors, chip.cooperative);
    for (int i = 0; i < kDepthwiseKernels && error == cudaSuccess; ++i)
        error = query_blocks(chip.blocks[i], kDepthwiseVariants[i].kernel, kDepthwiseThreads, static_cast<int>(kSharedBytes));
    return error;
}

const char* unsupported(const DepthwiseProblem& problem) {
    const Geometry& g = problem.geometry;
    if (g.groups != g.in_channels) return "groups that are not the input channels";
    if (problem.x.kind == Kind::f64 || problem.z.kind == Kind::f64) return "float64 operands";
    if (g.positions() > kMaxPositions) return "more than 2^31 - 2^20 output positions";
    if (g.out_channels * g.taps() > kMaxInt / 64) return "more than 2^25 weights";
    for (int d = 0; d < 3; ++d)
        for (const int64_t reach : {g.input[d], g.pad[d], g.output[d] * g.stride[d], g.kernel[d] * g.dilation[d]})
            if (reach > kMaxOuterInput) return "an input, padding, stride or dilation of more than 2^29";
    return nullptr;
}

DepthwiseConfig get_best_config(const DepthwiseProblem& problem, const DepthwiseChip& chip) {
    const Geometry& g = problem.geometry;
    const int64_t multiprocessors = std::max(1, chip.multiprocessors);
    DepthwiseConfig base;
    base.x_gather = gather_of(problem.x, g, g.input, g.out_per_group() == 1);
    base.z_gather = gather_of(problem.z, g, g.output, true);
    base.slices = static_cast<int>(ceil_div(g.out_channels, kSlice));
    base.cooperative = chip.cooperative;
    const double loads = base.x_gather == Gather::channels4 ? 5 : 12; // instructions for each position and lane
    DepthwiseConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kDepthwiseKernels; ++i) {
        const DepthwiseVariant& v = kDepthwiseVariants[i];
        DepthwiseConfig c = base;
        c.kernel = i;
        c.chunk_rows = v.rows;
        c.chunk_columns = v.columns;
        const int64_t chunks = g.kernel[0] * ceil_div(g.kernel[1], v.rows) * ceil_div(g.kernel[2], v.columns);
        c.tap_chunks = static_cast<int>(chunks);
        const TileChoice tile = best_tile(problem, v, loads);
        if (tile.rows == 0) continue; // its taps are too far apart
        c.tile_rows = static_cast<int>(tile.rows);
        c.tile_columns = static_cast<int>(tile.columns);
        c.tiles = static_cast<int>(tile.count);
        const int64_t places = std::max<int64_t>(1, c.slices * chunks), resident = std::max(1, chip.blocks[i]);
        const int64_t most =
            std::clamp<int64_t>(ceil_div(2 * multiprocessors * resident, places), 1, std::max<int64_t>(1, tile.count));
        for (int64_t splits = 1; splits <= most; ++splits) {
            const int64_t run = std::max<int64_t>(1, ceil_div(tile.count, splits));
            if (splits > 1 && ceil_div(tile.count, run) != splits) continue; // the last ones would be empty
            const double each = double(ceil_div(places * splits, multiprocessors)), alive = std::min(each, double(resident));
            const double partials = double(places * splits) * v.rows * v.columns * kSlice * 8 / (32.0 * multiprocessors);
            c.splits = static_cast<int>(splits);
            c.split_tiles = static_cast<int>(run);
            c.estimated_clocks = each * (double(run) * tile.clocks + 1500 / alive) + partials + 2 * 2500;
            if (c.estimated_clocks < best.estimated_clocks) best = c;
        }
    }
    const int64_t units = int64_t{best.slices} * best.tap_chunks * best.splits;
    best.blocks = static_cast<int>(std::clamp<int64_t>(units, 1, multiprocessors * std::max(1, chip.blocks[best.kernel])));
    best.shared_bytes = shared_bytes(best, g);
    return best;
}

size_t workspace_bytes(const DepthwiseConfig& c) {
    return layout_bytes(static_cast<size_t>(c.blocks),
                        size_t(c.slices) * c.tap_chunks * c.chunk_rows * c.chunk_columns * c.splits * kSlice);
}

cudaError_t correlate(const DepthwiseProblem& problem, const DepthwiseConfig& config, const Target& target,
                      const Scratch& workspace, cudaStream_t stream) {
    DepthwiseParams p = params_of(problem, config, target, workspace);
    p.to_target = true;
    return run(p, config, kReduce, stream);
}

cudaError_t correlate_and_update(const DepthwiseProblem& problem, const DepthwiseConfig& config, const Target& target,
                                 const Step& step, const Scratch& workspace, cudaStream_t stream) {
    DepthwiseParams p = params_of(problem, config, target, workspace);
    p.step = step;
    return run(p, config, kWrite, stream);
}

} // namespace localsgd::cuda
#endif
