#include "cost.h"

#include <algorithm>
#include <cmath>

#include "depthwise_dots.h"
#include "few_channels.h"
#include "patches.h"
#include "plane_runs.h"
#include "winograd.h"

namespace localsgd::cpu {
namespace {

// One core of a current x86 server, fp32, fitted to `benchmarks/kernels.py --device cpu --threads 1` on one with AVX2, one with
// AVX-512 and one of AMD's with AVX-512 (Zen 4). Only ratios matter for the pick; `localsgd_ext.benchmark` measures instead.
struct Core {
    double blas_flops_per_us;  // a large product by BLAS
    double blas_bytes_per_us;  // its operands, as far as they are not hidden behind it
    double panel_flops_per_us; // by a kernel on packed panels
    // oneDNN's dense convolutions with stride 1 and others, as shares of a product; depthwise ones, which wait for memory.
    double channels_last[2], channels_first[2], pointwise_first; // the last: of kernel size 1, channels first
    double depthwise_cached[2], depthwise_bytes_per_us[2];       // channels_last, channels first
    double cached_bytes;
    double tiny; // how much faster they are where images are tiny
};
constexpr Core kAvx2{88e3, 40e3, 85e3, {0.65, 0.65}, {0.85, 0.85}, 1, {11.5e3, 11.5e3}, {6e3, 6e3}, 16e6, 1};
constexpr Core kAvx512{190e3, 40e3, 178e3, {0.97, 0.7}, {0.9, 0.72}, 0.84, {13.5e3, 5e3}, {8e3, 3e3}, 40e6, 1.3};
constexpr Core kZen4{92e3, 13e3, 101e3, {0.97, 0.7}, {1.0, 0.85}, 0.84, {9e3, 3e3}, {9e3, 1.4e3}, 40e6, 0.9};
bool zen4(const Query& q) { return q.cpu.wide && q.cpu.amd; }
const Core& core(const Query& q) { return !q.cpu.wide ? kAvx2 : zen4(q) ? kZen4 : kAvx512; }

constexpr double kStreamBytesPerUs = 40e3; // operands of oneDNN, mostly hidden behind its products
constexpr double kReadBytesPerUs = 20e3;   // operands of a kernel that waits for them
constexpr double kConvertBytesPerUs = 6e3; // conversions and transposes
constexpr double kRunUs = 6e-3;            // a run of neighbouring elements that packing copies
constexpr double kElementUs = 0.1e-3;      // an element of it
constexpr double kFinishUs = 1.9e-3;       // an element of D, from panels into its place
constexpr double kCallUs = 4;              // one GEMM through ATen

// Minimal filtering: an element of x and z in the frequencies, by layout, and one of the sums from there.
constexpr double kTransformUs[] = {0.3e-3, 0.35e-3}, kBackUs = 0.5e-3;

bool is_wide(const Query& q) { return q.x_kind == Kind::f64 || q.z_kind == Kind::f64; }

double element_bytes(const Query& q) { return is_wide(q) ? 8 : 4; }

double product_us(const Query& q, double flops, double flops_per_us) {
    return flops / (flops_per_us * (is_wide(q) ? 0.5 : 1) * q.threads);
}
double gemm_us(const Query& q, double flops) { return product_us(q, flops, core(q).blas_flops_per_us); }
double panels_us(const Query& q, double flops) { return product_us(q, flops, core(q).panel_flops_per_us); }

// A few threads already use all of the memory's bandwidth.
double memory_us(const Query& q, double bytes, double bytes_per_us) { return bytes / (bytes_per_us * std::min(q.threads, 4)); }

double x_elements(const Query& q) {
    const Geometry& g = q.geometry;
    return double(g.batch * g.in_channels * product(g.input));
}

double z_elements(const Query& q) { return double(q.geometry.positions() * q.geometry.out_channels); }

double operand_bytes(const Query& q) { return x_elements(q) * kind_size(q.x_kind) + z_elements(q) * kind_size(q.z_kind); }

double d_bytes(const Query& q) { return double(q.geometry.out_channels * q.geometry.patch()) * element_bytes(q); }

double wgrad_flops(const Geometry& g) { return 2.0 * g.positions() * g.out_channels * g.patch(); }

// Narrow GEMMs run below the peak.
double narrow(double size) { return 1 + 6 / size; }

bool strided(const Geometry& g) { return product(g.stride) > 1; }

double convert_us(const Query& q, double elements, Kind kind) {
    return kind_size(kind) == element_bytes(q) ? 0 : elements * element_bytes(q) / (4 * kConvertBytesPerUs * q.threads);
}

// Packing the columns (taps, channels) of all groups at all positions into panels, from rows of `width` positions.
double pack_us(const Query& q, double taps, double channels, double width, int64_t stride, Kind kind) {
    const Geometry& g = q.geometry;
    const double runs = double(g.positions() * g.groups) * taps, elements = runs * channels;
    double us = 0;
    if (q.channels_last || g.dims == 0)
        us = runs * kRunUs + elements * kElementUs;
    else if (channels < 8 || stride > 2)
        us = elements * 9 * kElementUs; // one by one
    else
        us = elements * kElementUs * (2 + 20 / width);
    return us / q.threads + convert_us(q, elements, kind);
}

bool reads_in_place(const Query& q) {
    const Geometry& g = q.geometry;
    return g.pointwise() && !strided(g) && product(g.pad) == 0;
}

// Our kernels on AMX's tiles, by the same CPU, and by AVX-512's dot products on AMD's: what a product of whole tiles takes,
// what packing an element of an operand does in either layout, and what an element of D does from panels into its place.
constexpr double kTileFlopsPerUs = 1.35e6, kDotFlopsPerUs = 0.175e6;
constexpr double kPreciseTileFlopsPerUs = 0.65e6; // of W G on tiles, in three parts
constexpr double kTilePackUs[] = {0.22e-3, 0.3e-3}, kTileTapUs = 0.08e-3, kTileReorderUs = 0.6e-3;
constexpr double kTileFinishUs[] = {0.9e-3, 1.5e-3};

bool in_bf16(const Query& q, bool reads_z) {
    return q.cpu.bf16 != Cpu::Bf16::kEmulated && q.x_kind == Kind::bf16 && (!reads_z || q.z_kind == Kind::bf16);
}
bool has_tiles(const Query& q) { return q.cpu.bf16 == Cpu::Bf16::kTiles; }
bool on_tiles(const Query& q, bool reads_z) { return has_tiles(q) && in_bf16(q, reads_z); }

double tiles_us(const Query& q, double flops) {
    return flops / ((has_tiles(q) ? kTileFlopsPerUs : kDotFlopsPerUs) * q.threads);
}

// W G by our own kernel, 256 rows at a time, which threads share out by its columns.
double weighted_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double c = double(g.in_per_group()), strips = std::clamp(std::floor(c / 64), 1.0, double(q.threads));
    return panels_us(q, 2.0 * double(g.out_channels) * c * c) * q.threads / strips +
           kCallUs * double(g.groups * ceil_div(g.out_per_group(), 256));
}

double tiles(double size) { return std::ceil(size / 32) * 32; }

double gram_on_tiles_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double c = double(g.in_per_group()), elements = double(g.positions() * g.in_channels), all = tiles(c);
    const double flops = double(g.positions() * g.groups) * all * (all + 32);
    const bool first = !q.channels_last && g.dims > 0;
    const double product = double(g.out_channels) * c;
    const bool in_thirds = has_tiles(q) && q.z_kind == Kind::bf16;
    const double weighted =
        in_thirds ? 6 * product * all / (kPreciseTileFlopsPerUs * q.threads) : weighted_us(q) / (has_tiles(q) ? 1 : 0.8);
    return tiles_us(q, flops) + weighted + elements * kTilePackUs[first] * (first && strided(g) ? 2 : 1) / q.threads +
           memory_us(q, elements * kind_size(q.x_kind), kReadBytesPerUs) + double(g.groups) * c * c * 1e-3 / q.threads +
           4 * kCallUs;
}

double direct_on_tiles_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double rows = double(g.out_per_group()), patch = double(g.patch()),
                 columns = double(g.positions() * g.groups) * patch;
    const double flops = 2 * double(g.positions() * g.groups) * tiles(rows) * tiles(patch);
    const bool first = !q.channels_last && g.dims > 0;
    const double narrow_runs = g.in_per_group() % 16 == 0 ? 1 : 1 + 4 / double(g.in_per_group());
    // Tasks that share out the columns pack all of z each, and turn all of x.
    const double shared = g.patch() >= kWide ? double(q.threads) : 1;
    double pack = z_elements(q) * kTilePackUs[first] * shared;
    pack += first && g.pointwise() ? columns * kTilePackUs[1] : columns * narrow_runs * kTileTapUs;
    if (first && !g.pointwise()) pack += x_elements(q) * kTileReorderUs * shared;
    const double finish = double(g.out_channels) * patch * kTileFinishUs[first && !g.pointwise()];
    return tiles_us(q, flops) + (pack + finish) / q.threads + memory_us(q, operand_bytes(q), kReadBytesPerUs) + 2 * kCallUs;
}

double gram_us(const Query& q) {
    if (in_bf16(q, false)) return gram_on_tiles_us(q);
    const Geometry& g = q.geometry;
    const double c = double(g.in_per_group()), elements = double(g.positions() * g.in_channels);
    const double transpose = q.channels_last || g.dims == 0 ? 0 : elements * (strided(g) ? 0.3e-3 : 0.15e-3) / q.threads;
    return panels_us(q, elements * (c + 16)) + // panels of 16 on the diagonal
           weighted_us(q) + memory_us(q, elements * kind_size(q.x_kind), kReadBytesPerUs) + convert_us(q, elements, q.x_kind) +
           transpose + 2 * kCallUs;
}

// W += c Z^T X as one product, and the norm from matrices [rows, rows] in double.
double few_rows_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double rows = double(g.positions()), in = double(g.in_channels), out = double(g.out_channels);
    return gemm_us(q, wgrad_flops(g)) + memory_us(q, 2 * d_bytes(q), kStreamBytesPerUs) +
           panels_us(q, 2 * rows * rows * (in + out)) + 5 * kCallUs;
}

// Sums over the columns of z, which is read from memory once, and of copied rows of x.
double few_channels_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double share = g.kernel[2] >= 7 ? 1.1 : 0.75; // of the speed of panels
    return panels_us(q, wgrad_flops(g) / share) + memory_us(q, z_elements(q) * kind_size(q.z_kind), 8e3) +
           convert_us(q, z_elements(q), q.z_kind) + 2 * kCallUs;
}

double direct_us(const Query& q) {
    const Geometry& g = q.geometry;
    if (few_rows(g) && !is_wide(q)) return few_rows_us(q);
    if (in_bf16(q, true)) return direct_on_tiles_us(q);
    if (!q.channels_last && g.in_channels > 1 && has_few_channels(g, q.z_kind, is_wide(q))) return few_channels_us(q);
    const double rows = double(g.out_per_group()), patch = double(g.patch()), image = double(g.image_positions());
    const bool one_run = q.channels_last || g.dims == 0 || g.batch == 1, in_place = reads_in_place(q);
    const bool views = in_place && kind_size(q.x_kind) == element_bytes(q) && kind_size(q.z_kind) == element_bytes(q);
    if (views && rows >= 8 && (one_run || image >= 256)) // by BLAS, where x and z lie
        return gemm_us(q, wgrad_flops(g) * narrow(rows) * narrow(patch)) +
               memory_us(q, operand_bytes(q), core(q).blas_bytes_per_us) +
               (one_run ? 1 : double(g.batch)) * kCallUs * double(g.groups);
    const double blocks = double(ceil_div(g.out_per_group(), 6) * 6 * ceil_div(g.patch(), 16) * 16); // whole ones of D
    const double width = in_place ? image : double(g.output[2]);
    return panels_us(q, 2.0 * double(g.positions() * g.groups) * blocks) +
           pack_us(q, double(g.taps()), double(g.in_per_group()), width, g.stride[2], q.x_kind) +
           pack_us(q, 1, rows, image, 1, q.z_kind) + double(g.out_channels) * patch * kFinishUs / q.threads + 2 * kCallUs;
}

bool fits_a_cache(const Query& q) { return operand_bytes(q) <= core(q).cached_bytes; }
bool tiny(const Geometry& g) { return g.image_positions() < 64; }

double depthwise_us(const Query& q) {
    const Geometry& g = q.geometry;
    // The sums of nine taps fit into registers.
    const double taps = g.taps() > 9 ? double(g.taps()) / 6 : 1;
    double convert = convert_us(q, x_elements(q), q.x_kind) + convert_us(q, z_elements(q), q.z_kind);
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16; // converted in registers, or by dot products
    const bool dots = bf16 && zen4(q) && q.cpu.bf16 == Cpu::Bf16::kDots;
    if (q.channels_last && g.out_per_group() == 1) {
        const bool once = g.kernel[1] <= 3 && g.kernel[2] == 3 && g.dilation[2] == 1 && g.stride[2] <= 2; // read once per row
        const bool pairs = dots && dots_fit_pixels(g);
        const double bytes_per_us = pairs             ? 14e3
                                    : bf16            ? (strided(g) ? 12.5e3 : 9.5e3)
                                    : once            ? 17e3
                                    : fits_a_cache(q) ? 16e3
                                                      : 11e3;
        return taps * memory_us(q, operand_bytes(q), bytes_per_us) + (bf16 ? 0 : convert) + 2 * kCallUs;
    }
    const double x_planes = double(g.batch * g.in_channels * g.input[0]),
                 z_planes = double(g.batch * g.out_channels * g.output[0]);
    const double rows = x_planes * g.input[1] + z_planes * g.output[1];
    // Strips hold 3x3 taps; other kernels are swept row by row.
    const bool strips =
        g.kernel[1] == 3 && g.kernel[2] == 3 && g.stride[1] == g.stride[2] && g.stride[2] <= 2 && g.dilation[1] == 1;
    if (strips && bf16) convert = 0;
    const bool runs = zen4(q) && runs_fit(g) && (dots || (!bf16 && !is_wide(q)));
    const double longer = !zen4(q) ? 1 : runs ? 1.2 : strips && bf16 ? 2.6 : 1.6; // as measured
    const double plane_us = q.cpu.wide && tiny(g) && !runs ? 35e-3 : 20e-3;
    const double short_runs = (z_planes * plane_us + rows * (runs ? 0 : strips ? 1e-3 : 2e-3)) / q.threads;
    return longer * taps * (strided(g) && !strips ? 1.4 : 1) * (memory_us(q, operand_bytes(q), 25e3) + short_runs) + convert +
           2 * kCallUs;
}

// Products over blocks of tiles, the transforms of both operands and back, and memory that no cache holds from one layer to the
// next.
double winograd_us(const Query& q) {
    const Geometry& g = q.geometry;
    const WinogradPlan plan = winograd_plan(g, q.threads);
    const double tiles = double(plan.tiles * plan.tile.frequencies());
    const double rows = double(ceil_div(g.out_channels, 8) * 8), columns = double(ceil_div(g.in_channels, 32) * 32);
    const double channels = columns + double(ceil_div(g.out_channels, 32) * 32);
    const double sums = double(plan.tile.frequencies() * g.out_channels) * columns;
    const double blocks =
        double((plan.apart ? q.threads : 1) * plan.blocks * kTilesAtOnce * plan.tile.frequencies()) * channels;
    const double passes = plan.apart ? 1 : std::ceil(double(plan.tiles) / double(plan.blocks * kTilesAtOnce));
    const double share = zen4(q) && q.x_kind == Kind::bf16 ? 0.83 : 0.92; // less where bf16 is converted on the way
    return panels_us(q, 2 * tiles * rows * columns / share) +
           (tiles * channels * kTransformUs[q.channels_last ? 0 : 1] + sums * kBackUs) / q.threads +
           memory_us(q, (double(plan.parts) * sums + blocks) * element_bytes(q), 5e3) + convert_us(q, x_elements(q), q.x_kind) +
           convert_us(q, z_elements(q), q.z_kind) + (passes + 1) * kCallUs;
}

// Of first layers by bf16 dot products oneDNN keeps the channels as they are.
bool bf16_pictures(const Query& q) {
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16;
    return bf16 && q.cpu.bf16 == Cpu::Bf16::kDots && q.geometry.in_per_group() < 8;
}

// oneDNN brings operands in NCHW into blocks of channels unless the images are small. Memory beyond the allocator's limit is
// asked of the system each time.
double blocked_us(const Query& q) {
    constexpr double kAllocated = double{32 << 20};
    if (q.geometry.image_positions() < 400) return 0;
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16 && q.cpu.bf16 != Cpu::Bf16::kEmulated;
    if (bf16_pictures(q)) return memory_us(q, operand_bytes(q), 12e3);
    const double each = bf16 ? 2 : element_bytes(q);
    double us = 0;
    for (const double bytes : {x_elements(q) * each, z_elements(q) * each})
        us += memory_us(q, bytes, bytes > kAllocated ? 1.7e3 : 12e3);
    return us;
}

// oneDNN's weight gradient, whose result is then brought into D's order.
double library_us(const Query& q) {
    const Geometry& g = q.geometry;
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16;
    const bool dots = bf16 && q.cpu.bf16 == Cpu::Bf16::kDots;
    const bool few = !q.channels_last && !strided(g) && g.image_positions() < 100;
    const double times[] = {3, g.pointwise() ? 0.58 : few ? 0.38 : 0.5, 0.22}; // of a product's, by what multiplies bf16
    const double slow = bf16 ? times[static_cast<int>(q.cpu.bf16)] : 1;
    // A linear layer's is the GEMM of `direct`, but for a conversion of all of x and z at once if any.
    if (g.dims == 0 && slow >= 1 && !few_rows(g)) return direct_us(q);
    const double convert = bf16 ? 0 : 2 * (convert_us(q, x_elements(q), q.x_kind) + convert_us(q, z_elements(q), q.z_kind));
    const double order = d_bytes(q) / (g.pointwise() ? 4e3 : dots ? 1.3e3 : 1e3);
    if (g.depthwise()) {
        const double bytes = operand_bytes(q);
        const auto& speeds = fits_a_cache(q) ? core(q).depthwise_cached : core(q).depthwise_bytes_per_us;
        double speed = speeds[q.channels_last ? 0 : 1] * (tiny(g) ? core(q).tiny : 1);
        if (dots && zen4(q) && q.channels_last)
            speed = bytes > 8e6 ? 3e3 : strided(g) ? 16e3 : 11e3;
        else if (dots && zen4(q))
            speed = tiny(g) && !strided(g) ? 4e3 : fits_a_cache(q) ? 2.5e3 : 1.5e3;
        else if (bf16) // not as fast from memory as from a cache
            speed *= on_tiles(q, true) && q.channels_last && bytes > 8e6 ? 0.4 : 0.5;
        // Other kernels than small, dense ones are not vectorised.
        const bool vectorised = g.taps() <= 9 && product(g.dilation) == 1 && slow <= 1;
        const double sums =
            vectorised ? memory_us(q, bytes, speed) : wgrad_flops(g) / ((q.channels_last ? 4.5e3 : 1.6e3) * q.threads);
        return sums + convert + 10 * kCallUs;
    }
    const double grouped = g.groups > 1 ? 2 : 1;
    const bool on_units = on_tiles(q, true); // so fast that little hides behind products
    const double flops = wgrad_flops(g) * slow * grouped * narrow(double(g.out_per_group())) *
                         (on_units                         ? g.in_per_group() < 8 ? 2.6 : 1.3
                          : dots && g.in_per_group() >= 16 ? narrow(double(g.in_per_group()))
                          : bf16_pictures(q)               ? narrow(double(g.patch()))
                                                           : 1);
    const double rest = memory_us(q, operand_bytes(q), on_units ? (q.channels_last ? 10e3 : 5e3) : kStreamBytesPerUs) +
                        convert + order + 10 * kCallUs;
    if (g.pointwise()) {
        const double sliced = strided(g) ? pack_us(q, 1, double(g.in_channels), double(g.output[2]), 1, Kind::f32) : 0;
        if (!q.channels_last)
            return gemm_us(q, (g.image_positions() < 100 ? 1 : 1.06) * flops / core(q).pointwise_first) + rest + sliced +
                   blocked_us(q) + (dots ? memory_us(q, operand_bytes(q), 8e3) : 0);
        const double share = zen4(q) && !bf16 && d_bytes(q) <= 1 << 18 ? 1.12 : 0.97; // D stays in the second-level cache
        const double product = gemm_us(q, g.in_channels < 64 ? flops : flops * narrow(double(g.patch())) / share);
        // Few channels on either side: it waits for memory.
        const bool waits = q.cpu.wide && !bf16 && std::min(g.in_channels, g.out_channels) < 64;
        return (waits ? std::max(product, memory_us(q, operand_bytes(q), zen4(q) ? 12e3 : 8e3)) : product) + rest + sliced;
    }
    const bool apart = g.kernel == g.stride; // patches that share no element
    const auto& shares = q.channels_last ? core(q).channels_last : core(q).channels_first;
    const double apart_share = (q.channels_last && !zen4(q) ? 0.9 : 1) * (slow < 1 ? slow : 1); // not by bf16 instructions
    const double share = apart ? apart_share : bf16_pictures(q) ? 1 : shares[strided(g) ? 1 : 0];
    return gemm_us(q, flops / share) + rest + (q.channels_last ? 0 : blocked_us(q));
}

} // namespace

double estimate_us(const Query& q, Algorithm algorithm) {
    const Geometry& g = q.geometry;
    const double forward = q.z_present
                               ? 0
                               : gemm_us(q, wgrad_flops(g)) + memory_us(q, operand_bytes(q), kStreamBytesPerUs) +
                                     pack_us(q, double(g.taps()), double(g.in_per_group()), double(g.output[2]), 1, q.x_kind);
    switch (algorithm) {
    case Algorithm::kGram:
        return gram_us(q);
    case Algorithm::kDepthwise:
        return forward + depthwise_us(q);
    case Algorithm::kWinograd:
        return forward + winograd_us(q);
    case Algorithm::kDirect:
        return forward + direct_us(q);
    default:
        return forward + library_us(q);
    }
}

} // namespace localsgd::cpu
