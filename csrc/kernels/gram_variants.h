// The Gram kernels as values, from which get_best_config chooses.
#pragma once

#include "params.h"

namespace localsgd::cuda {

struct GramVariant {
    Core core, product; // of G; of W G
    int tile;           // of G: square
    int product_m, product_n, threads;
    int step_positions, product_step; // of the main loops; splits are multiples of them
    int shared_bytes;                 // dynamic
    int compute, compute_end; // the first compute capability, 75 for 7.5, that it runs on, and the first it no longer does
    Access access;
    void (*kernel)(GramParams);
};

constexpr int kGramSizes = 2;
constexpr int kGramFfmaKernels = kGramSizes * 3;      // by access to x
constexpr int kGramBf16Kernels = kGramSizes * 4;      // and 16-byte chunks
constexpr int kGramF16Kernels = kGramSizes * (4 + 3); // and sm_75's
constexpr int kGramTf32Kernels = kGramSizes * 3;      // in fp32, 4 channels are a chunk
constexpr int kGramKernels = kGramFfmaKernels + kGramBf16Kernels + kGramF16Kernels + kGramTf32Kernels;

#if !defined(__CUDACC_RTC__)
extern const GramVariant kGramBf16Variants[kGramBf16Kernels];
extern const GramVariant kGramF16Variants[kGramF16Kernels];
extern const GramVariant kGramTf32Variants[kGramTf32Kernels];

template <Core kCore, int kSize, Access kAccess, Core kProductCore, class Paths>
constexpr GramVariant gram_variant(int compute, int compute_end, void (*kernel)(GramParams)) {
    using Gram = typename Paths::Gram;
    using Product = typename Paths::Product;
    constexpr auto gram = sizeof(typename Gram::Storage), product = sizeof(typename Product::Storage);
    return {kCore,
            kProductCore,
            kSize,
            Product::Tile::kM,
            Product::Tile::kN,
            Gram::Tile::kThreads,
            Gram::kPositions,
            Product::kPositions,
            static_cast<int>(gram > product ? gram : product),
            compute,
            compute_end,
            kAccess,
            kernel};
}
#endif

} // namespace localsgd::cuda
