// What tests change about the emulated GPU, called through ctypes.
#include "cuda/device.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A GPU of `multiprocessors` that hold `blocks` blocks each, with or without cooperative launches, running code for `compute`
// (75 for 7.5). `seed` orders its blocks and threads.
EXPORTED void localsgd_emulate(unsigned seed, unsigned multiprocessors, unsigned blocks, int cooperative, int compute) {
    auto& options = emulation::options();
    const bool same = options.multiprocessors == multiprocessors && options.blocks_per_multiprocessor == blocks &&
                      options.cooperative == (cooperative != 0) && options.ptx_version == compute;
    options.seed = seed;
    if (same) return;
    options.multiprocessors = multiprocessors;
    options.blocks_per_multiprocessor = blocks;
    options.cooperative = cooperative != 0;
    options.ptx_version = compute;
    localsgd::cuda::forget_devices();
}

// Whether a multiprocessor holds one block, though the runtime told otherwise.
EXPORTED void localsgd_shrink(int yes) {
    static unsigned told = 0;
    auto& blocks = emulation::options().blocks_per_multiprocessor;
    if (yes) told = blocks;
    blocks = yes ? 1 : told;
}

namespace {
using Memory = emulation::Guarded<unsigned char>;
std::mutex mutex;
std::unordered_map<void*, std::unique_ptr<Memory>> memories;
} // namespace

EXPORTED void* localsgd_guarded(size_t bytes) {
    const std::lock_guard lock(mutex);
    auto memory = std::make_unique<Memory>(bytes);
    void* const data = memory->data();
    memories[data] = std::move(memory);
    return data;
}

EXPORTED int localsgd_intact(void* data) {
    const std::lock_guard lock(mutex);
    return memories.at(data)->intact();
}

EXPORTED void localsgd_release(void* data) {
    const std::lock_guard lock(mutex);
    memories.erase(data);
}
