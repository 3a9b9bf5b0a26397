#include "cost.h"

#include <algorithm>

namespace localsgd::cpu {
namespace {

// One core of a current x86 server (AVX2), fp32, fitted to `benchmarks/kernels.py --device cpu --threads 1`. Only ratios matter
// for the pick; `localsgd_ext.benchmark` measures instead.
constexpr double kGemmFlopsPerUs = 85e3;   // large GEMM
constexpr double kStreamBytesPerUs = 40e3; // operands of a GEMM, mostly hidden behind it
constexpr double kReadBytesPerUs = 20e3;   // operands of a kernel that waits for them
constexpr double kGatherBytesPerUs = 60e3; // im2col within the caches, in and out
constexpr double kConvertBytesPerUs = 6e3; // conversions and transposes
constexpr double kRunUs = 9e-3;            // a run of neighbouring elements that im2col copies
constexpr double kStridedUs = 0.5e-3;      // an element of a run with gaps
constexpr double kCallUs = 4;              // one GEMM through ATen

bool is_wide(const Query& q) { return q.x_kind == Kind::f64 || q.z_kind == Kind::f64; }

double element_bytes(const Query& q) { return is_wide(q) ? 8 : 4; }

double gemm_us(const Query& q, double flops) { return flops / (kGemmFlopsPerUs * (is_wide(q) ? 0.5 : 1) * q.threads); }

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

// Narrow GEMMs run below the peak, those with fewer columns than two vectors far below.
double narrow(double size) { return 1 + 6 / size; }
double narrow_patch(double size) { return size > 1 && size < 32 ? 3 : narrow(size); }

bool strided(const Geometry& g) { return product(g.stride) > 1; }

// im2col: per position and tap a run of channels (NHWC), per row of the patch matrix a run of columns (NCHW).
double gather_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double rows = double(g.positions()), patch = double(g.patch()) * g.groups;
    const double bytes = 2 * rows * patch * element_bytes(q);
    const double width = std::max<double>(1, g.pointwise() && !strided(g) ? g.image_positions() : g.output[2]);
    const double runs = q.channels_last || g.dims == 0 ? rows * g.taps() * g.groups : rows / width * patch;
    const double gaps = q.channels_last || g.stride[2] == 1 ? 0 : rows * patch * kStridedUs;
    return (runs * kRunUs + gaps) / q.threads + bytes / (kGatherBytesPerUs * q.threads);
}

double convert_us(const Query& q, double elements, Kind kind) {
    return kind_size(kind) == element_bytes(q) ? 0 : elements * element_bytes(q) / (4 * kConvertBytesPerUs * q.threads);
}

bool reads_in_place(const Query& q) {
    const Geometry& g = q.geometry;
    return g.pointwise() && !strided(g) && product(g.pad) == 0 && kind_size(q.x_kind) == element_bytes(q);
}

double gram_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double c = double(g.in_per_group()), elements = double(g.positions() * g.in_channels);
    const double transpose = q.channels_last || g.dims == 0 ? 0 : elements * (strided(g) ? 0.8e-3 : 0.15e-3) / q.threads;
    return gemm_us(q, elements * (c + 16)) + gemm_us(q, 2.0 * g.out_channels * c * c) + // panels of 16 on the diagonal
           memory_us(q, elements * kind_size(q.x_kind), kReadBytesPerUs) + convert_us(q, elements, q.x_kind) + transpose +
           2 * kCallUs;
}

double direct_us(const Query& q) {
    const Geometry& g = q.geometry;
    const double gather = (reads_in_place(q) ? 0 : gather_us(q)) + convert_us(q, z_elements(q), q.z_kind);
    const double workspace = double(g.positions()) * (double(g.patch()) * g.groups + g.out_channels) * element_bytes(q);
    const double tiles = reads_in_place(q) ? 1 : std::max(1.0, workspace / 8e6);
    // NCHW: a GEMM an image, small images first copied into one matrix.
    const bool images = reads_in_place(q) && !q.channels_last && g.dims > 0 && g.batch > 1, small = g.image_positions() < 256;
    const double copies = images && small ? 2 * operand_bytes(q) / (20e3 * q.threads) : 0;
    const double transpose = q.channels_last && !g.pointwise() ? d_bytes(q) / kConvertBytesPerUs : 0;
    return gemm_us(q, wgrad_flops(g) * narrow(double(g.out_per_group())) * narrow_patch(double(g.patch()))) +
           memory_us(q, operand_bytes(q), kStreamBytesPerUs) + gather + copies + transpose +
           (images && !small ? double(g.batch) : tiles) * kCallUs * double(g.groups);
}

double depthwise_us(const Query& q) {
    const Geometry& g = q.geometry;
    // The sums of nine taps fit into registers.
    const double taps = g.taps() > 9 ? double(g.taps()) / 6 : 1;
    if (q.channels_last && g.out_per_group() == 1) return taps * memory_us(q, operand_bytes(q), 14e3) + 2 * kCallUs;
    const double x_planes = double(g.batch * g.in_channels * g.input[0]),
                 z_planes = double(g.batch * g.out_channels * g.output[0]);
    const double rows = x_planes * g.input[1] + z_planes * g.output[1];
    const double short_runs = (z_planes * 20e-3 + rows * 2e-3) / q.threads;
    return taps * (strided(g) ? 1.4 : 1) * (memory_us(q, operand_bytes(q), 25e3) + short_runs) + 2 * kCallUs;
}

// oneDNN's weight gradient, whose result is then brought into D's order.
double library_us(const Query& q) {
    const Geometry& g = q.geometry;
    if (g.dims == 0) return direct_us(q) * 0.98; // the same GEMM, but for a conversion of all of x and z at once if any
    const bool bf16 = q.x_kind == Kind::bf16 && q.z_kind == Kind::bf16;
    const double slow = bf16 ? (q.fast_bf16 ? 0.5 : 3) : 1; // bf16 that the CPU must emulate
    const double convert = bf16 ? 0 : 2 * (convert_us(q, x_elements(q), q.x_kind) + convert_us(q, z_elements(q), q.z_kind));
    const double order = d_bytes(q) / (q.channels_last && !g.pointwise() ? 1e3 : 4e3);
    if (g.depthwise()) {
        const double bytes = operand_bytes(q), in_cache = 16e6;
        // Other kernels than small, dense ones are not vectorised.
        const bool vectorised = g.taps() <= 9 && product(g.dilation) == 1 && slow <= 1;
        const double sums = vectorised ? memory_us(q, bytes, bytes > in_cache ? 6e3 : 11.5e3)
                                       : wgrad_flops(g) / ((q.channels_last ? 4.5e3 : 1.6e3) * q.threads);
        return sums + convert + 10 * kCallUs;
    }
    const double share = g.pointwise() ? 1 : q.channels_last ? 0.67 : 0.79; // of the peak, beside a plain GEMM's
    const double grouped = g.groups > 1 ? 2 : 1;
    return gemm_us(q, wgrad_flops(g) * slow * grouped * narrow(double(g.out_per_group())) / share) +
           memory_us(q, operand_bytes(q), kStreamBytesPerUs) + convert + order + 10 * kCallUs +
           (g.pointwise() && strided(g) ? gather_us(q) / 2 : 0); // x is sliced first
}

} // namespace

double estimate_us(const Query& q, Algorithm algorithm) {
    const Geometry& g = q.geometry;
    const double forward =
        q.z_present ? 0 : gemm_us(q, wgrad_flops(g)) + memory_us(q, operand_bytes(q), kStreamBytesPerUs) + gather_us(q);
    switch (algorithm) {
    case Algorithm::kGram:
        return gram_us(q);
    case Algorithm::kDepthwise:
        return forward + depthwise_us(q);
    case Algorithm::kDirect:
        return forward + direct_us(q);
    default:
        return forward + library_us(q);
    }
}

} // namespace localsgd::cpu
