// Depthwise correlation on a GPU: what the host calls.
#pragma once

#include <cstddef>
#include <string>

#include "operand.h"
#include "workspace.h"

namespace localsgd::cuda {

struct DepthwiseProblem {
    Geometry geometry; // groups == in_channels
    Operand x, z;
};

constexpr int kDepthwiseKernels = 12;

// What the choice depends on besides the problem.
struct DepthwiseChip {
    int multiprocessors = 0;
    bool cooperative = false;           // whether a grid may have barriers
    int blocks[kDepthwiseKernels] = {}; // of each kernel, alive at once on a multiprocessor
};

struct DepthwiseConfig {
    int kernel = 0; // which of the tap chunks, or of the walkers
    int chunk_rows = 1, chunk_columns = 1, tap_chunks = 1;
    int tile_rows = 1, tile_columns = 1; // of the output
    int tiles = 0;                       // of all images
    int splits = 1;                      // of the tiles
    int split_tiles = 0;
    int slices = 0; // of 32 output channels
    int blocks = 1;
    size_t shared_bytes = 0;
    Gather x_gather = Gather::positions, z_gather = Gather::positions;
    bool cooperative = false; // one launch; otherwise one a phase
    double estimated_clocks = 0;

    std::string text() const;
};

cudaError_t query_chip(DepthwiseChip& chip);

// Why the kernels cannot take a problem ("groups that are not the input channels"), or null.
const char* unsupported(const DepthwiseProblem& problem);

// Pure arithmetic, the same for the same arguments.
DepthwiseConfig get_best_config(const DepthwiseProblem& problem, const DepthwiseChip& chip);

// Bytes of device memory that a launch uses, see workspace.h.
size_t workspace_bytes(const DepthwiseConfig& config);

// D to `target` (fp32).
cudaError_t correlate(const DepthwiseProblem& problem, const DepthwiseConfig& config, const Target& target,
                      const Scratch& workspace, cudaStream_t stream);

// W += lr * D / ||D||, `target` being W; nothing is written and `step.skipped` goes up where ||D|| is 0 or not finite.
cudaError_t correlate_and_update(const DepthwiseProblem& problem, const DepthwiseConfig& config, const Target& target,
                                 const Step& step, const Scratch& workspace, cudaStream_t stream);

} // namespace localsgd::cuda
