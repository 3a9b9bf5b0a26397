#include "write.h"

#include <algorithm>
#include <cmath>

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "../canonical.h"
#include "apply.h"

namespace localsgd::cpu {
namespace {

// Whether elements lie in the same order: strides of dimensions of size 1 say nothing.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
    for (int64_t dim = 0; dim < a.dim(); ++dim)
        if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
    return true;
}

// A run of memory of a weight and of D.
struct Target {
    at::Tensor weight, d; // dense and in the same order
    int64_t first_chunk;  // among those of all targets
    double scale = 0;     // of D; 0: not to be written

    Target(const at::Tensor& given, const at::Tensor& correlation, int64_t first_chunk)
        : weight(given.is_non_overlapping_and_dense() ? given : given.contiguous()), d(correlation), first_chunk(first_chunk) {
        if (same_order(d, weight)) return; // e.g. a channels_last weight: D in the weight's order
        d = at::empty_like(weight, correlation.options());
        d.copy_(correlation);
    }
    int64_t chunks() const { return ceil_div(d.numel(), kNormChunk); }

    double squares(int64_t chunk) const {
        const int64_t begin = (chunk - first_chunk) * kNormChunk, count = std::min(kNormChunk, d.numel() - begin);
        if (d.scalar_type() == at::kDouble) return sum_of_squares(d.const_data_ptr<double>() + begin, count);
        return sum_of_squares(d.const_data_ptr<float>() + begin, count);
    }
    void write(int64_t chunk) const {
        const int64_t begin = (chunk - first_chunk) * kNormChunk, count = std::min(kNormChunk, d.numel() - begin);
        const Kind kind = kind_of(weight);
        void* const w = static_cast<char*>(weight.mutable_data_ptr()) + begin * kind_size(kind);
        if (d.scalar_type() == at::kDouble)
            add_scaled(w, kind, d.const_data_ptr<double>() + begin, count, scale);
        else
            add_scaled(w, kind, d.const_data_ptr<float>() + begin, count, scale);
    }
};

template <typename Body>
void for_each_chunk(const std::vector<Target>& targets, int64_t chunks, const Body& body) {
    at::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
        auto target = std::upper_bound(targets.begin(), targets.end(), begin,
                                       [](int64_t chunk, const Target& t) { return chunk < t.first_chunk; }) -
                      1;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            while (chunk >= target->first_chunk + target->chunks()) ++target;
            body(*target, chunk);
        }
    });
}

} // namespace

std::vector<bool> apply_updates(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& ds, double lr,
                                bool normalize) {
    std::vector<Target> targets;
    int64_t chunks = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        targets.emplace_back(weights[i], ds[i], chunks);
        chunks += targets.back().chunks();
    }
    std::vector<double> squares(chunks); // summed in order, so that norms have the same bits with any number of threads
    for_each_chunk(targets, chunks, [&](const Target& target, int64_t chunk) { squares[chunk] = target.squares(chunk); });
    std::vector<bool> usable;
    for (Target& target : targets) {
        double sum = 0;
        for (int64_t i = 0; i < target.chunks(); ++i) sum += squares[target.first_chunk + i];
        const double norm = std::sqrt(sum);
        usable.push_back(std::isfinite(norm) && norm > 0);
        if (usable.back()) target.scale = normalize ? lr / norm : lr;
    }
    for_each_chunk(targets, chunks, [&](const Target& target, int64_t chunk) {
        if (target.scale != 0) target.write(chunk);
    });
    for (size_t i = 0; i < weights.size(); ++i) // slices, which were written as dense copies
        if (usable[i] && !targets[i].weight.is_same(weights[i])) weights[i].copy_(targets[i].weight);
    return usable;
}

} // namespace localsgd::cpu
