#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "copy.h"

namespace localsgd {
namespace {

// 64 bytes: one AVX-512 register, two of AVX2, four of SSE; the compiler splits it as the instruction set asks.
template <typename Acc>
struct Vector;
template <>
struct Vector<float> {
    static constexpr int64_t kLanes = 16;
    typedef float Type __attribute__((vector_size(64), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
    static constexpr int64_t kLanes = 8;
    typedef double Type __attribute__((vector_size(64), aligned(8), may_alias));
    typedef int64_t Mask __attribute__((vector_size(64)));
};

template <typename Acc>
constexpr int64_t kLanes = Vector<Acc>::kLanes;

template <typename Acc>
int64_t round_up(int64_t n) {
    return ceil_div(n, kLanes<Acc>) * kLanes<Acc>;
}

// One z plane [rows, width] against one padded x plane, as seen by the inner loop: tap (r, s) of output row p, column q is
// x[(p * row_step + r * tap_rows) * x_pitch + column[s] + q * column_step].
struct Sweep {
    int64_t rows, width; // of the output
    int64_t z_pitch, x_pitch;
    int64_t row_step, tap_rows;
    const int64_t* column; // [S]
};

// ---- planes: vectors along an output row ----------------------------------------------------------------------------

// The last, partial vector of a row: lanes beyond the row must add nothing even if x holds Inf there.
template <typename Acc>
LOCALSGD_INLINE void set_tail_mask(typename Vector<Acc>::Mask& mask, int64_t valid) {
    for (int64_t l = 0; l < kLanes<Acc>; ++l) mask[l] = l < valid ? -1 : 0;
}

template <typename Acc, int R, int S>
LOCALSGD_INLINE void plane_block(const Sweep& w, const Acc* x, const Acc* z, int64_t r0, int64_t s0, int64_t taps_wide,
                                 double* d) {
    using V = typename Vector<Acc>::Type;
    V sums[R][S] = {};
    const int64_t whole = w.width - w.width % kLanes<Acc>;
    typename Vector<Acc>::Mask mask;
    set_tail_mask<Acc>(mask, w.width - whole);
    for (int64_t p = 0; p < w.rows; ++p) {
        const Acc* z_row = z + p * w.z_pitch;
        const Acc* x_row = x + (p * w.row_step + r0 * w.tap_rows) * w.x_pitch;
        for (int64_t q = 0; q < whole; q += kLanes<Acc>) {
            const V zv = *reinterpret_cast<const V*>(z_row + q);
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < S; ++s)
                    sums[r][s] += zv * *reinterpret_cast<const V*>(x_row + r * w.tap_rows * w.x_pitch + w.column[s0 + s] + q);
        }
        if (whole < w.width) {
            const V zv = *reinterpret_cast<const V*>(z_row + whole);
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < S; ++s) {
                    const V xv = *reinterpret_cast<const V*>(x_row + r * w.tap_rows * w.x_pitch + w.column[s0 + s] + whole);
                    const V product = zv * xv;
                    sums[r][s] += mask ? product : V{};
                }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) {
            double sum = 0;
            for (int64_t l = 0; l < kLanes<Acc>; ++l) sum += static_cast<double>(sums[r][s][l]);
            d[(r0 + r) * taps_wide + s0 + s] += sum;
        }
}

// As many taps at once as registers hold accumulators; the rest in columns of the kernel.
template <typename Acc>
LOCALSGD_INLINE void plane_taps(const Sweep& w, const Acc* x, const Acc* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    if (kernel_h == 3 && kernel_w == 3) return plane_block<Acc, 3, 3>(w, x, z, 0, 0, 3, d);
    if (kernel_h == 5 && kernel_w == 5) return plane_block<Acc, 5, 5>(w, x, z, 0, 0, 5, d);
    for (int64_t r = 0; r < kernel_h; ++r) {
        int64_t s = 0;
        for (; s + 7 <= kernel_w; s += 7) plane_block<Acc, 1, 7>(w, x, z, r, s, kernel_w, d);
        for (; s + 3 <= kernel_w; s += 3) plane_block<Acc, 1, 3>(w, x, z, r, s, kernel_w, d);
        for (; s < kernel_w; ++s) plane_block<Acc, 1, 1>(w, x, z, r, s, kernel_w, d);
    }
}

LOCALSGD_MULTIVERSION
void sweep_plane(const Sweep& w, const float* x, const float* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps(w, x, z, kernel_h, kernel_w, d);
}

LOCALSGD_MULTIVERSION
void sweep_plane(const Sweep& w, const double* x, const double* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps(w, x, z, kernel_h, kernel_w, d);
}

// A strided layer's row is stored by phase (index modulo stride), so that each tap reads consecutive elements.
struct PhasedRow {
    int64_t stride, phase_length, padded; // padded: elements of the unphased row, zeros before and after included
    std::vector<int64_t> column;          // [S]

    template <typename Acc>
    static PhasedRow of(const Geometry& g, Acc /*tag*/) {
        const int64_t last = (g.kernel[2] - 1) * g.dilation[2];
        PhasedRow row{g.stride[2], 0, (g.output[2] - 1) * g.stride[2] + last + 1, {}};
        row.phase_length = last / row.stride + round_up<Acc>(g.output[2]);
        for (int64_t s = 0; s < g.kernel[2]; ++s) {
            const int64_t first = s * g.dilation[2];
            row.column.push_back(first % row.stride * row.phase_length + first / row.stride);
        }
        return row;
    }
    int64_t pitch() const { return stride * phase_length; }
};

// x plane (n, channel, depth) into `to` [padded height, pitch], which is zero wherever padding stays.
template <typename Acc>
void pack_plane(const DepthwiseArgs& a, const PhasedRow& row, int64_t n, int64_t channel, int64_t depth, int64_t height,
                Acc* to) {
    const Geometry& g = a.geometry;
    for (int64_t i = 0; i < height; ++i) {
        const int64_t h = i - g.pad[1];
        if (h < 0 || h >= g.input[1]) continue;
        const int64_t start =
            n * a.x_strides.batch + channel * a.x_strides.channel + depth * a.x_strides.space[0] + h * a.x_strides.space[1];
        for (int64_t phase = 0; phase < row.stride; ++phase) {
            const int64_t length = row.padded > phase ? ceil_div(row.padded - phase, row.stride) : 0;
            const Range in = valid_outputs(length, g.input[2], row.stride, phase - g.pad[2]);
            if (in.end <= in.begin) continue;
            const int64_t element = start + (in.begin * row.stride + phase - g.pad[2]) * a.x_strides.space[2];
            copy_run(to + i * row.pitch() + phase * row.phase_length + in.begin, offset(a.x, a.x_kind, element), a.x_kind,
                     in.end - in.begin, a.x_strides.space[2] * row.stride);
        }
    }
}

template <typename Acc>
void pack_output(const DepthwiseArgs& a, int64_t n, int64_t k, int64_t depth, int64_t pitch, Acc* to) {
    const Geometry& g = a.geometry;
    for (int64_t p = 0; p < g.output[1]; ++p) {
        const int64_t element =
            n * a.z_strides.batch + k * a.z_strides.channel + depth * a.z_strides.space[0] + p * a.z_strides.space[1];
        copy_run(to + p * pitch, offset(a.z, a.z_kind, element), a.z_kind, g.output[2], a.z_strides.space[2]);
    }
}

// Output depths that read input depth `depth`, and through which kernel plane: p * stride + r * dilation - pad == depth.
bool output_depth(const Geometry& g, int64_t depth, int64_t r, int64_t& p) {
    const int64_t from = depth + g.pad[0] - r * g.dilation[0];
    p = from / g.stride[0];
    return from >= 0 && from % g.stride[0] == 0 && p < g.output[0];
}

// ---- pixels: vectors along the channels -----------------------------------------------------------------------------

constexpr int64_t kPixelChannels = 64; // per gathered tile: whole cache lines, a few vectors

template <typename Acc, int R, int S>
LOCALSGD_INLINE void pixel_block(const Sweep& w, const Acc* x, const Acc* z, int64_t column_step, int64_t r0, int64_t s0,
                                 int64_t taps_wide, Acc* d) {
    using V = typename Vector<Acc>::Type;
    V sums[R][S] = {};
    for (int64_t p = 0; p < w.rows; ++p) {
        V row[R][S] = {}; // summed apart: one long chain of additions would cost precision
        for (int64_t q = 0; q < w.width; ++q) {
            const V zv = *reinterpret_cast<const V*>(z + p * w.z_pitch + q * kPixelChannels);
            const Acc* corner = x + (p * w.row_step + r0 * w.tap_rows) * w.x_pitch + q * column_step;
            for (int r = 0; r < R; ++r)
                for (int s = 0; s < S; ++s)
                    row[r][s] += zv * *reinterpret_cast<const V*>(corner + r * w.tap_rows * w.x_pitch + w.column[s0 + s]);
        }
        for (int r = 0; r < R; ++r)
            for (int s = 0; s < S; ++s) sums[r][s] += row[r][s];
    }
    for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) *reinterpret_cast<V*>(d + ((r0 + r) * taps_wide + s0 + s) * kPixelChannels) = sums[r][s];
}

template <typename Acc>
LOCALSGD_INLINE void pixel_taps(const Sweep& w, const Acc* x, const Acc* z, int64_t column_step, int64_t kernel_h,
                                int64_t kernel_w, int64_t channels, Acc* d) {
    for (int64_t c = 0; c < channels; c += kLanes<Acc>) {
        if (kernel_h == 3 && kernel_w == 3) {
            pixel_block<Acc, 3, 3>(w, x + c, z + c, column_step, 0, 0, 3, d + c);
            continue;
        }
        for (int64_t r = 0; r < kernel_h; ++r) {
            int64_t s = 0;
            for (; s + 7 <= kernel_w; s += 7) pixel_block<Acc, 1, 7>(w, x + c, z + c, column_step, r, s, kernel_w, d + c);
            for (; s + 3 <= kernel_w; s += 3) pixel_block<Acc, 1, 3>(w, x + c, z + c, column_step, r, s, kernel_w, d + c);
            for (; s < kernel_w; ++s) pixel_block<Acc, 1, 1>(w, x + c, z + c, column_step, r, s, kernel_w, d + c);
        }
    }
}

LOCALSGD_MULTIVERSION
void sweep_pixels(const Sweep& w, const float* x, const float* z, int64_t step, int64_t kernel_h, int64_t kernel_w,
                  int64_t channels, float* d) {
    pixel_taps(w, x, z, step, kernel_h, kernel_w, channels, d);
}

LOCALSGD_MULTIVERSION
void sweep_pixels(const Sweep& w, const double* x, const double* z, int64_t step, int64_t kernel_h, int64_t kernel_w,
                  int64_t channels, double* d) {
    pixel_taps(w, x, z, step, kernel_h, kernel_w, channels, d);
}

// Output rows gathered at once: about 256 KiB of x, which stays in the second-level cache.
int64_t band_rows(const Geometry& g, int64_t padded_width) {
    const int64_t row_bytes = padded_width * kPixelChannels * 8;
    const int64_t input_rows = std::max<int64_t>(1, (256 << 10) / row_bytes);
    return std::clamp<int64_t>((input_rows - (g.kernel[1] - 1) * g.dilation[1]) / g.stride[1], 1, g.output[1]);
}

} // namespace

template <typename Acc>
void depthwise_planes(const DepthwiseArgs& a, int64_t channel_begin, int64_t channel_end, Acc* d) {
    const Geometry& g = a.geometry;
    const PhasedRow row = PhasedRow::of(g, Acc());
    const int64_t height = (g.output[1] - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    const int64_t z_pitch = round_up<Acc>(g.output[2]);
    const int64_t multiplier = g.out_per_group();
    std::vector<Acc> x_plane(height * row.pitch()), z_plane(g.output[1] * z_pitch);
    std::vector<double> sums(multiplier * g.taps());
    const Sweep sweep{g.output[1], g.output[2], z_pitch, row.pitch(), g.stride[1], g.dilation[1], row.column.data()};
    for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t n = 0; n < g.batch; ++n)
            for (int64_t depth = 0; depth < g.input[0]; ++depth) {
                bool packed = false;
                for (int64_t r = 0; r < g.kernel[0]; ++r) {
                    int64_t p0;
                    if (!output_depth(g, depth, r, p0)) continue;
                    if (!packed) pack_plane(a, row, n, channel, depth, height, x_plane.data());
                    packed = true;
                    for (int64_t j = 0; j < multiplier; ++j) {
                        pack_output(a, n, channel * multiplier + j, p0, z_pitch, z_plane.data());
                        sweep_plane(sweep, x_plane.data(), z_plane.data(), g.kernel[1], g.kernel[2],
                                    sums.data() + (j * g.kernel[0] + r) * g.kernel[1] * g.kernel[2]);
                    }
                }
            }
        for (size_t i = 0; i < sums.size(); ++i) d[channel * multiplier * g.taps() + i] = static_cast<Acc>(sums[i]);
    }
}

int64_t pixel_blocks(const Geometry& g) { return std::min<int64_t>(g.batch * g.output[0] * g.output[1], 64); }

bool pixels_eligible(const DepthwiseArgs& a) {
    return a.geometry.out_per_group() == 1 && a.x_strides.channel == 1 && a.z_strides.channel == 1;
}

template <typename Acc>
void depthwise_pixels(const DepthwiseArgs& a, int64_t block, double* partial) {
    const Geometry& g = a.geometry;
    const int64_t rows = g.batch * g.output[0] * g.output[1], blocks = pixel_blocks(g);
    const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
    const int64_t width = (g.output[2] - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1;
    const int64_t band = band_rows(g, width);
    const int64_t band_height = (band - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    const int64_t plane_taps = g.kernel[1] * g.kernel[2];
    std::vector<Acc> x_tile(band_height * width * kPixelChannels), z_tile(band * g.output[2] * kPixelChannels);
    std::vector<Acc> sums(plane_taps * kPixelChannels);
    std::vector<int64_t> column;
    for (int64_t s = 0; s < g.kernel[2]; ++s) column.push_back(s * g.dilation[2] * kPixelChannels);
    std::fill(partial, partial + g.taps() * g.in_channels, 0.0);

    for (int64_t first = begin; first < end;) {
        const int64_t n = first / (g.output[0] * g.output[1]), p0 = first / g.output[1] % g.output[0], p1 = first % g.output[1];
        const int64_t count = std::min({band, end - first, g.output[1] - p1}); // a band stays within one plane
        const int64_t height = (count - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
        const Sweep sweep{count,         g.output[2],  g.output[2] * kPixelChannels, width * kPixelChannels, g.stride[1],
                          g.dilation[1], column.data()};
        for (int64_t c0 = 0; c0 < g.in_channels; c0 += kPixelChannels) {
            const int64_t channels = std::min(kPixelChannels, g.in_channels - c0);
            for (int64_t pixel = 0; pixel < count * g.output[2]; ++pixel) {
                const int64_t element = n * a.z_strides.batch + c0 + p0 * a.z_strides.space[0] +
                                        (p1 + pixel / g.output[2]) * a.z_strides.space[1] +
                                        pixel % g.output[2] * a.z_strides.space[2];
                copy_run(z_tile.data() + pixel * kPixelChannels, offset(a.z, a.z_kind, element), a.z_kind, channels, 1);
            }
            for (int64_t r = 0; r < g.kernel[0]; ++r) {
                const int64_t depth = p0 * g.stride[0] + r * g.dilation[0] - g.pad[0];
                if (depth < 0 || depth >= g.input[0]) continue;
                for (int64_t i = 0; i < height * width; ++i) {
                    const int64_t h = p1 * g.stride[1] + i / width - g.pad[1], w = i % width - g.pad[2];
                    Acc* to = x_tile.data() + i * kPixelChannels;
                    if (h < 0 || h >= g.input[1] || w < 0 || w >= g.input[2]) {
                        std::fill(to, to + channels, Acc(0));
                        continue;
                    }
                    const int64_t element = n * a.x_strides.batch + c0 + depth * a.x_strides.space[0] +
                                            h * a.x_strides.space[1] + w * a.x_strides.space[2];
                    copy_run(to, offset(a.x, a.x_kind, element), a.x_kind, channels, 1);
                }
                sweep_pixels(sweep, x_tile.data(), z_tile.data(), g.stride[2] * kPixelChannels, g.kernel[1], g.kernel[2],
                             channels, sums.data());
                for (int64_t tap = 0; tap < plane_taps; ++tap)
                    for (int64_t c = 0; c < channels; ++c)
                        partial[(r * plane_taps + tap) * g.in_channels + c0 + c] +=
                            static_cast<double>(sums[tap * kPixelChannels + c]);
            }
        }
        first += count;
    }
}

template <typename Acc>
void reduce_pixels(const Geometry& g, const double* partials, Acc* d) {
    const int64_t size = g.taps() * g.in_channels;
    for (int64_t c = 0; c < g.in_channels; ++c)
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
            double sum = 0;
            for (int64_t block = 0; block < pixel_blocks(g); ++block) sum += partials[block * size + tap * g.in_channels + c];
            d[c * g.taps() + tap] = static_cast<Acc>(sum);
        }
}

template void depthwise_planes<float>(const DepthwiseArgs&, int64_t, int64_t, float*);
template void depthwise_planes<double>(const DepthwiseArgs&, int64_t, int64_t, double*);
template void depthwise_pixels<float>(const DepthwiseArgs&, int64_t, double*);
template void depthwise_pixels<double>(const DepthwiseArgs&, int64_t, double*);
template void reduce_pixels<float>(const Geometry&, const double*, float*);
template void reduce_pixels<double>(const Geometry&, const double*, double*);

} // namespace localsgd
