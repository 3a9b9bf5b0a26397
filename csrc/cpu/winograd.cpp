#include "winograd.h"

#include <algorithm>
#include <bit>
#include <type_traits>

#include "panels.h"
#include "winograd_rules.h"

namespace localsgd {
namespace {

constexpr int64_t kCachedElements = 1 << 18; // 1 MB of transforms, which a second-level cache holds
constexpr int64_t kChain = 16;               // tiles that have a sum of their own
constexpr int64_t kChannels = 64;            // of a task's transforms
constexpr int64_t kLeastBlocks = 4;          // of a part
constexpr int64_t kFinished = 16;            // rows of D that are finished together
constexpr int64_t kPiece = 32;               // outputs side by side that are transformed together
constexpr int64_t kMostColumns = kPiece + 2;

template <typename Acc>
int64_t columns_in_panels(int64_t channels) {
    return ceil_div(channels, kMostPanel<Acc>) * kMostPanel<Acc>;
}

// Of a transformed frequency: one line more than there is, as frequencies a power of two apart would share a few sets of the
// cache.
template <typename Acc>
int64_t frequency_elements(int64_t channels) {
    return columns_in_panels<Acc>(channels) * kTilesAtOnce + kMostPanel<Acc>;
}

// Rows of one operand that a tile's transform reads: vectors of channels, `step` elements from column to column.
template <typename Acc, int kIn>
struct Rows {
    const Acc* data[kIn];
    int64_t step[kIn];
};

// Columns [0, columns) of the rows, of which only [begin, end) are not 0, to mid [kOut][kMostColumns][kLanes].
template <typename Acc, int kBytes, typename Rule>
LOCALSGD_INLINE void transform_columns(const Rows<Acc, Rule::kIn>& rows, int64_t columns, int64_t begin, int64_t end,
                                       Acc* mid) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    const auto to = [&](int64_t i, int64_t column) -> V& {
        return *reinterpret_cast<V*>(mid + (i * kMostColumns + column) * kLanes);
    };
    for (int64_t column = 0; column < columns; ++column) {
        V in[Rule::kIn], out[Rule::kOut];
        if (column < begin || column >= end) {
            for (int i = 0; i < Rule::kOut; ++i) to(i, column) = V{};
            continue;
        }
        for (int i = 0; i < Rule::kIn; ++i) in[i] = *reinterpret_cast<const V*>(rows.data[i] + column * rows.step[i]);
        Rule::apply(in, out);
        for (int i = 0; i < Rule::kOut; ++i) to(i, column) = out[i];
    }
}

// `rows` rows of `mid`, kTile columns a tile, to to[frequency][tile]: `frequency` elements apart, and `pitch` from tile to
// tile.
template <typename Acc, int kBytes, typename Rule>
LOCALSGD_INLINE void transform_tiles(const Acc* mid, int64_t rows, int64_t tiles, Acc* to, int64_t frequency, int64_t pitch) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    for (int64_t i = 0; i < rows; ++i, mid += kMostColumns * kLanes, to += Rule::kOut * frequency)
        for (int64_t t = 0; t < tiles; ++t) {
            V in[Rule::kIn], out[Rule::kOut];
            for (int j = 0; j < Rule::kIn; ++j) in[j] = *reinterpret_cast<const V*>(mid + (Rule::kTile * t + j) * kLanes);
            Rule::apply(in, out);
            for (int j = 0; j < Rule::kOut; ++j) *reinterpret_cast<V*>(to + j * frequency + t * pitch) = out[j];
        }
}

// Columns [begin, end) of a row, `count` channels from `element` on, to staged [columns][kLanes]; the channels behind are 0.
template <typename Acc, int kBytes>
LOCALSGD_INLINE void stage(const PatchSource& s, int64_t element, int64_t count, int64_t begin, int64_t end, Acc* staged,
                           Acc* scratch) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kSquare = kTransposed<Acc>;
    const int64_t step = s.strides.space[2], run = end - begin;
    if (run <= 0) return;
    staged += begin * kLanes;
    if (count < kLanes)
        for (int64_t t = 0; t < run; ++t) std::fill(staged + t * kLanes + count, staged + (t + 1) * kLanes, Acc(0));
    if (s.strides.channel == 1) {
        for (int64_t t = 0; t < run; ++t)
            copy_run(staged + t * kLanes, offset(s.data, s.kind, element + t * step), s.kind, count, 1);
        return;
    }
    const bool same = s.kind == kKindOf<Acc> && step == 1;
    const int64_t pitch = same ? s.strides.channel : kMostColumns;
    const Acc* const from = same ? static_cast<const Acc*>(s.data) + element : scratch;
    for (int64_t i = 0; i < count && !same; ++i)
        copy_run(scratch + i * pitch, offset(s.data, s.kind, element + i * s.strides.channel), s.kind, run, step);
    const int64_t whole = count == kLanes ? run - run % kSquare : 0;
    for (int64_t t = 0; t < whole; t += kSquare)
        for (int64_t i = 0; i < kLanes; i += kSquare)
            transpose_block<1>(from + i * pitch + t, pitch, staged + t * kLanes + i, kLanes);
    for (int64_t t = whole; t < run; ++t)
        for (int64_t i = 0; i < count; ++i) staged[t * kLanes + i] = from[i * pitch + t];
}

template <typename Acc>
struct Transform {
    PatchSource source;
    Triple output, pad; // the layer's
    WinogradTile tile;
    int64_t first, count; // tiles
    int64_t channel_begin = 0, channel_end = 0;
    int64_t frequency = 0; // elements from one to the next
    Acc* to = nullptr;     // [frequencies][panels][kTilesAtOnce][kPanel]
};

template <typename Acc, int kBytes, typename Down, typename Across>
LOCALSGD_INLINE void transform_operand(const Transform<Acc>& p) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    constexpr bool kOverlaps = Down::kIn > Down::kTile;
    alignas(64) Acc mid[Down::kOut * kMostColumns * kLanes], staged[Down::kIn * kMostColumns * kLanes],
        scratch[kMostColumns * kLanes];
    alignas(64) static constexpr Acc kZeros[kLanes] = {};
    const PatchSource& s = p.source;
    const Geometry& g = s.geometry;
    const int64_t columns = ceil_div(p.output[2], Across::kTile), rows = ceil_div(p.output[1], Down::kTile);
    const bool in_place = s.kind == kKindOf<Acc> && s.strides.channel == 1;
    for (int64_t done = 0; done < p.count;) {
        const int64_t tile = p.first + done, column = tile % columns, row = tile / columns % rows,
                      image = tile / columns / rows;
        const int64_t tiles = std::min({kPiece / Across::kTile, columns - column, p.count - done});
        const int64_t top = row * Down::kTile - (kOverlaps ? p.pad[1] : 0);
        const int64_t left = column * Across::kTile - (kOverlaps ? p.pad[2] : 0);
        const int64_t width = Across::kTile * tiles + (kOverlaps ? 2 : 0);
        const int64_t begin = std::clamp<int64_t>(-left, 0, width), end = std::clamp<int64_t>(g.input[2] - left, begin, width);
        for (int64_t c = p.channel_begin; c < p.channel_end; c += kLanes) {
            const int64_t channels = std::clamp<int64_t>(g.in_channels - c, 0, kLanes);
            Rows<Acc, Down::kIn> read;
            for (int64_t i = 0; i < Down::kIn; ++i) {
                const int64_t element = image * s.strides.batch + c * s.strides.channel + (top + i) * s.strides.space[1] +
                                        left * s.strides.space[2];
                if (top + i < 0 || top + i >= g.input[1]) {
                    read.data[i] = kZeros;
                    read.step[i] = 0;
                } else if (in_place && channels == kLanes) {
                    read.data[i] = static_cast<const Acc*>(s.data) + element;
                    read.step[i] = s.strides.space[2];
                } else {
                    Acc* const to = staged + i * kMostColumns * kLanes;
                    stage<Acc, kBytes>(s, element + begin * s.strides.space[2], channels, begin, end, to, scratch);
                    read.data[i] = to;
                    read.step[i] = kLanes;
                }
            }
            transform_columns<Acc, kBytes, Down>(read, width, begin, end, mid);
            Acc* const to = p.to + (c / kPanel * kTilesAtOnce + done) * kPanel + c % kPanel;
            transform_tiles<Acc, kBytes, Across>(mid, Down::kOut, tiles, to, p.frequency, kPanel);
        }
        done += tiles;
    }
}

// body(height, width), known to the compiler, of a tile.
template <typename Body>
LOCALSGD_INLINE void with_tile(WinogradTile tile, const Body& body) {
    using Two = std::integral_constant<int, 2>;
    using Four = std::integral_constant<int, 4>;
    if (tile.height == 4)
        body(Four(), Four());
    else if (tile.width == 4)
        body(Two(), Four());
    else
        body(Two(), Two());
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void transform_x(const Transform<Acc>& p) {
    with_tile(p.tile, [&](auto height, auto width) __attribute__((always_inline)) {
        transform_operand<Acc, kBytes, typename Rules<Acc, kBytes, height>::OfX, typename Rules<Acc, kBytes, width>::OfX>(p);
    });
}
template <typename Acc, int kBytes>
LOCALSGD_INLINE void transform_z(const Transform<Acc>& p) {
    with_tile(p.tile, [&](auto height, auto width) __attribute__((always_inline)) {
        transform_operand<Acc, kBytes, typename Rules<Acc, kBytes, height>::OfZ, typename Rules<Acc, kBytes, width>::OfZ>(p);
    });
}

LOCALSGD_BOTH_WIDTHS(transform_x, Transform<float>, float)
LOCALSGD_BOTH_WIDTHS(transform_x, Transform<double>, double)
LOCALSGD_BOTH_WIDTHS(transform_z, Transform<float>, float)
LOCALSGD_BOTH_WIDTHS(transform_z, Transform<double>, double)

// One panel of columns of one frequency's sums.
template <typename Acc>
struct Multiply {
    const Acc *z, *x;                   // of the first block: [panels][kTilesAtOnce][kPanel]
    int64_t block, count, rows, column; // block: elements
    bool add;
    Acc* sums; // [rows, kMostPanel]
};

template <typename Acc, int kBytes>
LOCALSGD_INLINE void multiply_frequency(const Multiply<Acc>& p) {
    constexpr int64_t kPanel = Shape<Acc, kBytes>::kPanel;
    if (!p.add) std::fill_n(p.sums, p.rows * kMostPanel<Acc>, Acc(0));
    for (int64_t block = 0, left = p.count; left > 0; ++block, left -= kTilesAtOnce)
        for (int64_t column = 0; column < kMostPanel<Acc>; column += kPanel)
            for (int64_t row = 0; row < p.rows; row += kPanel)
                multiply_panel<Acc, kBytes, 0, kChain>(p.z + block * p.block + row * kTilesAtOnce,
                                                       p.x + block * p.block + (p.column + column) * kTilesAtOnce,
                                                       std::min(left, kTilesAtOnce), p.sums + row * kMostPanel<Acc> + column,
                                                       kMostPanel<Acc>, p.rows - row, kPanel);
}

LOCALSGD_BOTH_WIDTHS(multiply_frequency, Multiply<float>, float)
LOCALSGD_BOTH_WIDTHS(multiply_frequency, Multiply<double>, double)

template <typename Acc>
struct Finish {
    const Acc* sums;                // of the first row: of a frequency and a panel, kMostPanel elements a row
    int64_t part, frequency, panel; // elements from one to the next
    int64_t parts, channels, count; // count: rows of D
    WinogradTile tile;
    Acc* d;
    bool taps_first;
};

template <typename Acc, int kBytes, int kHeight, int kWidth>
LOCALSGD_INLINE void finish_tiles(const Finish<Acc>& p) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int kRows = kHeight + 2, kColumns = kWidth + 2; // of frequencies
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = kMostPanel<Acc>, kAhead = 2 * kPanel;
    const auto one = [&](const Acc* from, int64_t c, Acc* d) __attribute__((always_inline)) {
        V mid[3][kColumns], taps[3][3];
        for (int j = 0; j < kColumns; ++j) {
            V in[kRows], out[3];
            for (int i = 0; i < kRows; ++i) {
                const Acc* const sum = from + (i * kColumns + j) * p.frequency;
                in[i] = *reinterpret_cast<const V*>(sum);
                for (int64_t part = 1; part < p.parts; ++part) in[i] += *reinterpret_cast<const V*>(sum + part * p.part);
                __builtin_prefetch(sum + kAhead, 0, 3);
            }
            Rules<Acc, kBytes, kHeight>::back(in, out);
            for (int i = 0; i < 3; ++i) mid[i][j] = out[i];
        }
        for (int i = 0; i < 3; ++i) Rules<Acc, kBytes, kWidth>::back(mid[i], taps[i]);
        const int64_t count = std::min(kLanes, p.channels - c);
        if (p.taps_first && count == kLanes) {
            for (int tap = 0; tap < 9; ++tap) *reinterpret_cast<V*>(d + tap * p.channels + c) = taps[tap / 3][tap % 3];
            return;
        }
        for (int64_t lane = 0; lane < count; ++lane)
            for (int tap = 0; tap < 9; ++tap)
                d[p.taps_first ? tap * p.channels + c + lane : (c + lane) * 9 + tap] = taps[tap / 3][tap % 3][lane];
    };
    for (int64_t left = 0; left < p.channels; left += kPanel)
        for (int64_t row = 0; row < p.count; ++row)
            for (int64_t c = left; c < std::min(left + kPanel, p.channels); c += kLanes)
                one(p.sums + left / kPanel * p.panel + row * kPanel + c - left, c, p.d + row * p.channels * 9);
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void finish(const Finish<Acc>& p) {
    with_tile(p.tile,
              [&](auto height, auto width) __attribute__((always_inline)) { finish_tiles<Acc, kBytes, height, width>(p); });
}

LOCALSGD_BOTH_WIDTHS(finish, Finish<float>, float)
LOCALSGD_BOTH_WIDTHS(finish, Finish<double>, double)

template <typename Acc>
int64_t matrix_elements(const Geometry& g) { // sums of one frequency
    return g.out_channels * columns_in_panels<Acc>(g.in_channels);
}

} // namespace

bool winograd_fits(const Geometry& g) {
    return g.dims == 2 && g.groups == 1 && g.kernel == Triple{1, 3, 3} && product(g.stride) == 1 && product(g.dilation) == 1;
}

template <typename Acc>
int64_t winograd_block_elements(const Geometry& g, const WinogradPlan& plan) {
    return plan.tile.frequencies() * (frequency_elements<Acc>(g.in_channels) + frequency_elements<Acc>(g.out_channels));
}

template <typename Acc>
int64_t winograd_sum_elements(const Geometry& g, const WinogradPlan& plan) {
    return plan.tile.frequencies() * matrix_elements<Acc>(g);
}

namespace {

int64_t tiles_of(const Geometry& g, WinogradTile tile) {
    return g.batch * ceil_div(g.output[1], tile.height) * ceil_div(g.output[2], tile.width);
}

// The one of the fewest multiplications among those that round no more than twice as much as PyTorch does, whose sums err the
// more the longer they are.
WinogradTile tile_for(const Geometry& g) {
    WinogradTile best = kWinogradTiles[0];
    for (const WinogradTile& tile : kWinogradTiles) {
        const bool fewer = tile.frequencies() * tiles_of(g, tile) < best.frequencies() * tiles_of(g, best);
        if (fewer && g.positions() >= tile.least_positions) best = tile;
    }
    return best;
}

} // namespace

WinogradPlan winograd_plan(const Geometry& g, int64_t threads) { return winograd_plan(g, threads, tile_for(g)); }

WinogradPlan winograd_plan(const Geometry& g, int64_t threads, WinogradTile tile) {
    const int64_t channels = columns_in_panels<float>(g.in_channels) + columns_in_panels<float>(g.out_channels);
    WinogradPlan plan;
    plan.wide = has_wide_registers();
    plan.tile = tile;
    plan.tiles = tiles_of(g, tile);
    const int64_t blocks = ceil_div(plan.tiles, kTilesAtOnce), sums = winograd_sum_elements<float>(g, plan);
    const int64_t most = std::min({kMostParts, blocks / kLeastBlocks, kMostPartElements / std::max<int64_t>(1, sums)});
    plan.parts = int64_t(std::bit_floor(uint64_t(std::max<int64_t>(1, most)))); // two or four threads share them out evenly
    plan.apart = plan.parts % threads == 0; // what a thread transformed is then in its own cache where it is multiplied
    // Fewer channels are little work between two times that all threads wait for each other.
    const int64_t each = std::max<int64_t>(1, plan.tile.frequencies() * kTilesAtOnce * channels); // elements
    const int64_t cached = (plan.apart ? 1 : threads) * kCachedElements / each;
    plan.blocks = std::clamp<int64_t>(cached, 1, std::max<int64_t>(1, ceil_div(blocks, plan.parts)));
    return plan;
}

int64_t winograd_transforms(const Geometry& g) {
    return ceil_div(g.in_channels, kChannels) + ceil_div(g.out_channels, kChannels);
}

template <typename Acc>
void winograd_transform(const WinogradArgs& a, const WinogradPlan& plan, int64_t task, int64_t first, Acc* block) {
    const Geometry& g = a.x.geometry;
    const int64_t of_z = ceil_div(g.out_channels, kChannels);
    const bool is_z = task < of_z;
    Transform<Acc> p{is_z ? a.z : a.x, g.output, g.pad, plan.tile, first, std::min(kTilesAtOnce, plan.tiles - first)};
    p.channel_begin = (is_z ? task : task - of_z) * kChannels;
    p.channel_end = std::min(p.channel_begin + kChannels, columns_in_panels<Acc>(p.source.geometry.in_channels));
    p.frequency = frequency_elements<Acc>(p.source.geometry.in_channels);
    p.to = block + (is_z ? 0 : plan.tile.frequencies() * frequency_elements<Acc>(g.out_channels));
    if (plan.wide)
        is_z ? transform_z_wide(p) : transform_x_wide(p);
    else
        is_z ? transform_z_narrow(p) : transform_x_narrow(p);
}

template <typename Acc>
int64_t winograd_products(const Geometry& g, const WinogradPlan& plan) {
    return plan.tile.frequencies() * ceil_div(g.in_channels, kMostPanel<Acc>);
}

template <typename Acc>
void winograd_multiply(const WinogradArgs& a, const WinogradPlan& plan, int64_t task, int64_t count, const Acc* blocks,
                       bool add, Acc* sums) {
    const Geometry& g = a.x.geometry;
    const int64_t panels = ceil_div(g.in_channels, kMostPanel<Acc>), frequency = task / panels, panel = task % panels;
    const int64_t of_z = frequency_elements<Acc>(g.out_channels), of_x = frequency_elements<Acc>(g.in_channels);
    const Multiply<Acc> p{blocks + frequency * of_z,
                          blocks + plan.tile.frequencies() * of_z + frequency * of_x,
                          winograd_block_elements<Acc>(g, plan),
                          count,
                          g.out_channels,
                          panel * kMostPanel<Acc>,
                          add,
                          sums + frequency * matrix_elements<Acc>(g) + panel * g.out_channels * kMostPanel<Acc>};
    plan.wide ? multiply_frequency_wide(p) : multiply_frequency_narrow(p);
}

int64_t winograd_finishes(const Geometry& g) { return ceil_div(g.out_channels, kFinished); }

template <typename Acc>
void winograd_finish(const Geometry& g, const WinogradPlan& plan, int64_t task, const Acc* sums, Acc* d, bool taps_first) {
    const int64_t row = task * kFinished;
    const Finish<Acc> p{sums + row * kMostPanel<Acc>,
                        winograd_sum_elements<Acc>(g, plan),
                        matrix_elements<Acc>(g),
                        g.out_channels * kMostPanel<Acc>,
                        plan.parts,
                        g.in_channels,
                        std::min(kFinished, g.out_channels - row),
                        plan.tile,
                        d + row * g.in_channels * 9,
                        taps_first};
    plan.wide ? finish_wide(p) : finish_narrow(p);
}

#define LOCALSGD_WINOGRAD(Acc)                                                                                                \
    template int64_t winograd_block_elements<Acc>(const Geometry&, const WinogradPlan&);                                      \
    template int64_t winograd_sum_elements<Acc>(const Geometry&, const WinogradPlan&);                                        \
    template void winograd_transform<Acc>(const WinogradArgs&, const WinogradPlan&, int64_t, int64_t, Acc*);                  \
    template int64_t winograd_products<Acc>(const Geometry&, const WinogradPlan&);                                            \
    template void winograd_multiply<Acc>(const WinogradArgs&, const WinogradPlan&, int64_t, int64_t, const Acc*, bool, Acc*); \
    template void winograd_finish<Acc>(const Geometry&, const WinogradPlan&, int64_t, const Acc*, Acc*, bool);
LOCALSGD_WINOGRAD(float)
LOCALSGD_WINOGRAD(double)

} // namespace localsgd
