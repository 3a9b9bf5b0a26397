// Blocked im2col: the input patches of a range of output positions, gathered into one dense tile of the accumulation type.
// With kernel size 1 this also gathers z (see output_geometry).
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "elements.h"

namespace localsgd {

enum class TileOrder {
    kChannelsFirst, // [groups * patch, T], a patch ordered (channel, taps): D's own order
    kChannelsLast,  // [groups, T, patch],  a patch ordered (taps, channel)
};

struct PatchSource {
    const void* data;
    Kind kind;
    Geometry geometry;
    Strides strides;
    TileOrder order;
};

// Adjacent spatial dimensions that the layer walks alike become one, so that runs are long. Changes no element's meaning.
void merge_space(Geometry& geometry, Strides& strides);

// A tile of `count` positions is gathered in `pack_tasks` independent pieces, so that threads can share it.
int64_t pack_tasks(const PatchSource& source, int64_t count);

// Pieces [task_begin, task_end) of the tile of positions [first, first + count); position = (n, p0, p1, p2) flattened.
template <typename Acc>
void pack(const PatchSource& source, int64_t first, int64_t count, int64_t task_begin, int64_t task_end, Acc* tile);

} // namespace localsgd
