// The emulated GPU itself: it must compute what the hardware would, and it must report what goes wrong.
#include <sys/wait.h>
#include <unistd.h>

#include <random>
#include <vector>

#include "check.h"
#include "cpu/elements.h"
#include "emulation/guarded.h"
#include "kernels/element.cuh"
#include "kernels/grid.cuh"
#include "kernels/ptx.cuh"

namespace {

using namespace localsgd;
using namespace localsgd::cuda;
using emulation::Guarded;

template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), unsigned grid, unsigned block, bool cooperative, const Arguments&... arguments) {
    return launch(kernel, dim3(grid), dim3(block), 256, cooperative, nullptr, arguments...);
}

// Whether `body` ends the process that runs it.
template <class Body>
bool aborts(const Body& body) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        if (!std::freopen("/dev/null", "w", stderr)) _exit(0); // what it reports is expected
        emulation::options().hang_seconds = 0.5;
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status);
}

// --- barriers and warp operations

__global__ void reverse(int* data) {
    using Values = int[64];
    LOCALSGD_SHARED(Values, values);
    values[threadIdx.x] = data[blockIdx.x * 64 + threadIdx.x];
    __syncthreads();
    data[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void reverse_without_barrier(int* data) {
    using Values = int[64];
    LOCALSGD_SHARED(Values, values);
    values[threadIdx.x] = data[blockIdx.x * 64 + threadIdx.x];
    data[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void divergent_barrier(int* data) {
    if (threadIdx.x % 2) __syncthreads();
    __syncwarp();
    data[threadIdx.x] = 1;
}

__global__ void divergent_shuffle(int* data) {
    if (threadIdx.x < 16)
        data[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
    else
        __syncwarp();
}

__global__ void early_return(int* data) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    data[threadIdx.x] = 1;
}

__global__ void shuffles(int* data) {
    const int lane = static_cast<int>(threadIdx.x);
    data[lane] = __shfl_xor_sync(~0u, lane, 5);
    data[32 + lane] = __shfl_down_sync(~0u, lane, 3);
    data[64 + lane] = __shfl_up_sync(~0u, lane, 2, 8);
    data[96 + lane] = __shfl_sync(~0u, lane, 11, 16);
    data[128 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
    data[160 + lane] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
}

__global__ void poisoned(unsigned* data) {
    LOCALSGD_SHARED(unsigned, word);
    LOCALSGD_DYNAMIC_SHARED(bytes);
    data[2 * blockIdx.x] = word;
    std::memcpy(&data[2 * blockIdx.x + 1], bytes, 4);
    word = 0;
    std::memset(bytes, 0, 256);
}

__global__ void atomics(unsigned* data) {
    atomicAdd(&data[0], threadIdx.x);
    atomicInc(&data[1], 9);
}

void test_barriers() {
    for (unsigned seed = 0; seed < 6; ++seed) {
        emulation::options().seed = seed;
        Guarded<int> data(5 * 64);
        for (int i = 0; i < 5 * 64; ++i) data[i] = i;
        CHECK(run(reverse, 5, 64, false, data.data()) == cudaSuccess);
        bool reversed = true;
        for (int i = 0; i < 5 * 64; ++i) reversed = reversed && data[i] == i / 64 * 64 + 63 - i % 64;
        CHECK(reversed && data.intact());
        CHECK(run(reverse_without_barrier, 5, 64, false, data.data()) == cudaSuccess);
        bool restored = true;
        for (int i = 0; i < 5 * 64; ++i) restored = restored && data[i] == i;
        CHECK(!restored);
        Guarded<int> flags(40);
        CHECK(run(early_return, 1, 64, false, flags.data()) == cudaSuccess);
        CHECK(flags[0] == 1 && flags[39] == 1);
        Guarded<unsigned> words(8);
        CHECK(run(poisoned, 4, 1, false, words.data()) == cudaSuccess);
        for (int i = 0; i < 8; ++i) CHECK(words[i] == ~0u);
        Guarded<unsigned> counters(2);
        counters[0] = counters[1] = 0;
        CHECK(run(atomics, 3, 96, false, counters.data()) == cudaSuccess);
        CHECK(counters[0] == 3 * 95 * 96 / 2 && counters[1] == 3 * 96 % 10);
    }
    std::vector<int> unused(256);
    CHECK(aborts([&] { run(divergent_barrier, 1, 32, false, unused.data()); }));
    CHECK(aborts([&] { run(divergent_shuffle, 1, 32, false, unused.data()); }));
    Guarded<int> lanes(192);
    CHECK(run(shuffles, 1, 32, false, lanes.data()) == cudaSuccess);
    for (int l = 0; l < 32; ++l) {
        CHECK(lanes[l] == (l ^ 5));
        CHECK(lanes[32 + l] == (l + 3 < 32 ? l + 3 : l));
        CHECK(lanes[64 + l] == (l % 8 >= 2 ? l - 2 : l));
        CHECK(lanes[96 + l] == l / 16 * 16 + 11);
        CHECK(lanes[128 + l] == 0x49249249);
        CHECK(lanes[160 + l] == 1);
    }
}

// --- grids

__global__ void all_to_all(unsigned* barrier, unsigned* data, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x == 0) data[blockIdx.x] = static_cast<unsigned>(round);
        grid_barrier(barrier);
        for (unsigned b = 0; b < gridDim.x; ++b)
            if (__ldcg(data + b) != static_cast<unsigned>(round)) data[gridDim.x] = 1;
        grid_barrier(barrier);
    }
}

void test_grid() {
    emulation::Options& o = emulation::options();
    o.multiprocessors = 3;
    o.blocks_per_multiprocessor = 2;
    Guarded<unsigned> barrier(1);
    barrier[0] = 0;
    for (unsigned blocks = 1; blocks <= 6; ++blocks) {
        o.seed = blocks;
        Guarded<unsigned> data(blocks + 1);
        data[blocks] = 0;
        CHECK(run(all_to_all, blocks, 64, true, barrier.data(), data.data(), 5) == cudaSuccess);
        CHECK(data[blocks] == 0 && (barrier[0] & 0x7fffffffu) == 0);
    }
    std::vector<unsigned> unused(8);
    CHECK(run(all_to_all, 7, 64, true, barrier.data(), unused.data(), 1) == cudaErrorCooperativeLaunchTooLarge);
    CHECK(run(all_to_all, 0, 64, false, barrier.data(), unused.data(), 1) == cudaErrorInvalidConfiguration);
    // Not promised without a cooperative launch.
    std::vector<unsigned> many(65, 0);
    CHECK(aborts([&] { run(all_to_all, 64, 32, false, barrier.data(), many.data(), 1); }));
}

// --- guards

__global__ void write_at(float* data, int index) { data[index] = 1; }

void test_guards() {
    for (const auto flush : {emulation::Flush::begin, emulation::Flush::end}) {
        Guarded<float> data(5, flush);
        CHECK(data.intact() && std::isnan(data[4]));
        run(write_at, 1, 1, false, data.data(), 4);
        CHECK(data.intact());
        run(write_at, 1, 1, false, data.data(), flush == emulation::Flush::begin ? 5 : -1);
        CHECK(!data.intact(/*report=*/false));
    }
    CHECK(aborts([] {
        Guarded<float> data(8);
        run(write_at, 1, 1, false, data.data(), 8);
    }));
    CHECK(aborts([] {
        Guarded<float> data(8, emulation::Flush::begin);
        run(write_at, 1, 1, false, data.data(), -1);
    }));
}

// --- cp.async

struct alignas(16) Staged {
    float values[3][4];
};

__global__ void copy_late(const float* from, float* to, int mode) {
    LOCALSGD_SHARED(Staged, staged);
    cp_async16(staged.values[0], from);
    cp_async_commit();
    cp_async16(staged.values[1], from + 4, false);
    cp_async_commit();
    if (mode == 1) to[0] = staged.values[0][0]; // too early
    cp_async_wait<1>();
    if (mode == 0) to[0] = staged.values[0][0];
    to[1] = staged.values[1][0]; // too early
    if (mode != 2) cp_async_wait<0>();
    to[2] = staged.values[1][0];
}

void test_async_copies() {
    Guarded<float> from(8), to(3);
    for (int i = 0; i < 8; ++i) from[i] = 5.0f + i;
    CHECK(run(copy_late, 1, 1, false, from.data(), to.data(), 0) == cudaSuccess);
    CHECK(to[0] == 5 && std::isnan(to[1]) && to[2] == 0); // the second was not valid: zeros
    CHECK(run(copy_late, 1, 1, false, from.data(), to.data(), 1) == cudaSuccess);
    CHECK(std::isnan(to[0]));
    CHECK(aborts([&] { run(copy_late, 1, 1, false, from.data(), to.data(), 2); }));
    CHECK(aborts([&] { run(copy_late, 1, 1, false, from.data() + 1, to.data(), 0); })); // misaligned
}

// --- matrix products: A [16, K] and B [K, 8] through shared memory, ldmatrix and mma. A lies [m][k], B as [k][n].

template <class T, int kK>
struct Operands {
    alignas(16) T a[16][kK];
    alignas(16) T b[kK][8];
};

__global__ void product_16bit(const Operands<unsigned short, 16>* in, float* d, bool bfloat16) {
    using Both = Operands<unsigned short, 16>;
    LOCALSGD_SHARED(Both, s);
    if (threadIdx.x == 0) s = *in;
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x);
    unsigned a[4], b4[4];
    ldmatrix(a, &s.a[lane % 16][lane / 16 * 8]);
    ldmatrix_transposed(b4, &s.b[lane % 16][0]);
    const unsigned b[2] = {b4[0], b4[1]};
    float sum[4] = {1, 1, 1, 1};
    if (bfloat16)
        mma_m16n8k16_bf16(sum, a, b);
    else
        mma_m16n8k16_f16(sum, a, b);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void product_f16_k8(const Operands<unsigned short, 8>* in, float* d) {
    const int lane = static_cast<int>(threadIdx.x), row = lane / 4, k = lane % 4 * 2;
    const auto pair = [](unsigned low, unsigned high) { return low | high << 16; };
    const unsigned a[2] = {pair(in->a[row][k], in->a[row][k + 1]), pair(in->a[row + 8][k], in->a[row + 8][k + 1])};
    const unsigned b[1] = {pair(in->b[k][row], in->b[k + 1][row])};
    float sum[4] = {1, 1, 1, 1};
    mma_m16n8k8_f16(sum, a, b);
    for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + k + i % 2] = sum[i];
}

__global__ void product_tf32(const Operands<float, 8>* in, float* d) {
    const int lane = static_cast<int>(threadIdx.x), row = lane / 4, k = lane % 4;
    const unsigned a[4] = {to_tf32(in->a[row][k]), to_tf32(in->a[row + 8][k]), to_tf32(in->a[row][k + 4]),
                           to_tf32(in->a[row + 8][k + 4])};
    const unsigned b[2] = {to_tf32(in->b[k][row]), to_tf32(in->b[k + 4][row])};
    float sum[4] = {1, 1, 1, 1};
    mma_m16n8k8_tf32(sum, a, b);
    for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + 2 * k + i % 2] = sum[i];
}

// Small integers: exact in every format.
template <class T, int kK, class Encode, class Kernel>
void check_product(const Encode& encode, const Kernel& kernel) {
    std::mt19937 random(7);
    const auto in = std::make_unique<Operands<T, kK>>();
    float a[16][kK], b[kK][8];
    for (int k = 0; k < kK; ++k) {
        for (int m = 0; m < 16; ++m) in->a[m][k] = encode(a[m][k] = static_cast<float>(random() % 17) - 8);
        for (int n = 0; n < 8; ++n) in->b[k][n] = encode(b[k][n] = static_cast<float>(random() % 17) - 8);
    }
    Guarded<float> d(16 * 8);
    kernel(in.get(), d.data());
    bool equal = d.intact();
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            float sum = 1;
            for (int k = 0; k < kK; ++k) sum += a[m][k] * b[k][n];
            equal = equal && d[m * 8 + n] == sum;
        }
    CHECK(equal);
}

void test_products() {
    using Bits = unsigned short;
    const auto to_half = [](float v) { return static_cast<Bits>(float_to_half(v)); };
    const auto to_bfloat16 = [](float v) { return static_cast<Bits>(float_to_bfloat16(v)); };
    for (unsigned seed = 0; seed < 3; ++seed) {
        emulation::options().seed = seed;
        check_product<Bits, 16>(to_bfloat16, [](auto* in, float* d) { run(product_16bit, 1, 32, false, in, d, true); });
        check_product<Bits, 16>(to_half, [](auto* in, float* d) { run(product_16bit, 1, 32, false, in, d, false); });
        check_product<Bits, 8>(to_half, [](auto* in, float* d) { run(product_f16_k8, 1, 32, false, in, d); });
        check_product<float, 8>([](float v) { return v; }, [](auto* in, float* d) { run(product_tf32, 1, 32, false, in, d); });
    }
}

// --- conversions: all 65536 patterns there, and back again; roundings against the CPU kernels' own.

void test_conversions() {
    int wrong = 0;
    for (unsigned bits = 0; bits < 65536; ++bits) {
        const float half = half_to_float(bits), bfloat16 = bfloat16_to_float(bits);
        const float expected = to_float(Half{static_cast<uint16_t>(bits)});
        wrong += std::isnan(expected) ? !std::isnan(half) : __float_as_uint(half) != __float_as_uint(expected);
        wrong += std::isnan(half) ? !std::isnan(half_to_float(float_to_half(half))) : float_to_half(half) != bits;
        wrong += std::isnan(bfloat16) ? !std::isnan(bfloat16_to_float(float_to_bfloat16(bfloat16)))
                                      : float_to_bfloat16(bfloat16) != bits;
        wrong += !std::isnan(half) && emulation::HalfBits::value(bits) != half;
    }
    CHECK(wrong == 0);
    std::mt19937 random(3);
    for (int i = 0; i < 400000; ++i) {
        // Any pattern; then halves' midpoints and their neighbours, where roundings go wrong.
        const unsigned pattern = i % 2 ? static_cast<unsigned>(random())
                                       : __float_as_uint(half_to_float(random() & 0xffffu)) + 0x1000u + random() % 3 - 1;
        const float value = __uint_as_float(pattern);
        if (std::isnan(value)) continue;
        Half half;
        BFloat16 bfloat16;
        store(half, value);
        store(bfloat16, value);
        wrong += float_to_half(value) != half.bits;
        wrong += float_to_bfloat16(value) != bfloat16.bits;
    }
    CHECK(wrong == 0);
}

} // namespace

int main() {
    test_barriers();
    test_grid();
    test_async_copies();
    test_products();
    test_conversions();
    test_guards();
    return test::finish("test_emulation");
}
