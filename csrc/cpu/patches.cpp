#include "patches.h"

#include <algorithm>

#include "copy.h"

namespace localsgd {
namespace {

bool walks_whole(const Geometry& g, int dim) {
    return g.kernel[dim] == 1 && g.stride[dim] == 1 && g.pad[dim] == 0 && g.input[dim] == g.output[dim];
}

struct Position {
    int64_t n, p0, p1, p2;
};

Position position_of(const Geometry& g, int64_t t) {
    const auto& out = g.output;
    return {t / product(out), t / (out[1] * out[2]) % out[0], t / out[2] % out[1], t % out[2]};
}

Tap tap_of(const Geometry& g, int64_t index) {
    return {index / (g.kernel[1] * g.kernel[2]), index / g.kernel[2] % g.kernel[1], index % g.kernel[2]};
}

int64_t input_index(const Geometry& g, int dim, int64_t output, int64_t tap) {
    return output * g.stride[dim] + tap * g.dilation[dim] - g.pad[dim];
}

bool inside(const Geometry& g, int dim, int64_t index) { return index >= 0 && index < g.input[dim]; }

// One row of the channels-first tile: one (channel, tap), all positions.
template <typename Acc>
void pack_row(const PatchSource& s, int64_t first, int64_t count, int64_t row, Acc* to) {
    const Geometry& g = s.geometry;
    const int64_t channel = row / g.taps();
    const Tap tap = tap_of(g, row % g.taps());
    for_each_run(
        g, s.strides, first, count, tap, [&](int64_t at, int64_t run) { std::fill_n(to + at, run, Acc(0)); },
        [&](int64_t at, int64_t run, int64_t element) {
            copy_run(to + at, offset(s.data, s.kind, element + channel * s.strides.channel), s.kind, run,
                     s.strides.space[2] * g.stride[2]);
        });
}

// One position of the channels-last tile: all taps and channels.
template <typename Acc>
void pack_position(const PatchSource& s, int64_t first, int64_t count, int64_t t, Acc* tile) {
    const Geometry& g = s.geometry;
    const Position p = position_of(g, first + t);
    const int64_t channels = g.in_per_group();
    for (int64_t index = 0; index < g.taps(); ++index) {
        const Tap tap = tap_of(g, index);
        const int64_t i0 = input_index(g, 0, p.p0, tap.r0), i1 = input_index(g, 1, p.p1, tap.r1);
        const int64_t i2 = input_index(g, 2, p.p2, tap.r2);
        const bool in = inside(g, 0, i0) && inside(g, 1, i1) && inside(g, 2, i2);
        const int64_t element =
            p.n * s.strides.batch + i0 * s.strides.space[0] + i1 * s.strides.space[1] + i2 * s.strides.space[2];
        for (int64_t group = 0; group < g.groups; ++group) {
            Acc* to = tile + ((group * count + t) * g.taps() + index) * channels;
            if (in)
                copy_run(to, offset(s.data, s.kind, element + group * channels * s.strides.channel), s.kind, channels,
                         s.strides.channel);
            else
                std::fill(to, to + channels, Acc(0));
        }
    }
}

} // namespace

void merge_space(Geometry& g, Strides& strides) {
    for (int outer = 1; outer >= 0; --outer) {
        const bool adjacent = g.input[outer] == 1 || strides.space[outer] == strides.space[2] * g.input[2];
        if (!walks_whole(g, outer) || !walks_whole(g, 2) || !adjacent) return;
        g.input[2] *= g.input[outer];
        g.output[2] = g.input[2];
        g.input[outer] = g.output[outer] = 1;
    }
}

int64_t pack_tasks(const PatchSource& source, int64_t count) {
    return source.order == TileOrder::kChannelsFirst ? source.geometry.groups * source.geometry.patch() : count;
}

template <typename Acc>
void pack(const PatchSource& source, int64_t first, int64_t count, int64_t task_begin, int64_t task_end, Acc* tile) {
    for (int64_t task = task_begin; task < task_end; ++task) {
        if (source.order == TileOrder::kChannelsFirst)
            pack_row(source, first, count, task, tile + task * count);
        else
            pack_position(source, first, count, task, tile);
    }
}

template void pack<float>(const PatchSource&, int64_t, int64_t, int64_t, int64_t, float*);
template void pack<double>(const PatchSource&, int64_t, int64_t, int64_t, int64_t, double*);

} // namespace localsgd
