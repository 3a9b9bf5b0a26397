#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "copy.h"
#include "depthwise.h"
#include "depthwise_dots.h"
#include "pixel_taps.h"

namespace localsgd {
namespace {

constexpr int64_t kBandRows = 16;     // output rows of a band; when as many are summed, they join a sum in double
constexpr int64_t kConvertedRows = 4; // the same where x and z are converted first, into buffers that stay in the cache

LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<float>& b, float* sums) { band_sums<float, kWideBytes>(g, b, sums); }
LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<double>& b, double* sums) { band_sums<double, kWideBytes>(g, b, sums); }
LOCALSGD_WIDE
void sweep_wide(const Geometry& g, const Band<BFloat16>& b, float* sums) { band_sums<float, kWideBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<BFloat16>& b, float* sums) { band_sums<float, kNarrowBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<float>& b, float* sums) { band_sums<float, kNarrowBytes>(g, b, sums); }
LOCALSGD_NARROW
void sweep_narrow(const Geometry& g, const Band<double>& b, double* sums) { band_sums<double, kNarrowBytes>(g, b, sums); }

// Rows [first, first + count) of one plane, a block of channels, where they lie.
template <typename T>
Rows<T> rows_in_place(const void* data, const Strides& strides, int64_t plane, int64_t first, int64_t channel, int64_t extent) {
    const T* const begin = static_cast<const T*>(data);
    return {begin + plane + first * strides.space[1] + channel, strides.space[1], strides.space[2], begin + extent};
}

// Elements from the first to the last one of a tensor [batch, channels, space], and one more.
int64_t extent(const Strides& strides, int64_t batch, int64_t channels, const Triple& space) {
    int64_t sum = 1 + (batch - 1) * strides.batch + (channels - 1) * strides.channel;
    for (int i = 0; i < 3; ++i) sum += (space[i] - 1) * strides.space[i];
    return sum;
}

// The same converted into `buffer` [count][width][pitch], whose pitch are the channels, filled up to whole vectors.
template <typename Acc>
Rows<Acc> converted_rows(const void* data, Kind kind, const Strides& strides, int64_t plane, int64_t first, int64_t count,
                         int64_t width, int64_t channel, int64_t channels, std::vector<Acc>& buffer) {
    const int64_t start = plane + first * strides.space[1] + channel;
    const int64_t pitch = ceil_div(channels, kMostLanes<Acc>) * kMostLanes<Acc>;
    const bool dense = channels == pitch && strides.space[2] == pitch; // pixels that lie side by side: a row is one run
    buffer.resize(std::max(buffer.size(), static_cast<size_t>(count * width * pitch)));
    for (int64_t row = 0; row < count; ++row)
        for (int64_t pixel = 0; pixel < (dense ? 1 : width); ++pixel)
            copy_run(buffer.data() + (row * width + pixel) * pitch,
                     offset(data, kind, start + row * strides.space[1] + pixel * strides.space[2]), kind,
                     dense ? width * pitch : channels, 1);
    return {buffer.data(), width * pitch, pitch, nullptr};
}

} // namespace

PixelTasks pixel_tasks(const Geometry& g) {
    constexpr int64_t kLeastProducts = 1 << 19; // of a task: some 50 us
    const int64_t rows = g.batch * g.output[0] * g.output[1];
    const int64_t blocks = ceil_div(g.in_channels, kBlockChannels);
    // Even blocks, of whole vectors.
    const int64_t channels = ceil_div(ceil_div(g.in_channels, blocks), kMostLanes<float>) * kMostLanes<float>;
    const int64_t products = g.positions() * g.taps() * std::min(channels, g.in_channels);
    return {std::clamp<int64_t>(products / kLeastProducts, 1, std::min<int64_t>(rows, 64)), ceil_div(g.in_channels, channels),
            channels};
}

bool pixels_eligible(const DepthwiseArgs& a) {
    return a.geometry.out_per_group() == 1 && a.x_strides.channel == 1 && a.z_strides.channel == 1;
}

namespace {

// `total` [taps][total_pitch] += `sums` [taps][kBlockChannels], the first `channels` of each tap.
template <typename Acc>
LOCALSGD_INLINE void add_in_double(const Acc* sums, int64_t taps, int64_t channels, double* total, int64_t total_pitch) {
    for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
            total[tap * total_pitch + c] += static_cast<double>(sums[tap * kBlockChannels + c]);
}
LOCALSGD_MULTIVERSION
void join(const float* sums, int64_t taps, int64_t channels, double* total, int64_t total_pitch) {
    add_in_double(sums, taps, channels, total, total_pitch);
}
LOCALSGD_MULTIVERSION
void join(const double* sums, int64_t taps, int64_t channels, double* total, int64_t total_pitch) {
    add_in_double(sums, taps, channels, total, total_pitch);
}

// x and z of type T, or of any if that is Acc.
template <typename Acc, typename T>
void sum_pixels(const DepthwiseArgs& a, int64_t task, double* partials) {
    const Geometry& g = a.geometry;
    const PixelTasks tasks = pixel_tasks(g);
    const int64_t part = task / tasks.blocks, c0 = task % tasks.blocks * tasks.block_channels;
    const int64_t channels = std::min(tasks.block_channels, g.in_channels - c0);
    const int64_t rows = g.batch * g.output[0] * g.output[1];
    const int64_t begin = rows * part / tasks.parts, end = rows * (part + 1) / tasks.parts;
    const int64_t plane_taps = g.kernel[1] * g.kernel[2];
    // A tensor of fewer channels than a vector has lanes cannot be read where it lies.
    const bool convert =
        std::is_same_v<T, Acc> && (a.x_kind != kKindOf<Acc> || a.z_kind != kKindOf<Acc> || g.in_channels < kMostLanes<Acc>);
    constexpr size_t kAlignment = 64; // sums that straddle cache lines would cost twice as much
    std::vector<Acc> x_buffer, z_buffer,
        memory(kAlignment / sizeof(Acc) + kMostLanes<Acc> + static_cast<size_t>(plane_taps * kBlockChannels));
    void* aligned = memory.data();
    size_t room = memory.size() * sizeof(Acc);
    std::align(kAlignment, sizeof(Acc), aligned, room);
    Acc* const sums = static_cast<Acc*>(aligned) + kMostLanes<Acc>; // a vector at the end of a narrow block begins before it
    std::vector<Range> columns;
    for (int64_t s = 0; s < g.kernel[2]; ++s)
        columns.push_back(valid_outputs(g.output[2], g.input[2], g.stride[2], s * g.dilation[2] - g.pad[2]));
    double* const partial = partials + part * g.taps() * g.in_channels + c0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) std::fill_n(partial + tap * g.in_channels, channels, 0.0);

    const bool dots = std::is_same_v<T, BFloat16> && a.dots && dots_fit_pixels(g);
    const int64_t x_extent = extent(a.x_strides, g.batch, g.in_channels, g.input);
    const int64_t z_extent = extent(a.z_strides, g.batch, g.out_channels, g.output);
    int64_t summed = 0; // output rows, whose sums are in `memory`
    const auto join_sums = [&](int64_t depth) {
        double* const total = partial + depth * plane_taps * g.in_channels;
        if constexpr (std::is_same_v<T, BFloat16>)
            if (dots) join_dots(sums, channels, total, g.in_channels);
        if (!dots) join(sums, plane_taps, channels, total, g.in_channels);
        std::fill(memory.begin(), memory.end(), Acc(0));
        summed = 0;
    };
    for (int64_t first = begin; first < end;) {
        const int64_t n = first / (g.output[0] * g.output[1]), p0 = first / g.output[1] % g.output[0], p1 = first % g.output[1];
        const int64_t most = convert ? kConvertedRows : kBandRows;
        const int64_t count = std::min({most, end - first, g.output[1] - p1}); // a band stays within one plane
        const int64_t top = std::clamp<int64_t>(p1 * g.stride[1] - g.pad[1], 0, g.input[1]);
        const int64_t bottom = std::clamp<int64_t>(
            (p1 + count - 1) * g.stride[1] - g.pad[1] + (g.kernel[1] - 1) * g.dilation[1] + 1, top, g.input[1]);
        const auto rows_of = [&](const void* data, Kind kind, const Strides& strides, int64_t depth, int64_t row,
                                 int64_t height, int64_t width, std::vector<Acc>& buffer) -> Rows<T> {
            const int64_t plane = n * strides.batch + depth * strides.space[0];
            if constexpr (std::is_same_v<T, Acc>)
                if (convert) return converted_rows(data, kind, strides, plane, row, height, width, c0, channels, buffer);
            return rows_in_place<T>(data, strides, plane, row, c0, data == a.x ? x_extent : z_extent);
        };
        const Rows<T> z = rows_of(a.z, a.z_kind, a.z_strides, p0, p1, count, g.output[2], z_buffer);
        for (int64_t r = 0; r < g.kernel[0]; ++r) {
            const int64_t depth = p0 * g.stride[0] + r * g.dilation[0] - g.pad[0];
            if (depth < 0 || depth >= g.input[0] || bottom == top) continue;
            const Rows<T> x = rows_of(a.x, a.x_kind, a.x_strides, depth, top, bottom - top, g.input[2], x_buffer);
            const Band<T> band{x, z, top, p1, count, channels, convert, columns.data()};
            if constexpr (std::is_same_v<T, BFloat16>)
                if (dots) dot_pixels(g, band, sums);
            if (!dots) has_wide_registers() ? sweep_wide(g, band, sums) : sweep_narrow(g, band, sums);
            summed += count;
            if (g.kernel[0] > 1 || summed >= kBandRows) join_sums(r); // planes of few rows share their sums
        }
        first += count;
    }
    if (summed > 0) join_sums(0);
}

} // namespace

template <typename Acc>
void depthwise_pixels(const DepthwiseArgs& a, int64_t task, double* partials) {
    if constexpr (std::is_same_v<Acc, float>) {
        const bool bf16 = a.x_kind == Kind::bf16 && a.z_kind == Kind::bf16;
        if (bf16 && a.geometry.in_channels >= kMostLanes<float>) return sum_pixels<float, BFloat16>(a, task, partials);
    }
    sum_pixels<Acc, Acc>(a, task, partials);
}

namespace {

template <typename Acc>
LOCALSGD_INLINE void sum_parts(const double* partials, int64_t parts, int64_t taps, int64_t in_channels, int64_t begin,
                               int64_t end, Acc* d) {
    constexpr int64_t kChannels = 64;
    double sums[kChannels];
    for (int64_t c0 = begin; c0 < end; c0 += kChannels) {
        const int64_t channels = std::min(kChannels, end - c0);
        for (int64_t tap = 0; tap < taps; ++tap) {
            std::fill_n(sums, channels, 0.0);
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t c = 0; c < channels; ++c) sums[c] += partials[(part * taps + tap) * in_channels + c0 + c];
            for (int64_t c = 0; c < channels; ++c) d[(c0 + c) * taps + tap] = static_cast<Acc>(sums[c]);
        }
    }
}
LOCALSGD_MULTIVERSION
void reduce(const double* partials, int64_t parts, int64_t taps, int64_t in_channels, int64_t begin, int64_t end, float* d) {
    sum_parts(partials, parts, taps, in_channels, begin, end, d);
}
LOCALSGD_MULTIVERSION
void reduce(const double* partials, int64_t parts, int64_t taps, int64_t in_channels, int64_t begin, int64_t end, double* d) {
    sum_parts(partials, parts, taps, in_channels, begin, end, d);
}

} // namespace

template <typename Acc>
void reduce_pixels(const Geometry& g, const double* partials, int64_t channel_begin, int64_t channel_end, Acc* d) {
    reduce(partials, pixel_tasks(g).parts, g.taps(), g.in_channels, channel_begin, channel_end, d);
}

template void depthwise_pixels<float>(const DepthwiseArgs&, int64_t, double*);
template void depthwise_pixels<double>(const DepthwiseArgs&, int64_t, double*);
template void reduce_pixels<float>(const Geometry&, const double*, int64_t, int64_t, float*);
template void reduce_pixels<double>(const Geometry&, const double*, int64_t, int64_t, double*);

} // namespace localsgd
