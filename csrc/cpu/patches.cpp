#include "patches.h"

namespace localsgd {
namespace {

bool walks_whole(const Geometry& g, int dim) {
    return g.kernel[dim] == 1 && g.stride[dim] == 1 && g.pad[dim] == 0 && g.input[dim] == g.output[dim];
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

std::span<const Run> runs_of(const Geometry& g, const Strides& strides, int64_t first, int64_t count, const Tap& tap,
                             Run* memory) {
    size_t runs = 0;
    for_each_run(
        g, strides, first, count, tap, [&](int64_t at, int64_t run) { memory[runs++] = {at, run, Run::kPadding}; },
        [&](int64_t at, int64_t run, int64_t element) { memory[runs++] = {at, run, element}; });
    return {memory, runs};
}

} // namespace localsgd
