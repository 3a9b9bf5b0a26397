// Direct correlation on a GPU: what the host calls.
#pragma once

#include <cstddef>
#include <string>

#include "direct_variants.h"
#include "operand.h"
#include "workspace.h"

namespace localsgd::cuda {

struct DirectProblem {
    Geometry geometry;
    Operand x, z;
    // Which roundings of fp32 operands the caller takes for matrix units: to tf32, as torch's own flags have it, and where the
    // other operand is fp16 or bf16 to that, as autocast did for the layer's forward. Without them operands are never rounded;
    // fp16 and bf16, which tf32 holds exactly, may meet in it.
    bool allow_tf32 = false, allow_lower = false;
};

// What the choice depends on besides the problem.
struct Chip {
    int multiprocessors = 0;
    bool cooperative = false;        // whether a grid may have barriers
    int blocks[kDirectKernels] = {}; // of each kernel, alive at once on a multiprocessor
    int compute = 0; // 80 for 8.0: what the kernels that run on it were compiled for, which may be less than it has
};

struct DirectConfig {
    int kernel = 0; // which of the cores, tiles and accesses
    Core core = Core::ffma;
    int tile_m = 0, tile_n = 0, threads = 0;
    Access z_access = Access::scalar, x_access = Access::scalar;
    int tiles = 0;  // of D, all groups
    int splits = 1; // of the positions
    int split_positions = 0;
    int sharers = 1;
    int blocks = 1;
    bool cooperative = false; // one launch; otherwise one a phase
    double estimated_clocks = 0;

    std::string text() const;
};

// Asks the runtime about the current device, and for the shared memory that kernels need on it: once for every device, before
// the first launch. Takes some microseconds per kernel.
cudaError_t query_chip(Chip& chip);

// Why the kernels cannot take a problem ("more than 2^31 - 2^20 output positions"), or null. fp64 is not for them either.
const char* unsupported(const DirectProblem& problem);

// Pure arithmetic, the same for the same arguments.
DirectConfig get_best_config(const DirectProblem& problem, const Chip& chip);

// Bytes of device memory that a launch uses, see workspace.h.
size_t workspace_bytes(const DirectConfig& config);

// D to `target` (fp32).
cudaError_t correlate(const DirectProblem& problem, const DirectConfig& config, const Target& target, const Scratch& workspace,
                      cudaStream_t stream);

// W += lr * D / ||D||, `target` being W; nothing is written and `step.skipped` goes up where ||D|| is 0 or not finite.
cudaError_t correlate_and_update(const DirectProblem& problem, const DirectConfig& config, const Target& target,
                                 const Step& step, const Scratch& workspace, cudaStream_t stream);

} // namespace localsgd::cuda
