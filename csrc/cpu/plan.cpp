#include "plan.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <unordered_map>

namespace localsgd::cpu {
namespace {

// Of the whole update, which is what most callers make: of a copy of the weight, by nothing.
double median_us(const Layer& given, Algorithm algorithm) {
    using Clock = std::chrono::steady_clock;
    Layer layer = given;
    layer.weight = given.weight.clone();
    std::vector<double> times;
    for (int run = 0; run < 6; ++run) {
        const auto start = Clock::now();
        update(layer, algorithm, 0, true);
        if (run > 0) times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count()); // 0: warm-up
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

Plan measured_plan(const Layer& layer, const Query& query) {
    static std::mutex mutex;
    static std::unordered_map<std::string, Plan> plans;
    const std::string key = plan_key(query);
    {
        const std::lock_guard lock(mutex);
        if (const auto found = plans.find(key); found != plans.end()) return found->second;
    }
    Plan plan = make_plan(query);
    for (Candidate& candidate : plan.candidates)
        if (candidate.automatic) candidate.measured_us = median_us(layer, candidate.algorithm);
    pick_by_measurement(plan);
    const std::lock_guard lock(mutex);
    return plans.emplace(key, std::move(plan)).first->second; // another thread's timing, if it came first
}

} // namespace

Plan plan(const Layer& layer, const Query& query, bool benchmark) {
    return benchmark ? measured_plan(layer, query) : make_plan(query);
}

} // namespace localsgd::cpu
