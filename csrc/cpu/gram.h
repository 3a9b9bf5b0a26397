// The Gram matrix X^T X of what a layer of kernel size 1 reads: one symmetric product, of which the lower half is made.
#pragma once

#include <cstdint>

#include "../geometry.h"
#include "elements.h"
#include "vectors.h"

namespace localsgd {

struct GramArgs {
    Geometry geometry; // pointwise
    const void* x;
    Kind x_kind;
    Strides x_strides;
};

// The positions are cut into parts, each with a Gram matrix of its own, and the rows of a Gram matrix into strips of even
// area. Only the number of parts changes the order of a sum, so it depends on the layer alone.
struct GramTasks {
    int64_t parts, strips;
    int64_t count(const Geometry& geometry) const { return parts * geometry.groups * strips; }
};
GramTasks gram_tasks(const Geometry& geometry, int64_t threads);

// Task `task`: rows of partials[part][group] [C, C], up to the diagonal (what is written beyond is of no meaning), and, if
// wanted, of sums[part][group] [C], the sums of X's columns. x is read in tiles of positions that are packed (converted,
// transposed where channels come first) into panels in the cache. For them
// a thread takes memory of 128 positions.
template <typename Acc>
void gram_part(const GramArgs& args, const GramTasks& tasks, int64_t task, Acc* partials, Acc* sums,
               bool wide = has_wide_registers());

// Adds up the parts in order into the first one, and completes its upper half. Tasks: gram_rows(geometry).
int64_t gram_rows(const Geometry& geometry);
template <typename Acc>
void finish_gram(const Geometry& geometry, int64_t parts, int64_t task, Acc* partials);

} // namespace localsgd
