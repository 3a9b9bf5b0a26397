// The choice of a direct kernel and its launch; the kernels of the fp32 core.
#include "direct.cuh"

// Every direct kernel: tile, access to z, access to x. Other pairs of accesses are read by a slower one that also fits.
#define LOCALSGD_DIRECT_ACCESSES(X, m, n)           \
    X(m, n, Access::channels4, Access::channels4)   \
    X(m, n, Access::channels4, Access::scalar)      \
    X(m, n, Access::positions4, Access::positions4) \
    X(m, n, Access::positions4, Access::scalar)     \
    X(m, n, Access::scalar, Access::scalar)
#define LOCALSGD_DIRECT_KERNELS(X)        \
    LOCALSGD_DIRECT_ACCESSES(X, 128, 128) \
    LOCALSGD_DIRECT_ACCESSES(X, 64, 128)  \
    LOCALSGD_DIRECT_ACCESSES(X, 128, 64)  \
    LOCALSGD_DIRECT_ACCESSES(X, 64, 64)

#if defined(__CUDACC_RTC__)
namespace localsgd::cuda {
#define LOCALSGD_INSTANTIATE(m, n, z, x) template __global__ void direct_kernel<Tile<m, n>, z, x>(DirectParams);
LOCALSGD_DIRECT_KERNELS(LOCALSGD_INSTANTIATE)
} // namespace localsgd::cuda
#else
#include <algorithm>
#include <limits>

#include "direct.h"

namespace localsgd::cuda {
namespace {

#define LOCALSGD_VARIANT(m, n, z, x) \
    {Core::ffma, m, n, Tile<m, n>::kThreads, kStepPositions, 0, 0, z, x, direct_kernel<Tile<m, n>, z, x>},
constexpr Variant kFfmaVariants[] = {LOCALSGD_DIRECT_KERNELS(LOCALSGD_VARIANT)};
static_assert(sizeof(kFfmaVariants) / sizeof(kFfmaVariants[0]) == kFfmaKernels);

const Variant& variant(int kernel) {
    if (kernel < kFfmaKernels) return kFfmaVariants[kernel];
    const int mma = kernel - kFfmaKernels, which = mma % kMmaKernels;
    return mma < kMmaKernels       ? kMmaBf16Variants[which]
           : mma < 2 * kMmaKernels ? kMmaF16Variants[which]
                                   : kMmaTf32Variants[which];
}

constexpr int kSharedUnasked = 48 << 10; // bytes of dynamic shared memory that any kernel may have

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
bool same_type(Core core, const DirectProblem& p) {
    const Kind kind = core == Core::mma_bf16 ? Kind::bf16 : core == Core::mma_f16 ? Kind::f16 : Kind::f32;
    return p.x.kind == kind && p.z.kind == kind;
}

// Multiply-adds a clock and multiprocessor: of an A100, or of sm_75 for fp16 without cp.async.
double multiplies(Core core, const Chip& chip) {
    if (core == Core::ffma) return 128;
    if (core == Core::mma_tf32) return 512;
    return chip.compute >= 80 ? 1024 : 512;
}

// Clocks of the busiest multiprocessor. Counted: multiply-adds (of which a good kernel gets 85 %, from matrix units 60 %, less
// with few warps), reading the operands from the second-level cache (32 bytes a clock) where it is not hidden, for matrix units
// also the instructions that gather operands (some 16 a load, 128 lanes a clock), partial tiles out and in, two grid barriers.
// For comparing configurations, not for promises.
double estimate(const DirectConfig& c, const Chip& chip) {
    constexpr double kBytesPerClock = 32, kUnitClocks = 1500, kBarrierClocks = 2500, kLoadClocks = 16.0 / 128;
    const double units = double(c.tiles) * c.splits;
    const double each = std::max(1.0, double((c.tiles * int64_t{c.splits} + chip.multiprocessors - 1) / chip.multiprocessors));
    const double resident = std::min<double>(each, std::max(1, chip.blocks[c.kernel]));
    const double share = (c.core == Core::ffma ? 0.85 : 0.6) * std::min(1.0, resident * c.threads / 256.0);
    const double multiply = double(c.split_positions) * c.tile_m * c.tile_n / multiplies(c.core, chip) / share;
    const double element = c.core == Core::mma_bf16 || c.core == Core::mma_f16 ? 2 : 4;
    const double read = double(c.split_positions) * (c.tile_m + c.tile_n) * element / kBytesPerClock;
    const auto width = [&](Access access) {
        return access == Access::scalar ? 1 : access == Access::chunks16 ? 16 / element : 4;
    };
    const double gather =
        c.core == Core::ffma
            ? 0
            : double(c.split_positions) * (c.tile_m / width(c.z_access) + c.tile_n / width(c.x_access)) * kLoadClocks;
    const double partials = units * c.tile_m * c.tile_n * 4 * 2 / (kBytesPerClock * chip.multiprocessors);
    const double most = std::max(std::max(multiply, read), gather), rest = std::min(multiply, std::max(read, gather));
    return each * (most + 0.25 * rest + kUnitClocks / resident) + partials + 2 * kBarrierClocks;
}

const char* core_name(Core core) {
    switch (core) {
    case Core::mma_bf16:
        return "mma_bf16";
    case Core::mma_f16:
        return "mma_f16";
    case Core::mma_tf32:
        return "mma_tf32";
    case Core::ffma:
        return "ffma";
    }
    return "?";
}

DirectParams params_of(const DirectProblem& problem, const DirectConfig& c, const Target& target, void* workspace) {
    const Geometry& g = problem.geometry;
    DirectParams p{};
    p.x = patches_of(problem.x, g);
    p.z = patches_of(problem.z, output_geometry(g));
    p.grid.groups = static_cast<int>(g.groups);
    p.grid.tiles_m = (p.z.columns + c.tile_m - 1) / c.tile_m;
    p.grid.tiles_n = (p.x.columns + c.tile_n - 1) / c.tile_n;
    p.grid.splits = c.splits;
    p.grid.units = c.tiles * c.splits;
    p.grid.split_positions = c.split_positions;
    p.grid.sharers = c.sharers;
    p.grid.by_splits = fast_div(c.splits);
    p.grid.by_tiles_n = fast_div(std::max(1, p.grid.tiles_n));
    p.grid.by_tiles_m = fast_div(std::max(1, p.grid.tiles_m));
    p.workspace = lay_out(workspace, static_cast<size_t>(c.blocks));
    p.target = target;
    return p;
}

cudaError_t run(const DirectParams& params, const DirectConfig& c, Phase last, cudaStream_t stream) {
    DirectParams p = params;
    for (int phase = kCorrelate; phase <= last; ++phase) {
        p.first = static_cast<Phase>(phase);
        p.last = c.cooperative ? last : p.first;
        const cudaError_t error = launch(variant(c.kernel).kernel, dim3(c.blocks), dim3(c.threads),
                                         static_cast<size_t>(variant(c.kernel).shared_bytes), c.cooperative, stream, p);
        if (error != cudaSuccess || c.cooperative) return error;
    }
    return cudaSuccess;
}

} // namespace

std::string DirectConfig::text() const {
    return std::string(core_name(core)) + " " + std::to_string(tile_m) + "x" + std::to_string(tile_n) + ", z by " +
           access_name(z_access) + ", x by " + access_name(x_access) + ", " + std::to_string(tiles) + " tiles, " +
           std::to_string(splits) + " splits of " + std::to_string(split_positions) + " positions, " + std::to_string(blocks) +
           " blocks of " + std::to_string(threads) + (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(Chip& chip) {
    int device = 0, cooperative = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    chip.cooperative = cooperative != 0;
    // Not the device's own capability: where it runs an older architecture's code, that has no newer instructions.
    cudaFuncAttributes attributes = {};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, variant(kFfmaKernels).kernel);
    chip.compute = attributes.ptxVersion;
    for (int i = 0; i < kDirectKernels && error == cudaSuccess; ++i) {
        const Variant& v = variant(i);
        chip.blocks[i] = 0;
        if (v.compute > chip.compute) continue;
        if (v.shared_bytes > kSharedUnasked)
            error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared_bytes);
        if (error == cudaSuccess)
            error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&chip.blocks[i], v.kernel, v.threads,
                                                                  static_cast<size_t>(v.shared_bytes));
    }
    return error;
}

const char* unsupported(const DirectProblem& problem) {
    const Geometry& g = problem.geometry;
    if (problem.x.kind == Kind::f64 || problem.z.kind == Kind::f64) return "float64 operands";
    if (g.positions() > kMaxPositions) return "more than 2^31 - 2^20 output positions";
    if (g.patch() > kMaxInt / 2 || g.out_per_group() > kMaxInt / 2) return "more than 2^30 rows or columns of the correlation";
    if (!fits(problem.x, g)) return "an image of x that spans more than 2^31 elements";
    if (!fits(problem.z, output_geometry(g))) return "an image of z that spans more than 2^31 elements";
    return nullptr;
}

DirectConfig get_best_config(const DirectProblem& problem, const Chip& chip) {
    const Geometry& g = problem.geometry;
    const auto [x_geometry, x_strides] = collapse(g, problem.x.strides);
    const auto [z_geometry, z_strides] = collapse(output_geometry(g), problem.z.strides);
    DirectConfig base;
    base.z_access = access_of(problem.z, z_geometry, z_strides);
    base.x_access = access_of(problem.x, x_geometry, x_strides);
    if (base.z_access == Access::scalar || (base.x_access != base.z_access && base.x_access != Access::scalar))
        base.x_access = Access::scalar;
    base.cooperative = chip.cooperative;
    // Copying chunks spares instructions, so where it can be done it is.
    const bool chunks =
        chip.compute >= 80 && in_chunks(problem.x, x_geometry, x_strides) && in_chunks(problem.z, z_geometry, z_strides);
    DirectConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kDirectKernels; ++i) {
        const Variant& v = variant(i);
        if (v.compute > chip.compute || !allowed(v.core, problem)) continue;
        const bool copied = v.core != Core::ffma && chunks && same_type(v.core, problem);
        if (copied ? v.z != Access::chunks16 : v.z != base.z_access || v.x != base.x_access) continue;
        const int64_t steps = ceil_div(g.positions(), v.step_positions);
        DirectConfig c = base;
        c.kernel = i;
        c.core = v.core;
        c.z_access = v.z;
        c.x_access = v.x;
        c.tile_m = v.tile_m;
        c.tile_n = v.tile_n;
        c.threads = v.threads;
        const int64_t tiles = g.groups * ceil_div(g.out_per_group(), v.tile_m) * ceil_div(g.patch(), v.tile_n);
        const int64_t resident = int64_t{std::max(1, chip.multiprocessors)} * std::max(1, chip.blocks[i]);
        c.tiles = static_cast<int>(tiles);
        // One, two or three rounds of blocks at most: further ones only add partial tiles.
        const int64_t most = std::max<int64_t>(1, std::min(steps, tiles ? ceil_div(3 * resident, tiles) : 1));
        for (int64_t splits = 1; splits <= most; ++splits) {
            const int64_t split_steps = std::max<int64_t>(1, ceil_div(steps, splits));
            if (splits > 1 && ceil_div(steps, split_steps) != splits) continue; // the last ones would be empty
            c.splits = static_cast<int>(splits);
            c.split_positions = static_cast<int>(split_steps * v.step_positions);
            c.estimated_clocks = estimate(c, chip);
            if (c.estimated_clocks < best.estimated_clocks) best = c;
        }
    }
    const int64_t resident = int64_t{std::max(1, chip.multiprocessors)} * std::max(1, chip.blocks[best.kernel]);
    best.blocks = static_cast<int>(std::clamp<int64_t>(int64_t{best.tiles} * best.splits, 1, resident));
    const int64_t quads = int64_t{best.tiles} * best.tile_m * best.tile_n / 4, threads = int64_t{best.blocks} * best.threads;
    while (best.sharers < 16 && best.sharers * 2 <= best.splits && quads * best.sharers * 2 <= threads) best.sharers *= 2;
    return best;
}

size_t workspace_bytes(const DirectConfig& c) {
    return layout_bytes(static_cast<size_t>(c.blocks), static_cast<size_t>(c.tiles) * c.splits * c.tile_m * c.tile_n);
}

cudaError_t correlate(const DirectProblem& problem, const DirectConfig& config, const Target& target, void* workspace,
                      cudaStream_t stream) {
    DirectParams p = params_of(problem, config, target, workspace);
    p.to_target = true;
    return run(p, config, kReduce, stream);
}

cudaError_t correlate_and_update(const DirectProblem& problem, const DirectConfig& config, const Target& target,
                                 const Step& step, void* workspace, cudaStream_t stream) {
    DirectParams p = params_of(problem, config, target, workspace);
    p.step = step;
    return run(p, config, kWrite, stream);
}

} // namespace localsgd::cuda
#endif
