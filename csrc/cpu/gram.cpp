#include "gram.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "panels.h"

namespace localsgd {
namespace {

constexpr int64_t kBlock = 32;             // rows of a Gram matrix that are finished together
constexpr int64_t kLongestChain = 1 << 15; // positions
constexpr int64_t kSide = 256;             // of a block of D = W G
constexpr int64_t kDepth = 128;            // of its sums at once: three panels' worth in the first-level cache

template <typename Acc>
struct Part {
    PatchSource x;              // one group's: x from its first channel on
    int64_t first, end;         // positions
    int64_t row_begin, row_end; // of the Gram matrix: whole panels, or all that are left
    Acc* gram;                  // [C, C]
    Acc* sums;                  // [C] or null
};

template <typename Acc, int kBytes>
LOCALSGD_INLINE void multiply_tile(const Part<Acc>& p, const Panels<Acc, kBytes>& tile, int64_t count) {
    using Shape = Shape<Acc, kBytes>;
    constexpr int64_t kLanes = Shape::kLanes, kPanel = Shape::kPanel;
    const int64_t channels = p.x.geometry.in_per_group();
    for (int64_t panel = p.row_begin; panel < p.row_end; panel += kPanel) {
        const int64_t end = std::min(panel + kPanel, p.row_end);
        for (int64_t column = 0; column <= panel; column += kPanel) {
            const Acc* b = tile.at(column, 0);
            Acc* const gram = p.gram + panel * channels + column;
            const Acc* a = tile.at(panel, 0);
            if (column == panel) { // the first rows on the diagonal need one vector of columns only
                multiply<Acc, kBytes, kLanes, 1>(a, b, count, gram, channels, end - panel, end - panel);
                multiply_panel<Acc, kBytes, kLanes>(a, b, count, gram, channels, end - panel, end - panel);
            } else {
                multiply_panel<Acc, kBytes>(a, b, count, gram, channels, end - panel, kPanel);
            }
        }
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void add_sums(const Part<Acc>& p, const Panels<Acc, kBytes>& tile, int64_t count) {
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
    const Panels<Acc, kBytes> tile(p.row_end);
    std::vector<Acc> scratch(scratch_size<Acc>(p.row_end));
    for (int64_t first = p.first; first < p.end; first += kTile) {
        const int64_t count = std::min(kTile, p.end - first);
        pack<Acc, kBytes>(p.x, tile, 0, p.row_end, first, count, scratch.data());
        multiply_tile<Acc, kBytes>(p, tile, count);
        if (p.sums) add_sums<Acc, kBytes>(p, tile, count);
    }
}

LOCALSGD_BOTH_WIDTHS(add_part, Part<float>, float)
LOCALSGD_BOTH_WIDTHS(add_part, Part<double>, double)

void add_part_tiles(const Part<float>& p, Unit by) {
    const TileUnit unit(by);
    const bool in_pairs = packed_form(p.x) == Form::kPairs, once = in_pairs && unit.may_be_left(Form::kPairs);
    const Tiles pairs(p.row_end), columns(once ? 0 : p.row_end);
    const Tiles &packed = in_pairs ? pairs : columns, &transposed = in_pairs ? columns : pairs, &left = once ? pairs : columns;
    const int64_t channels = p.x.geometry.in_per_group();
    for (int64_t first = p.first; first < p.end; first += kTilePositions) {
        const int64_t count = std::min(kTilePositions, p.end - first);
        pack_tiles(p.x, packed, 0, p.row_end, first, count);
        if (!once) transpose_tiles(packed, transposed, p.row_end, count);
        for (int64_t column = 0; column < p.row_end; column += kTileColumns)
            for (int64_t row = std::max(column, p.row_begin); row < p.row_end; row += kTileColumns)
                unit.multiply(left.panel(row), once ? Form::kPairs : Form::kColumns, {{pairs.panel(column)}}, count,
                              {p.gram + row * channels + column, channels, std::min(kTileColumns, p.row_end - row),
                               std::min(kTileColumns, p.row_end - column), first > p.first});
        for (int64_t c = p.row_begin; p.sums && c < p.row_end; c += 16)
            sum_tiles(pairs.panel(c), count, p.sums + c, std::min<int64_t>(16, p.row_end - c));
    }
}

} // namespace

Tasks gram_tasks(const Geometry& g, int64_t threads, Unit unit) {
    const int64_t channels = g.in_per_group(), products = g.positions() * channels * channels / 2;
    if (channels >= kWide) { // several parts only where a sum in one chain would cost precision
        const int64_t most = std::clamp<int64_t>(kMostPartElements / (g.groups * channels * channels), 1, kMostParts);
        return {std::clamp<int64_t>(g.positions() / kLongestChain, 1, most), std::clamp<int64_t>(threads, 1, channels / 64)};
    }
    return {std::clamp<int64_t>(products / kLeastProducts, 1, most_parts(g.positions(), unit)), 1};
}

template <typename Acc>
void gram_part(const PatchSource& x, const Tasks& tasks, int64_t task, Acc* partials, Acc* sums, Unit unit) {
    constexpr int64_t kPanel = kMostPanel<Acc>;
    Part<Acc> p{x, 0, 0, 0, 0, nullptr, nullptr};
    Geometry& g = p.x.geometry;
    merge_space(g, p.x.strides);
    const int64_t channels = g.in_per_group(), matrix = task / tasks.strips, part = matrix / g.groups;
    p.x.data = offset(x.data, x.kind, matrix % g.groups * channels * x.strides.channel);
    p.first = g.positions() * part / tasks.parts;
    p.end = g.positions() * (part + 1) / tasks.parts;
    const auto row = [&](int64_t strip) { // of a triangle's area, strip / strips lies above it
        const double share = std::sqrt(double(strip) / double(tasks.strips));
        return strip == tasks.strips ? channels : int64_t(share * double(channels)) / kPanel * kPanel;
    };
    p.row_begin = row(task % tasks.strips);
    p.row_end = row(task % tasks.strips + 1);
    p.gram = partials + matrix * channels * channels;
    if (sums) {
        p.sums = sums + matrix * channels;
        std::fill(p.sums + p.row_begin, p.sums + p.row_end, Acc(0));
    }
    if constexpr (sizeof(Acc) == sizeof(float))
        if (only_bf16(unit) && p.first < p.end) return add_part_tiles(p, unit);
    std::fill(p.gram + p.row_begin * channels, p.gram + p.row_end * channels, Acc(0));
    unit == Unit::kWide ? add_part_wide(p) : add_part_narrow(p);
}

int64_t gram_rows(const Geometry& g) { return g.groups * ceil_div(g.in_per_group(), kBlock); }

namespace {

// The elements above the diagonal of the columns [first, last), from those below it.
template <typename Acc>
void mirror(Acc* gram, int64_t channels, int64_t first, int64_t last) {
    for (int64_t left = 0; left <= first; left += kBlock) // in blocks whose rows and columns stay in the cache
        for (int64_t row = first; row < last; ++row)
            for (int64_t column = left; column < std::min(left + kBlock, row); ++column)
                gram[column * channels + row] = gram[row * channels + column];
}

} // namespace

template <typename Acc>
void finish_gram(const Geometry& g, int64_t parts, int64_t task, Acc* partials) {
    const int64_t channels = g.in_per_group(), blocks = ceil_div(channels, kBlock), whole = g.groups * channels * channels;
    Acc* const gram = partials + task / blocks * channels * channels;
    const int64_t first = task % blocks * kBlock, last = std::min(first + kBlock, channels);
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t row = first; row < last; ++row)
            for (int64_t column = 0; column <= row; ++column)
                gram[row * channels + column] += gram[part * whole + row * channels + column];
    mirror(gram, channels, first, last);
}

template <typename Acc>
void pack_half(const Acc* gram, int64_t channels, Acc* packed) {
    for (int64_t row = 0; row < channels; ++row) packed = std::copy_n(gram + row * channels, row + 1, packed);
}

template <typename Acc>
void unpack_half(const Acc* packed, int64_t channels, Acc* gram) {
    for (int64_t first = 0; first < channels; first += kBlock) {
        const int64_t last = std::min(first + kBlock, channels);
        for (int64_t row = first; row < last; ++row) std::copy_n(packed + half(row), row + 1, gram + row * channels);
        mirror(gram, channels, first, last);
    }
}

int64_t gram_product_tasks(const Geometry& g) {
    return g.groups * ceil_div(g.out_per_group(), kSide) * ceil_div(g.in_per_group(), kSide);
}

void gram_product(const Geometry& g, const uint16_t* weight, const float* gram, int64_t task, float* d) {
    const int64_t channels = g.in_per_group(), outputs = g.out_per_group();
    const int64_t across = ceil_div(channels, kSide), each = ceil_div(outputs, kSide) * across;
    const int64_t group = task / each, first_row = task % each / across * kSide, left = task % across * kSide;
    const int64_t rows = std::min(kSide, outputs - first_row), columns = std::min(kSide, channels - left);
    PatchSource w{weight + (group * outputs + first_row) * channels, Kind::bf16, {}, {0, channels, {0, 0, 1}}};
    w.geometry.in_channels = rows;
    w.geometry.input[2] = w.geometry.output[2] = channels;
    const Tiles packed(rows);
    const std::array<Tiles, 3> thirds{Tiles(columns), Tiles(columns), Tiles(columns)};
    const TileUnit unit(Unit::kTiles);
    for (int64_t first = 0; first < channels; first += kDepth) {
        const int64_t count = std::min(kDepth, channels - first);
        pack_tiles(w, packed, 0, rows, first, count);
        if (packed_form(w) == Form::kPairs) transpose_tiles(packed, packed, rows, count); // one channel
        pack_thirds(gram + (group * channels + first) * channels + left, channels, count, columns, thirds);
        for (int64_t column = 0; column < columns; column += kTileColumns)
            for (int64_t row = 0; row < rows; row += kTileColumns)
                unit.multiply(packed.panel(row), Form::kColumns,
                              {{thirds[0].panel(column), thirds[1].panel(column), thirds[2].panel(column)}}, count,
                              {d + (group * outputs + first_row + row) * channels + left + column, channels,
                               std::min(kTileColumns, rows - row), std::min(kTileColumns, columns - column), first > 0});
    }
}

template void gram_part<float>(const PatchSource&, const Tasks&, int64_t, float*, float*, Unit);
template void gram_part<double>(const PatchSource&, const Tasks&, int64_t, double*, double*, Unit);
template void finish_gram<float>(const Geometry&, int64_t, int64_t, float*);
template void finish_gram<double>(const Geometry&, int64_t, int64_t, double*);
template void pack_half<float>(const float*, int64_t, float*);
template void pack_half<double>(const double*, int64_t, double*);
template void unpack_half<float>(const float*, int64_t, float*);
template void unpack_half<double>(const double*, int64_t, double*);

} // namespace localsgd
