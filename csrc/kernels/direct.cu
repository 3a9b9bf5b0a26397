// The choice of a direct kernel and its launch; the kernels of the fp32 core.
#include "direct.cuh"

// Every direct kernel: tile, access to z, access to x. Other pairs of accesses are read by a slower one that also fits.
#define LOCALSGD_DIRECT_ACCESSES(X, m, n)           \
    X(m, n, Access::channels4, Access::channels4)   \
    X(m, n, Access::channels4, Access::scalar)      \
    X(m, n, Access::positions4, Access::positions4) \
    X(m, n, Access::positions4, Access::scalar)     \
    X(m, n, Access::scalar, Access::scalar)
#define LOCALSGD_DIRECT_KERNELS(X)                  \
    LOCALSGD_DIRECT_ACCESSES(X, 128, 128)           \
    LOCALSGD_DIRECT_ACCESSES(X, 64, 128)            \
    LOCALSGD_DIRECT_ACCESSES(X, 128, 64)            \
    LOCALSGD_DIRECT_ACCESSES(X, 64, 64)             \
    X(64, 64, Access::channels4, Access::segments)  \
    X(64, 64, Access::positions4, Access::segments) \
    X(64, 32, Access::channels4, Access::segments)  \
    X(64, 32, Access::positions4, Access::segments)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(m, n, z, x) template __global__ void direct_kernel<Tile<m, n>, z, x>(DirectParams);
LOCALSGD_DIRECT_KERNELS(LOCALSGD_INSTANTIATE)
} // namespace localsgd::cuda
#else
#include "direct.h"
#include "estimate.h"
#include "launch.h"

namespace localsgd::cuda {
namespace {

template <int kM, int kN, Access kZ, Access kX>
constexpr Variant ffma_variant() {
    using T = Tile<kM, kN>;
    int chunks = 0;
    if constexpr (kX == Access::segments) chunks = SegmentedFfma<T, kZ>::kChunks;
    return {Core::ffma, kM, kN, T::kThreads, kStepPositions, 0, 0, kZ, kX, chunks, direct_kernel<T, kZ, kX>};
}
#define LOCALSGD_VARIANT(m, n, z, x) ffma_variant<m, n, z, x>(),
constexpr Variant kFfmaVariants[] = {LOCALSGD_DIRECT_KERNELS(LOCALSGD_VARIANT)};
static_assert(sizeof(kFfmaVariants) / sizeof(kFfmaVariants[0]) == kFfmaKernels);

const Variant& variant(int kernel) {
    if (kernel < kFfmaKernels) return kFfmaVariants[kernel];
    const int bf16 = kernel - kFfmaKernels, f16 = bf16 - kHalfKernels, tf32 = f16 - kHalfKernels;
    return f16 < 0 ? kMmaBf16Variants[bf16] : tf32 < 0 ? kMmaF16Variants[f16] : kMmaTf32Variants[tf32];
}

// Whether a core computes what is asked for without rounding an operand more than the caller allows.
bool allowed(Core core, const DirectProblem& p) {
    const Kind x = p.x.kind, z = p.z.kind;
    const auto holds = [&](Kind kind) {
        return (x == kind || z == kind) && (x == kind || (x == Kind::f32 && p.allow_lower)) &&
               (z == kind || (z == Kind::f32 && p.allow_lower));
    };
    switch (core) {
    case Core::mma_bf16:
        return holds(Kind::bf16);
    case Core::mma_f16:
        return holds(Kind::f16);
    case Core::mma_tf32:
        return p.allow_tf32 || (x != Kind::f32 && z != Kind::f32);
    case Core::ffma:
        return true;
    }
    return false;
}

// What cp.async copies is what the matrix units take.
bool same_type(Core core, const DirectProblem& p) { return p.x.kind == operand_kind(core) && p.z.kind == operand_kind(core); }

DirectParams params_of(const DirectProblem& problem, const DirectConfig& c, const Target& target, const Scratch& workspace) {
    const Variant& v = variant(c.kernel);
    const bool segments = by_segments(c.x_access);
    const Geometry g = segments ? padded_to(v.step_positions, problem.geometry) : problem.geometry;
    DirectParams p{};
    if (segments) p.segments = segments_of(problem.x, problem.geometry, v.step_positions, c.tile_n);
    p.x = patches_of(problem.x, g);
    const Collapsed folded = fold_windows(g, problem.x.strides);
    p.read = patches_of({problem.x.data, problem.x.kind, folded.strides}, folded.geometry);
    Geometry z_geometry = output_geometry(problem.geometry);
    z_geometry.output = g.output; // what pads it lies beyond the input
    p.z = patches_of(problem.z, z_geometry);
    p.grid = tile_grid(g.groups, ceil_div(p.z.columns, c.tile_m), ceil_div(p.x.columns, c.tile_n), c.splits, c.split_positions,
                       c.sharers);
    p.workspace = lay_out(workspace, static_cast<size_t>(c.blocks));
    p.target = target;
    p.target.in_quads = takes_quads(target, p.x, g);
    return p;
}

cudaError_t run(const DirectParams& p, const DirectConfig& c, Phase last, cudaStream_t stream) {
    const Variant& v = variant(c.kernel);
    return launch_phases(v.kernel, {c.blocks, c.threads, static_cast<size_t>(v.shared_bytes), c.cooperative}, p, kCorrelate,
                         last, stream);
}

// Whether a kernel that reads x by segments can: x is what it multiplies or rounds, and z as it reads that.
bool takes_segments(const Variant& v, const DirectProblem& p, Access z_access) {
    const Geometry& g = p.geometry;
    if (p.x.kind != (v.x == Access::segments32 ? Kind::f32 : operand_kind(v.core))) return false;
    if (!in_segments(p.x, g, v.step_positions, v.tile_n, v.chunks)) return false;
    if (v.core != Core::ffma) return p.z.kind == operand_kind(v.core) && in_chunks(p.z, output_geometry(g), p.z.strides);
    return v.z == z_access && (v.z == Access::channels4 || g.output[2] % v.step_positions == 0); // 4 positions: without padding
}

} // namespace

std::string DirectConfig::text() const {
    return std::string(core_name(core)) + " " + std::to_string(tile_m) + "x" + std::to_string(tile_n) + ", z by " +
           access_name(z_access) + ", x by " + access_name(x_access) + ", " + std::to_string(tiles) + " tiles, " +
           std::to_string(splits) + " splits of " + std::to_string(split_positions) + " positions, " + std::to_string(blocks) +
           " blocks of " + std::to_string(threads) + (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(Chip& chip) {
    cudaError_t error = query_device(chip.multiprocessors, chip.cooperative);
    if (error == cudaSuccess) error = query_compute(chip.compute, variant(kFfmaKernels).kernel);
    for (int i = 0; i < kDirectKernels && error == cudaSuccess; ++i) {
        const Variant& v = variant(i);
        chip.blocks[i] = 0;
        if (v.compute <= chip.compute) error = query_blocks(chip.blocks[i], v.kernel, v.threads, v.shared_bytes);
    }
    return error;
}

const char* unsupported(const DirectProblem& problem) {
    const Geometry& g = problem.geometry;
    if (problem.x.kind == Kind::f64 || problem.z.kind == Kind::f64) return "float64 operands";
    if (g.positions() > kMaxPositions) return "more than 2^31 - 2^20 output positions";
    if (g.patch() > kMaxInt / 2 || g.out_per_group() > kMaxInt / 2) return "more than 2^30 rows or columns of the correlation";
    if (!countable(g.groups, g.out_per_group(), g.patch())) return "a correlation of more than 2^33 elements in tiles";
    if (!fits(problem.x, g)) return "an image of x that spans more than 2^31 elements";
    if (!fits(problem.z, output_geometry(g))) return "an image of z that spans more than 2^31 elements";
    return nullptr;
}

DirectConfig get_best_config(const DirectProblem& problem, const Chip& chip) {
    const Geometry& g = problem.geometry;
    const Collapsed folded = fold_windows(g, problem.x.strides);
    const auto [x_geometry, x_strides] = collapse(folded.geometry, folded.strides);
    const auto [z_geometry, z_strides] = collapse(output_geometry(g), problem.z.strides);
    const int multiprocessors = std::max(1, chip.multiprocessors);
    const Access z_access = access_of(problem.z, z_geometry, z_strides);
    Access x_access = access_of(problem.x, x_geometry, x_strides);
    if (z_access == Access::scalar || (x_access != z_access && x_access != Access::scalar)) x_access = Access::scalar;
    // Copying chunks spares instructions, so where it can be done it is.
    const bool chunks =
        chip.compute >= 80 && in_chunks(problem.x, x_geometry, x_strides) && in_chunks(problem.z, z_geometry, z_strides);
    DirectConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kDirectKernels; ++i) {
        const Variant& v = variant(i);
        if (v.compute > chip.compute || !allowed(v.core, problem)) continue;
        int64_t positions = g.positions();
        if (by_segments(v.x)) {
            if (!takes_segments(v, problem, z_access) || x_access != Access::scalar || chunks) continue;
            positions = padded_to(v.step_positions, g).positions();
        } else {
            const bool copied = v.core != Core::ffma && chunks && same_type(v.core, problem);
            if (copied ? v.z != Access::chunks16 : v.z != z_access || v.x != x_access) continue;
        }
        const int resident = std::max(1, chip.blocks[i]);
        const MainLoop loop{v.core, v.tile_m, v.tile_n,        v.threads, v.step_positions, v.z,
                            v.x,    1,        multiprocessors, resident,  chip.compute};
        const int64_t tiles = g.groups * ceil_div(g.out_per_group(), v.tile_m) * ceil_div(g.patch(), v.tile_n);
        const Split split = best_split(loop, tiles, positions, kBarrierClocks);
        if (split.clocks >= best.estimated_clocks) continue;
        best.estimated_clocks = split.clocks;
        best.kernel = i;
        best.core = v.core;
        best.z_access = v.z;
        best.x_access = v.x;
        best.tile_m = v.tile_m;
        best.tile_n = v.tile_n;
        best.threads = v.threads;
        best.tiles = static_cast<int>(tiles);
        best.splits = static_cast<int>(split.splits);
        best.split_positions = static_cast<int>(split.positions);
        best.blocks = static_cast<int>(std::clamp<int64_t>(split.units(), 1, int64_t{multiprocessors} * resident));
    }
    best.estimated_clocks += kBarrierClocks;
    best.cooperative = chip.cooperative;
    best.sharers = sharers_of(best.tile_m * best.tile_n, best.tiles, best.splits, int64_t{best.blocks} * best.threads);
    return best;
}

size_t workspace_bytes(const DirectConfig& c) {
    return layout_bytes(static_cast<size_t>(c.blocks), static_cast<size_t>(c.tiles) * c.splits * c.tile_m * c.tile_n);
}

cudaError_t correlate(const DirectProblem& problem, const DirectConfig& config, const Target& target, const Scratch& workspace,
                      cudaStream_t stream) {
    DirectParams p = params_of(problem, config, target, workspace);
    p.to_target = true;
    return run(p, config, kReduce, stream);
}

cudaError_t correlate_and_update(const DirectProblem& problem, const DirectConfig& config, const Target& target,
                                 const Step& step, const Scratch& workspace, cudaStream_t stream) {
    DirectParams p = params_of(problem, config, target, workspace);
    p.step = step;
    return run(p, config, kWrite, stream);
}

} // namespace localsgd::cuda
#endif
