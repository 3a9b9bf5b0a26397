// W += lr * D / ||D|| for many tensors at once.
#pragma once

#include "element.cuh"
#include "norm_apply.cuh"

namespace localsgd::cuda {

constexpr int kApplyThreads = 256;

// The tensor of a chunk; the same for all threads of a block.
LOCALSGD_DEVICE int tensor_of(const ApplyParams& p, int chunk) {
    int low = 0, high = p.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (p.tensors[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

LOCALSGD_DEVICE bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uint64>(p) % bytes == 0; }

LOCALSGD_DEVICE int size_of(Element element) { return element == Element::f32 ? 4 : 2; }

// Memory-bound: four neighbours at a time where tensors are aligned for them, which tensors of the framework's allocator are;
// and several such loads in flight.
constexpr int kApplyStep = 4 * kApplyThreads, kApplyBatch = kChunk / kApplyStep;

// A chunk of a tensor, and what a thread has read of it.
struct Chunk {
    const ApplyTensor& tensor;
    int64 begin;
    int count;
    uint4 d[kApplyBatch] = {};
    float4 old[kApplyBatch] = {};

    LOCALSGD_DEVICE Chunk(const ApplyTensor& t, int chunk)
        : tensor(t),
          begin(static_cast<int64>(chunk - t.first_chunk) * kChunk),
          count(static_cast<int>(min(t.count - begin, int64{kChunk}))) {}

    static LOCALSGD_DEVICE int place(int j) { return static_cast<int>(threadIdx.x) * 4 + j * kApplyStep; }
    // How many elements are read four at a time: of D; of D and W.
    LOCALSGD_DEVICE int quads() const { return is_aligned(tensor.d, 4 * size_of(tensor.d_element)) ? count / 4 * 4 : 0; }
    LOCALSGD_DEVICE int both_quads() const {
        return tensor.element == Element::f32 && is_aligned(tensor.weight, 16) ? quads() : 0;
    }
    LOCALSGD_DEVICE float one(int i) const { return widen(load_bits(tensor.d, begin + i, tensor.d_element), tensor.d_element); }

    LOCALSGD_DEVICE void load_d() {
        const int end = quads();
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j)
            d[j] = place(j) < end ? load_bits4(tensor.d, begin + place(j), tensor.d_element) : make_uint4(0, 0, 0, 0);
    }
    LOCALSGD_DEVICE void load_weight() {
        const int end = both_quads();
        const float* w = static_cast<const float*>(tensor.weight) + begin;
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j)
            if (place(j) < end) old[j] = quad(w + place(j));
    }
    LOCALSGD_DEVICE double squares() const {
        const auto square = [](float v) { return static_cast<double>(v) * v; };
        double sum = 0;
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            const float4 v = widen4(d[j], tensor.d_element);
            sum += square(v.x) + square(v.y) + square(v.z) + square(v.w);
        }
        for (int i = quads() + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads) sum += square(one(i));
        return sum;
    }
    LOCALSGD_DEVICE void write(double scale) const {
        const int end = both_quads();
        float* w = static_cast<float*>(tensor.weight) + begin;
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            if (place(j) >= end) break;
            const float4 v = widen4(d[j], tensor.d_element);
            quad(w + place(j)) = make_float4(add_scaled(old[j].x, scale, v.x), add_scaled(old[j].y, scale, v.y),
                                             add_scaled(old[j].z, scale, v.z), add_scaled(old[j].w, scale, v.w));
        }
        for (int i = end + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads)
            add_scaled_at(tensor.weight, begin + i, tensor.element, scale, one(i));
    }
};

// The sum over a tensor's chunks, in one order whichever block asks.
LOCALSGD_DEVICE double tensor_squares(const ApplyParams& p, int index) {
    const int first = p.tensors[index].first_chunk, end = index + 1 < p.count ? p.tensors[index + 1].first_chunk : p.chunks;
    return block_sum<kApplyThreads>(p.workspace.squares + first, end - first);
}

LOCALSGD_DEVICE void put_squares(const ApplyParams& p, int chunk, double squares) {
    squares = block_sum<kApplyThreads>(squares);
    if (threadIdx.x == 0) p.workspace.squares[chunk] = squares;
}

LOCALSGD_DEVICE void write_or_count(const ApplyParams& p, const Chunk& c, int chunk, int index, double squares) {
    if (usable(p.step, squares))
        c.write(step_scale(p.step, squares));
    else if (chunk == c.tensor.first_chunk && threadIdx.x == 0)
        count_skip(p.step.skipped ? p.step.skipped + index * p.skipped_stride : nullptr);
}

__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const ApplyParams p) {
    if (p.first == kReduce && p.last == kWrite && static_cast<int>(gridDim.x) == p.chunks) {
        // One chunk a block: it is read once, W before the barrier, too.
        const int chunk = static_cast<int>(blockIdx.x), index = tensor_of(p, chunk);
        Chunk c(p.tensors[index], chunk);
        c.load_d();
        c.load_weight();
        put_squares(p, chunk, c.squares());
        grid_barrier(p.workspace.barrier);
        write_or_count(p, c, chunk, index, tensor_squares(p, index));
        return;
    }
    if (p.first == kReduce) {
        for (int chunk = static_cast<int>(blockIdx.x); chunk < p.chunks; chunk += static_cast<int>(gridDim.x)) {
            Chunk c(p.tensors[tensor_of(p, chunk)], chunk);
            c.load_d();
            put_squares(p, chunk, c.squares());
        }
    }
    if (p.first < kWrite && p.last >= kWrite) grid_barrier(p.workspace.barrier);
    if (p.last < kWrite) return;
    int summed = -1;
    double squares = 0;
    for (int chunk = static_cast<int>(blockIdx.x); chunk < p.chunks; chunk += static_cast<int>(gridDim.x)) {
        const int index = tensor_of(p, chunk);
        if (index != summed) squares = tensor_squares(p, index);
        summed = index;
        Chunk c(p.tensors[index], chunk);
        c.load_d();
        c.load_weight();
        write_or_count(p, c, chunk, index, squares);
    }
}

} // namespace localsgd::cuda
