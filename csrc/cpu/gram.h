// The Gram matrix X^T X of what a layer of kernel size 1 reads: one symmetric product, of which the lower half is made.
#pragma once

#include <cstdint>

#include "patches.h"
#include "vectors.h"

namespace localsgd {

Tasks gram_tasks(const Geometry& geometry, int64_t threads);

// Task `task`: a strip of the rows of partials[part][group] [C, C], up to the diagonal (what is written beyond is of no
// meaning), and, if wanted, of sums[part][group] [C], the sums of X's columns.
template <typename Acc>
void gram_part(const PatchSource& x, const Tasks& tasks, int64_t task, Acc* partials, Acc* sums,
               bool wide = has_wide_registers());

// Adds up the parts in order into the first one, and completes its upper half. Tasks: gram_rows(geometry).
int64_t gram_rows(const Geometry& geometry);
template <typename Acc>
void finish_gram(const Geometry& geometry, int64_t parts, int64_t task, Acc* partials);

} // namespace localsgd
