// What launchers make of tensors: which of the ways to read an operand fits, and the numbers that kernels index it by.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../cpu/elements.h"
#include "../geometry.h"
#include "platform.cuh"

namespace localsgd::cuda {

struct Operand {
    const void* data;
    Kind kind; // not f64
    Strides strides;
};

constexpr int64 kMaxPositions = 0x7fffffff - (1 << 20); // positions just past the end are computed with
constexpr int64 kMaxInt = 0x7fffffff;
constexpr int64 kMaxOuterInput = 1 << 29; // see kOutside
constexpr int64 kMaxTiled =
    int64{1} << 33; // elements of all tiles: quads of them, and steps beyond those, are counted in 32 bits

// Whether the matrices of all groups have no more elements than that in tiles of any size but 64x160, see in_segments.
inline bool countable(int64_t groups, int64_t rows, int64_t columns) {
    constexpr int64_t kLargestTile = 128;
    const int64_t tiles = kMaxTiled / (kLargestTile * kLargestTile);
    const int64_t down = std::max<int64_t>(1, ceil_div(rows, kLargestTile));
    return groups <= tiles && down <= tiles / std::max<int64_t>(1, groups) &&
           ceil_div(columns, kLargestTile) <= tiles / std::max<int64_t>(1, groups) / down;
}

inline FastDiv fast_div(int64 by) {
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

inline Collapsed collapse(const Geometry& geometry, const Strides& strides) {
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

// Windows that lie side by side, of few channels (NHWC): what one takes of a row of x is as much memory, and might be a single
// pixel of that many channels: whole chunks, or quads, where those of single pixels are none. Columns of the patch matrix keep
// their order.
inline Collapsed fold_windows(const Geometry& geometry, const Strides& strides) {
    Collapsed c{geometry, strides};
    Geometry& g = c.geometry;
    const int64_t across = g.kernel[2];
    if (g.groups != 1 || g.in_channels % 8 == 0 || across == 1) return c;
    if (g.stride[2] != across || g.dilation[2] != 1 || g.pad[2] != 0) return c;
    if ((strides.channel != 1 && g.in_channels > 1) || strides.space[2] != g.in_channels || g.output[2] * across > g.input[2])
        return c;
    g.in_channels *= across;
    g.input[2] /= across;
    g.kernel[2] = g.stride[2] = 1;
    c.strides.channel = 1;
    c.strides.space[2] *= across;
    return c;
}

inline Element element_of(Kind kind) {
    return kind == Kind::f32 ? Element::f32 : kind == Kind::bf16 ? Element::bf16 : Element::f16;
}

// What a core multiplies.
inline Kind operand_kind(Core core) {
    return core == Core::mma_bf16 ? Kind::bf16 : core == Core::mma_f16 ? Kind::f16 : Kind::f32;
}

inline bool by_segments(Access access) { return access == Access::segments || access == Access::segments32; }

inline bool multiple_of_4(int64_t n) { return n % 4 == 0; }

inline bool aligned(const Operand& o) { return reinterpret_cast<uintptr_t>(o.data) % (4 * kind_size(o.kind)) == 0; }

inline Access access_of(const Operand& o, const Geometry& g, const Strides& s) {
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
inline bool in_chunks(const Operand& o, const Geometry& g, const Strides& s) {
    const int64_t width = 16 / kind_size(o.kind);
    if (s.channel != 1 || g.in_per_group() % width != 0 || reinterpret_cast<uintptr_t>(o.data) % 16 != 0) return false;
    if (g.batch > 1 && s.batch % width != 0) return false;
    for (int d = 0; d < 3; ++d)
        if (g.input[d] > 1 && s.space[d] % width != 0) return false;
    return true;
}

// The same positions, padded so that none of the runs of `step` that they are taken in goes beyond a row of the output.
inline Geometry padded_to(int64_t step, Geometry g) {
    g.output[2] = ceil_div(g.output[2], step) * step;
    return g;
}

// Channels that lie between neighbouring pixels: all of them, or one.
inline int64_t inner_channels(const Operand& o, const Geometry& g) { return o.strides.channel == 1 ? g.in_channels : 1; }

// The segments that a step of so many positions reads for a tile of so many columns.
struct SegmentSize {
    int64_t width, lead, chunks, rows; // elements of a chunk; as in Segments

    SegmentSize(const Operand& o, const Geometry& g, int64_t step, int64_t tile) : width(16 / kind_size(o.kind)) {
        const int64_t pixels = (step - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1, inner = inner_channels(o, g);
        const int64_t kernel_row = g.kernel[2] * inner, kernel_rows = g.patch() / kernel_row;
        lead = (width - g.pad[2] * inner % width) % width;
        chunks = ceil_div(lead + pixels * inner, width);
        rows = g.patch() <= tile ? kernel_rows : std::min(kernel_rows, ceil_div(tile - 1, kernel_row) + 1);
    }
};

inline Segments segments_of(const Operand& o, const Geometry& given, int64_t step, int64_t tile) {
    const Geometry g = padded_to(step, given);
    const SegmentSize size(o, g, step, tile);
    const int64_t inner = inner_channels(o, g), kernel_plane = g.kernel[1] * size.chunks;
    Segments p{};
    p.data = o.data;
    p.element = element_of(o.kind);
    p.positions = static_cast<int>(g.positions());
    p.columns = static_cast<int>(g.in_channels / inner * g.kernel[0] * kernel_plane);
    // Chunks of zeros count as those of a further channel, and must be aligned, too.
    p.channel_stride = inner == g.in_channels ? 0 : static_cast<int>(o.strides.channel);
    p.batch_stride = g.batch == 1 ? 0 : o.strides.batch;
    p.image = fast_div(std::max<int64_t>(1, g.image_positions()));
    p.plane = fast_div(std::max<int64_t>(1, g.output[1] * g.output[2]));
    p.row = fast_div(std::max<int64_t>(1, g.output[2]));
    p.flat = g.output[0] == 1 && g.output[1] == 1;
    p.channels_fastest = false;
    p.column_inner = fast_div(g.kernel[0] * kernel_plane);
    p.tap_plane = fast_div(kernel_plane);
    p.tap_row = fast_div(size.chunks);
    for (int d = 0; d < 2; ++d) {
        p.space_stride[d] = g.input[d] == 1 ? 0 : static_cast<int>(o.strides.space[d]);
        p.stride[d] = static_cast<int>(g.stride[d]);
        p.pad[d] = static_cast<int>(g.pad[d]);
        p.dilation[d] = static_cast<int>(g.dilation[d]);
        p.input[d] = static_cast<int>(g.input[d]);
    }
    p.space_stride[2] = 1;
    p.stride[2] = p.pitch = static_cast<int>(g.stride[2] * inner);
    p.pad[2] = static_cast<int>(g.pad[2] * inner + size.lead);
    p.dilation[2] = static_cast<int>(size.width);
    p.input[2] = static_cast<int>(g.input[2] * inner);
    p.chunks = static_cast<int>(size.chunks);
    p.rows = static_cast<int>(size.rows);
    p.lead = static_cast<int>(size.lead);
    p.gap = static_cast<int>((g.dilation[2] - 1) * inner);
    p.across = static_cast<int>(given.output[2]);
    p.patch = static_cast<int>(g.patch());
    p.by_channels = fast_div(inner);
    p.by_kernel_row = fast_div(g.kernel[2] * inner);
    return p;
}

// Whether x may be read by segments: its rows are whole chunks, everywhere aligned, and what a step reads is at most `most` of
// them.
inline bool in_segments(const Operand& o, const Geometry& g, int64_t step, int64_t tile, int64_t most) {
    const int64_t width = 16 / kind_size(o.kind), inner = inner_channels(o, g);
    const Strides& s = o.strides;
    if (g.groups != 1 || g.in_channels == 0 || inner > most * width || g.input[2] * inner % width != 0) return false;
    if (inner < g.in_channels && s.channel % width != 0) return false;
    if (inner < g.in_channels && g.taps() > 1 && s.channel <= s.space[2]) return false; // D's columns, see patches_of
    if (g.input[2] > 1 && s.space[2] != inner) return false;
    if (reinterpret_cast<uintptr_t>(o.data) % 16 != 0 || (g.batch > 1 && s.batch % width != 0)) return false;
    for (int d = 0; d < 2; ++d)
        if (g.input[d] > 1 && s.space[d] % width != 0) return false;
    // Elements of a row, and elements of all tiles, are counted in 32 bits.
    const int64_t row = (g.output[2] + step) * g.stride[2] + g.pad[2] + g.kernel[2] * g.dilation[2];
    if (row > kMaxInt / 2 / inner || padded_to(step, g).positions() > kMaxPositions) return false;
    if (ceil_div(g.out_channels, 64) > kMaxTiled / (64 * tile) / ceil_div(g.patch(), tile)) return false;
    int64_t reach = g.in_channels * s.channel + most * width; // from a step's first element to the end of its last chunk
    for (int d = 0; d < 3; ++d) reach += (g.kernel[d] - 1) * g.dilation[d] * s.space[d];
    if (reach > kMaxInt) return false;
    const SegmentSize size(o, g, step, tile);
    return (size.rows + 1) * size.chunks <= most;
}

inline Patches patches_of(const Operand& o, const Geometry& geometry) {
    const auto [g, s] = collapse(geometry, o.strides);
    Patches p{};
    p.data = o.data;
    p.element = element_of(o.kind);
    p.positions = static_cast<int>(g.positions());
    p.columns = static_cast<int>(g.patch());
    p.batch_stride = g.batch == 1 ? 0 : s.batch; // what is never stepped along may have any stride, aligned or not
    p.group_stride = static_cast<int>(g.in_per_group() * s.channel);
    p.channel_stride = static_cast<int>(s.channel);
    p.image = fast_div(std::max<int64_t>(1, g.image_positions()));
    p.plane = fast_div(std::max<int64_t>(1, g.output[1] * g.output[2]));
    p.row = fast_div(std::max<int64_t>(1, g.output[2]));
    p.flat = g.output[0] == 1 && g.output[1] == 1;
    p.in_place = p.flat && g.batch == 1 && g.taps() == 1 && g.stride[2] == 1 && g.pad == Triple{0, 0, 0} && g.input == g.output;
    p.channels_fastest = s.channel == 1 || s.channel <= s.space[2] || g.taps() == 1;
    p.column_inner = fast_div(std::max<int64_t>(1, p.channels_fastest ? g.in_per_group() : g.taps()));
    p.tap_plane = fast_div(std::max<int64_t>(1, g.kernel[1] * g.kernel[2]));
    p.tap_row = fast_div(std::max<int64_t>(1, g.kernel[2]));
    for (int d = 0; d < 3; ++d) {
        p.space_stride[d] = g.input[d] == 1 ? 0 : static_cast<int>(s.space[d]);
        p.stride[d] = static_cast<int>(g.stride[d]);
        p.pad[d] = static_cast<int>(g.pad[d]);
        p.dilation[d] = static_cast<int>(g.dilation[d]);
        p.input[d] = static_cast<int>(g.input[d]);
    }
    return p;
}

// Whether `target` takes whole quads of the columns of x.
inline bool takes_quads(const Target& target, const Patches& x, const Geometry& g) {
    if (target.element != Element::f32 || reinterpret_cast<uintptr_t>(target.data) % 16 != 0 || x.columns % 4 != 0)
        return false;
    if (g.out_channels > 1 && target.out_stride % 4 != 0) return false;
    int64_t expected = 1;
    const auto follows = [&](int64_t size, int64_t stride) {
        const bool yes = size == 1 || stride == expected;
        expected *= size;
        return yes;
    };
    const bool channels_last = x.channels_fastest && g.in_per_group() > 1;
    if (channels_last && (target.channel_stride != 1 || !multiple_of_4(g.in_per_group()))) return false;
    if (channels_last) {
        for (int d = 0; d < 3; ++d)
            if (g.kernel[d] > 1 && target.tap_stride[d] % 4 != 0) return false;
        return true;
    }
    for (int d = 2; d >= 0; --d)
        if (!follows(g.kernel[d], target.tap_stride[d])) return false;
    return follows(g.in_per_group(), target.channel_stride);
}

inline bool fits(const Operand& o, const Geometry& geometry) {
    const auto [g, s] = collapse(geometry, o.strides);
    int64_t reach = g.in_channels * s.channel;
    for (int d = 0; d < 3; ++d) {
        if (s.space[d] > kMaxInt || g.input[d] > kMaxInt || g.pad[d] > kMaxInt || g.stride[d] > kMaxInt) return false;
        if (g.output[d] * g.stride[d] > kMaxInt) return false;
        reach += (g.kernel[d] - 1) * g.dilation[d] * s.space[d];
    }
    return reach <= kMaxInt && s.channel <= kMaxInt && g.input[0] + g.pad[0] + g.kernel[0] * g.dilation[0] <= kMaxOuterInput;
}

inline const char* access_name(Access access) {
    switch (access) {
    case Access::scalar:
        return "scalar";
    case Access::channels4:
        return "4 channels";
    case Access::positions4:
        return "4 positions";
    case Access::chunks16:
        return "16 bytes";
    case Access::segments:
        return "segments";
    case Access::segments32:
        return "segments of fp32";
    }
    return "?";
}

} // namespace localsgd::cuda
