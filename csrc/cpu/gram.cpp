#include "gram.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "copy.h"
#include "patches.h"
#include "transpose.h"

namespace localsgd {
namespace {

constexpr int64_t kTile = 128; // positions: a panel of them fits the first-level cache, all panels of a wide layer the second
constexpr int64_t kBlock = 32; // rows of a Gram matrix that are finished together
constexpr int64_t kMostParts = 8;
constexpr int64_t kWide = 256; // channels from which on strips are work enough for many threads, and parts would cost memory

template <typename Acc, int kBytes>
struct Shape {
    static constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    static constexpr int64_t kPanel = 2 * kLanes;                  // columns
    static constexpr int64_t kRows = kBytes == kWideBytes ? 8 : 4; // of a block: its sums fill half of the registers
};

template <typename Acc>
struct Part {
    GramArgs args;              // one group's: x from its first channel on
    int64_t first, end;         // positions
    int64_t row_begin, row_end; // of the Gram matrix: whole panels, or all that are left
    Acc* gram;                  // [C, C]
    Acc* sums;                  // [C] or null
};

// A tile is [panels][kTile][kPanel]: X's columns in panels, so that a product reads both of its operands consecutively.
template <typename Acc, int kBytes>
struct Tile {
    static constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    std::vector<Acc> memory;
    Acc* data;

    explicit Tile(int64_t columns) : memory(ceil_div(columns, kPanel) * kPanel * kTile + kPanel), data(memory.data()) {
        data += (kPanel - reinterpret_cast<uintptr_t>(data) / sizeof(Acc) % kPanel) % kPanel; // whole cache lines
    }
    Acc* at(int64_t column, int64_t row) const { return data + (column / kPanel * kTile + row) * kPanel + column % kPanel; }
};

// Tile rows [at, at + count) from positions whose channels lie side by side.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack_channels_last(const GramArgs& a, const Tile<Acc, kBytes>& tile, int64_t columns, int64_t at,
                                        int64_t count, int64_t element, int64_t step, Acc* scratch) {
    constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    const bool same = a.x_kind == kKindOf<Acc>;
    for (int64_t t = 0; t < count; ++t, element += step) {
        const Acc* from = static_cast<const Acc*>(offset(a.x, a.x_kind, element));
        if (!same) copy_run(scratch, from, a.x_kind, columns, 1), from = scratch;
        Acc* to = tile.at(0, at + t);
        int64_t c = 0;
        for (; c + kPanel <= columns; c += kPanel, to += kTile * kPanel) std::memcpy(to, from + c, kPanel * sizeof(Acc));
        for (int64_t i = 0; c + i < columns; ++i) to[i] = from[c + i];
    }
}

// The same from channels whose positions lie `step` apart.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack_channels_first(const GramArgs& a, const Tile<Acc, kBytes>& tile, int64_t columns, int64_t at,
                                         int64_t count, int64_t element, int64_t step, Acc* scratch) {
    constexpr int64_t kLanes = Shape<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    constexpr int64_t kSquare = kTransposed<Acc>;
    const bool same = a.x_kind == kKindOf<Acc>;
    const int64_t apart = same ? step : 1;
    for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t channels = std::min(kLanes, columns - c), start = element + c * a.x_strides.channel;
        const Acc* from = static_cast<const Acc*>(a.x) + (same ? start : 0);
        int64_t pitch = a.x_strides.channel;
        if (!same) {
            for (int64_t i = 0; i < channels; ++i)
                copy_run(scratch + i * kTile, offset(a.x, a.x_kind, start + i * a.x_strides.channel), a.x_kind, count, step);
            from = scratch, pitch = kTile;
        }
        Acc* const to = tile.at(c, at);
        const int64_t whole = channels == kLanes && apart == 1 ? count - count % kSquare : 0;
        for (int64_t t = 0; t < whole; t += kSquare)
            for (int64_t i = 0; i < kLanes; i += kSquare)
                transpose_block(from + i * pitch + t, pitch, to + t * kPanel + i, kPanel);
        for (int64_t t = whole; t < count; ++t)
            for (int64_t i = 0; i < channels; ++i) to[t * kPanel + i] = from[i * pitch + t * apart];
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void pack_tile(const GramArgs& a, const Tile<Acc, kBytes>& tile, int64_t columns, int64_t first, int64_t count,
                               Acc* scratch) {
    constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    const Geometry& g = a.geometry;
    const int64_t step = a.x_strides.space[2] * g.stride[2];
    const auto zero = [&](int64_t at, int64_t run) __attribute__((always_inline)) {
        for (int64_t c = 0; c < columns; c += kPanel) std::fill_n(tile.at(c, at), run * kPanel, Acc(0));
    };
    for_each_run(g, a.x_strides, first, count, {0, 0, 0}, zero,
                 [&](int64_t at, int64_t run, int64_t element) __attribute__((always_inline)) {
                     if (a.x_strides.channel == 1)
                         pack_channels_last<Acc, kBytes>(a, tile, columns, at, run, element, step, scratch);
                     else
                         pack_channels_first<Acc, kBytes>(a, tile, columns, at, run, element, step, scratch);
                 });
}

// gram [rows, columns] += A^T B over `count` tile rows: kRows columns of a panel from `a` on, kVectors vectors from `b` on.
template <typename Acc, int kBytes, int kRows, int kVectors>
LOCALSGD_INLINE void multiply(const Acc* a, const Acc* b, int64_t count, Acc* gram, int64_t pitch, int64_t rows,
                              int64_t columns) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    V sum[kRows][kVectors] = {};
    for (int64_t t = 0; t < count; ++t) {
        V bv[kVectors];
        for (int v = 0; v < kVectors; ++v) bv[v] = *reinterpret_cast<const V*>(b + t * kPanel + v * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const V av = a[t * kPanel + i] - V{}; // in all lanes
            for (int v = 0; v < kVectors; ++v) sum[i][v] += av * bv[v];
        }
    }
    if (rows >= kRows && columns >= kVectors * kLanes) {
        for (int i = 0; i < kRows; ++i)
            for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(gram + i * pitch + v * kLanes) += sum[i][v];
        return;
    }
    for (int64_t i = 0; i < std::min<int64_t>(kRows, rows); ++i)
        for (int64_t j = 0; j < std::min(kVectors * kLanes, columns); ++j)
            gram[i * pitch + j] += sum[i][j / kLanes][j % kLanes];
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void multiply_tile(const Part<Acc>& p, const Tile<Acc, kBytes>& tile, int64_t count) {
    using Shape = Shape<Acc, kBytes>;
    constexpr int64_t kLanes = Shape::kLanes, kPanel = Shape::kPanel;
    const int64_t channels = p.args.geometry.in_per_group();
    for (int64_t panel = p.row_begin; panel < p.row_end; panel += kPanel) {
        const int64_t end = std::min(panel + kPanel, p.row_end);
        for (int64_t column = 0; column <= panel; column += kPanel) {
            const Acc* b = tile.at(column, 0);
            Acc* const gram = p.gram + panel * channels + column;
            int64_t row = 0;
            if (column == panel) { // the first rows on the diagonal need one vector of columns only
                multiply<Acc, kBytes, kLanes, 1>(b, b, count, gram, channels, end - panel, end - panel);
                row = kLanes;
            }
            for (; panel + row < end; row += Shape::kRows)
                multiply<Acc, kBytes, Shape::kRows, 2>(tile.at(panel + row, 0), b, count, gram + row * channels, channels,
                                                       end - panel - row, channels - column);
        }
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void add_sums(const Part<Acc>& p, const Tile<Acc, kBytes>& tile, int64_t count) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    for (int64_t c = p.row_begin; c < p.row_end; c += kLanes) {
        V sum{};
        for (int64_t t = 0; t < count; ++t) sum += *reinterpret_cast<const V*>(tile.at(c, 0) + t * kPanel);
        for (int64_t i = 0; i < std::min(kLanes, p.row_end - c); ++i) p.sums[c + i] += sum[i];
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void add_part(const Part<Acc>& p) {
    const Tile<Acc, kBytes> tile(p.row_end);
    std::vector<Acc> scratch(std::max(kTile * Shape<Acc, kBytes>::kLanes, p.row_end));
    for (int64_t first = p.first; first < p.end; first += kTile) {
        const int64_t count = std::min(kTile, p.end - first);
        pack_tile<Acc, kBytes>(p.args, tile, p.row_end, first, count, scratch.data());
        multiply_tile<Acc, kBytes>(p, tile, count);
        if (p.sums) add_sums<Acc, kBytes>(p, tile, count);
    }
}

LOCALSGD_MULTIVERSION
void add_part_wide(const Part<float>& p) { add_part<float, kWideBytes>(p); }
LOCALSGD_MULTIVERSION
void add_part_wide(const Part<double>& p) { add_part<double, kWideBytes>(p); }
LOCALSGD_MULTIVERSION
void add_part_narrow(const Part<float>& p) { add_part<float, kNarrowBytes>(p); }
LOCALSGD_MULTIVERSION
void add_part_narrow(const Part<double>& p) { add_part<double, kNarrowBytes>(p); }

} // namespace

GramTasks gram_tasks(const Geometry& g, int64_t threads) {
    constexpr int64_t kLeastProducts = 1 << 22; // of a part: some 100 us
    const int64_t channels = g.in_per_group(), products = g.positions() * channels * channels / 2;
    if (channels >= kWide) return {1, std::clamp<int64_t>(threads, 1, channels / 64)};
    return {std::clamp<int64_t>(products / kLeastProducts, 1, kMostParts), 1};
}

template <typename Acc>
void gram_part(const GramArgs& a, const GramTasks& tasks, int64_t task, Acc* partials, Acc* sums, bool wide) {
    constexpr int64_t kPanel = Shape<Acc, kWideBytes>::kPanel;
    Part<Acc> p{a, 0, 0, 0, 0, nullptr, nullptr};
    Geometry& g = p.args.geometry;
    merge_space(g, p.args.x_strides);
    const int64_t channels = g.in_per_group(), matrix = task / tasks.strips, part = matrix / g.groups;
    p.args.x = offset(a.x, a.x_kind, matrix % g.groups * channels * a.x_strides.channel);
    p.first = g.positions() * part / tasks.parts;
    p.end = g.positions() * (part + 1) / tasks.parts;
    const auto row = [&](int64_t strip) { // of a triangle's area, strip / strips lies above it
        const double share = std::sqrt(double(strip) / double(tasks.strips));
        return strip == tasks.strips ? channels : int64_t(share * double(channels)) / kPanel * kPanel;
    };
    p.row_begin = row(task % tasks.strips);
    p.row_end = row(task % tasks.strips + 1);
    p.gram = partials + matrix * channels * channels;
    std::fill(p.gram + p.row_begin * channels, p.gram + p.row_end * channels, Acc(0));
    if (sums) {
        p.sums = sums + matrix * channels;
        std::fill(p.sums + p.row_begin, p.sums + p.row_end, Acc(0));
    }
    wide ? add_part_wide(p) : add_part_narrow(p);
}

int64_t gram_rows(const Geometry& g) { return g.groups * ceil_div(g.in_per_group(), kBlock); }

template <typename Acc>
void finish_gram(const Geometry& g, int64_t parts, int64_t task, Acc* partials) {
    const int64_t channels = g.in_per_group(), blocks = ceil_div(channels, kBlock), whole = g.groups * channels * channels;
    Acc* const gram = partials + task / blocks * channels * channels;
    const int64_t first = task % blocks * kBlock, last = std::min(first + kBlock, channels);
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t row = first; row < last; ++row)
            for (int64_t column = 0; column <= row; ++column)
                gram[row * channels + column] += gram[part * whole + row * channels + column];
    for (int64_t left = 0; left <= first; left += kBlock) // in blocks whose rows and columns stay in the cache
        for (int64_t row = first; row < last; ++row)
            for (int64_t column = left; column < std::min(left + kBlock, row); ++column)
                gram[column * channels + row] = gram[row * channels + column];
}

template void gram_part<float>(const GramArgs&, const GramTasks&, int64_t, float*, float*, bool);
template void gram_part<double>(const GramArgs&, const GramTasks&, int64_t, double*, double*, bool);
template void finish_gram<float>(const Geometry&, int64_t, int64_t, float*);
template void finish_gram<double>(const Geometry&, int64_t, int64_t, double*);

} // namespace localsgd
