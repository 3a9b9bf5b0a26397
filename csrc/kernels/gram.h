// The Gram form of the correlation on a GPU: what the host calls.
#pragma once

#include <cstddef>
#include <string>

#include "gram_variants.h"
#include "operand.h"
#include "workspace.h"

namespace localsgd::cuda {

// A layer whose outputs each read one position (1x1 convolutions, linear layers), and whose z is W x + b. Nothing of z but its
// dtype matters.
struct GramProblem {
    Geometry geometry;
    Operand x;
    const void* weight; // [K, C/g], any strides
    Kind weight_kind;
    int64_t weight_out_stride, weight_channel_stride;
    const void* bias; // [K], dense; or null
    Kind bias_kind;
    Kind z_kind; // W and b are rounded to it where it is lower than theirs, as the forward did
    // Which roundings of an fp32 x the caller takes for matrix units, as in DirectProblem: to tf32, and W with it, as the
    // forward did; to a z_kind that is lower. Without them x is never rounded.
    bool allow_tf32 = false, allow_lower = false;
};

// What the choice depends on besides the problem.
struct GramChip {
    int multiprocessors = 0;
    bool cooperative = false;      // whether a grid may have barriers
    int blocks[kGramKernels] = {}; // of each kernel, alive at once on a multiprocessor
    int compute = 0;               // as in Chip
};

struct GramConfig {
    int kernel = 0; // which of the cores, tiles and accesses
    Core core = Core::ffma;
    int tile = 0, threads = 0;
    Access access = Access::scalar;
    int tiles = 0;  // of G's lower triangles
    int splits = 1; // of the positions
    int split_positions = 0;
    int sharers = 1;
    Core product = Core::ffma;
    int product_m = 0, product_n = 0;
    int product_pairs = 1;  // of parts, see parts.cuh
    int product_tiles = 0;  // of D
    int product_splits = 1; // of the summed index, whose length is pairs * input channels
    int product_split_length = 0;
    int product_sharers = 1;
    int blocks = 1;
    bool cooperative = false; // one launch; otherwise one a phase
    double estimated_clocks = 0;

    std::string text() const;
};

cudaError_t query_chip(GramChip& chip);

// Why the kernels cannot take a problem ("a kernel of more than one tap"), or null.
const char* unsupported(const GramProblem& problem);

// Pure arithmetic, the same for the same arguments.
GramConfig get_best_config(const GramProblem& problem, const GramChip& chip);

// Bytes of device memory that a launch uses, see workspace.h.
size_t workspace_bytes(const GramProblem& problem, const GramConfig& config);

// D to `target` (fp32).
cudaError_t correlate(const GramProblem& problem, const GramConfig& config, const Target& target, const Scratch& workspace,
                      cudaStream_t stream);

// W += lr * D / ||D||, `target` being problem.weight; nothing is written and `step.skipped` goes up where ||D|| is 0 or not
// finite.
cudaError_t correlate_and_update(const GramProblem& problem, const GramConfig& config, const Target& target, const Step& step,
                                 const Scratch& workspace, cudaStream_t stream);

} // namespace localsgd::cuda
