// Products of matrices whose rows are output positions: columns are packed, tile by tile, into panels that stay in the cache.
//
// A tile is [panels][kTile][kPanel]: each panel holds some columns of kTile positions, so that a product reads both of its
// operands consecutively. Packing converts, gathers (im2col) and, where channels come first, transposes.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "copy.h"
#include "patches.h"
#include "transpose.h"

namespace localsgd {

constexpr int64_t kTile = 128; // positions: a panel of them fits the first-level cache

template <typename Acc, int kBytes>
struct Shape {
    static constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    static constexpr int64_t kPanel = 2 * kLanes;                  // columns
    static constexpr int64_t kRows = kBytes == kWideBytes ? 8 : 6; // of a block: its sums fill most of the registers
};
template <typename Acc>
constexpr int64_t kMostPanel = Shape<Acc, kWideBytes>::kPanel;

template <typename Acc, int kBytes>
struct Panels {
    static constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    std::vector<Acc> memory;
    Acc* data;

    explicit Panels(int64_t columns) : memory(ceil_div(columns, kPanel) * kPanel * kTile + kPanel), data(memory.data()) {
        data += (kPanel - reinterpret_cast<uintptr_t>(data) / sizeof(Acc) % kPanel) % kPanel; // whole cache lines
    }
    Acc* at(int64_t column, int64_t row) const { return data + (column / kPanel * kTile + row) * kPanel + column % kPanel; }
};

// body(column, columns) for the columns [begin, end), at most `most` at once and none of them in two panels.
template <typename Acc, int kBytes, typename Body>
LOCALSGD_INLINE void for_each_piece(int64_t begin, int64_t end, int64_t most, const Body& body) {
    constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    for (int64_t column = begin; column < end;) {
        const int64_t columns = std::min({most, end - column, kPanel - column % kPanel});
        body(column, columns);
        column += columns;
    }
}

// Rows [at, at + count) of the columns [begin, end), from positions `step` apart whose channels lie side by side.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack_channels_last(const PatchSource& s, const Panels<Acc, kBytes>& to, int64_t begin, int64_t end,
                                        int64_t at, int64_t count, int64_t element, int64_t step, Acc* scratch) {
    using Shape = Shape<Acc, kBytes>;
    const bool same = s.kind == kKindOf<Acc>;
    for (int64_t t = 0; t < count; ++t, element += step) {
        const Acc* from = static_cast<const Acc*>(offset(s.data, s.kind, element));
        if (!same) copy_run(scratch, from, s.kind, end - begin, 1), from = scratch;
        for_each_piece<Acc, kBytes>(begin, end, Shape::kPanel,
                                    [&](int64_t column, int64_t columns) __attribute__((always_inline)) {
                                        Acc* const piece = to.at(column, at + t);
                                        if (columns == Shape::kPanel)
                                            std::memcpy(piece, from, Shape::kPanel * sizeof(Acc));
                                        else
                                            for (int64_t i = 0; i < columns; ++i) piece[i] = from[i];
                                        from += columns;
                                    });
    }
}

// The same of `columns` <= kLanes channels of one panel, from `column` on, whose positions lie `step` apart.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack_channels_first(const PatchSource& s, const Panels<Acc, kBytes>& to, int64_t column, int64_t columns,
                                         int64_t at, int64_t count, int64_t element, int64_t step, Acc* scratch) {
    constexpr int64_t kLanes = Shape<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel, kSquare = kTransposed<Acc>;
    const bool same = s.kind == kKindOf<Acc>;
    const int64_t apart = same ? step : 1, pitch = same ? s.strides.channel : kTile;
    const Acc* const from = same ? static_cast<const Acc*>(s.data) + element : scratch;
    for (int64_t i = 0; i < columns && !same; ++i)
        copy_run(scratch + i * kTile, offset(s.data, s.kind, element + i * s.strides.channel), s.kind, count, step);
    Acc* const piece = to.at(column, at);
    const int64_t whole = columns == kLanes && (apart == 1 || apart == 2) ? count - count % kSquare : 0;
    for (int64_t t = 0; t < whole; t += kSquare)
        for (int64_t i = 0; i < kLanes; i += kSquare)
            if (apart == 1)
                transpose_block<1>(from + i * pitch + t, pitch, piece + t * kPanel + i, kPanel);
            else
                transpose_block<2>(from + i * pitch + t * 2, pitch, piece + t * kPanel + i, kPanel);
    for (int64_t t = whole; t < count; ++t)
        for (int64_t i = 0; i < columns; ++i) piece[t * kPanel + i] = from[i * pitch + t * apart];
}

inline Tap tap_of(const Geometry& g, int64_t index) {
    return {index / (g.kernel[1] * g.kernel[2]), index / g.kernel[2] % g.kernel[1], index % g.kernel[2]};
}

// Columns [begin, end) of the patch matrix [positions, (taps, channels of a group)] at the positions [first, first + count), as
// columns 0 and on of `to`. `scratch` holds kLanes columns of a tile and a position's channels.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack(const PatchSource& s, const Panels<Acc, kBytes>& to, int64_t begin, int64_t end, int64_t first,
                          int64_t count, Acc* scratch) {
    constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    const Geometry& g = s.geometry;
    const int64_t channels = g.in_per_group(), step = s.strides.space[2] * g.stride[2];
    Run memory[kTile];
    for (int64_t tap = begin / channels; tap * channels < end; ++tap) {
        const int64_t from = std::max(begin, tap * channels), column = from - begin;
        const int64_t last = std::min(end, (tap + 1) * channels) - begin, channel = from - tap * channels;
        const std::span<const Run> runs = runs_of(g, s.strides, first, count, tap_of(g, tap), memory);
        for (const Run& r : runs)
            if (r.element == Run::kPadding)
                for_each_piece<Acc, kBytes>(column, last, kPanel,
                                            [&](int64_t c, int64_t columns) __attribute__((always_inline)) {
                                                for (int64_t t = 0; t < r.count; ++t)
                                                    std::fill_n(to.at(c, r.at + t), columns, Acc(0));
                                            });
        const int64_t start = channel * s.strides.channel;
        if (s.strides.channel == 1) {
            for (const Run& r : runs)
                if (r.element != Run::kPadding)
                    pack_channels_last<Acc, kBytes>(s, to, column, last, r.at, r.count, r.element + start, step, scratch);
            continue;
        }
        // Some channels after others: they lie far apart, their rows side by side.
        for_each_piece<Acc, kBytes>(
            column, last, Shape<Acc, kBytes>::kLanes, [&](int64_t c, int64_t columns) __attribute__((always_inline)) {
                const int64_t of_piece = start + (c - column) * s.strides.channel;
                for (const Run& r : runs)
                    if (r.element != Run::kPadding)
                        pack_channels_first<Acc, kBytes>(s, to, c, columns, r.at, r.count, r.element + of_piece, step, scratch);
            });
    }
}
template <typename Acc>
int64_t scratch_size(int64_t channels) {
    return std::max(kTile * kMostLanes<Acc>, channels);
}

// d [rows, columns] += A^T B over `count` positions: kRows columns of a panel from `a` on, kVectors vectors from `b` on. kChain
// positions at a time have a sum of their own.
template <typename Acc, int kBytes, int kRows, int kVectors, int64_t kChain = kTile>
LOCALSGD_INLINE void multiply(const Acc* a, const Acc* b, int64_t count, Acc* d, int64_t pitch, int64_t rows, int64_t columns) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    const auto add_products = [&](V(&sum)[kRows][kVectors], int64_t first, int64_t end) __attribute__((always_inline)) {
        for (int64_t t = first; t < end; ++t) {
            V bv[kVectors];
            for (int v = 0; v < kVectors; ++v) bv[v] = *reinterpret_cast<const V*>(b + t * kPanel + v * kLanes);
            for (int i = 0; i < kRows; ++i) {
                const V av = a[t * kPanel + i] - V{}; // in all lanes
                for (int v = 0; v < kVectors; ++v) sum[i][v] += av * bv[v];
            }
        }
    };
    V sum[kRows][kVectors] = {};
    if constexpr (kChain != kTile)
        for (int i = 0; i < std::min<int64_t>(kRows, rows); ++i)
            for (int v = 0; v < kVectors; ++v) __builtin_prefetch(d + i * pitch + v * kLanes, 1, 3);
    if constexpr (kChain == kTile)
        add_products(sum, 0, count);
    else
        for (int64_t first = 0; first < count; first += kChain) {
            V part[kRows][kVectors] = {};
            add_products(part, first, std::min(first + kChain, count));
            for (int i = 0; i < kRows; ++i)
                for (int v = 0; v < kVectors; ++v) sum[i][v] += part[i][v];
        }
    if (rows >= kRows && columns >= kVectors * kLanes) {
        for (int i = 0; i < kRows; ++i)
            for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(d + i * pitch + v * kLanes) += sum[i][v];
        return;
    }
    for (int64_t i = 0; i < std::min<int64_t>(kRows, rows); ++i)
        for (int64_t j = 0; j < std::min(kVectors * kLanes, columns); ++j) d[i * pitch + j] += sum[i][j / kLanes][j % kLanes];
}

// The same for the columns [kFirst, kPanel) of the panel `a`, of which `rows` are used.
template <typename Acc, int kBytes, int64_t kFirst = 0, int64_t kChain = kTile>
LOCALSGD_INLINE void multiply_panel(const Acc* a, const Acc* b, int64_t count, Acc* d, int64_t pitch, int64_t rows,
                                    int64_t columns) {
    using Shape = Shape<Acc, kBytes>;
    constexpr int64_t kRest = (Shape::kPanel - kFirst) % Shape::kRows, kEnd = Shape::kPanel - kRest;
    for (int64_t row = kFirst; row < std::min(kEnd, rows); row += Shape::kRows)
        multiply<Acc, kBytes, Shape::kRows, 2, kChain>(a + row, b, count, d + row * pitch, pitch, rows - row, columns);
    if constexpr (kRest > 0)
        if (kEnd < rows)
            multiply<Acc, kBytes, kRest, 2, kChain>(a + kEnd, b, count, d + kEnd * pitch, pitch, rows - kEnd, columns);
}

// name_wide and name_narrow, of `name<Acc, kBytes>`, each compiled for every instruction set: a template cannot be.
#define LOCALSGD_BOTH_WIDTHS(name, Argument, Acc)                                   \
    LOCALSGD_MULTIVERSION                                                           \
    void name##_wide(const Argument& argument) { name<Acc, kWideBytes>(argument); } \
    LOCALSGD_MULTIVERSION                                                           \
    void name##_narrow(const Argument& argument) { name<Acc, kNarrowBytes>(argument); }

} // namespace localsgd
