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

// Memory-bound: four neighbours at a time where both tensors are aligned for them, which tensors of the framework's allocator
// are; and several such loads in flight.
constexpr int kApplyStep = 4 * kApplyThreads, kApplyBatch = kChunk / kApplyStep;

LOCALSGD_DEVICE double chunk_squares(const ApplyTensor& t, int64 begin, int count) {
    const auto square = [](float v) { return static_cast<double>(v) * v; };
    double sum = 0;
    int done = 0;
    if (is_aligned(t.d, 4 * size_of(t.d_element))) {
        done = count / 4 * 4;
        uint4 bits[kApplyBatch];
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            const int i = static_cast<int>(threadIdx.x) * 4 + j * kApplyStep;
            bits[j] = i < done ? load_bits4(t.d, begin + i, t.d_element) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            const float4 v = widen4(bits[j], t.d_element);
            sum += square(v.x) + square(v.y) + square(v.z) + square(v.w);
        }
    }
    for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads)
        sum += square(widen(load_bits(t.d, begin + i, t.d_element), t.d_element));
    return sum;
}

LOCALSGD_DEVICE void chunk_write(const ApplyTensor& t, int64 begin, int count, double scale) {
    int done = 0;
    if (t.element == Element::f32 && is_aligned(t.d, 4 * size_of(t.d_element)) && is_aligned(t.weight, 16)) {
        done = count / 4 * 4;
        float* w = static_cast<float*>(t.weight) + begin;
        uint4 bits[kApplyBatch];
        float4 old[kApplyBatch];
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            const int i = static_cast<int>(threadIdx.x) * 4 + j * kApplyStep;
            if (i >= done) break;
            bits[j] = load_bits4(t.d, begin + i, t.d_element);
            old[j] = quad(w + i);
        }
#pragma unroll
        for (int j = 0; j < kApplyBatch; ++j) {
            const int i = static_cast<int>(threadIdx.x) * 4 + j * kApplyStep;
            if (i >= done) break;
            const float4 v = widen4(bits[j], t.d_element);
            quad(w + i) = make_float4(add_scaled(old[j].x, scale, v.x), add_scaled(old[j].y, scale, v.y),
                                      add_scaled(old[j].z, scale, v.z), add_scaled(old[j].w, scale, v.w));
        }
    }
    for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads)
        add_scaled_at(t.weight, begin + i, t.element, scale, widen(load_bits(t.d, begin + i, t.d_element), t.d_element));
}

__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const ApplyParams p) {
    if (p.first == kReduce) {
        for (int chunk = static_cast<int>(blockIdx.x); chunk < p.chunks; chunk += static_cast<int>(gridDim.x)) {
            const ApplyTensor& t = p.tensors[tensor_of(p, chunk)];
            const int64 begin = static_cast<int64>(chunk - t.first_chunk) * kChunk;
            const double sum =
                block_sum<kApplyThreads>(chunk_squares(t, begin, static_cast<int>(min(t.count - begin, int64{kChunk}))));
            if (threadIdx.x == 0) p.workspace.squares[chunk] = sum;
        }
    }
    if (p.first < kWrite && p.last >= kWrite) grid_barrier(p.workspace.barrier);
    if (p.last < kWrite) return;
    int summed = -1;
    double squares = 0;
    for (int chunk = static_cast<int>(blockIdx.x); chunk < p.chunks; chunk += static_cast<int>(gridDim.x)) {
        const int index = tensor_of(p, chunk);
        const ApplyTensor& t = p.tensors[index];
        if (index != summed) { // a tensor's chunks, in one order whichever block asks
            const int end = index + 1 < p.count ? p.tensors[index + 1].first_chunk : p.chunks;
            squares = block_sum<kApplyThreads>(p.workspace.squares + t.first_chunk, end - t.first_chunk);
            summed = index;
        }
        if (usable(p.step, squares)) {
            const int64 begin = static_cast<int64>(chunk - t.first_chunk) * kChunk;
            chunk_write(t, begin, static_cast<int>(min(t.count - begin, int64{kChunk})), step_scale(p.step, squares));
        } else if (chunk == t.first_chunk && threadIdx.x == 0) {
            count_skip(p.step.skipped ? p.step.skipped + index * p.skipped_stride : nullptr);
        }
    }
}

} // namespace localsgd::cuda
