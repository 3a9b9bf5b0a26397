#include "winograd.h"

#include <algorithm>

#include "panels.h"

namespace localsgd {
namespace {

// The points are 0, 1, -1 and infinity. Where the way back takes halves the transforms do not: fewer roundings.
template <typename Acc, int kBytes>
struct Rules {
    using V = typename Vector<Acc, kBytes>::Type;

    struct OfX { // whose tiles overlap by two rows and columns
        static constexpr int kIn = 4;
        static LOCALSGD_INLINE void apply(const V (&x)[4], V (&out)[4]) {
            out[0] = x[0] - x[2];
            out[1] = x[1] + x[2];
            out[2] = x[2] - x[1];
            out[3] = x[3] - x[1];
        }
    };
    struct OfZ {
        static constexpr int kIn = 2;
        static LOCALSGD_INLINE void apply(const V (&z)[2], V (&out)[4]) {
            out[0] = z[0];
            out[1] = z[0] + z[1];
            out[2] = z[0] - z[1];
            out[3] = z[1];
        }
    };
    static LOCALSGD_INLINE void back(const V (&sum)[4], V (&taps)[3]) {
        const V even = (sum[1] + sum[2]) * Acc(0.5);
        taps[0] = sum[0] + even;
        taps[1] = (sum[1] - sum[2]) * Acc(0.5);
        taps[2] = even + sum[3];
    }
};

constexpr int64_t kCachedChannels = 256; // whose transforms of a block, 1 MB, a second-level cache holds
constexpr int64_t kChannels = 64;        // of a task's transforms
constexpr int64_t kLeastBlocks = 4;      // of a part
constexpr int64_t kFinished = 16;        // rows of D that are finished together
constexpr int64_t kPiece = 16;           // tiles side by side that are transformed together
constexpr int64_t kMostColumns = 2 * kPiece + 2;

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

// Columns [0, columns) of the rows, of which only [begin, end) are not 0, to mid [4][kMostColumns][kLanes].
template <typename Acc, int kBytes, typename Rule>
LOCALSGD_INLINE void transform_columns(const Rows<Acc, Rule::kIn>& rows, int64_t columns, int64_t begin, int64_t end,
                                       Acc* mid) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    const auto to = [&](int64_t i, int64_t column) -> V& {
        return *reinterpret_cast<V*>(mid + (i * kMostColumns + column) * kLanes);
    };
    for (int64_t column = 0; column < columns; ++column) {
        V in[Rule::kIn], out[4];
        if (column < begin || column >= end) {
            for (int i = 0; i < 4; ++i) to(i, column) = V{};
            continue;
        }
        for (int i = 0; i < Rule::kIn; ++i) in[i] = *reinterpret_cast<const V*>(rows.data[i] + column * rows.step[i]);
        Rule::apply(in, out);
        for (int i = 0; i < 4; ++i) to(i, column) = out[i];
    }
}

// The rows of `mid`, two columns a tile, to to[frequency][tile]: `frequency` elements apart, and `pitch` from tile to tile.
template <typename Acc, int kBytes, typename Rule>
LOCALSGD_INLINE void transform_tiles(const Acc* mid, int64_t tiles, Acc* to, int64_t frequency, int64_t pitch) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes;
    for (int64_t i = 0; i < 4; ++i, mid += kMostColumns * kLanes, to += 4 * frequency)
        for (int64_t t = 0; t < tiles; ++t) {
            V in[Rule::kIn], out[4];
            for (int j = 0; j < Rule::kIn; ++j) in[j] = *reinterpret_cast<const V*>(mid + (2 * t + j) * kLanes);
            Rule::apply(in, out);
            for (int j = 0; j < 4; ++j) *reinterpret_cast<V*>(to + j * frequency + t * pitch) = out[j];
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
    int64_t channel_begin, channel_end, first, count;
    Acc* to; // [frequencies][panels][kTilesAtOnce][kPanel]
};

template <typename Acc, int kBytes, typename Rule>
LOCALSGD_INLINE void transform_operand(const Transform<Acc>& p) {
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = Shape<Acc, kBytes>::kPanel;
    constexpr bool kOverlaps = Rule::kIn > 2;
    alignas(64) Acc mid[4 * kMostColumns * kLanes], staged[Rule::kIn * kMostColumns * kLanes], scratch[kMostColumns * kLanes];
    alignas(64) static constexpr Acc kZeros[kLanes] = {};
    const PatchSource& s = p.source;
    const Geometry& g = s.geometry;
    const int64_t columns = ceil_div(p.output[2], 2), rows = ceil_div(p.output[1], 2);
    const int64_t frequency = frequency_elements<Acc>(g.in_channels);
    const bool in_place = s.kind == kKindOf<Acc> && s.strides.channel == 1;
    for (int64_t done = 0; done < p.count;) {
        const int64_t tile = p.first + done, column = tile % columns, row = tile / columns % rows,
                      image = tile / columns / rows;
        const int64_t tiles = std::min({kPiece, columns - column, p.count - done});
        const int64_t top = row * 2 - (kOverlaps ? p.pad[1] : 0), left = column * 2 - (kOverlaps ? p.pad[2] : 0);
        const int64_t width = 2 * tiles + (kOverlaps ? 2 : 0);
        const int64_t begin = std::clamp<int64_t>(-left, 0, width), end = std::clamp<int64_t>(g.input[2] - left, begin, width);
        for (int64_t c = p.channel_begin; c < p.channel_end; c += kLanes) {
            const int64_t channels = std::clamp<int64_t>(g.in_channels - c, 0, kLanes);
            Rows<Acc, Rule::kIn> read;
            for (int64_t i = 0; i < Rule::kIn; ++i) {
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
            transform_columns<Acc, kBytes, Rule>(read, width, begin, end, mid);
            Acc* const to = p.to + (c / kPanel * kTilesAtOnce + done) * kPanel + c % kPanel;
            transform_tiles<Acc, kBytes, Rule>(mid, tiles, to, frequency, kPanel);
        }
        done += tiles;
    }
}

template <typename Acc, int kBytes>
LOCALSGD_INLINE void transform_x(const Transform<Acc>& p) {
    transform_operand<Acc, kBytes, typename Rules<Acc, kBytes>::OfX>(p);
}
template <typename Acc, int kBytes>
LOCALSGD_INLINE void transform_z(const Transform<Acc>& p) {
    transform_operand<Acc, kBytes, typename Rules<Acc, kBytes>::OfZ>(p);
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
                multiply_panel<Acc, kBytes>(p.z + block * p.block + row * kTilesAtOnce,
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
    Acc* d;
    bool taps_first;
};

template <typename Acc, int kBytes>
LOCALSGD_INLINE void finish(const Finish<Acc>& p) {
    using V = typename Vector<Acc, kBytes>::Type;
    constexpr int64_t kLanes = Vector<Acc, kBytes>::kLanes, kPanel = kMostPanel<Acc>, kAhead = 2 * kPanel;
    const auto one = [&](const Acc* from, int64_t c, Acc* d) __attribute__((always_inline)) {
        V mid[3][4], taps[3][3];
        for (int j = 0; j < 4; ++j) {
            V in[4], out[3];
            for (int i = 0; i < 4; ++i) {
                const Acc* const sum = from + (i * 4 + j) * p.frequency;
                in[i] = *reinterpret_cast<const V*>(sum);
                for (int64_t part = 1; part < p.parts; ++part) in[i] += *reinterpret_cast<const V*>(sum + part * p.part);
                __builtin_prefetch(sum + kAhead, 0, 3);
            }
            Rules<Acc, kBytes>::back(in, out);
            for (int i = 0; i < 3; ++i) mid[i][j] = out[i];
        }
        for (int i = 0; i < 3; ++i) Rules<Acc, kBytes>::back(mid[i], taps[i]);
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
int64_t winograd_block_elements(const Geometry& g) {
    return kFrequencies * (frequency_elements<Acc>(g.in_channels) + frequency_elements<Acc>(g.out_channels));
}

template <typename Acc>
int64_t winograd_sum_elements(const Geometry& g) {
    return kFrequencies * matrix_elements<Acc>(g);
}

WinogradPlan winograd_plan(const Geometry& g, int64_t threads) {
    WinogradPlan plan;
    plan.wide = has_wide_registers();
    plan.tiles = g.batch * ceil_div(g.output[1], 2) * ceil_div(g.output[2], 2);
    const int64_t blocks = ceil_div(plan.tiles, kTilesAtOnce), sums = winograd_sum_elements<float>(g);
    plan.parts = std::min({kMostParts, blocks / kLeastBlocks, kMostPartElements / std::max<int64_t>(1, sums)});
    plan.parts = std::max<int64_t>(1, plan.parts);
    plan.apart = plan.parts % threads == 0; // what a thread transformed is then in its own cache where it is multiplied
    // Fewer channels are little work between two times that all threads wait for each other.
    const int64_t channels = columns_in_panels<float>(g.in_channels) + columns_in_panels<float>(g.out_channels);
    const int64_t cached = (plan.apart ? 1 : threads) * kCachedChannels / std::max<int64_t>(1, channels);
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
    Transform<Acc> p{is_z ? a.z : a.x, g.output, g.pad, 0, 0, first, std::min(kTilesAtOnce, plan.tiles - first), block};
    p.channel_begin = (is_z ? task : task - of_z) * kChannels;
    p.channel_end = std::min(p.channel_begin + kChannels, columns_in_panels<Acc>(p.source.geometry.in_channels));
    if (!is_z) p.to += kFrequencies * frequency_elements<Acc>(g.out_channels);
    if (plan.wide)
        is_z ? transform_z_wide(p) : transform_x_wide(p);
    else
        is_z ? transform_z_narrow(p) : transform_x_narrow(p);
}

template <typename Acc>
int64_t winograd_products(const Geometry& g) {
    return kFrequencies * ceil_div(g.in_channels, kMostPanel<Acc>);
}

template <typename Acc>
void winograd_multiply(const WinogradArgs& a, const WinogradPlan& plan, int64_t task, int64_t count, const Acc* blocks,
                       bool add, Acc* sums) {
    const Geometry& g = a.x.geometry;
    const int64_t panels = ceil_div(g.in_channels, kMostPanel<Acc>), frequency = task / panels, panel = task % panels;
    const int64_t of_z = frequency_elements<Acc>(g.out_channels), of_x = frequency_elements<Acc>(g.in_channels);
    const Multiply<Acc> p{blocks + frequency * of_z,
                          blocks + kFrequencies * of_z + frequency * of_x,
                          winograd_block_elements<Acc>(g),
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
                        winograd_sum_elements<Acc>(g),
                        matrix_elements<Acc>(g),
                        g.out_channels * kMostPanel<Acc>,
                        plan.parts,
                        g.in_channels,
                        std::min(kFinished, g.out_channels - row),
                        d + row * g.in_channels * 9,
                        taps_first};
    plan.wide ? finish_wide(p) : finish_narrow(p);
}

#define LOCALSGD_WINOGRAD(Acc)                                                                                                \
    template int64_t winograd_block_elements<Acc>(const Geometry&);                                                           \
    template int64_t winograd_sum_elements<Acc>(const Geometry&);                                                             \
    template void winograd_transform<Acc>(const WinogradArgs&, const WinogradPlan&, int64_t, int64_t, Acc*);                  \
    template int64_t winograd_products<Acc>(const Geometry&);                                                                 \
    template void winograd_multiply<Acc>(const WinogradArgs&, const WinogradPlan&, int64_t, int64_t, const Acc*, bool, Acc*); \
    template void winograd_finish<Acc>(const Geometry&, const WinogradPlan&, int64_t, const Acc*, Acc*, bool);
LOCALSGD_WINOGRAD(float)
LOCALSGD_WINOGRAD(double)

} // namespace localsgd
