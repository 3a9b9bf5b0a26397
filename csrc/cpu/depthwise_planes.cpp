#include "depthwise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "copy.h"
#include "vectors.h"

namespace localsgd {
namespace {

// 64 bytes: one AVX-512 register, two of AVX2, four of SSE; the compiler splits it as the instruction set asks.
template <typename Acc>
int64_t round_up(int64_t n) {
    return ceil_div(n, kMostLanes<Acc>) * kMostLanes<Acc>;
}

// One z plane [rows, width] against one padded x plane, as seen by the inner loop: tap (r, s) of output row p, column q is
// x[(p * row_step + r * tap_rows) * x_pitch + column[s] + q * column_step].
struct Sweep {
    int64_t rows, width; // of the output
    int64_t z_pitch, x_pitch;
    int64_t row_step, tap_rows;
    const int64_t* column;            // [S]
    int64_t planes, x_plane, z_plane; // as many planes like this one, so far apart
};

// The last, partial vector of a row: lanes beyond the row must add nothing even if x holds Inf there.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void set_tail_mask(typename Vector<Acc, kBytes>::Mask& mask, int64_t valid) {
    for (int64_t l = 0; l < Vector<Acc, kBytes>::kLanes; ++l) mask[l] = l < valid ? -1 : 0;
}

template <typename Acc, int kBytes, int R, int S>
LOCALSGD_INLINE void plane_block(const Sweep& w, const Acc* x, const Acc* z, int64_t r0, int64_t s0, int64_t taps_wide,
                                 double* d) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    V sums[R][S] = {};
    const int64_t whole = w.width - w.width % kLanes;
    typename Vector<Acc, kBytes>::Mask mask;
    set_tail_mask<Acc, kBytes>(mask, w.width - whole);
    for (int64_t row = 0, plane = 0, p = 0; row < w.planes * w.rows; ++row, ++p) {
        if (p == w.rows) p = 0, ++plane;
        const Acc* z_row = z + plane * w.z_plane + p * w.z_pitch;
        const Acc* x_row = x + plane * w.x_plane + (p * w.row_step + r0 * w.tap_rows) * w.x_pitch;
        for (int64_t q = 0; q < whole; q += kLanes) {
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
            for (int64_t l = 0; l < kLanes; ++l) sum += static_cast<double>(sums[r][s][l]);
            d[(r0 + r) * taps_wide + s0 + s] += sum;
        }
}

// As many taps at once as registers hold accumulators; the rest in columns of the kernel.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void plane_taps(const Sweep& w, const Acc* x, const Acc* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    if (kernel_h == 3 && kernel_w == 3) return plane_block<Acc, kBytes, 3, 3>(w, x, z, 0, 0, 3, d);
    for (int64_t r = 0; r < kernel_h; ++r) {
        int64_t s = 0;
        for (; s + 7 <= kernel_w; s += 7) plane_block<Acc, kBytes, 1, 7>(w, x, z, r, s, kernel_w, d);
        for (; s + 5 <= kernel_w; s += 5) plane_block<Acc, kBytes, 1, 5>(w, x, z, r, s, kernel_w, d);
        for (; s + 3 <= kernel_w; s += 3) plane_block<Acc, kBytes, 1, 3>(w, x, z, r, s, kernel_w, d);
        for (; s < kernel_w; ++s) plane_block<Acc, kBytes, 1, 1>(w, x, z, r, s, kernel_w, d);
    }
}

LOCALSGD_MULTIVERSION
void sweep_wide(const Sweep& w, const float* x, const float* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps<float, kWideBytes>(w, x, z, kernel_h, kernel_w, d);
}
LOCALSGD_MULTIVERSION
void sweep_wide(const Sweep& w, const double* x, const double* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps<double, kWideBytes>(w, x, z, kernel_h, kernel_w, d);
}
LOCALSGD_MULTIVERSION
void sweep_narrow(const Sweep& w, const float* x, const float* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps<float, kNarrowBytes>(w, x, z, kernel_h, kernel_w, d);
}
LOCALSGD_MULTIVERSION
void sweep_narrow(const Sweep& w, const double* x, const double* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    plane_taps<double, kNarrowBytes>(w, x, z, kernel_h, kernel_w, d);
}

template <typename Acc>
void sweep_plane(const Sweep& w, const Acc* x, const Acc* z, int64_t kernel_h, int64_t kernel_w, double* d) {
    has_wide_registers() ? sweep_wide(w, x, z, kernel_h, kernel_w, d) : sweep_narrow(w, x, z, kernel_h, kernel_w, d);
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

// As copy_run; rows are short, so that calling it for each would take longer than copying.
template <typename Acc>
void copy_row(Acc* to, const void* data, Kind kind, int64_t element, int64_t count, int64_t stride) {
    if (kind != (sizeof(Acc) == 8 ? Kind::f64 : Kind::f32) || stride != 1)
        return copy_run(to, offset(data, kind, element), kind, count, stride);
    const Acc* from = static_cast<const Acc*>(data) + element;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) std::memcpy(to + i, from + i, 8 * sizeof(Acc));
    for (; i < count; ++i) to[i] = from[i];
}

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
            copy_row(to + i * row.pitch() + phase * row.phase_length + in.begin, a.x, a.x_kind, element, in.end - in.begin,
                     a.x_strides.space[2] * row.stride);
        }
    }
}

template <typename Acc>
void pack_output(const DepthwiseArgs& a, int64_t n, int64_t k, int64_t depth, int64_t pitch, Acc* to) {
    const Geometry& g = a.geometry;
    for (int64_t p = 0; p < g.output[1]; ++p) {
        const int64_t element =
            n * a.z_strides.batch + k * a.z_strides.channel + depth * a.z_strides.space[0] + p * a.z_strides.space[1];
        copy_row(to + p * pitch, a.z, a.z_kind, element, g.output[2], a.z_strides.space[2]);
    }
}

// Output depths that read input depth `depth`, and through which kernel plane: p * stride + r * dilation - pad == depth.
bool output_depth(const Geometry& g, int64_t depth, int64_t r, int64_t& p) {
    const int64_t from = depth + g.pad[0] - r * g.dilation[0];
    p = from / g.stride[0];
    return from >= 0 && from % g.stride[0] == 0 && p < g.output[0];
}

} // namespace

template <typename Acc>
void depthwise_planes(const DepthwiseArgs& a, int64_t channel_begin, int64_t channel_end, Acc* d) {
    constexpr int64_t kTogether = 1024; // elements of z: what is summed in lanes, before they are added up in double
    const Geometry& g = a.geometry;
    const PhasedRow row = PhasedRow::of(g, Acc());
    const int64_t height = (g.output[1] - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1;
    const int64_t z_pitch = round_up<Acc>(g.output[2]), multiplier = g.out_per_group();
    const int64_t x_size = height * row.pitch(), z_size = g.output[1] * z_pitch;
    // Small planes of several images at once.
    const int64_t together =
        g.kernel[0] == 1 && g.input[0] == 1 && g.output[0] == 1 ? std::clamp<int64_t>(kTogether / z_size, 1, g.batch) : 1;
    std::vector<Acc> x_planes(together * x_size), z_planes(together * z_size);
    std::vector<double> sums(multiplier * g.taps());
    Sweep sweep{g.output[1],   g.output[2],       z_pitch, row.pitch(), g.stride[1],
                g.dilation[1], row.column.data(), 1,       x_size,      z_size};
    for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t n = 0; n < g.batch; n += sweep.planes) {
            sweep.planes = std::min(together, g.batch - n);
            for (int64_t depth = 0; depth < g.input[0]; ++depth) {
                bool packed = false;
                for (int64_t r = 0; r < g.kernel[0]; ++r) {
                    int64_t p0;
                    if (!output_depth(g, depth, r, p0)) continue;
                    for (int64_t i = 0; i < sweep.planes && !packed; ++i)
                        pack_plane(a, row, n + i, channel, depth, height, x_planes.data() + i * x_size);
                    packed = true;
                    for (int64_t j = 0; j < multiplier; ++j) {
                        for (int64_t i = 0; i < sweep.planes; ++i)
                            pack_output(a, n + i, channel * multiplier + j, p0, z_pitch, z_planes.data() + i * z_size);
                        sweep_plane(sweep, x_planes.data(), z_planes.data(), g.kernel[1], g.kernel[2],
                                    sums.data() + (j * g.kernel[0] + r) * g.kernel[1] * g.kernel[2]);
                    }
                }
            }
        }
        for (size_t i = 0; i < sums.size(); ++i) d[channel * multiplier * g.taps() + i] = static_cast<Acc>(sums[i]);
    }
}

template void depthwise_planes<float>(const DepthwiseArgs&, int64_t, int64_t, float*);
template void depthwise_planes<double>(const DepthwiseArgs&, int64_t, int64_t, double*);

} // namespace localsgd
