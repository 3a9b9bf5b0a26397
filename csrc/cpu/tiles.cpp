#include "tiles.h"

#include <algorithm>
#include <cstring>

#include "intrinsics.h"
#ifdef LOCALSGD_HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace localsgd {

Tiles::Tiles(int64_t columns) : memory_(ceil_div(columns, kTileColumns) * 2 * kPanelPitch + 32), data_(memory_.data()) {
    data_ += (32 - reinterpret_cast<uintptr_t>(data_) / sizeof(uint16_t) % 32) % 32; // whole cache lines
}

#ifdef LOCALSGD_HAS_TILES

namespace {

constexpr int64_t kBlock = 512; // elements: 1 KiB

// Elements of 16 bits: lanes [at, at + count).
LOCALSGD_INLINE uint32_t lanes(int64_t at, int64_t count) { return static_cast<uint32_t>(((uint64_t{1} << count) - 1) << at); }

// Two positions' values of `count` neighbouring columns side by side, from lane `lane` of a row of pairs on.
LOCALSGD_PACKS inline void store_pairs(const uint16_t* first, const uint16_t* second, int64_t lane, int64_t count,
                                       uint16_t* row) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto mask = static_cast<__mmask16>(lanes(lane, count));
    const auto load = [&](const uint16_t* from) LOCALSGD_PACKS {
        return from ? _mm256_maskz_loadu_epi16(mask, from - lane) : _mm256_setzero_si256();
    };
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(load(first)), load(second), 1);
    _mm512_mask_storeu_epi32(row, mask, _mm512_permutexvar_epi16(order, both));
}

// Columns [column, last) at the positions whose channels lie at `rows`, null for zeros: 32 positions at a time, so that lines
// of memory of which a panel takes a half are still in the cache for the next one.
LOCALSGD_PACKS inline void pack_channels(const Tiles& to, int64_t column, int64_t last, const uint16_t* const* rows,
                                         int64_t positions) {
    for (int64_t t = 0; t < positions; t += 32)
        for (int64_t c = column; c < last;) {
            const int64_t lane = c % 16, count = std::min(16 - lane, last - c), skip = c - column;
            uint16_t* row = to.panel(c) + t * 16;
            for (int64_t i = t; i < t + 32; i += 2, row += 32)
                store_pairs(rows[i] ? rows[i] + skip : nullptr, rows[i + 1] ? rows[i + 1] + skip : nullptr, lane, count, row);
            c += count;
        }
}

// Pairs of positions apart again: [positions, channels].
LOCALSGD_PACKS inline void unpack_pairs(const Tiles& pairs, int64_t positions, int64_t channels, uint16_t* to) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20,
                                           18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int64_t t = 0; t < positions; t += 2, to += 2 * channels)
        for (int64_t c = 0; c < channels; c += 16) {
            const __m512i apart = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(pairs.panel(c) + t * 16));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), _mm512_castsi512_si256(apart));
            if (t + 1 < positions)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + channels + c), _mm512_extracti64x4_epi64(apart, 1));
        }
}

// A column's values at the positions [at, at + run), `step` elements apart from `from` on, or zeros.
LOCALSGD_PACKS inline void pack_positions(uint16_t* row, int64_t at, int64_t run, const uint16_t* from, int64_t step) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22,
                                          20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    while (run > 0) {
        const int64_t lane = at % 32, count = std::min(32 - lane, run);
        uint16_t* const to = row + at / 32 * kBlock;
        const __mmask32 mask = lanes(lane, count);
        if (!from) {
            _mm512_mask_storeu_epi16(to, mask, _mm512_setzero_si512());
        } else if (step == 1) {
            _mm512_mask_storeu_epi16(to, mask, _mm512_maskz_loadu_epi16(mask, from - lane));
        } else if (step == 2) {
            const uint64_t wanted = ((uint64_t{1} << (2 * count - 1)) - 1) << (2 * lane); // no element behind the last
            const uint16_t* const start = from - 2 * lane;
            const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(wanted), start);
            const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(wanted >> 32), start + 32);
            _mm512_mask_storeu_epi16(to, mask, _mm512_permutex2var_epi16(low, even, high));
        } else {
            for (int64_t i = 0; i < count; ++i) to[lane + i] = from[i * step];
        }
        if (from) from += count * step;
        at += count;
        run -= count;
    }
}

LOCALSGD_PACKS inline void transpose_block(const uint16_t* from, uint16_t* to) {
    __m512i r[16], s[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + 32 * i);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 16; half += 8) {
            s[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            s[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, r[i]);
}

// All of d's tiles: kRows x kColumns of 16 x 16.
template <int kRows, int kColumns>
LOCALSGD_TILES inline void multiply_block(const uint16_t* a, std::span<const uint16_t* const> b, int64_t steps, float* d,
                                          int64_t pitch, bool add) {
    constexpr int64_t kPanel = Tiles::kPanelPitch, kLine = 64;
    const int64_t bytes = pitch * static_cast<int64_t>(sizeof(float));
    __asm__ volatile("" ::: "memory"); // GCC does not know what tileloadd reads
    if (add) {
        _tile_loadd(0, d, bytes);
        if constexpr (kColumns == 2) _tile_loadd(1, d + 16, bytes);
        if constexpr (kRows == 2) _tile_loadd(2, d + 16 * pitch, bytes);
        if constexpr (kRows == 2 && kColumns == 2) _tile_loadd(3, d + 16 * pitch + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, a += kBlock) {
        _tile_loadd(4, a, kLine);
        if constexpr (kRows == 2) _tile_loadd(5, a + kPanel, kLine);
        for (const uint16_t* panels : b) {
            _tile_loadd(6, panels + step * kBlock, kLine);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
            if constexpr (kColumns == 2) {
                _tile_loadd(7, panels + step * kBlock + kPanel, kLine);
                _tile_dpbf16ps(1, 4, 7);
                if constexpr (kRows == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, d, bytes);
    if constexpr (kColumns == 2) _tile_stored(1, d + 16, bytes);
    if constexpr (kRows == 2) _tile_stored(2, d + 16 * pitch, bytes);
    if constexpr (kRows == 2 && kColumns == 2) _tile_stored(3, d + 16 * pitch + 16, bytes);
}

LOCALSGD_TILES void multiply_blocks(const uint16_t* a, std::span<const uint16_t* const> b, int64_t steps,
                                    const TileProduct& p) {
    if (p.rows > 16)
        p.columns > 16 ? multiply_block<2, 2>(a, b, steps, p.d, p.pitch, p.add)
                       : multiply_block<2, 1>(a, b, steps, p.d, p.pitch, p.add);
    else
        p.columns > 16 ? multiply_block<1, 2>(a, b, steps, p.d, p.pitch, p.add)
                       : multiply_block<1, 1>(a, b, steps, p.d, p.pitch, p.add);
}

constexpr int kDotRows = 8; // whose sums, two vectors each, fill half of the registers

// d [kDotRows, 16 kVectors]: its elements `mask` of the last vector, of the first `rows`.
template <int kVectors, Form kForm>
LOCALSGD_DOTS inline void dot_block(const uint16_t* a, std::span<const uint16_t* const> b, int64_t steps, float* d,
                                    int64_t pitch, int64_t rows, __mmask16 mask, bool add) {
    constexpr int64_t kOfRow = kForm == Form::kPairs ? 2 : 32, kOfPair = kForm == Form::kPairs ? 32 : 2;
    __m512 sum[kDotRows][kVectors];
    for (int i = 0; i < kDotRows; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
    for (const uint16_t* panels : b)
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t pair = 0; pair < 16; ++pair) {
                const uint16_t* const left = a + step * kBlock + pair * kOfPair;
                const uint16_t* const right = panels + step * kBlock + pair * 32;
                __m512bh columns[kVectors];
                for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(right + v * Tiles::kPanelPitch);
                for (int i = 0; i < kDotRows; ++i) {
                    int32_t both;
                    std::memcpy(&both, left + i * kOfRow, sizeof(both));
                    const auto row = (__m512bh)_mm512_set1_epi32(both);
                    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], row, columns[v]);
                }
            }
    for (int i = 0; i < kDotRows && i < rows; ++i)
        for (int v = 0; v < kVectors; ++v) {
            float* const to = d + i * pitch + 16 * v;
            const __mmask16 stored = v + 1 == kVectors ? mask : 0xffff;
            if (add) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(stored, to));
            _mm512_mask_storeu_ps(to, stored, sum[i][v]);
        }
}

template <int kVectors, Form kForm>
void dot_rows(const uint16_t* a, std::span<const uint16_t* const> b, int64_t steps, const TileProduct& p) {
    const auto mask = static_cast<__mmask16>(lanes(0, p.columns - 16 * (kVectors - 1)));
    for (int64_t row = 0; row < p.rows; row += kDotRows)
        dot_block<kVectors, kForm>(a + row / 16 * Tiles::kPanelPitch + row % 16 * (kForm == Form::kPairs ? 2 : 32), b, steps,
                                   p.d + row * p.pitch, p.pitch, p.rows - row, mask, p.add);
}

void dot_products(const uint16_t* a, Form form, std::span<const uint16_t* const> b, int64_t steps, const TileProduct& p) {
    if (form == Form::kPairs)
        p.columns > 16 ? dot_rows<2, Form::kPairs>(a, b, steps, p) : dot_rows<1, Form::kPairs>(a, b, steps, p);
    else
        p.columns > 16 ? dot_rows<2, Form::kColumns>(a, b, steps, p) : dot_rows<1, Form::kColumns>(a, b, steps, p);
}

LOCALSGD_TILES void set_up() {
    struct alignas(64) Configuration { // as the instruction reads it
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
        constexpr Configuration() {
            for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = 64, rows[tile] = 16;
        }
    };
    static constexpr Configuration configuration; // not on the stack: GCC does not know that the instruction reads all of it
    _tile_loadconfig(&configuration);
}

LOCALSGD_TILES void release() { _tile_release(); }

bool permitted() {
    constexpr int kRequest = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

} // namespace

bool has_tiles() {
    static const bool yes = permitted();
    return yes;
}

bool has_dots() {
    static const bool yes = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
    return yes;
}

LOCALSGD_PACKS
void pack_tiles(const PatchSource& s, const Tiles& to, int64_t begin, int64_t end, int64_t first, int64_t count) {
    const Geometry& g = s.geometry;
    const auto* const data = static_cast<const uint16_t*>(s.data);
    const bool in_pairs = packed_form(s) == Form::kPairs;
    const int64_t channels = g.in_per_group(), step = s.strides.space[2] * g.stride[2], whole = ceil_div(count, 32) * 32;
    const uint16_t* rows[kTilePositions];
    Run memory[kTilePositions];
    for (int64_t tap = begin / channels; tap * channels < end; ++tap) {
        const int64_t from = std::max(begin, tap * channels), column = from - begin;
        const int64_t last = std::min(end, (tap + 1) * channels) - begin, channel = from - tap * channels;
        const Tap position{tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]};
        if (in_pairs) {
            std::fill(rows, rows + whole, nullptr);
            for_each_run(
                g, s.strides, first, count, position, [](int64_t, int64_t) LOCALSGD_PACKS {},
                [&](int64_t at, int64_t run, int64_t element) LOCALSGD_PACKS {
                    const uint16_t* row = data + element + channel;
                    for (int64_t t = 0; t < run; ++t, row += step) rows[at + t] = row;
                });
            pack_channels(to, column, last, rows, whole);
            continue;
        }
        // One channel after another: they lie far apart, their rows side by side.
        const std::span<const Run> runs = runs_of(g, s.strides, first, count, position, memory);
        for (int64_t c = column; c < last; ++c) {
            uint16_t* const to_column = to.panel(c) + c % 16 * 32;
            const uint16_t* const of_channel = data + (channel + c - column) * s.strides.channel;
            for (const Run& run : runs)
                pack_positions(to_column, run.at, run.count, run.element == Run::kPadding ? nullptr : of_channel + run.element,
                               step);
            pack_positions(to_column, count, whole - count, nullptr, step);
        }
    }
}

LOCALSGD_PACKS
void pack_thirds(const float* from, int64_t pitch, int64_t count, int64_t columns, const std::array<Tiles, 3>& to) {
    const __m512i upper = _mm512_set1_epi32(-65536), magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i infinity = _mm512_set1_epi32(0x7f800000), quiet = _mm512_set1_epi32(0x00400000);
    for (int64_t column = 0; column < columns; column += 16) {
        const auto mask = static_cast<__mmask16>(lanes(0, std::min<int64_t>(16, columns - column)));
        for (int64_t t = 0; t < ceil_div(count, 32) * 32; t += 2) {
            __m512i parts[2][3];
            for (int i = 0; i < 2; ++i) {
                __m512 rest =
                    t + i < count ? _mm512_maskz_loadu_ps(mask, from + (t + i) * pitch + column) : _mm512_setzero_ps();
                const __m512i size = _mm512_and_si512(_mm512_castps_si512(rest), magnitude);
                const __mmask16 finite = _mm512_cmplt_epi32_mask(size, infinity), nan = _mm512_cmpgt_epi32_mask(size, infinity);
                for (int third = 0; third < 3; ++third) { // cut off, not rounded: nothing overflows, and nothing is left over
                    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest), upper);
                    parts[i][third] = bits;
                    rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(bits));
                }
                parts[i][0] = _mm512_mask_or_epi32(parts[i][0], nan, parts[i][0], quiet); // its low bits may be all it has
            }
            for (int third = 0; third < 3; ++third)
                _mm512_storeu_si512(to[third].panel(column) + t * 16,
                                    _mm512_or_si512(_mm512_srli_epi32(parts[0][third], 16), parts[1][third]));
        }
    }
}

LOCALSGD_PACKS
void transpose_tiles(const Tiles& from, const Tiles& to, int64_t columns, int64_t count) {
    for (int64_t column = 0; column < columns; column += 16)
        for (int64_t step = 0; step < ceil_div(count, 32); ++step)
            transpose_block(from.panel(column) + step * kBlock, to.panel(column) + step * kBlock);
}

TileUnit::TileUnit(Unit unit) : unit_(unit) {
    if (unit_ == Unit::kTiles) set_up();
}
TileUnit::~TileUnit() {
    if (unit_ == Unit::kTiles) release();
}

void TileUnit::multiply(const uint16_t* a, Form form, std::span<const uint16_t* const> b, int64_t count,
                        const TileProduct& p) const {
    const int64_t steps = ceil_div(count, 32);
    if (unit_ == Unit::kDots) return dot_products(a, form, b, steps, p);
    if (p.rows % 16 == 0 && p.columns % 16 == 0) return multiply_blocks(a, b, steps, p);
    alignas(64) float all[kTileColumns * kTileColumns];
    multiply_blocks(a, b, steps, {all, kTileColumns, p.rows, p.columns, false});
    for (int64_t i = 0; i < p.rows; ++i)
        for (int64_t j = 0; j < p.columns; ++j) {
            float& d = p.d[i * p.pitch + j];
            d = all[i * kTileColumns + j] + (p.add ? d : 0);
        }
}

ChannelsLast::ChannelsLast(const PatchSource& source) : source_(source), inputs_(source) {
    Geometry& g = inputs_.geometry;
    channels_ = ceil_div(g.in_per_group(), 16) * 16;
    useful_ = packed_form(source) == Form::kColumns && g.taps() > 1 && g.kernel[0] == 1 && g.input[0] == 1 && g.output[0] == 1;
    g.output = g.input;
    g.kernel = g.stride = g.dilation = {1, 1, 1};
    g.pad = {0, 0, 0};
    merge_space(g, inputs_.strides);
}

LOCALSGD_PACKS
PatchSource ChannelsLast::of(int64_t first, int64_t count) {
    const Geometry& g = source_.geometry;
    const int64_t width = g.input[2];
    const auto read = [&](int dim, int64_t output, int64_t tap) {
        return output * g.stride[dim] + tap * g.dilation[dim] - g.pad[dim];
    };
    const auto inside = [&](int dim, int64_t at) { return std::clamp<int64_t>(at, 0, g.input[dim] - 1); };
    const auto row = [&](int64_t position, int64_t tap) { return read(1, position / g.output[2] % g.output[1], tap); };
    const auto start = [&](int64_t position, int64_t tap) { // of that row; never falls from one position to the next
        return (position / g.image_positions() * g.input[1] + inside(1, row(position, tap))) * width;
    };
    const int64_t last = first + count - 1;
    int64_t begin = start(first, 0), end = start(last, g.kernel[1] - 1) + width;
    if (g.kernel[1] == 1) { // of rows that are read at all, and may be long, no more than that
        if (row(first, 0) == inside(1, row(first, 0))) begin += inside(2, read(2, first % g.output[2], 0));
        if (row(last, 0) == inside(1, row(last, 0))) end += inside(2, read(2, last % g.output[2], g.kernel[2] - 1)) + 1 - width;
    }
    if (!tiles_) tiles_.emplace(channels_);
    if (int64_t(memory_.size()) < (end - begin) * channels_) memory_.resize((end - begin) * channels_);
    const int64_t known = begin < begin_ ? 0 : std::clamp<int64_t>(end_ - begin, 0, end - begin);
    if (known > 0 && begin > begin_)
        std::memmove(memory_.data(), memory_.data() + (begin - begin_) * channels_, known * channels_ * sizeof(uint16_t));
    for (int64_t at = begin + known; at < end; at += kTilePositions) {
        const int64_t part = std::min(kTilePositions, end - at);
        pack_tiles(inputs_, *tiles_, 0, g.in_per_group(), at, part);
        transpose_tiles(*tiles_, *tiles_, channels_, part);
        unpack_pairs(*tiles_, part, channels_, memory_.data() + (at - begin) * channels_);
    }
    begin_ = begin;
    end_ = end;
    PatchSource same = source_;
    same.strides = {g.input[1] * width * channels_, 1, {0, width * channels_, channels_}};
    // Where the first position of all would lie.
    same.data = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(memory_.data()) -
                                              static_cast<uintptr_t>(begin * channels_) * sizeof(uint16_t));
    return same;
}

LOCALSGD_PACKS
void sum_tiles(const uint16_t* pairs, int64_t count, float* sums, int64_t columns) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t pair = 0; pair < ceil_div(count, 2); ++pair) {
        const __m512i both = _mm512_loadu_si512(pairs + pair * 32);
        even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
        odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536))));
    }
    alignas(64) float all[16];
    _mm512_store_ps(all, _mm512_add_ps(even, odd));
    for (int64_t i = 0; i < columns; ++i) sums[i] += all[i];
}

#else

bool has_tiles() { return false; }
bool has_dots() { return false; }
void pack_tiles(const PatchSource&, const Tiles&, int64_t, int64_t, int64_t, int64_t) {}
void transpose_tiles(const Tiles&, const Tiles&, int64_t, int64_t) {}
TileUnit::TileUnit(Unit unit) : unit_(unit) {}
TileUnit::~TileUnit() = default;
void TileUnit::multiply(const uint16_t*, Form, std::span<const uint16_t* const>, int64_t, const TileProduct&) const {}
void pack_thirds(const float*, int64_t, int64_t, int64_t, const std::array<Tiles, 3>&) {}
ChannelsLast::ChannelsLast(const PatchSource& source) : source_(source), inputs_(source), channels_(0), useful_(false) {}
PatchSource ChannelsLast::of(int64_t, int64_t) { return source_; }
void sum_tiles(const uint16_t*, int64_t, float*, int64_t) {}

#endif

} // namespace localsgd
