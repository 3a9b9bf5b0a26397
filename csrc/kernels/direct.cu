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

using Kernel = void (*)(DirectParams);

struct Variant {
    int tile_m, tile_n, threads;
    Access z, x;
    Kernel kernel;
};

#define LOCALSGD_VARIANT(m, n, z, x) {m, n, Tile<m, n>::kThreads, z, x, direct_kernel<Tile<m, n>, z, x>},
constexpr Variant kVariants[] = {LOCALSGD_DIRECT_KERNELS(LOCALSGD_VARIANT)};
static_assert(sizeof(kVariants) / sizeof(kVariants[0]) == kDirectTiles * kDirectAccesses);

// Clocks of the busiest multiprocessor. Counted: multiply-adds (128 a clock, of which a good kernel gets 85 %, less with few
// warps), reading the operands from the second-level cache (32 bytes a clock) where it is not hidden, partial tiles out and in,
// two grid barriers. For comparing configurations, not for promises.
double estimate(const DirectConfig& c, const Chip& chip) {
    constexpr double kFlopsShare = 0.85, kBytesPerClock = 32, kUnitClocks = 1500, kBarrierClocks = 2500;
    const double units = double(c.tiles) * c.splits;
    const double each = std::max(1.0, double((c.tiles * int64_t{c.splits} + chip.multiprocessors - 1) / chip.multiprocessors));
    const double resident = std::min<double>(each, std::max(1, chip.blocks[c.kernel]));
    const double share = kFlopsShare * std::min(1.0, resident * c.threads / 256.0);
    const double multiply = double(c.split_positions) * c.tile_m * c.tile_n / 128 / share;
    const double read = double(c.split_positions) * (c.tile_m + c.tile_n) * 4 / kBytesPerClock;
    const double partials = units * c.tile_m * c.tile_n * 4 * 2 / (kBytesPerClock * chip.multiprocessors);
    return each * (std::max(multiply, read) + 0.25 * std::min(multiply, read) + kUnitClocks / resident) + partials +
           2 * kBarrierClocks;
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
        const cudaError_t error =
            launch(kVariants[c.kernel].kernel, dim3(c.blocks), dim3(c.threads), 0, c.cooperative, stream, p);
        if (error != cudaSuccess || c.cooperative) return error;
    }
    return cudaSuccess;
}

} // namespace

std::string DirectConfig::text() const {
    return "ffma " + std::to_string(tile_m) + "x" + std::to_string(tile_n) + ", z by " + access_name(z_access) + ", x by " +
           access_name(x_access) + ", " + std::to_string(tiles) + " tiles, " + std::to_string(splits) + " splits of " +
           std::to_string(split_positions) + " positions, " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
           (cooperative ? ", one launch" : ", a launch a phase");
}

cudaError_t query_chip(Chip& chip) {
    int device = 0, cooperative = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    chip.cooperative = cooperative != 0;
    for (int i = 0; i < kDirectTiles * kDirectAccesses && error == cudaSuccess; ++i)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&chip.blocks[i], kVariants[i].kernel, kVariants[i].threads, 0);
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
    const int64_t steps = ceil_div(g.positions(), kStepPositions);
    DirectConfig best;
    best.estimated_clocks = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kDirectTiles * kDirectAccesses; ++i) {
        const Variant& v = kVariants[i];
        if (v.z != base.z_access || v.x != base.x_access) continue;
        DirectConfig c = base;
        c.kernel = i;
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
            c.split_positions = static_cast<int>(split_steps * kStepPositions);
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
