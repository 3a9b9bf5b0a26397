// What is known of a GPU, and the workspaces of the launches on it.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "../kernels/apply.h"
#include "../kernels/depthwise.h"
#include "../kernels/direct.h"
#include "../kernels/gram.h"
#include "../select.h"
#include "stream.h"

namespace localsgd::cuda {

struct Chips {
    Chip direct;
    GramChip gram;
    DepthwiseChip depthwise;
    ApplyChip apply;
    int capability = 0;       // 90 for 9.0, of the device itself
    double clocks_per_us = 0; // of a multiprocessor
    double bytes_per_us = 0;  // of the device's memory
    int multiprocessors = 0;
};

// What was worked out for one layer's geometry, dtypes, strides and alignments.
struct Prepared {
    std::optional<DirectConfig> direct;
    std::optional<GramConfig> gram;
    std::optional<DepthwiseConfig> depthwise;
    std::optional<Plan> estimated, measured;
};
using Key = std::array<int64_t, 56>;

struct KeyHash {
    size_t operator()(const Key& key) const {
        return std::hash<std::string_view>()({reinterpret_cast<const char*>(key.data()), sizeof key});
    }
};

class Device {
  public:
    explicit Device(at::Device device);

    const Chips& chips() const { return chips_; }

    // Calls use(scratch) with a workspace for one launch on `stream`. Every stream has its own, which only grows; during a
    // graph capture it comes from the graph's own memory, so that replays touch nothing that eager launches use. Nothing is
    // zeroed: barriers are handed out from an array that was, and each launch leaves its own ready. `use` must only launch.
    template <class Use>
    void with_workspace(size_t bytes, const Stream& stream, const Use& use) {
        const std::lock_guard lock(workspace_mutex_); // or another thread could replace it before the launch
        use(scratch(bytes, stream));
    }

    // Finds or makes what is kept under `key`. `use` must not come back here.
    template <class Use>
    auto with_prepared(const Key& key, const Use& use) {
        const std::lock_guard lock(mutex_);
        if (prepared_.size() >= kMostPrepared) prepared_.clear(); // shapes that never come back
        return use(prepared_[key]);
    }

  private:
    struct Buffer {
        at::Tensor memory;
        unsigned* barrier = nullptr;
    };
    struct Buffers {
        Buffer eager, captured;
        uint64_t capture = 0;
    };
    // A barrier for each stream and each graph captured on it; the 4096th graph shares the first one's, which is long gone.
    static constexpr int64_t kBarriers = 4096, kBarrierSpacing = 8; // 32 bytes apart
    static constexpr size_t kMostPrepared = 4096;

    Scratch scratch(size_t bytes, const Stream& stream);

    at::Device device_;
    Chips chips_;
    std::mutex mutex_, workspace_mutex_;
    std::unordered_map<Key, Prepared, KeyHash> prepared_;
    std::unordered_map<cudaStream_t, Buffers> buffers_;
    size_t largest_ = 0; // of all workspaces
    at::Tensor barriers_;
    int64_t barriers_used_ = 0;
};

// The state of a device, made at its first use. Throws what `unavailable` says.
Device& state_of(at::Device device);

// Why the kernels cannot run on a device ("this build holds code for sm_80, sm_90"), or "".
std::string unavailable(at::Device device);

// Forgets all of it, as if no device had been used: for tests that change the emulated device.
void forget_devices();

} // namespace localsgd::cuda
