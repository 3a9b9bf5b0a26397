// Algorithm selection: what must hold for every shape, and the picks that the speed of known layers depends on.
#include "check.h"
#include "select.h"

using namespace localsgd;

namespace {

Query query(int64_t in, int64_t out, int64_t side, int64_t kernel, int64_t groups = 1, int64_t stride = 1) {
    Query q;
    q.geometry = test::geometry(8, in, out, groups, {1, side, side}, {1, kernel, kernel}, {1, stride, stride}, {1, 1, 1},
                                {0, kernel / 2, kernel / 2});
    q.geometry.dims = 2;
    q.z_is_output = true;
    return q;
}

bool promised(const Query& q) { return !q.z_present || q.z_is_output; }

void rules() {
    for (const int64_t kernel : {1, 3})
        for (const int64_t groups : {1, 4, 64})
            for (const bool present : {false, true})
                for (const bool output : {false, true})
                    for (const Kind kind : {Kind::f16, Kind::bf16, Kind::f32, Kind::f64})
                        for (const int threads : {1, 2, 64}) {
                            Query q = query(64, 128, 14, kernel, groups);
                            q.z_present = present, q.z_is_output = output, q.x_kind = q.z_kind = kind, q.threads = threads;
                            const Plan plan = make_plan(q);
                            const Candidate& pick = plan.candidate(plan.pick);
                            CHECK(plan.candidates.size() == 5);
                            CHECK(cheapest(q) == plan.pick);
                            CHECK(pick.eligible && pick.automatic && !plan.reason.empty());
                            CHECK(plan.candidate(Algorithm::kGram).eligible == (kernel == 1));
                            CHECK(plan.candidate(Algorithm::kGram).automatic == (kernel == 1 && promised(q)));
                            CHECK(plan.candidate(Algorithm::kDepthwise).eligible == (groups == 64));
                            CHECK(plan.candidate(Algorithm::kWinograd).automatic == (kernel == 3 && groups == 1));
                            CHECK(plan.candidate(Algorithm::kDirect).automatic);
                            CHECK(plan.candidate(Algorithm::kLibrary).automatic);
                            for (const Candidate& c : plan.candidates) {
                                CHECK(std::isfinite(c.estimated_us) && c.estimated_us > 0);
                                CHECK(c.measured_us < 0);
                                CHECK((c.why_not[0] == 0) == (c.eligible && c.automatic));
                                if (c.automatic) CHECK(pick.estimated_us <= c.estimated_us);
                            }
                        }
}

void picks() {
    CHECK(make_plan(query(64, 256, 56, 1)).pick == Algorithm::kGram);
    CHECK(make_plan(query(128, 512, 28, 1)).pick == Algorithm::kGram);
    CHECK(make_plan(query(256, 512, 56, 1, 1, 2)).pick == Algorithm::kGram);
    CHECK(make_plan(query(256, 64, 56, 1)).pick != Algorithm::kGram);
    CHECK(make_plan(query(144, 144, 56, 3, 144)).pick == Algorithm::kDepthwise);
    CHECK(make_plan(query(384, 384, 14, 3, 384)).pick == Algorithm::kDepthwise);
    CHECK(make_plan(query(144, 144, 28, 7, 144)).pick == Algorithm::kDepthwise);
    Query small = query(960, 960, 7, 3, 960); // NCHW: a plane is a few vectors
    CHECK(make_plan(small).pick == Algorithm::kLibrary);
    small.channels_last = true;
    CHECK(make_plan(small).pick == Algorithm::kDepthwise);
    Query dense = query(512, 512, 7, 3), stem = query(3, 64, 224, 7, 1, 2);
    CHECK(make_plan(dense).pick == Algorithm::kWinograd);
    CHECK(make_plan(query(512, 512, 7, 3, 1, 2)).pick == Algorithm::kDirect);
    CHECK(make_plan(query(16, 16, 14, 3)).pick ==
          Algorithm::kLibrary); // transforms of so few channels are more than the products
    CHECK(make_plan(stem).pick == Algorithm::kDirect);
    stem.channels_last = true;
    CHECK(make_plan(stem).pick == Algorithm::kLibrary);
    Query without = query(96, 64, 14, 1); // contracting, but any other algorithm would have to compute z first
    without.z_present = false;
    CHECK(make_plan(without).pick == Algorithm::kGram);
}

void what_the_cpu_multiplies_with_decides() {
    Query q = query(128, 128, 28, 5);
    q.channels_last = true;
    CHECK(make_plan(q).pick == Algorithm::kDirect);
    q.cpu.wide = true; // oneDNN's own kernels gain more by it
    CHECK(make_plan(q).pick == Algorithm::kLibrary);
    q.x_kind = q.z_kind = Kind::bf16;
    CHECK(make_plan(q).pick == Algorithm::kDirect);
    q.cpu.bf16 = Cpu::Bf16::kDots;
    CHECK(make_plan(q).pick == Algorithm::kLibrary);
    q.cpu.bf16 = Cpu::Bf16::kTiles; // ours, too
    CHECK(make_plan(q).pick == Algorithm::kDirect);
    q.z_kind = Kind::f32; // nothing of the kind multiplies bf16 by fp32
    CHECK(make_plan(q).candidate(Algorithm::kDirect).estimated_us > 3e3);
    Query wide = query(768, 768, 14, 1), narrow = query(64, 256, 56, 1);
    for (Query* pointwise : {&wide, &narrow}) {
        pointwise->cpu = q.cpu;
        pointwise->x_kind = pointwise->z_kind = Kind::bf16;
    }
    CHECK(make_plan(wide).pick == Algorithm::kDirect); // W G costs more than what G saves
    CHECK(make_plan(narrow).pick == Algorithm::kGram);
    Query q_threads = query(64, 64, 56, 3);
    q_threads.cpu = q.cpu;
    q_threads.x_kind = q_threads.z_kind = Kind::bf16;
    const double one = make_plan(q_threads).candidate(Algorithm::kDirect).estimated_us;
    q_threads.threads = 8;
    CHECK(make_plan(q_threads).candidate(Algorithm::kDirect).estimated_us > one / 7); // all of them turn all of x
}

void amd_s_blas_keeps_to_avx2() {
    Query q = query(256, 64, 56, 1);
    q.channels_last = q.cpu.wide = true;
    CHECK(make_plan(q).pick == Algorithm::kDirect);
    q.cpu.amd = true; // and oneDNN does not
    CHECK(make_plan(q).pick == Algorithm::kLibrary);
    q.cpu.wide = false;
    CHECK(make_plan(q).pick == Algorithm::kDirect);
}

void measurement_decides() {
    Plan plan = make_plan(query(64, 256, 56, 1));
    double time = 400;
    for (Candidate& c : plan.candidates)
        if (c.automatic) c.measured_us = time -= 100;
    pick_by_measurement(plan);
    CHECK(plan.pick == Algorithm::kLibrary); // timed last, hence the shortest; depthwise was not timed and must not win
    CHECK(plan.reason.find("measured 100 us, next direct 200 us") != std::string::npos);
}

void keys() {
    const Query base = query(64, 256, 56, 1);
    std::vector<Query> others(8, base);
    others[0].geometry.batch = 9;
    others[1].geometry.stride[2] = 2;
    others[2].x_kind = Kind::bf16;
    others[3].z_kind = Kind::bf16;
    others[4].channels_last = true;
    others[5].threads = 2;
    others[6].z_is_output = false;
    others[7].z_present = false;
    for (const Query& other : others) CHECK(plan_key(other) != plan_key(base));
    CHECK(describe(base.geometry) == "conv2d 64->256 k1x1 s1x1 p0x0 d1x1 g1 8x(56x56->56x56)");
}

} // namespace

int main() {
    rules();
    picks();
    what_the_cpu_multiplies_with_decides();
    amd_s_blas_keeps_to_avx2();
    measurement_decides();
    keys();
    return test::finish("select");
}
