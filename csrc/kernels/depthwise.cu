#include "depthwise.cuh"

// Every depthwise kernel: rows and columns of the taps that it adds up at once; and those that walk, by element and stride.
#define LOCALSGD_DEPTHWISE_KERNELS(X) X(3, 3) X(5, 5) X(7, 7) X(1, 3) X(1, 7) X(1, 1)
#define LOCALSGD_DEPTHWISE_WALKERS(X) X(f16, 1) X(f16, 2) X(bf16, 1) X(bf16, 2) X(f32, 1) X(f32, 2)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(r, s) template __global__ void depthwise_kernel<r, s>(DepthwiseParams);
LOCALSGD_DEPTHWISE_KERNELS(LOCALSGD_INSTANTIATE)
#define LOCALSGD_INSTANTIATE_WALKER(element, stride) \
    template __global__ void depthwise_walk_kernel<Element::element, stride>(DepthwiseParams);
LOCALSGD_DEPTHWISE_WALKERS(LOCALSGD_INSTANTIATE_WALKER)
} // namespace localsgd::cuda
#else
#include <algorithm>
#include <iterator>
#include <limits>

#include "depthwise_choice.h"
#include "launch.h"

namespace localsgd::cuda {
namespace {

template <Element kElement, int kStride>
constexpr DepthwiseVariant walk_variant(Kind kind) {
    using W = Walker<kElement, kStride>;
    return {3, 3, depthwise_walk_kernel<kElement, kStride>, {W::kRows, W::kInputRows, W::kKept, kind, kStride}};
}

#define LOCALSGD_VARIANT(r, s) {r, s, depthwise_kernel<r, s>, {}},
#define LOCALSGD_WALK_VARIANT(element, stride) walk_variant<Element::element, stride>(Kind::element),
constexpr DepthwiseVariant kDepthwiseVariants[] = {LOCALSGD_DEPTHWISE_KERNELS(LOCALSGD_VARIANT)
                                                       LOCALSGD_DEPTHWISE_WALKERS(LOCALSGD_WALK_VARIANT)};
#undef LOCALSGD_VARIANT
#undef LOCALSGD_WALK_VARIANT
static_assert(sizeof(kDepthwiseVariants) / sizeof(kDepthwiseVariants[0]) == kDepthwiseKernels);

DepthwiseOperand operand_of(const Operand& o, const Triple& size, Gather gather) {
    DepthwiseOperand d{o.data, element_of(o.kind), gather, {}, o.strides.batch, o.strides.channel, {}};
    for (int i = 0; i < 3; ++i) {
        d.size[i] = static_cast<int>(size[i]);
        d.space_stride[i] = o.strides.space[i];
    }
    return d;
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
    const std::string how = kDepthwiseVariants[kernel].walk.rows > 0
                                ? "walkers"
                                : "x by " + std::string(gather_name(x_gather)) + ", z by " + gather_name(z_gather);
    return "depthwise " + number(chunk_rows) + "x" + number(chunk_columns) + " taps, " + number(tap_chunks) + " chunks, " +
           how + ", " + number(tiles) + " tiles of " + number(tile_rows) + " rows x " + number(tile_columns) + " columns, " +
           number(splits) + " splits of " + number(split_tiles) + " tiles, " + number(slices) + " slices, " + number(blocks) +
           " blocks of " + number(kDepthwiseThreads) + (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(DepthwiseChip& chip) {
    cudaError_t error = query_device(chip.multiprocessors, chip.cooperative);
    for (int i = 0; i < kDepthwiseKernels && error == cudaSuccess; ++i) {
        const DepthwiseVariant& v = kDepthwiseVariants[i];
        const size_t bytes = v.walk.rows > 0 ? kWalkSharedBytes : kSharedBytes;
        error = query_blocks(chip.blocks[i], v.kernel, kDepthwiseThreads, static_cast<int>(bytes));
    }
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
    DepthwiseConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    const auto walks = [&](const DepthwiseVariant& v) { return can_walk(problem, v.walk); };
    const bool walk = std::any_of(std::begin(kDepthwiseVariants), std::end(kDepthwiseVariants), walks);
    for (int i = 0; i < kDepthwiseKernels; ++i) {
        const DepthwiseVariant& v = kDepthwiseVariants[i];
        const int64_t resident = std::max(1, chip.blocks[i]);
        base.kernel = i;
        base.chunk_rows = v.rows;
        base.chunk_columns = v.columns;
        if (walk && walks(v))
            choose_walk(best, base, problem, v.walk, multiprocessors, resident);
        else if (!walk && v.walk.rows == 0)
            choose_tiles(best, base, problem, v, multiprocessors, resident);
    }
    const int64_t units = int64_t{best.slices} * best.tap_chunks * best.splits;
    best.blocks = static_cast<int>(std::clamp<int64_t>(units, 1, multiprocessors * std::max(1, chip.blocks[best.kernel])));
    best.shared_bytes = shared_bytes(best, kDepthwiseVariants[best.kernel].walk, g);
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
