// Runs a kernel's grid on a CPU. A block is an OS thread, its CUDA threads are fibers that run until they have to wait.
//
// What it shows: missing barriers (in a seeded order of threads and blocks somebody reads too early, and finds NaN or other
// bits), divergent barriers (reported as deadlocks), wrong indices (with the guarded buffers), unwaited asynchronous copies.
// What it cannot show: missing memory fences (a CPU's memory is coherent) and speed.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "fiber.h"
#include "language.h"

namespace emulation {

struct Options {
    // 0: threads and blocks in order. Otherwise both are shuffled, and one warp after the other is kept from running until all
    // others wait for it: what it has not yet read must still be there.
    unsigned seed = 0;
    unsigned multiprocessors = 2;
    unsigned blocks_per_multiprocessor = 2;
    int ptx_version = 90;      // what kernels are said to have been compiled for
    bool cooperative = true;   // whether the device has cooperative launches
    double hang_seconds = 120; // a block that only spins for so long is hung
};
inline Options& options() {
    static Options value;
    return value;
}

constexpr unsigned kWarpSize = 32;
constexpr size_t kStaticShared = 48 << 10;   // what a kernel may declare statically
constexpr size_t kDynamicShared = 227 << 10; // the most any architecture lets a block have
constexpr size_t kMessageBytes = 64;
constexpr unsigned char kPoison = 0xff; // as a float of any size: NaN

struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;
    size_t bytes;  // copied
    size_t zeroed; // written as zeros after them
};

struct Thread {
    Context context;
    uint3 index{};
    unsigned lane = 0, warp = 0;
    bool done = false;
    const char* waiting = nullptr;                 // what for
    std::vector<AsyncCopy> open;                   // cp.async issued since the last commit
    std::vector<std::vector<AsyncCopy>> committed; // oldest group first
};

struct Warp {
    unsigned live = 0;
    unsigned arrived = 0;
    uint64_t generation = 0;
    const char* operation = nullptr;
    // Two generations: a lane may post for the next operation before all lanes have read from this one.
    alignas(16) unsigned char mail[2][kWarpSize][kMessageBytes];
};

struct Block {
    uint3 index{};
    dim3 block, grid;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> static_shared, dynamic_shared;
    std::map<const void*, size_t> static_offsets;
    size_t static_used = 0;
    const std::function<void()>* body = nullptr;
    Context scheduler;
    unsigned current = 0, alive = 0, arrived = 0;
    uint64_t generation = 0;
    uint64_t progress = 0; // anything that happened
    bool spinning = false; // some thread waits for another block
};

inline thread_local Block* running = nullptr;

inline Thread& self() { return running->threads[running->current]; }

[[noreturn]] inline void fail(const char* format, ...) {
    std::fprintf(stderr, "emulation: ");
    if (running) {
        const Thread& t = self();
        std::fprintf(stderr, "block (%u, %u, %u) thread (%u, %u, %u): ", running->index.x, running->index.y, running->index.z,
                     t.index.x, t.index.y, t.index.z);
    }
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::abort();
}

inline void yield() {
    Block& b = *running;
    b.threads[b.current].context.switch_to(b.scheduler);
}

inline void release_block_if_complete(Block& b) {
    if (b.alive == 0 || b.arrived < b.alive) return;
    b.arrived = 0;
    ++b.generation;
    ++b.progress;
}

inline void release_warp_if_complete(Warp& w) {
    if (w.live == 0 || w.arrived < static_cast<unsigned>(__builtin_popcount(w.live))) return;
    w.arrived = 0;
    w.operation = nullptr;
    ++w.generation;
    ++running->progress;
}

// Threads that have returned count as arrived, as on the hardware.
inline void block_barrier() {
    Block& b = *running;
    const uint64_t generation = b.generation;
    ++b.arrived;
    ++b.progress;
    release_block_if_complete(b);
    self().waiting = "__syncthreads";
    while (b.generation == generation) yield();
    self().waiting = nullptr;
}

// All live lanes of a warp meet in one operation, each with a message that the others may read until the next operation.
inline const unsigned char (*warp_exchange(const char* operation, unsigned mask, const void* message, size_t bytes))
    [kMessageBytes] {
        Thread& t = self();
        Warp& w = running->warps[t.warp];
        if ((mask & w.live) != w.live) fail("%s with mask %08x, but lanes %08x are alive", operation, mask, w.live);
        if (w.operation && std::strcmp(w.operation, operation) != 0)
            fail("%s while other lanes are at %s", operation, w.operation);
        w.operation = operation;
        const uint64_t generation = w.generation;
        auto* mail = w.mail[generation & 1];
        if (bytes) std::memcpy(mail[t.lane], message, bytes);
        ++w.arrived;
        ++running->progress;
        release_warp_if_complete(w);
        t.waiting = operation;
        while (w.generation == generation) yield();
        t.waiting = nullptr;
        return mail;
    }

// In a loop that waits for another block.
inline void backoff() {
    running->spinning = true;
    yield();
}

inline void thread_entry() {
    Context::arrived(nullptr);
    Block& b = *running;
    (*b.body)();
    Thread& t = self();
    if (!t.open.empty() || !t.committed.empty()) fail("returned without waiting for its cp.async");
    t.done = true;
    --b.alive;
    ++b.progress;
    Warp& w = b.warps[t.warp];
    w.live &= ~(1u << t.lane);
    release_warp_if_complete(w);
    release_block_if_complete(b);
    t.context.switch_to(b.scheduler, /*last=*/true);
    std::abort();
}

inline void report_deadlock(const Block& b) {
    std::map<std::string, unsigned> waiting;
    for (const Thread& t : b.threads) ++waiting[t.done ? "(returned)" : t.waiting ? t.waiting : "(running)"];
    std::string where;
    for (const auto& [what, count] : waiting) where += " " + std::to_string(count) + " at " + what + ";";
    std::fprintf(stderr, "emulation: deadlock in block (%u, %u, %u):%s a barrier that not all threads reach?\n", b.index.x,
                 b.index.y, b.index.z, where.c_str());
    std::abort();
}

inline void run_block(Block& b, unsigned number, const Stacks& stacks) {
    using Clock = std::chrono::steady_clock;
    const unsigned count = b.block.x * b.block.y * b.block.z;
    running = &b;
    b.index = {number % b.grid.x, number / b.grid.x % b.grid.y, number / b.grid.x / b.grid.y};
    b.threads = std::vector<Thread>(count);
    b.warps = std::vector<Warp>((count + kWarpSize - 1) / kWarpSize);
    for (Warp& w : b.warps) std::memset(w.mail, kPoison, sizeof(w.mail));
    b.static_shared.assign(kStaticShared + 128, kPoison);
    std::fill(b.dynamic_shared.begin(), b.dynamic_shared.end(), kPoison);
    b.static_offsets.clear();
    b.static_used = 0;
    b.alive = count;
    b.arrived = 0;
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) {
        Thread& t = b.threads[i];
        t.index = {i % b.block.x, i / b.block.x % b.block.y, i / b.block.x / b.block.y};
        t.lane = i % kWarpSize;
        t.warp = i / kWarpSize;
        b.warps[t.warp].live |= 1u << t.lane;
        t.context.start(stacks[i], thread_entry);
        order[i] = i;
    }
    std::mt19937 random(options().seed * 7919u + number);
    auto last_progress = Clock::now();
    constexpr unsigned kNone = ~0u;
    unsigned starved = kNone, patience = 0; // a warp
    while (b.alive) {
        if (options().seed) std::shuffle(order.begin(), order.end(), random);
        const uint64_t before = b.progress;
        b.spinning = false;
        for (const unsigned i : order) {
            if (b.threads[i].done || b.threads[i].warp == starved) continue;
            b.current = i;
            b.scheduler.switch_to(b.threads[i].context);
        }
        if (b.progress != before) {
            last_progress = Clock::now();
            if (options().seed && starved == kNone) starved = static_cast<unsigned>(random() % b.warps.size());
            continue;
        }
        if (starved != kNone) { // all others wait for it, or for another block, which is given time to go on without it
            if (b.spinning && ++patience < 200) {
                std::this_thread::yield();
                continue;
            }
            patience = 0;
            starved = kNone;
            continue;
        }
        if (!b.spinning) report_deadlock(b);
        std::this_thread::yield();
        if (std::chrono::duration<double>(Clock::now() - last_progress).count() > options().hang_seconds) {
            std::fprintf(stderr, "emulation: hung: block (%u, %u, %u) waits for another block for %g s\n", b.index.x, b.index.y,
                         b.index.z, options().hang_seconds);
            std::abort();
        }
    }
    running = nullptr;
}

// `together`: all blocks are alive at once, as a cooperative launch guarantees; otherwise one after the other on few threads,
// so that a kernel that counts on blocks it has no right to count on hangs here.
inline void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, bool together, const std::function<void()>& body) {
    const unsigned blocks = grid.x * grid.y * grid.z;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    if (options().seed) {
        std::mt19937 random(options().seed);
        std::shuffle(order.begin(), order.end(), random);
    }
    std::atomic<unsigned> next{0};
    const auto work = [&] {
        const Stacks stacks(block.x * block.y * block.z);
        Block b;
        b.block = block;
        b.grid = grid;
        b.body = &body;
        b.dynamic_shared.resize(dynamic_shared + 128);
        for (unsigned i; (i = next++) < blocks;) run_block(b, order[i], stacks);
    };
    const unsigned workers = together ? blocks : std::min(blocks, std::max(2u, std::thread::hardware_concurrency()));
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < workers; ++i) threads.emplace_back(work);
    for (std::thread& t : threads) t.join();
}

inline unsigned char* aligned(unsigned char* p) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(p) + 127) & ~uintptr_t{127});
}

inline unsigned char* dynamic_shared() { return aligned(running->dynamic_shared.data()); }

// One object a block and declaration. `key` is the declaration's own address.
template <class T>
T& static_shared(const void* key) {
    Block& b = *running;
    const auto [entry, fresh] = b.static_offsets.try_emplace(key, b.static_used);
    if (fresh) {
        b.static_used += (sizeof(T) + 15) / 16 * 16;
        if (b.static_used > kStaticShared) fail("%zu bytes of static shared memory", b.static_used);
    }
    return *reinterpret_cast<T*>(aligned(b.static_shared.data()) + entry->second);
}

} // namespace emulation

#define threadIdx (emulation::self().index)
#define blockIdx (emulation::running->index)
#define blockDim (emulation::running->block)
#define gridDim (emulation::running->grid)
static constexpr int warpSize = 32;
