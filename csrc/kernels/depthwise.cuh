// Depthwise correlation: D[k, t] = sum over positions of z[k] * x[k / multiplier] shifted by t. Too few operations for each
// element to be worth a matrix product: what counts is to read x and z once, and to add up all taps while they are at hand.
#pragma once

#include "depthwise_walk.cuh"
#include "norm_apply.cuh"

namespace localsgd::cuda {

// Floats between neighbouring positions of a tile in shared memory: odd, so that lanes on channels and lanes on positions both
// meet 32 different banks.
constexpr int kPitch = kSlice + 1;

// Where a tile begins in the plane of an operand, and how much of it is read; zeros stand for the rest.
struct Window {
    int64 plane; // offset of the image and the depth
    int row, column;
    int rows, columns; // needed
};

LOCALSGD_DEVICE bool offset_in(const DepthwiseOperand& o, const Window& w, unsigned position, const FastDiv& by_columns,
                               int64& offset) {
    unsigned column = position;
    const auto row = static_cast<int>(divide(column, by_columns));
    const int h = w.row + row, v = w.column + static_cast<int>(column);
    offset = w.plane + h * o.space_stride[1] + v * o.space_stride[2];
    return row < w.rows && static_cast<int>(column) < w.columns && h >= 0 && h < o.size[1] && v >= 0 && v < o.size[2];
}

// to[position][lane] for the channels k / multiplier of a slice, k = first_k + lane.
LOCALSGD_DEVICE void load_tile(const DepthwiseOperand& o, float* to, const Window& w, int positions, const FastDiv& by_columns,
                               int first_k, int out_channels, const FastDiv& multiplier) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    int64 offset;
    if (o.gather == Gather::channels4) { // the multiplier is 1
        constexpr int kQuads = kSlice / 4;
        const int c = thread % kQuads * 4, k = first_k + c;
#pragma unroll 4
        for (int i = thread / kQuads; i < positions; i += kDepthwiseThreads / kQuads) {
            float4 v = make_float4(0, 0, 0, 0);
            if (offset_in(o, w, i, by_columns, offset) && k < out_channels)
                v = widen4(load_bits4(o.data, offset + k, o.element), o.element);
            float* p = to + i * kPitch + c;
            p[0] = v.x, p[1] = v.y, p[2] = v.z, p[3] = v.w;
        }
    } else if (o.gather == Gather::channels) {
        const int k = first_k + lane;
        const int64 channel = quotient(k, multiplier) * o.channel_stride;
#pragma unroll 4
        for (int i = warp; i < positions; i += kDepthwiseWarps) {
            const bool valid = offset_in(o, w, i, by_columns, offset) && k < out_channels;
            to[i * kPitch + lane] = valid ? widen(load_bits(o.data, offset + channel, o.element), o.element) : 0.0f;
        }
    } else {
        for (int c = warp; c < kSlice; c += kDepthwiseWarps) {
            const int k = first_k + c;
            const int64 channel = quotient(k, multiplier) * o.channel_stride;
#pragma unroll 4
            for (int i = lane; i < positions; i += 32) {
                const bool valid = offset_in(o, w, i, by_columns, offset) && k < out_channels;
                to[i * kPitch + c] = valid ? widen(load_bits(o.data, offset + channel, o.element), o.element) : 0.0f;
            }
        }
    }
}

// A warp's rows of a tile, a channel for each lane, all taps in registers.
template <int kR, int kS>
LOCALSGD_DEVICE void add_tile(float (&sum)[kR][kS], const DepthwiseParams& p, const float* x, const float* z, int rows,
                              int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int tap_row = p.dilation[1] * p.x_columns * kPitch;
    for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kDepthwiseWarps) {
        const float* z_row = z + row * p.tile_columns * kPitch + lane;
        const float* x_row = x + row * p.stride[1] * p.x_columns * kPitch + lane;
        if (p.stride[2] == 1 && p.dilation[2] == 1) {
            // By columns of x: tap s multiplies column i with z of column i - s, and the last kS of those stay in registers. At
            // the ends those are zeros, so that an infinite x makes its row of taps NaN: D is not usable either way.
            float recent[kS];
#pragma unroll
            for (int s = 0; s < kS; ++s) recent[s] = 0;
            for (int i = 0; i < columns + kS - 1; ++i) {
#pragma unroll
                for (int s = kS - 1; s > 0; --s) recent[s] = recent[s - 1];
                recent[0] = i < columns ? z_row[i * kPitch] : 0.0f;
#pragma unroll
                for (int r = 0; r < kR; ++r) {
                    const float v = x_row[r * tap_row + i * kPitch];
#pragma unroll
                    for (int s = 0; s < kS; ++s) sum[r][s] = fmaf(recent[s], v, sum[r][s]);
                }
            }
        } else {
            for (int q = 0; q < columns; ++q) {
                const float v = z_row[q * kPitch];
                const float* corner = x_row + q * p.stride[2] * kPitch;
#pragma unroll
                for (int r = 0; r < kR; ++r)
#pragma unroll
                    for (int s = 0; s < kS; ++s)
                        sum[r][s] = fmaf(v, corner[r * tap_row + s * p.dilation[2] * kPitch], sum[r][s]);
            }
        }
    }
}

struct TapChunk {
    int plane, row, column; // its first tap
};

template <int kR, int kS>
LOCALSGD_DEVICE TapChunk tap_chunk(const DepthwiseParams& p, unsigned chunk) {
    const unsigned plane = divide(chunk, p.by_chunk_plane), row = divide(chunk, p.by_chunk_row);
    return {static_cast<int>(plane), static_cast<int>(row) * kR, static_cast<int>(chunk) * kS};
}

template <int kR, int kS>
LOCALSGD_DEVICE void depthwise_unit(float (&sum)[kR][kS], const DepthwiseParams& p, float* memory, int slice, unsigned chunk,
                                    int first_tile, int last_tile) {
    float* const x = memory;
    float* const z = memory + p.x_rows * p.x_columns * kPitch;
    const TapChunk tap = tap_chunk<kR, kS>(p, chunk);
    for (int tile = first_tile; tile < last_tile; ++tile) {
        unsigned column = static_cast<unsigned>(tile), row = divide(column, p.by_across), plane = divide(row, p.by_down);
        const unsigned image = divide(plane, p.by_planes);
        const int depth = static_cast<int>(plane) * p.stride[0] + tap.plane * p.dilation[0] - p.pad[0];
        if (depth < 0 || depth >= p.x.size[0]) continue; // the same for the whole block
        Window wz, wx;
        wz.plane = image * p.z.batch_stride + plane * p.z.space_stride[0];
        wz.row = static_cast<int>(row) * p.tile_rows;
        wz.column = static_cast<int>(column) * p.tile_columns;
        wz.rows = min(p.tile_rows, p.z.size[1] - wz.row);
        wz.columns = min(p.tile_columns, p.z.size[2] - wz.column);
        wx.plane = image * p.x.batch_stride + depth * p.x.space_stride[0];
        wx.row = wz.row * p.stride[1] + tap.row * p.dilation[1] - p.pad[1];
        wx.column = wz.column * p.stride[2] + tap.column * p.dilation[2] - p.pad[2];
        // No more than what existing taps read: a partial chunk's other ones are multiplied by whatever is there and left out.
        wx.rows = (wz.rows - 1) * p.stride[1] + (min(kR, p.kernel[1] - tap.row) - 1) * p.dilation[1] + 1;
        wx.columns = (wz.columns - 1) * p.stride[2] + (min(kS, p.kernel[2] - tap.column) - 1) * p.dilation[2] + 1;
        __syncthreads(); // the last tile is done with
        load_tile(p.x, x, wx, p.x_rows * p.x_columns, p.by_x_columns, slice * kSlice, p.out_channels, p.multiplier);
        load_tile(p.z, z, wz, p.tile_rows * p.tile_columns, p.by_tile_columns, slice * kSlice, p.out_channels,
                  FastDiv{1, 1, 0});
        __syncthreads();
        add_tile<kR, kS>(sum, p, x, z, wz.rows, wz.columns);
    }
}

// partials[row][lane], row: slice, chunk, tap.
LOCALSGD_DEVICE float* partial_row(const DepthwiseParams& p, int taps, int split, int row) {
    return p.workspace.partials + (static_cast<int64>(split) * p.slices * p.tap_chunks * taps + row) * kSlice;
}

// The sums of a block's warps, those of channel `channel` of the slice in this lane, to a place in the partial sums.
template <int kR, int kS>
LOCALSGD_DEVICE void store_sums(const float (&sum)[kR][kS], float* memory, int channel, float* to) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    // A row of taps at a time.
#pragma unroll
    for (int r = 0; r < kR; ++r) {
        __syncthreads();
#pragma unroll
        for (int s = 0; s < kS; ++s) memory[(warp * kS + s) * kSlice + channel] = sum[r][s];
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < kS * kSlice; i += kDepthwiseThreads) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < kDepthwiseWarps; ++w) total += memory[w * kS * kSlice + i];
            to[r * kS * kSlice + i] = total;
        }
    }
}

template <int kR, int kS>
LOCALSGD_DEVICE void depthwise_tiles(const DepthwiseParams& p, float* memory) {
    for (int unit = static_cast<int>(blockIdx.x); unit < p.units; unit += static_cast<int>(gridDim.x)) {
        auto split = static_cast<unsigned>(unit);
        const unsigned place = divide(split, p.by_splits);
        unsigned chunk = place;
        const unsigned slice = divide(chunk, p.by_tap_chunks);
        float sum[kR][kS];
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
            for (int s = 0; s < kS; ++s) sum[r][s] = 0;
        const int first = static_cast<int>(split) * p.split_tiles;
        depthwise_unit<kR, kS>(sum, p, memory, static_cast<int>(slice), chunk, first, min(first + p.split_tiles, p.tiles));
        store_sums<kR, kS>(sum, memory, static_cast<int>(threadIdx.x) % 32,
                           partial_row(p, kR * kS, static_cast<int>(split), static_cast<int>(place) * kR * kS));
    }
}

template <Element kElement, int kStride>
LOCALSGD_DEVICE void walk_tiles(const DepthwiseParams& p, float* memory) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int unit = static_cast<int>(blockIdx.x); unit < p.units; unit += static_cast<int>(gridDim.x)) {
        auto split = static_cast<unsigned>(unit);
        const int slice = static_cast<int>(divide(split, p.by_splits)), first = static_cast<int>(split) * p.split_tiles;
        float sum[3][3];
        walk_unit<kElement, kStride>(sum, p, slice, first, min(first + p.split_tiles, p.tiles));
        store_sums<3, 3>(sum, memory, lane % kWalkerLanes * 2 + lane / kWalkerLanes,
                         partial_row(p, 9, static_cast<int>(split), slice * 9));
    }
}

// Calls visit(offset in D) if the tap and the channel of a row and a lane exist.
template <int kR, int kS, class Visit>
LOCALSGD_DEVICE void visit_target(const DepthwiseParams& p, int row, int lane, const Visit& visit) {
    unsigned chunk = static_cast<unsigned>(row) / (kR * kS);
    const int tap = row % (kR * kS), k = static_cast<int>(divide(chunk, p.by_tap_chunks)) * kSlice + lane;
    const TapChunk first = tap_chunk<kR, kS>(p, chunk);
    const int r = first.row + tap / kS, s = first.column + tap % kS;
    if (k >= p.out_channels || r >= p.kernel[1] || s >= p.kernel[2]) return;
    visit(k * p.target.out_stride + first.plane * p.target.tap_stride[0] + r * p.target.tap_stride[1] +
          s * p.target.tap_stride[2]);
}

// D into the first split's place, its squares' sum for this block; or D to the target, if that is all that is wanted. A block
// for each row: its warps add a run of splits each.
template <int kR, int kS>
LOCALSGD_DEVICE void depthwise_reduce(const DepthwiseParams& p, float* memory) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int rows = p.slices * p.tap_chunks * kR * kS, run = (p.splits + kDepthwiseWarps - 1) / kDepthwiseWarps;
    double squares = 0;
    for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
        float sum = 0;
#pragma unroll 8
        for (int split = warp * run; split < min(warp * run + run, p.splits); ++split)
            sum += __ldcg(partial_row(p, kR * kS, split, row) + lane);
        __syncthreads(); // the last row is done with
        memory[warp * kSlice + lane] = sum;
        __syncthreads();
        if (warp != 0) continue;
        float d = 0;
#pragma unroll
        for (int w = 0; w < kDepthwiseWarps; ++w) d += memory[w * kSlice + lane];
        visit_target<kR, kS>(p, row, lane, [&](int64 offset) {
            squares += static_cast<double>(d) * static_cast<double>(d);
            if (p.to_target) static_cast<float*>(p.target.data)[offset] = d;
        });
        if (!p.to_target) partial_row(p, kR * kS, 0, row)[lane] = d;
    }
    if (p.to_target) return;
    squares = block_sum<kDepthwiseThreads>(squares);
    if (threadIdx.x == 0) p.workspace.squares[blockIdx.x] = squares;
}

// A warp takes a row. `wait` as in norm_and_write: W is read before it, since nobody writes W until then.
template <int kR, int kS, class Wait>
LOCALSGD_DEVICE void depthwise_write(const DepthwiseParams& p, const Wait& wait) {
    const int lane = static_cast<int>(threadIdx.x) % 32, rows = p.slices * p.tap_chunks * kR * kS;
    int row = static_cast<int>(blockIdx.x) * kDepthwiseWarps + static_cast<int>(threadIdx.x) / 32;
    double scale = 0;
    bool waited = false;
#pragma unroll 1
    do { // once even without a row: all threads meet in `wait`
        int64 at = -1;
        float old = 0;
        visit_target<kR, kS>(p, row, lane, [&](int64 offset) { // rows beyond the last have channels that do not exist
            at = offset;
            old = weight_at(p.target.data, offset, p.target.element);
        });
        if (!waited) {
            waited = true;
            wait();
            const double squares = block_sum<kDepthwiseThreads>(p.workspace.squares, static_cast<int>(gridDim.x));
            if (!usable(p.step, squares)) {
                if (blockIdx.x == 0 && threadIdx.x == 0) count_skip(p.step.skipped);
                return;
            }
            scale = step_scale(p.step, squares);
        }
        if (at >= 0)
            put_weight(p.target.data, at, p.target.element,
                       add_scaled(old, scale, __ldcg(partial_row(p, kR * kS, 0, row) + lane)));
        row += static_cast<int>(gridDim.x) * kDepthwiseWarps;
    } while (row < rows);
}

// Blocks a multiprocessor is to hold, by which the compiler rations registers: 80 a thread, more for the sums of large chunks.
template <int kR, int kS>
constexpr int kDepthwiseBlocks = kR * kS > 25  ? 1
                                 : kR * kS > 9 ? 2
                                               : 3;

// `tiles` fills the partial sums; then the phases that follow.
template <int kR, int kS, class Tiles>
LOCALSGD_DEVICE void depthwise_phases(const DepthwiseParams& p, float* memory, const Tiles& tiles) {
    if (p.first == kCorrelate) tiles(p, memory);
    if (p.first < kReduce && p.last >= kReduce) grid_barrier(p.workspace.barrier);
    if (p.first <= kReduce && p.last >= kReduce) depthwise_reduce<kR, kS>(p, memory);
    if (p.last < kWrite) return;
    depthwise_write<kR, kS>(p, [&] {
        if (p.first < kWrite) grid_barrier(p.workspace.barrier);
    });
}

template <int kR, int kS>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<kR, kS>) depthwise_kernel(const DepthwiseParams p) {
    LOCALSGD_DYNAMIC_SHARED(dynamic);
    depthwise_phases<kR, kS>(p, reinterpret_cast<float*>(dynamic), depthwise_tiles<kR, kS>);
}

// Two blocks a multiprocessor: 128 registers a thread, so that enough bytes are on their way.
template <Element kElement, int kStride>
__global__ void __launch_bounds__(kDepthwiseThreads, 2) depthwise_walk_kernel(const DepthwiseParams p) {
    LOCALSGD_DYNAMIC_SHARED(dynamic);
    depthwise_phases<3, 3>(p, reinterpret_cast<float*>(dynamic), walk_tiles<kElement, kStride>);
}

} // namespace localsgd::cuda
