// Prints the kernels that launchers choose from, one a line, as the launchers' own tables have them: symbol, first compute
// capability it runs on, first it no longer runs on, and for each product the instruction that multiplies and the tile: rows,
// columns, those of a warp's part, bytes of an operand's element, columns that are read from global memory. Compiled with all
// of csrc/kernels/*.cu included, for the emulated GPU.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {

using namespace localsgd::cuda;

constexpr int kNever = 1 << 30;

template <class T>
bool print_if(int m, int n, int bytes) {
    if (m != T::kM || n != T::kN) return false;
    std::printf("%dx%dx%dx%dx%d", m, n, T::kM / T::kWarpsM, T::kN / T::kWarpsN, bytes);
    return true;
}

template <template <int, int> class T, class Wide = T<64, 64>> // `Wide`: the matrix units' tile for few channels
void print_tile(int m, int n, int bytes) {
    if (print_if<T<64, 64>>(m, n, bytes) || print_if<T<64, 128>>(m, n, bytes) || print_if<T<128, 64>>(m, n, bytes) ||
        print_if<T<128, 128>>(m, n, bytes) || print_if<T<64, 32>>(m, n, bytes) || print_if<Wide>(m, n, bytes))
        return;
    std::fprintf(stderr, "name the tile %dx%d in tests/device/variants.cpp\n", m, n);
    std::exit(1);
}
template <int kM, int kN>
using Tf32Tile = MmaTile<Core::mma_tf32, kM, kN>;
template <int kM, int kN>
using HalfTile = MmaTile<Core::mma_bf16, kM, kN>;

// `read`: columns that are read from global memory, which is hardly any of those that segments hold.
void print_product(Core core, int m, int n, int read) {
    std::printf(core == Core::ffma ? " FFMA:" : " HMMA:");
    if (core == Core::ffma)
        print_tile<Tile>(m, n, 4);
    else if (core == Core::mma_tf32)
        print_tile<Tf32Tile, Tf32Tile<64, 160>>(m, n, 4);
    else
        print_tile<HalfTile, HalfTile<64, 160>>(m, n, 2);
    std::printf("x%d", read);
}

template <class Kernel>
void begin(Kernel kernel, int compute = 0, int compute_end = kNever) {
    Dl_info found{};
    if (!dladdr(reinterpret_cast<const void*>(kernel), &found) || !found.dli_sname) std::exit(1);
    std::printf("\n%s %d %d", found.dli_sname, compute, compute_end);
}

void print(const Variant& v) {
    begin(v.kernel, v.compute);
    print_product(v.core, v.tile_m, v.tile_n, by_segments(v.x) ? 0 : v.tile_n);
}

void print(const GramVariant& v) {
    begin(v.kernel, v.compute, v.compute_end);
    print_product(v.core, v.tile, v.tile, v.tile);
    print_product(v.product, v.product_m, v.product_n, v.product_n);
}

} // namespace

int main() {
    for (int i = 0; i < kDirectKernels; ++i) print(variant(i));
    for (int i = 0; i < kGramKernels; ++i) print(gram_kernel_variant(i));
    for (const DepthwiseVariant& v : kDepthwiseVariants) {
        begin(v.kernel);
        std::printf(" FFMA");
    }
    begin(apply_kernel);
    std::puts(" DFMA");
}
