// Which elements of x (or z) a range of output positions reads, and how their products are shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "../geometry.h"
#include "elements.h"

namespace localsgd {

struct PatchSource {
    const void* data;
    Kind kind;
    Geometry geometry;
    Strides strides;
};

// Adjacent spatial dimensions that the layer walks alike become one, so that runs are long. Changes no element's meaning.
void merge_space(Geometry& geometry, Strides& strides);

struct Tap {
    int64_t r0, r1, r2;
};

// Positions [first, first + count) as tap `tap` sees them, in order: zero(at, run) for a run of them, `at` after the first,
// that lies in the padding, and values(at, run, element) for one whose elements of channel 0 begin at `element` and lie
// space[2] * stride[2] apart.
template <typename Zero, typename Values>
LOCALSGD_INLINE void for_each_run(const Geometry& g, const Strides& strides, int64_t first, int64_t count, const Tap& tap,
                                  const Zero& zero, const Values& values) {
    const int64_t shift = tap.r2 * g.dilation[2] - g.pad[2];
    const Range valid = valid_outputs(g.output[2], g.input[2], g.stride[2], shift);
    for (int64_t done = 0; done < count;) {
        const int64_t row = (first + done) / g.output[2], p2 = (first + done) % g.output[2];
        const int64_t run = std::min(count - done, g.output[2] - p2);
        const int64_t i0 = row / g.output[1] % g.output[0] * g.stride[0] + tap.r0 * g.dilation[0] - g.pad[0];
        const int64_t i1 = row % g.output[1] * g.stride[1] + tap.r1 * g.dilation[1] - g.pad[1];
        const bool inside = i0 >= 0 && i0 < g.input[0] && i1 >= 0 && i1 < g.input[1];
        const int64_t begin = inside ? std::clamp(valid.begin, p2, p2 + run) : p2 + run;
        const int64_t end = inside ? std::clamp(valid.end, begin, p2 + run) : begin;
        if (begin > p2) zero(done, begin - p2);
        if (end > begin)
            values(done + begin - p2, end - begin,
                   row / (g.output[0] * g.output[1]) * strides.batch + i0 * strides.space[0] + i1 * strides.space[1] +
                       (begin * g.stride[2] + shift) * strides.space[2]);
        if (p2 + run > end) zero(done + end - p2, p2 + run - end);
        done += run;
    }
}

// The same as a list, for many channels to go through. `memory` holds as many runs as there are positions.
struct Run {
    int64_t at, count, element; // or kPadding
    static constexpr int64_t kPadding = -1;
};
std::span<const Run> runs_of(const Geometry& g, const Strides& strides, int64_t first, int64_t count, const Tap& tap,
                             Run* memory);

// The positions are cut into parts, each with a sum of its own, and every sum into strips. Only the number of parts changes the
// order of additions, so it depends on the layer alone; that of strips may follow the number of threads.
struct Tasks {
    int64_t parts, strips;
    int64_t count(const Geometry& geometry) const { return parts * geometry.groups * strips; }
};
constexpr int64_t kWide = 256; // columns from which on strips are work enough for many threads, and parts would cost memory
constexpr int64_t kLeastProducts = 1 << 22; // of a part: some 100 us, on tiles 10 us
constexpr int64_t kMostParts = 8, kMostPartElements = 1 << 20;

} // namespace localsgd
