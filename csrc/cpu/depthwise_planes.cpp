#include "depthwise.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "copy.h"
#include "lanes.h"
#include "plane_runs.h"
#include "plane_taps.h"

namespace localsgd {
namespace {

// Planes of T that meet, and where their taps are summed.
template <typename T, typename Acc>
struct Pair {
    Plane<T> x, z;
    Acc* sums;
};
template <typename T, typename Acc>
using Pairs = std::vector<Pair<T, Acc>>;

template <typename T, typename Acc, int kBytes, int kStride>
LOCALSGD_INLINE void sweep_pairs(const Sweep<Acc>& w, const Pairs<T, Acc>& pairs) {
    for (const Pair<T, Acc>& pair : pairs) plane_taps<T, Acc, kBytes, kStride>(w, pair.x, pair.z, pair.sums);
}
template <typename T, typename Acc, int kBytes>
LOCALSGD_INLINE void sweep_any(const Sweep<Acc>& w, const Pairs<T, Acc>& pairs) {
    if (w.g.stride[2] == 1) return sweep_pairs<T, Acc, kBytes, 1>(w, pairs);
    if (w.g.stride[2] == 2) return sweep_pairs<T, Acc, kBytes, 2>(w, pairs);
    if constexpr (std::is_same_v<T, Acc>) sweep_pairs<T, Acc, kBytes, 0>(w, pairs);
}

// What is compiled for each width of vectors.
template <typename T, typename Acc>
LOCALSGD_WIDE void sweep_wide(const Sweep<Acc>& w, const Pairs<T, Acc>& pairs) {
    sweep_any<T, Acc, kWideBytes>(w, pairs);
}
LOCALSGD_NARROW
void sweep_narrow(const Sweep<float>& w, const Pairs<float, float>& pairs) { sweep_any<float, float, kNarrowBytes>(w, pairs); }
LOCALSGD_NARROW
void sweep_narrow(const Sweep<float>& w, const Pairs<BFloat16, float>& pairs) {
    sweep_any<BFloat16, float, kNarrowBytes>(w, pairs);
}
LOCALSGD_NARROW
void sweep_narrow(const Sweep<double>& w, const Pairs<double, double>& pairs) {
    sweep_any<double, double, kNarrowBytes>(w, pairs);
}

// The planes of x or z: where they lie, or copied into one of several slots.
template <typename Acc>
struct Planes {
    const void* data;
    Kind kind;
    Strides strides;
    int64_t height, width;
    int64_t before, after; // elements beyond a plane that are read
    int64_t slots, slot_size;
    int64_t extent; // elements from the first to the last one
    std::vector<Acc> buffer;

    Planes(const void* data, Kind kind, const Strides& strides, int64_t batch, int64_t channels, const Triple& space,
           int64_t before, int64_t after, int64_t slots)
        : data(data),
          kind(kind),
          strides(strides),
          height(space[1]),
          width(space[2]),
          before(before),
          after(after),
          slots(slots),
          slot_size(before + height * width + after) {
        extent = 1 + (batch - 1) * strides.batch + (channels - 1) * strides.channel;
        for (int i = 0; i < 3; ++i) extent += (space[i] - 1) * strides.space[i];
    }

    int64_t start_of(int64_t n, int64_t channel, int64_t depth) const {
        return n * strides.batch + channel * strides.channel + depth * strides.space[0];
    }
    // Whether a plane can be read where it lies, but for its type.
    bool in_place(int64_t start) const {
        return strides.space[2] == 1 && start >= before && start + (height - 1) * strides.space[1] + width + after <= extent;
    }
    template <typename T>
    Plane<T> there(int64_t start) const {
        return {static_cast<const T*>(data) + start, strides.space[1]};
    }
    // There, or a copy that stays until the next one into its slot.
    Plane<Acc> at(int64_t start, int64_t slot) {
        if (kind == kKindOf<Acc> && in_place(start)) return there<Acc>(start);
        const int64_t pitch = strides.space[1], step = strides.space[2];
        if (buffer.empty()) buffer.resize(slots * slot_size);
        Acc* const to = buffer.data() + slot * slot_size + before;
        const bool dense = pitch == width * step;
        for (int64_t row = 0; row < (dense ? 1 : height); ++row)
            copy_run(to + row * width, offset(data, kind, start + row * pitch), kind, dense ? height * width : width, step);
        return {to, width};
    }
};

// Planes that meet: an input depth, a kernel plane and the output depth that reads the one through the other.
struct Meeting {
    int64_t depth, r, p0;
};
std::vector<Meeting> meetings(const Geometry& g) {
    std::vector<Meeting> all;
    for (int64_t depth = 0; depth < g.input[0]; ++depth)
        for (int64_t r = 0; r < g.kernel[0]; ++r) {
            const int64_t from = depth + g.pad[0] - r * g.dilation[0];
            if (from >= 0 && from % g.stride[0] == 0 && from / g.stride[0] < g.output[0])
                all.push_back({depth, r, from / g.stride[0]});
        }
    return all;
}

} // namespace

template <typename Acc>
void depthwise_planes(const DepthwiseArgs& a, int64_t channel_begin, int64_t channel_end, Acc* d) {
    constexpr int64_t kTogether = 4096;    // elements of z: what is summed in lanes, before they are added up in double
    constexpr int64_t kMostChannels = 32;  // of an image, one after another as they lie in memory,
    constexpr int64_t kSumsInCache = 4096; // while their sums stay in the first-level cache
    const Geometry& g = a.geometry;
    const Sweep<Acc> columns(g);
    // Pairs swept together: for what begins a sweep, and no more copies than stay in the cache.
    const int64_t most_pairs = std::clamp<int64_t>(2048 / g.image_positions(), 1, 16);
    Planes<Acc> x_planes(a.x, a.x_kind, a.x_strides, g.batch, g.in_channels, g.input, columns.before, columns.after,
                         most_pairs + 1); // a plane of x may meet planes of z in two sweeps
    Planes<Acc> z_planes(a.z, a.z_kind, a.z_strides, g.batch, g.out_channels, g.output, 0, kMostLanes<Acc>, most_pairs);
    const std::vector<Meeting> all = meetings(g);
    const bool bf16 = std::is_same_v<Acc, float> && a.x_kind == Kind::bf16 && a.z_kind == Kind::bf16 && in_strips(g);
    const auto dense = [&](const Strides& s) { return s.space[2] == 1 && s.space[1] == g.output[2]; };
    const bool wide = has_wide_registers(), fit = runs_fit(g);
    std::optional<PlaneRuns<BFloat16>> dots;
    if (bf16 && fit && a.dots && dense(a.x_strides) && dense(a.z_strides)) dots.emplace(g);
    std::optional<PlaneRuns<float>> runs;
    if (std::is_same_v<Acc, float> && fit && wide && !dots) runs.emplace(g);
    const bool wide_sums = wide || dots;
    const int64_t lanes = (wide_sums ? kWideBytes : kNarrowBytes) / sizeof(Acc), in_plane = g.kernel[1] * g.kernel[2] * lanes;
    const int64_t multiplier = g.out_per_group(), in_channel = multiplier * g.taps();
    const int64_t together = std::clamp<int64_t>(kTogether / g.image_positions(), 1, std::max<int64_t>(g.batch, 1));
    const int64_t most = std::clamp<int64_t>(kSumsInCache / (in_channel * lanes), 1, kMostChannels);
    std::vector<Acc> in_lanes;
    std::vector<double> sums;
    Pairs<Acc, Acc> pairs;
    Pairs<BFloat16, Acc> in_bf16;
    int64_t x_slot = 0;
    const auto sweep = [&] {
        wide ? sweep_wide(columns, pairs) : sweep_narrow(columns, pairs);
        pairs.clear();
        if constexpr (std::is_same_v<Acc, float>) wide ? sweep_wide(columns, in_bf16) : sweep_narrow(columns, in_bf16);
        in_bf16.clear();
    };
    for (int64_t first = channel_begin; first < channel_end; first += most) {
        const int64_t channels = std::min(most, channel_end - first), count = channels * in_channel;
        in_lanes.assign(count * lanes, Acc(0));
        sums.assign(count, 0.0);
        for (int64_t n = 0; n < g.batch; ++n) {
            for (int64_t c = 0; c < channels; ++c) {
                Plane<Acc> x{nullptr, 0};
                for (size_t i = 0; i < all.size(); ++i) {
                    const auto [depth, r, p0] = all[i];
                    const int64_t of_x = x_planes.start_of(n, first + c, depth);
                    if (i == 0 || depth != all[i - 1].depth) x = {nullptr, 0};
                    for (int64_t j = 0; j < multiplier; ++j) {
                        if (static_cast<int64_t>(pairs.size() + in_bf16.size()) == most_pairs) sweep();
                        const int64_t of_z = z_planes.start_of(n, (first + c) * multiplier + j, p0);
                        Acc* const to = in_lanes.data() + ((c * multiplier + j) * g.kernel[0] + r) * in_plane;
                        const Pair<BFloat16, Acc> there{x_planes.template there<BFloat16>(of_x),
                                                        z_planes.template there<BFloat16>(of_z), to};
                        if constexpr (std::is_same_v<Acc, float>)
                            if (dots) {
                                dots->add(there.x.data, there.z.data, to);
                                continue;
                            }
                        if (bf16 && x_planes.in_place(of_x) && z_planes.in_place(of_z)) {
                            in_bf16.push_back(there);
                            continue;
                        }
                        if (!x.data) {
                            x_slot = (x_slot + 1) % (most_pairs + 1);
                            x = x_planes.at(of_x, x_slot);
                        }
                        const Plane<Acc> z = z_planes.at(of_z, pairs.size());
                        if constexpr (std::is_same_v<Acc, float>)
                            if (runs && x.pitch == g.output[2] && z.pitch == g.output[2]) {
                                if (!pairs.empty() || !in_bf16.empty())
                                    sweep(); // whose copies the next ones may take the place of
                                runs->add(x.data, z.data, to);
                                continue;
                            }
                        pairs.push_back({x, z, to});
                    }
                }
            }
            sweep();
            if ((n + 1) % together && n + 1 < g.batch) continue;
            add_lanes(wide_sums, in_lanes.data(), count, sums.data());
        }
        for (int64_t i = 0; i < count; ++i) d[first * in_channel + i] = static_cast<Acc>(sums[i]);
    }
}

template void depthwise_planes<float>(const DepthwiseArgs&, int64_t, int64_t, float*);
template void depthwise_planes<double>(const DepthwiseArgs&, int64_t, int64_t, double*);

} // namespace localsgd
