// The Gram matrix X^T X of what a layer of kernel size 1 reads: one symmetric product, of which the lower half is made.
#pragma once

#include <cstdint>

#include "patches.h"
#include "tiles.h"

namespace localsgd {

Tasks gram_tasks(const Geometry& geometry, int64_t threads, Unit unit);

// Task `task`: a strip of the rows of partials[part][group] [C, C], up to the diagonal (what is written beyond is of no
// meaning), and, if wanted, of sums[part][group] [C], the sums of X's columns.
template <typename Acc>
void gram_part(const PatchSource& x, const Tasks& tasks, int64_t task, Acc* partials, Acc* sums, Unit unit);

// Adds up the parts in order into the first one, and completes its upper half. Tasks: gram_rows(geometry).
int64_t gram_rows(const Geometry& geometry);
template <typename Acc>
void finish_gram(const Geometry& geometry, int64_t parts, int64_t task, Acc* partials);

// D = W G on tiles, as precise as in fp32 above its subnormals, for weights [K, C/groups] in bf16 and whole Gram matrices: one
// block of each group's D a task, of gram_product_tasks.
int64_t gram_product_tasks(const Geometry& geometry);
void gram_product(const Geometry& geometry, const uint16_t* weight, const float* gram, int64_t task, float* d);

// The lower half of a symmetric matrix [channels, channels], diagonal included, row by row: half() numbers; and back.
inline int64_t half(int64_t channels) { return channels * (channels + 1) / 2; }
template <typename Acc>
void pack_half(const Acc* gram, int64_t channels, Acc* packed);
template <typename Acc>
void unpack_half(const Acc* packed, int64_t channels, Acc* gram);

} // namespace localsgd
