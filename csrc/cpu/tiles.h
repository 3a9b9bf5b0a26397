// Products of bf16 matrices on AMX's tiles, or by AVX-512's dot products of pairs: exact products, summed in fp32, but for what
// is subnormal, which both take for 0.
//
// Columns of the patch matrix are packed, kTilePositions positions at a time, into panels of 16; a panel is a row of blocks of
// 1 KiB, each 32 positions of those 16 columns, in one of two forms, of which one is the transpose of the other in elements of
// 32 bits: [16 columns][16 pairs of positions], what a product reads as its left operand, and [16 pairs][16 columns], its
// right one (and dot products as either). Channels that lie side by side come in pairs of positions, positions that do in
// columns.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "patches.h"
#include "vectors.h"

namespace localsgd {

constexpr int64_t kTilePositions = 256; // a panel of 16 columns takes 8 KiB: those of four fit the first-level cache
constexpr int64_t kTileColumns = 32;    // of a product at once, and its rows

// Whether this CPU has AMX with bf16 and the system lets this process use it, which is asked for here.
bool has_tiles();
// Whether it has AVX-512's dot products of bf16.
bool has_dots();

// What multiplies: vectors of 32 or 64 bytes, or dot products or tiles, which only bf16 fits.
enum class Unit { kNarrow, kWide, kDots, kTiles };
inline Unit unit_for(bool bf16) {
    if (bf16 && has_tiles()) return Unit::kTiles;
    if (bf16 && has_dots()) return Unit::kDots;
    return has_wide_registers() ? Unit::kWide : Unit::kNarrow;
}
inline bool only_bf16(Unit unit) { return unit == Unit::kDots || unit == Unit::kTiles; }
// Tiles take so little time for a product that several sums of each must not be added up for the sake of few positions.
inline int64_t most_parts(int64_t positions, Unit unit) {
    return unit == Unit::kTiles ? std::clamp<int64_t>(positions / 1024, 1, kMostParts) : kMostParts;
}

class Tiles {
  public:
    explicit Tiles(int64_t columns); // zeros
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    uint16_t* panel(int64_t column) const { return data_ + column / 16 * kPanelPitch; }

    // One block more than there is: panels a power of two apart would share a few sets of the cache.
    static constexpr int64_t kPanelPitch = (kTilePositions + 32) * 16;

  private:
    std::vector<uint16_t> memory_;
    uint16_t* data_;
};

enum class Form { kColumns, kPairs };

// How pack_tiles writes the source's columns.
inline Form packed_form(const PatchSource& source) { return source.strides.channel == 1 ? Form::kPairs : Form::kColumns; }

// Columns [begin, end) of the patch matrix [positions, (taps, channels of a group)] at the positions [first, first + count),
// as columns 0 and on of `to`; zeros up to the next multiple of 32 positions. The source must be of kind bf16.
void pack_tiles(const PatchSource& source, const Tiles& to, int64_t begin, int64_t end, int64_t first, int64_t count);

// x, whose channels do not lie side by side, with channels that do, [positions of the input, channels of a group up to a
// multiple of 16]: as many rows of it as some output positions read (of kernels of one row, as many positions).
class ChannelsLast {
  public:
    explicit ChannelsLast(const PatchSource& source);

    // Whether it is of use: several taps read each element, and rows that follow each other in the patches do so in memory.
    bool useful() const { return useful_; }

    // A source like the given one as far as output positions [first, first + count) read it. Lives until the next call, which
    // takes over what it reads again: each element is turned once if `first` never falls.
    PatchSource of(int64_t first, int64_t count);

  private:
    PatchSource source_, inputs_; // inputs_: every element of the input, as the positions of a layer of kernel size 1
    [[maybe_unused]] int64_t channels_;
    bool useful_;
    int64_t begin_ = 0, end_ = 0; // positions in memory_
    std::vector<uint16_t> memory_;
    std::optional<Tiles> tiles_;
};

// One form from the other, for the first `columns` columns and `count` positions; in place if `from` is `to`.
void transpose_tiles(const Tiles& from, const Tiles& to, int64_t columns, int64_t count);

// Three matrices whose sum is [count, columns] of fp32, in form kPairs: each has the next 8 bits of every element.
void pack_thirds(const float* from, int64_t pitch, int64_t count, int64_t columns, const std::array<Tiles, 3>& to);

// d [rows, columns] = A^T B, or what was there and that if `add`, over `count` positions: the columns of `a` from a multiple of
// 32 on, in the form that is given, and those of each of `b`, in form kPairs, whose products add up. At most 32 rows and
// columns.
struct TileProduct {
    float* d;
    int64_t pitch, rows, columns;
    bool add;
};

// Makes products by kTiles, for which the calling thread's tiles are set up while it lives, or kDots.
class TileUnit {
  public:
    explicit TileUnit(Unit unit);
    ~TileUnit();
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;

    // Whether `a` may be in this form.
    bool may_be_left(Form form) const { return unit_ == Unit::kDots || form == Form::kColumns; }

    void multiply(const uint16_t* a, Form form, std::span<const uint16_t* const> b, int64_t count,
                  const TileProduct& product) const;

  private:
    Unit unit_;
};

// sums[i] += the sum of column i of a panel in form kPairs, for its first `columns` <= 16.
void sum_tiles(const uint16_t* pairs, int64_t count, float* sums, int64_t columns);

} // namespace localsgd
