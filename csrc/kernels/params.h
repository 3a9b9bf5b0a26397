// What kernels are told: plain numbers and pointers, the same for the host's compiler, nvcc and NVRTC.
#pragma once

namespace localsgd::cuda {

using int64 = long long;
using uint64 = unsigned long long;

// Known at run time: kernels branch on it uniformly, once per 16-byte load, instead of existing nine times.
enum class Element : int { f16, bf16, f32 };

// n / divisor for 0 <= n < 2^31 as one high multiplication (Granlund and Montgomery 1994): a division costs some 20
// instructions.
struct FastDiv {
    unsigned divisor = 1, multiplier = 1, shift = 0;
};

// How slices of an operand are read.
enum class Access : int {
    scalar,     // element by element: any strides
    channels4,  // 4 columns that are neighbours in memory (NHWC)
    positions4, // 4 positions that are neighbours in memory (NCHW without gaps)
    chunks16,   // 16 bytes of columns that are neighbours in memory, straight to shared memory (mma cores only)
    segments,   // all that the windows of a step reach over, of x of few channels
    segments32, // the same of fp32 that an mma core rounds to 16 bits
};

// What multiplies: fused multiply-adds in fp32, or the matrix units with operands of the type named. All add in fp32.
enum class Core : int { ffma, mma_bf16, mma_f16, mma_tf32 };

// The patch matrix of an operand: a row per output position, a column per (channel, tap). z is one with a single tap that lies
// on the position itself.
struct Patches {
    const void* data;
    Element element;
    int positions; // rows: batch * output positions
    int columns;   // channels per group * taps
    int64 batch_stride;
    int group_stride; // channels per group * channel_stride
    int channel_stride;
    int space_stride[3];
    // position -> (image, p0, p1, p2); with `flat` there is a single spatial dimension
    FastDiv image, plane, row;
    bool flat;
    bool in_place; // position p lies at p * space_stride[2]: one image without gaps, a single tap, no stride and no padding
    // column -> (tap, channel) if `channels_fastest`, so that neighbouring columns are neighbours in NHWC; else (channel, tap)
    FastDiv column_inner, tap_plane, tap_row;
    bool channels_fastest;
    int stride[3], pad[3], dilation[3], input[3];
};

// x of few channels, where the positions of a step lie in one row of the output: their windows overlap, and what a row of the
// kernel reads of x is one segment of memory (in NCHW, of each channel). As patches these are a row for the first position of a
// step and a column for every chunk of 16 bytes: coordinate 2 counts elements, and what is read begins at a chunk.
struct Segments : Patches {
    int chunks; // of a segment
    int rows;   // of the kernel (in NCHW, of all channels) that a tile's columns take at most
    int lead;   // elements before the first window
    int pitch;  // elements from a position to the next
    int gap;    // elements between the pixels of a window's row, more than without dilation
    int across; // positions in a row of the output, which steps pad
    int patch;  // columns of D
    // column of D -> (row of the kernel, pixel, channel of NHWC)
    FastDiv by_channels, by_kernel_row;
};
constexpr int kSegmentChunks =
    256; // of a step, at most: those of all segments, one of zeros among them (mma cores; twice as many of segments32)

// Tiles of D, each split over the positions. Unit u = tile * splits + split; blocks take units round robin.
struct TileGrid {
    int groups, tiles_m, tiles_n; // tile = (group * tiles_m + m) * tiles_n + n
    int splits, split_positions;
    int units; // tiles * splits
    // Lanes that share the sum of a quad over the splits, each a run of them: with few tiles and many splits a single lane
    // would be a long chain of loads. A power of two, at most 32.
    int sharers;
    FastDiv by_splits, by_tiles_n, by_tiles_m;
};

// Where an element of D goes: W, or D itself.
struct Target {
    void* data;
    Element element;
    int64 out_stride; // of the output channels
    int64 channel_stride, tap_stride[3];
    bool in_quads = false; // fp32 whose 4 columns of D from a multiple of 4 on are 16 aligned bytes
};

struct Workspace {
    unsigned* barrier; // 0 before its first use; leaves itself ready
    double* squares;   // a partial sum of squares for each block, or chunk
    float* partials;   // [tiles][splits][slot][thread][4]
};

// sign * lr: a number of the host's, or a scalar on the device, so that a captured graph follows the schedule.
struct Rate {
    double value = 0;
    const float* device_float = nullptr;
    const double* device_double = nullptr;
};

struct Step {
    Rate rate;
    bool normalize = true;
    uint64* skipped = nullptr; // counts steps that were not taken, or null
};

// A kernel runs the phases from `first` to `last`: all of them in one cooperative launch with grid barriers between, or one a
// launch, whose order in the stream is then the barrier. Both give the same bits. Where a tile is not split there is nothing to
// reduce: that phase, and the barrier before it, are left out, and nothing runs in a launch of its own.
enum Phase : int { kCorrelate, kReduce, kWrite };

struct DirectParams {
    Patches z, x;      // z.columns: output channels per group; x.columns: C/g * taps
    Patches read;      // x again, as the main loop reads it,
    Segments segments; // or as kernels do for few channels
    TileGrid grid;
    Workspace workspace;
    Target target;
    bool to_target; // D itself is wanted: kReduce writes it and is the last phase
    Step step;
    Phase first, last;
};

// The phases of a Gram launch, as above: G in partial tiles; G whole, and W as the forward rounded it, as operands of the
// product; D in partial tiles; D; W.
enum GramPhase : int { kGramTiles, kGramMatrix, kGramProduct, kGramReduce, kGramWrite };

// The product's summed index is (part of W, part of G, input channel), cut off where pairs of parts no longer count; see
// parts.cuh. With a bias, the parts of b are further channels of W and sum x further rows of G, so that one product is all of
// D. Zeros fill up to multiples of 8.
struct GramParams {
    Patches x;               // columns: input channels per group
    TileGrid gram, product;  // tiles of G's lower triangle, split over positions; of D, split over the product's summed index
    Patches weights, matrix; // [groups][parts][inner][rows]: W transposed; [groups][parts][inner][pitch]: G
    void *weights_data, *matrix_data;
    float* sum_partials; // of x: [splits][shares of a slice][groups][pitch]; only with a bias
    int outputs, rows;   // output channels per group; rounded up
    int pitch, inner;    // input channels per group, rounded up; with a bias 8 more
    int weight_parts, matrix_parts;
    FastDiv by_pitch, by_row_quads, by_inner_octets;
    const void* weight;
    Element weight_element;
    int64 weight_out_stride, weight_channel_stride;
    const void* bias; // [K], or null
    Element bias_element;
    Element weight_rounding, bias_rounding; // before they are multiplied; f32: none
    Workspace workspace;
    Target target;
    bool to_target; // D itself is wanted: kGramReduce is the last phase
    Step step;
    GramPhase first, last;
};

// How a tile of a depthwise operand is read: 4 channels that are neighbours in memory, or one, by neighbouring threads; or
// neighbouring positions of one channel (NCHW).
enum class Gather : int { channels4, channels, positions };

struct DepthwiseOperand {
    const void* data;
    Element element;
    Gather gather;
    int size[3];
    int64 batch_stride, channel_stride, space_stride[3];
};

// The kernel's taps in chunks of what a thread's registers hold, output planes in tiles, output channels in slices of a warp's
// width. Unit = (slice * tap_chunks + chunk) * splits + split: a run of tiles for one slice and chunk.
struct DepthwiseParams {
    DepthwiseOperand x, z;
    int out_channels;
    FastDiv multiplier; // output channel -> input channel
    int stride[3], pad[3], dilation[3], kernel[3];
    int tile_rows, tile_columns, x_rows, x_columns; // of a tile of z, and of the x that it reads
    FastDiv by_tile_columns, by_x_columns;
    int tiles; // of all images: ((image * planes + plane) * down + row) * across + column
    FastDiv by_planes, by_down, by_across;
    int slices, tap_chunks, splits, split_tiles, units;
    FastDiv by_splits, by_tap_chunks, by_chunk_plane, by_chunk_row; // chunk -> (kernel plane, row of chunks, column)
    Workspace workspace; // partials: [splits][slices][tap_chunks][taps of a chunk][32]
    Target target;
    bool to_target; // D itself is wanted: kReduce is the last phase
    Step step;
    Phase first, last;
};

// Tensors of an apply launch: what fits into 4 KiB of kernel parameters, so that nothing has to be uploaded.
constexpr int kApplyTensors = 96;
constexpr int kChunk = 4096; // elements of one tensor that a block takes at a time

struct ApplyTensor {
    void* weight;
    const void* d;
    int64 count;
    int first_chunk;
    Element element, d_element;
};

struct ApplyParams {
    ApplyTensor tensors[kApplyTensors];
    int count, chunks;
    int skipped_stride; // 1: a counter for each tensor, 0: one for all
    Step step;
    Workspace workspace; // squares: [chunks]
    Phase first, last;   // kReduce, kWrite
};

} // namespace localsgd::cuda
