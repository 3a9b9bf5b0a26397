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

// Memory-bound: 16-byte accesses where both tensors are aligned for them, which tensors of the framework's allocator are.
LOCALSGD_DEVICE double chunk_squares(const float* d, int count) {
    double sum = 0;
    int done = 0;
    if (is_aligned(d, 16)) {
        done = count / 4 * 4;
        for (int i = static_cast<int>(threadIdx.x) * 4; i < done; i += kApplyThreads * 4) {
            const float4 v = quad(d + i);
            sum += static_cast<double>(v.x) * v.x + static_cast<double>(v.y) * v.y + static_cast<double>(v.z) * v.z +
                   static_cast<double>(v.w) * v.w;
        }
    }
    for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads) sum += static_cast<double>(d[i]) * d[i];
    return sum;
}

LOCALSGD_DEVICE void chunk_write(const ApplyTensor& t, int64 begin, int count, double scale) {
    const float* d = t.d + begin;
    int done = 0;
    if (t.element == Element::f32 && is_aligned(t.d, 16) && is_aligned(t.weight, 16)) {
        done = count / 4 * 4;
        float* w = static_cast<float*>(t.weight) + begin;
        for (int i = static_cast<int>(threadIdx.x) * 4; i < done; i += kApplyThreads * 4) {
            const float4 v = quad(d + i), old = quad(w + i);
            quad(w + i) = make_float4(add_scaled(old.x, scale, v.x), add_scaled(old.y, scale, v.y),
                                      add_scaled(old.z, scale, v.z), add_scaled(old.w, scale, v.w));
        }
    }
    for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kApplyThreads)
        add_scaled_at(t.weight, begin + i, t.element, scale, d[i]);
}

__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const ApplyParams p) {
    if (p.first == kReduce) {
        for (int chunk = static_cast<int>(blockIdx.x); chunk < p.chunks; chunk += static_cast<int>(gridDim.x)) {
            const ApplyTensor& t = p.tensors[tensor_of(p, chunk)];
            const int64 begin = static_cast<int64>(chunk - t.first_chunk) * kChunk;
            const double sum =
                block_sum<kApplyThreads>(chunk_squares(t.d + begin, static_cast<int>(min(t.count - begin, int64{kChunk}))));
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
