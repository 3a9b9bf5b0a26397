#include "direct.h"

#include <algorithm>
#include <vector>

#include "panels.h"

namespace localsgd {
namespace {

constexpr int64_t kChunk = 512;          // columns of X in the cache at once
constexpr int64_t kBlock = 8;            // rows of D that are finished together
constexpr int64_t kLeastPositions = 512; // of a part: with fewer, more sums of each element of D cost more than they share out

template <typename Acc>
struct Part {
    DirectArgs args;    // one group's
    int64_t first, end; // positions
    int64_t column_begin, column_end;
    Acc* d; // [panels, K, kMostPanel]
};

// Of an element of D: neighbours in a product lie together, not a whole row of D apart.
template <typename Acc>
int64_t place(int64_t rows, int64_t row, int64_t column) {
    return (column / kMostPanel<Acc> * rows + row) * kMostPanel<Acc> + column % kMostPanel<Acc>;
}

// Of a group's sums.
template <typename Acc>
int64_t padded(const Geometry& g) {
    return g.out_per_group() * ceil_div(g.patch(), kMostPanel<Acc>) * kMostPanel<Acc>;
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void add_part(const Part<Acc>& p) {
    using Shape = Shape<Acc, kBytes>;
    const Geometry &g = p.args.x.geometry, &out = p.args.z.geometry;
    const int64_t rows = out.in_per_group();
    const Panels<Acc, kBytes> z(rows), x(std::min(kChunk, p.column_end - p.column_begin));
    std::vector<Acc> scratch(scratch_size<Acc>(std::max(rows, g.in_per_group())));
    for (int64_t first = p.first; first < p.end; first += kTile) {
        const int64_t count = std::min(kTile, p.end - first);
        pack<Acc, kBytes>(p.args.z, z, 0, rows, first, count, scratch.data());
        for (int64_t begin = p.column_begin; begin < p.column_end; begin += kChunk) {
            const int64_t columns = std::min(kChunk, p.column_end - begin);
            pack<Acc, kBytes>(p.args.x, x, begin, begin + columns, first, count, scratch.data());
            for (int64_t column = 0; column < columns; column += Shape::kPanel)
                for (int64_t row = 0; row < rows; row += Shape::kPanel)
                    multiply_panel<Acc, kBytes>(z.at(row, 0), x.at(column, 0), count,
                                                p.d + place<Acc>(rows, row, begin + column), kMostPanel<Acc>, rows - row,
                                                Shape::kPanel);
        }
    }
}

LOCALSGD_BOTH_WIDTHS(add_part, Part<float>, float)
LOCALSGD_BOTH_WIDTHS(add_part, Part<double>, double)

void add_part_tiles(const Part<float>& p, Unit by) {
    static_assert(kMostPanel<float> == kTileColumns);
    const PatchSource& of_z = p.args.z;
    ChannelsLast inputs(p.args.x);
    const int64_t rows = of_z.geometry.in_per_group();
    const Tiles z(rows), x(std::min(kChunk, p.column_end - p.column_begin));
    const TileUnit unit(by);
    const Form packed = packed_form(of_z), left = unit.may_be_left(packed) ? packed : Form::kColumns;
    for (int64_t first = p.first; first < p.end; first += kTilePositions) {
        const int64_t count = std::min(kTilePositions, p.end - first);
        pack_tiles(of_z, z, 0, rows, first, count);
        if (left != packed) transpose_tiles(z, z, rows, count);
        const PatchSource of_x = inputs.useful() ? inputs.of(first, count) : p.args.x;
        for (int64_t begin = p.column_begin; begin < p.column_end; begin += kChunk) {
            const int64_t columns = std::min(kChunk, p.column_end - begin);
            pack_tiles(of_x, x, begin, begin + columns, first, count);
            if (packed_form(of_x) == Form::kColumns) transpose_tiles(x, x, columns, count);
            for (int64_t column = 0; column < columns; column += kTileColumns)
                for (int64_t row = 0; row < rows; row += kTileColumns)
                    unit.multiply(z.panel(row), left, {{x.panel(column)}}, count,
                                  {p.d + place<float>(rows, row, begin + column), kTileColumns,
                                   std::min(kTileColumns, rows - row), kTileColumns, first > p.first});
        }
    }
}

PatchSource of_group(const PatchSource& source, int64_t group) {
    PatchSource s = source;
    s.data = offset(s.data, s.kind, group * s.geometry.in_per_group() * s.strides.channel);
    return s;
}

} // namespace

template <typename Acc>
int64_t direct_elements(const Geometry& g) {
    return g.groups * padded<Acc>(g);
}

Tasks direct_tasks(const Geometry& g, int64_t threads, Unit unit) {
    const int64_t products = g.positions() * g.out_per_group() * g.patch();
    const int64_t long_enough = g.positions() / kLeastPositions;
    if (g.patch() >= kWide || long_enough < 2)
        return {1, std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, g.patch() / 64))};
    const int64_t most = std::clamp<int64_t>(std::min(kMostPartElements / direct_elements<float>(g), long_enough), 1,
                                             most_parts(g.positions(), unit));
    return {std::clamp<int64_t>(products / kLeastProducts, 1, most), 1};
}

template <typename Acc>
void direct_part(const DirectArgs& a, const Tasks& tasks, int64_t task, Acc* partials, Unit unit) {
    const Geometry& g = a.x.geometry;
    const int64_t matrix = task / tasks.strips, part = matrix / g.groups, strip = task % tasks.strips;
    Part<Acc> p{{of_group(a.x, matrix % g.groups), of_group(a.z, matrix % g.groups)}, 0, 0, 0, 0, nullptr};
    merge_space(p.args.x.geometry, p.args.x.strides);
    merge_space(p.args.z.geometry, p.args.z.strides);
    p.first = g.positions() * part / tasks.parts;
    p.end = g.positions() * (part + 1) / tasks.parts;
    const auto column = [&](int64_t i) {
        return i == tasks.strips ? g.patch() : g.patch() * i / tasks.strips / kMostPanel<Acc> * kMostPanel<Acc>;
    };
    p.column_begin = column(strip);
    p.column_end = column(strip + 1);
    const int64_t rows = g.out_per_group();
    p.d = partials + matrix * padded<Acc>(g);
    if constexpr (sizeof(Acc) == sizeof(float))
        if (only_bf16(unit) && p.first < p.end) return add_part_tiles(p, unit);
    std::fill(p.d + p.column_begin * rows, p.d + ceil_div(p.column_end, kMostPanel<Acc>) * kMostPanel<Acc> * rows, Acc(0));
    unit == Unit::kWide ? add_part_wide(p) : add_part_narrow(p);
}

int64_t direct_blocks(const Geometry& g) { return g.groups * ceil_div(g.out_per_group(), kBlock); }

template <typename Acc>
void finish_direct(const Geometry& g, int64_t parts, int64_t block, const Acc* partials, Acc* d, bool taps_first) {
    constexpr int64_t kPanel = kMostPanel<Acc>;
    const int64_t channels = g.in_per_group(), taps = g.taps(), rows = g.out_per_group(), whole = direct_elements<Acc>(g);
    const int64_t blocks = ceil_div(rows, kBlock), group = block / blocks, first = block % blocks * kBlock;
    const int64_t count = std::min(kBlock, rows - first);
    const Acc* const from = partials + group * padded<Acc>(g);
    const int64_t channel_stride = taps_first ? 1 : taps, tap_stride = taps_first ? channels : 1;
    const auto piece = [&](int64_t tap, int64_t c, int64_t run) {
        const Acc* sums = from + place<Acc>(rows, first, tap * channels + c);
        Acc* to = d + (group * rows + first) * g.patch() + c * channel_stride + tap * tap_stride;
        for (int64_t k = 0; k < count; ++k, sums += kPanel, to += g.patch())
            if (parts == 1 && channel_stride == 1)
                std::copy_n(sums, run, to);
            else
                for (int64_t i = 0; i < run; ++i) {
                    Acc sum = sums[i];
                    for (int64_t part = 1; part < parts; ++part) sum += sums[part * whole + i];
                    to[i * channel_stride] = sum;
                }
    };
    for (int64_t left = 0; left < channels; left += kPanel) // all taps of some channels: what they write stays in the cache
        for (int64_t tap = 0; tap < g.taps(); ++tap)
            for (int64_t c = left, last = std::min(left + kPanel, channels); c < last;) {
                const int64_t run = std::min(last - c, kPanel - (tap * channels + c) % kPanel);
                piece(tap, c, run);
                c += run;
            }
}

template int64_t direct_elements<float>(const Geometry&);
template int64_t direct_elements<double>(const Geometry&);
template void direct_part<float>(const DirectArgs&, const Tasks&, int64_t, float*, Unit);
template void direct_part<double>(const DirectArgs&, const Tasks&, int64_t, double*, Unit);
template void finish_direct<float>(const Geometry&, int64_t, int64_t, const float*, float*, bool);
template void finish_direct<double>(const Geometry&, int64_t, int64_t, const double*, double*, bool);

} // namespace localsgd
