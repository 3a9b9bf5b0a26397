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
#include "direct_variants.h"
#include "workspace.h"

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

constexpr int64 kMaxPositions = 0x7fffffff - (1 << 20); // positions just past the end are computed with
constexpr int64 kMaxInt = 0x7fffffff;
constexpr int kSharedUnasked = 48 << 10;  // bytes of dynamic shared memory that any kernel may have
constexpr int64 kMaxOuterInput = 1 << 29; // see kOutside

FastDiv fast_div(int64 by) {
    unsigned shift = 0;
    while ((1ull << shift) < static_cast<uint64>(by)) ++shift;
    const uint64 multiplier = (((1ull << shift) - static_cast<uint64>(by)) << 32) / static_cast<uint64>(by) + 1;
    return {static_cast<unsigned>(by), static_cast<unsigned>(multiplier), shift};
}

// An operand that is read at the positions themselves has as many spatial dimensions as it has gaps between them: one, if
// memory goes on evenly, and then often one image as well. Saves divisions, and lets 4 positions be read at once.
struct Collapsed {
    Geometry geometry;
    Strides strides;
};

Collapsed collapse(const Geometry& geometry, const Strides& strides) {
    Collapsed c{geometry, strides};
    Geometry& g = c.geometry;
    const bool in_place =
        g.pointwise() && product(g.stride) == 1 && product(g.input) == product(g.output) && g.pad == Triple{0, 0, 0};
    if (!in_place) return c;
    int64_t size = 1, step = strides.space[2]; // of the innermost run
    for (int d = 2; d >= 0; --d) {
        if (g.output[d] == 1) continue;
        if (size == 1)
            step = strides.space[d];
        else if (strides.space[d] != size * step)
            return c;
        size *= g.output[d];
    }
    if (size == 1) { // images of one position
        size = g.batch;
        step = strides.batch;
        g.batch = 1;
    } else if (strides.batch == size * step) {
        size *= g.batch;
        g.batch = 1;
    }
    g.input = g.output = {1, 1, size};
    c.strides.space = {0, 0, step};
    return c;
}

Element element_of(Kind kind) { return kind == Kind::f32 ? Element::f32 : kind == Kind::bf16 ? Element::bf16 : Element::f16; }

bool multiple_of_4(int64_t n) { return n % 4 == 0; }

bool aligned(const Operand& o) { return reinterpret_cast<uintptr_t>(o.data) % (4 * kind_size(o.kind)) == 0; }

Access access_of(const Operand& o, const Geometry& g, const Strides& s) {
    if (!aligned(o)) return Access::scalar;
    bool strides = g.batch == 1 || multiple_of_4(s.batch);
    if (g.pointwise() && product(g.stride) == 1 && g.input == g.output && g.output[0] == 1 && g.output[1] == 1 &&
        s.space[2] == 1 && strides && multiple_of_4(s.channel) && multiple_of_4(g.output[2]))
        return Access::positions4;
    for (int d = 0; d < 3; ++d) strides = strides && (g.input[d] == 1 || multiple_of_4(s.space[d]));
    if (s.channel == 1 && multiple_of_4(g.in_per_group()) && strides) return Access::channels4;
    return Access::scalar;
}

// Whether cp.async may copy 16 bytes at a time: whole chunks of one tap's channels, everywhere aligned.
bool in_chunks(const Operand& o, const Geometry& g, const Strides& s) {
    const int64_t width = 16 / kind_size(o.kind);
    if (s.channel != 1 || g.in_per_group() % width != 0 || reinterpret_cast<uintptr_t>(o.data) % 16 != 0) return false;
    if (g.batch > 1 && s.batch % width != 0) return false;
    for (int d = 0; d < 3; ++d)
        if (g.input[d] > 1 && s.space[d] % width != 0) return false;
    return true;
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
bool same_type(Core core, const DirectProblem& p) {
    const Kind kind = core == Core::mma_bf16 ? Kind::bf16 : core == Core::mma_f16 ? Kind::f16 : Kind::f32;
    return p.x.kind == kind && p.z.kind == kind;
}

Patches patches_of(const Operand& o, const Geometry& geometry) {
    const auto [g, s] = collapse(geometry, o.strides);
    Patches p{};
    p.data = o.data;
    p.element = element_of(o.kind);
    p.positions = static_cast<int>(g.positions());
    p.columns = static_cast<int>(g.patch());
    p.batch_stride = s.batch;
    p.group_stride = static_cast<int>(g.in_per_group() * s.channel);
    p.channel_stride = static_cast<int>(s.channel);
    p.image = fast_div(std::max<int64_t>(1, g.image_positions()));
    p.plane = fast_div(std::max<int64_t>(1, g.output[1] * g.output[2]));
    p.row = fast_div(std::max<int64_t>(1, g.output[2]));
    p.flat = g.output[0] == 1 && g.output[1] == 1;
    p.channels_fastest = s.channel == 1 || s.channel <= s.space[2] || g.taps() == 1;
    p.column_inner = fast_div(std::max<int64_t>(1, p.channels_fastest ? g.in_per_group() : g.taps()));
    p.tap_plane = fast_div(std::max<int64_t>(1, g.kernel[1] * g.kernel[2]));
    p.tap_row = fast_div(std::max<int64_t>(1, g.kernel[2]));
    for (int d = 0; d < 3; ++d) {
        p.space_stride[d] = static_cast<int>(s.space[d]);
        p.stride[d] = static_cast<int>(g.stride[d]);
        p.pad[d] = static_cast<int>(g.pad[d]);
        p.dilation[d] = static_cast<int>(g.dilation[d]);
        p.input[d] = static_cast<int>(g.input[d]);
    }
    return p;
}

bool fits(const Operand& o, const Geometry& geometry) {
    const auto [g, s] = collapse(geometry, o.strides);
    int64_t reach = g.in_channels * s.channel;
    for (int d = 0; d < 3; ++d) {
        if (s.space[d] > kMaxInt || g.input[d] > kMaxInt || g.pad[d] > kMaxInt || g.stride[d] > kMaxInt) return false;
        if (g.output[d] * g.stride[d] > kMaxInt) return false;
        reach += (g.kernel[d] - 1) * g.dilation[d] * s.space[d];
    }
    return reach <= kMaxInt && s.channel <= kMaxInt && g.input[0] + g.pad[0] + g.kernel[0] * g.dilation[0] <= kMaxOuterInput;
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

const char* access_name(Access access) {
    switch (access) {
    case Access::scalar:
        return "scalar";
    case Access::channels4:
        return "4 channels";
    case Access::positions4:
        return "4 positions";
    case Access::chunks16:
        return "16 bytes";
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
