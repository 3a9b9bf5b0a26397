// Norm and write of many tensors on the emulated GPU.
#include "../../csrc/kernels/apply.cu"

#include <memory>
#include <vector>

#include "check.h"
#include "emulation/guarded.h"
#include "layers.h"

namespace {

using namespace localsgd;
using namespace localsgd::cuda;
using emulation::Flush;
using emulation::Guarded;

Element element_of(Kind kind) { return kind == Kind::f32 ? Element::f32 : kind == Kind::bf16 ? Element::bf16 : Element::f16; }

// Every pair of a weight's and a correlation's dtype among any nine tensors; the first few correlations are fp32.
struct Weights {
    std::vector<std::unique_ptr<layers::Tensor>> weights, correlations;
    std::vector<ApplyItem> items;
    int weight_shift, shift;

    // Weights and correlations begin so many elements into their buffers, which then are not aligned to 16 bytes.
    explicit Weights(const std::vector<int64_t>& sizes, int weight_shift_ = 0, int shift_ = 0)
        : weight_shift(weight_shift_), shift(shift_) {
        const Kind kinds[] = {Kind::f32, Kind::bf16, Kind::f16};
        for (size_t i = 0; i < sizes.size(); ++i) {
            const Kind kind = kinds[i % 3], d_kind = kinds[i / 3 % 3];
            const Flush flush = i % 2 ? Flush::end : Flush::begin;
            const auto tensor = [&](int64_t size, Kind of, unsigned seed) {
                return std::make_unique<layers::Tensor>(layers::Shape{size, 1, 1, 1, 1}, of, layers::Layout::nchw, flush, seed);
            };
            weights.push_back(tensor(sizes[i] + weight_shift, kind, static_cast<unsigned>(i)));
            correlations.push_back(tensor(sizes[i] + shift, d_kind, static_cast<unsigned>(100 + i)));
            auto* weight = static_cast<unsigned char*>(weights[i]->data()) + weight_shift * kind_size(kind);
            auto* d = static_cast<unsigned char*>(correlations[i]->data()) + shift * kind_size(d_kind);
            items.push_back({weight, element_of(kind), d, element_of(d_kind), sizes[i]});
        }
    }

    double d(size_t i, int64_t j) const { return correlations[i]->at(j + shift); }

    bool intact() const {
        for (size_t i = 0; i < items.size(); ++i)
            if (!weights[i]->intact() || !correlations[i]->intact()) return false;
        return true;
    }

    double norm(size_t i) const {
        double sum = 0;
        for (int64 j = 0; j < items[i].count; ++j) sum += d(i, j) * d(i, j);
        return std::sqrt(sum);
    }
};

// What a write may be off by: half a unit in the last place of the result.
double unit(Element element) { return element == Element::f32 ? 0x1p-24 : element == Element::f16 ? 0x1p-11 : 0x1p-8; }

void run(const std::vector<int64_t>& sizes, unsigned seed, bool cooperative, bool normalize, int weight_shift, int shift,
         int bad = -1) {
    emulation::options().seed = seed;
    emulation::options().cooperative = cooperative;
    Weights w(sizes, weight_shift, shift);
    const int count = static_cast<int>(sizes.size());
    if (bad >= 0) w.correlations[bad]->set(static_cast<size_t>(sizes[bad] / 2 + shift), seed % 2 ? std::nanf("") : -HUGE_VALF);
    ApplyChip chip;
    CHECK(query_chip(chip) == cudaSuccess && chip.cooperative == cooperative && chip.blocks > 0);
    Guarded<unsigned char> workspace(apply_workspace_bytes(w.items.data(), count));
    std::memset(workspace.data(), 0, 256);
    Guarded<uint64> skipped(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) skipped[i] = 10 * i;
    Guarded<double> rate(1);
    Step step;
    step.rate.device_double = rate.data();
    step.normalize = normalize;
    step.skipped = skipped.data();
    for (int repeat = 1; repeat <= 2; ++repeat) {
        rate[0] = repeat == 1 ? 0.75 : -0.125;
        std::vector<std::vector<float>> before;
        for (const auto& t : w.weights) before.push_back(t->floats());
        CHECK(apply_update(w.items.data(), count, step, 1, chip, workspace.data(), nullptr) == cudaSuccess);
        CHECK(w.intact() && workspace.intact() && skipped.intact());
        for (size_t i = 0; i < sizes.size(); ++i) {
            const double norm = w.norm(i);
            const bool good = std::isfinite(norm) && norm > 0;
            CHECK(skipped[i] == 10 * i + (good ? 0 : repeat));
            const std::vector<float> after = w.weights[i]->floats();
            double worst = 0;
            for (size_t j = 0; j < static_cast<size_t>(sizes[i]); ++j) {
                const size_t at = j + weight_shift;
                const double expected =
                    before[i][at] + (good ? rate[0] * w.d(i, static_cast<int64_t>(j)) / (normalize ? norm : 1) : 0);
                worst = std::max(worst, std::fabs(after[at] - expected) / std::max(std::fabs(expected), 0.01));
            }
            CHECK(good ? worst <= 1.001 * unit(w.items[i].element) : after == before[i]);
        }
    }
}

// In one launch, with one counter for all.
void apply_once(Weights& w, const Step& step) {
    const int count = static_cast<int>(w.items.size());
    ApplyChip chip;
    CHECK(query_chip(chip) == cudaSuccess);
    Guarded<unsigned char> workspace(apply_workspace_bytes(w.items.data(), count));
    std::memset(workspace.data(), 0, 256);
    CHECK(apply_update(w.items.data(), count, step, 0, chip, workspace.data(), nullptr) == cudaSuccess);
    CHECK(workspace.intact());
}

// Squares of fp32 that overflow fp32, and that vanish in it.
void test_extreme_norms() {
    emulation::options().seed = 0;
    for (const float size : {3e38f, 1e-38f, 1e-45f}) {
        Weights w({129});
        w.correlations[0]->fill(size);
        const std::vector<float> before = w.weights[0]->floats();
        Step step;
        step.rate.value = 1;
        apply_once(w, step);
        const std::vector<float> after = w.weights[0]->floats();
        double worst = 0;
        for (size_t j = 0; j < 129; ++j) worst = std::max(worst, std::fabs(after[j] - before[j] - 1 / std::sqrt(129.0)));
        CHECK(worst < 5e-7);
    }
}

// One counter for all tensors, of which several are skipped.
void test_shared_counter() {
    Weights w({5, 0, 7, 3});
    w.correlations[2]->fill(0);
    Guarded<uint64> skipped(1);
    skipped[0] = 0;
    Step step;
    step.rate.value = 1;
    step.skipped = skipped.data();
    apply_once(w, step);
    CHECK(skipped[0] == 2);
}

// A rate that is not finite, whatever D is.
void test_rates() {
    emulation::options().seed = 0;
    for (const double rate : {-HUGE_VAL, HUGE_VAL, std::nan("")}) {
        Weights w({129});
        const std::vector<float> before = w.weights[0]->floats();
        Guarded<uint64> skipped(1);
        skipped[0] = 0;
        Step step;
        step.rate.value = rate;
        step.skipped = skipped.data();
        apply_once(w, step);
        CHECK(skipped[0] == 1 && w.weights[0]->floats() == before);
    }
}

} // namespace

int main() {
    const std::vector<int64_t> few{1, 4, 129, 151, 4096, 4097, 12289, 3, 64};
    for (unsigned seed = 0; seed < 4; ++seed) {
        emulation::options().multiprocessors = seed < 2 ? 2 : 7; // several chunks a block, or one
        run(few, seed, true, true, 0, 0);
        run(few, seed, false, true, 0, 0);
        run(few, seed, true, false, 0, 1);
        run(few, seed, true, true, 1, 0);
        run(few, seed, true, true, 0, 0, 4 + static_cast<int>(seed) % 3);
    }
    emulation::options().multiprocessors = 2;
    std::vector<int64_t> many; // more than fit into one launch
    for (int i = 0; i < 200; ++i) many.push_back(i % 7 == 0 ? 4100 + i : 1 + i);
    run(many, 2, true, true, 0, 0, 150);
    test_extreme_norms();
    test_rates();
    test_shared_counter();
    return test::finish("test_cuda_apply");
}
