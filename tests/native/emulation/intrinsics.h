// Barriers, warp operations, atomics and cached loads.
#pragma once

#include "machine.h"

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::warp_exchange("__syncwarp", mask, nullptr, 0); }

inline void __trap() { emulation::fail("trap"); }

// The order of memory operations is the CPU's: these keep the compiler and the CPU from reordering, nothing more.
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }

namespace emulation {

// What lane `source` brought; a lane outside the warp, or one that has returned, gives back one's own value as shuffles do.
template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= kMessageBytes);
    const unsigned lane = self().lane;
    const unsigned live = running->warps[self().warp].live;
    const auto* mail = warp_exchange(operation, mask, &value, sizeof(T));
    T result = value;
    if (source >= 0 && source < static_cast<int>(kWarpSize) && source != static_cast<int>(lane)) {
        if (!(live >> source & 1)) fail("%s reads lane %d, which has returned", operation, source);
        std::memcpy(&result, mail[source], sizeof(T));
    }
    return result;
}

} // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane);
    return emulation::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane), source = lane ^ bits;
    return emulation::shuffle("__shfl_xor_sync", mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane), source = lane + static_cast<int>(by);
    return emulation::shuffle("__shfl_down_sync", mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const int lane = static_cast<int>(emulation::self().lane), source = lane - static_cast<int>(by);
    return emulation::shuffle("__shfl_up_sync", mask, value, source >= (lane & ~(width - 1)) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned live = emulation::running->warps[emulation::self().warp].live;
    const auto* mail = emulation::warp_exchange("__ballot_sync", mask, &predicate, sizeof(predicate));
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        int vote;
        std::memcpy(&vote, mail[lane], sizeof(vote));
        if ((live >> lane & 1) && vote) votes |= 1u << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
inline unsigned atomicExch(unsigned* p, unsigned v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    unsigned old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

// Through the read-only cache and past the first-level cache; aligned, as the device demands.
template <class T>
T __ldg(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulation::fail("misaligned %zu-byte load", sizeof(T));
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return __ldg(p);
}
