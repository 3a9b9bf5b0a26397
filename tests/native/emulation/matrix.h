// cp.async, ldmatrix and the mma shapes in use, with the fragment layouts of the PTX ISA ("Warp-level matrix instructions").
#pragma once

#include "intrinsics.h"

namespace emulation {

// --- cp.async: the data arrives only when the thread waits for it, and until then the destination holds NaN. On hardware it
// arrives at any time in between, so a kernel that is right here has waited wherever it must.

inline void copy_async(void* to, const void* from, size_t bytes, size_t size) {
    if (size != 4 && size != 8 && size != 16) fail("cp.async of %zu bytes", size);
    if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size) // of no bytes as well
        fail("misaligned cp.async of %zu bytes", size);
    std::memset(to, kPoison, size);
    self().open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, size - bytes});
}

inline void commit_async() {
    Thread& t = self();
    t.committed.push_back(std::move(t.open));
    t.open.clear();
}

// All but the latest `pending` groups are complete afterwards.
inline void wait_async(size_t pending) {
    auto& groups = self().committed;
    while (groups.size() > pending) {
        for (const AsyncCopy& c : groups.front()) {
            if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
            std::memset(c.to + c.bytes, 0, c.zeroed);
        }
        groups.erase(groups.begin());
    }
}

// --- ldmatrix: lanes 8i..8i+7 bring the addresses of the 8 rows (16 bytes each) of matrix i. Lane l receives the pair of
// 16-bit elements (row l/4, columns 2*(l%4) and +1); transposed: (rows 2*(l%4) and +1, column l/4).

template <int kMatrices>
inline void load_matrix(uint32_t (&to)[kMatrices], const void* row, bool transposed) {
    static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
    const unsigned lane = self().lane;
    if (lane < 8 * kMatrices && reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned ldmatrix row");
    const auto* mail = warp_exchange("ldmatrix", ~0u, &row, sizeof(row));
    const auto element = [&](int matrix, unsigned r, unsigned c) {
        const unsigned char* address;
        std::memcpy(&address, mail[8 * matrix + r], sizeof(address));
        uint16_t bits;
        std::memcpy(&bits, address + 2 * c, 2);
        return static_cast<uint32_t>(bits);
    };
    const unsigned a = lane / 4, b = 2 * (lane % 4);
    for (int i = 0; i < kMatrices; ++i)
        to[i] = transposed ? element(i, b, a) | element(i, b + 1, a) << 16 : element(i, a, b) | element(i, a, b + 1) << 16;
    warp_exchange("ldmatrix", ~0u, nullptr, 0); // shared memory may be overwritten only once all lanes have read
}

// --- mma: D[16, 8] += A[16, K] * B[K, 8], products exact, sums in fp32.

struct BFloat16Bits {
    static float value(uint32_t bits) { return emulated_bit_cast<float>(bits << 16); }
};
struct HalfBits {
    static float value(uint32_t bits) {
        const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                : exponent     ? emulated_bit_cast<float>((exponent + 112) << 23 | mantissa << 13)
                                               : static_cast<float>(mantissa) * 0x1p-24f;
        return bits & 0x8000 ? -magnitude : magnitude;
    }
};

// Matrix products by whole fragments: `a_at(lanes, row, k)` and `b_at(lanes, k, column)` find an element in the lanes'
// registers.
template <int kK, class Fragment, class AAt, class BAt>
inline void multiply(const char* operation, float (&d)[4], const Fragment& mine, const AAt& a_at, const BAt& b_at) {
    static_assert(sizeof(Fragment) <= kMessageBytes);
    const unsigned lane = self().lane;
    const auto* mail = warp_exchange(operation, ~0u, &mine, sizeof(mine));
    Fragment lanes[kWarpSize];
    for (unsigned l = 0; l < kWarpSize; ++l) std::memcpy(&lanes[l], mail[l], sizeof(Fragment));
    for (int i = 0; i < 4; ++i) { // d0, d1: row lane/4; d2, d3: 8 rows below; columns 2*(lane%4) + {0, 1}
        const int row = static_cast<int>(lane / 4) + 8 * (i / 2), column = 2 * static_cast<int>(lane % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < kK; ++k) sum += a_at(lanes, row, k) * b_at(lanes, k, column);
        d[i] += sum;
    }
}

template <int kA, int kB>
struct Registers {
    uint32_t a[kA], b[kB];
};

// 16-bit elements, two a register. A: lane 4*(row%8) + (k%8)/2, register (row/8) + 2*(k/8). B: lane 4*column + (k%8)/2,
// register k/8.
template <class Bits, int kK>
inline void mma_16bit(float (&d)[4], const uint32_t (&a)[kK / 4], const uint32_t (&b)[kK / 8]) {
    using Fragment = Registers<kK / 4, kK / 8>;
    Fragment mine;
    std::memcpy(mine.a, a, sizeof(a));
    std::memcpy(mine.b, b, sizeof(b));
    const auto half = [](uint32_t word, int k) { return Bits::value(k % 2 ? word >> 16 : word & 0xffffu); };
    multiply<kK>(
        "mma", d, mine,
        [&](const Fragment* f, int row, int k) { return half(f[4 * (row % 8) + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k); },
        [&](const Fragment* f, int k, int column) { return half(f[4 * column + k % 8 / 2].b[k / 8], k); });
}

// tf32: fp32 whose low 13 bits the matrix unit does not read. A: lane 4*(row%8) + k%4, register (row/8) + 2*(k/4). B: lane
// 4*column + k%4, register k/4.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using Fragment = Registers<4, 2>;
    Fragment mine;
    std::memcpy(mine.a, a, sizeof(a));
    std::memcpy(mine.b, b, sizeof(b));
    const auto value = [](uint32_t bits) { return emulated_bit_cast<float>(bits & 0xffffe000u); };
    multiply<8>(
        "mma", d, mine,
        [&](const Fragment* f, int row, int k) { return value(f[4 * (row % 8) + k % 4].a[row / 8 + 2 * (k / 4)]); },
        [&](const Fragment* f, int k, int column) { return value(f[4 * column + k % 4].b[k / 4]); });
}

} // namespace emulation
