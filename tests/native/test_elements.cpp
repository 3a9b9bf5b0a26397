// Conversions of fp16 and bf16 against their definitions, over every bit pattern; norm and write against plain loops.
#include "check.h"
#include "cpu/apply.h"
#include "cpu/copy.h"
#include "cpu/elements.h"

using namespace localsgd;

namespace {

double half_by_definition(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

double bfloat_by_definition(uint16_t bits) {
    const int exponent = (bits >> 7) & 255, mantissa = bits & 127;
    const double magnitude = exponent == 255 ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -133)
                                             : std::ldexp(128 + mantissa, exponent - 134);
    return bits & 0x8000 ? -magnitude : magnitude;
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

// Between neighbours `low` and the next number, everything below the middle rounds down, the middle to the even one.
template <typename T>
void check_rounding(uint16_t low, double at, double next) {
    const auto stored = [](double v) {
        T t;
        store(t, v);
        return t.bits;
    };
    const double middle = at + (next - at) / 2;
    CHECK(stored(at) == low);
    CHECK(stored(at + (next - at) * 0.499) == low);
    CHECK(stored(at + (next - at) * 0.501) == low + 1);
    CHECK(stored(middle) == (low & 1 ? low + 1 : low));
    CHECK(stored(-middle) == ((low & 1 ? low + 1 : low) | 0x8000));
}

void conversions() {
    for (uint32_t i = 0; i < 65536; ++i) {
        const auto bits = static_cast<uint16_t>(i);
        CHECK_THAT(same(to_float(Half{bits}), half_by_definition(bits)), "fp16 pattern " + std::to_string(i));
        CHECK_THAT(same(to_float(BFloat16{bits}), bfloat_by_definition(bits)), "bf16 pattern " + std::to_string(i));
    }
    for (uint16_t bits = 0; bits < 0x7bff; bits = static_cast<uint16_t>(bits + 1))
        check_rounding<Half>(bits, half_by_definition(bits), half_by_definition(static_cast<uint16_t>(bits + 1)));
    for (uint16_t bits = 0x80; bits < 0x7f7f; bits = static_cast<uint16_t>(bits + 7)) // normal numbers: doubles hold middles
        check_rounding<BFloat16>(bits, bfloat_by_definition(bits), bfloat_by_definition(static_cast<uint16_t>(bits + 1)));
    Half h;
    store(h, 65519.0);
    CHECK(h.bits == 0x7bff);
    store(h, 65520.0);
    CHECK(h.bits == 0x7c00); // ties to even, which is Inf
    store(h, -1e30);
    CHECK(h.bits == 0xfc00);
    store(h, NAN);
    CHECK(std::isnan(to_float(h)));
    BFloat16 b;
    store(b, NAN);
    CHECK(std::isnan(to_float(b)));
    store(b, 1e39);
    CHECK(b.bits == 0x7f80);
}

void strided_copies() {
    std::vector<uint16_t> from(100);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i * 577);
    for (const int64_t stride : {1, 3}) {
        std::vector<float> halves(33, -1), brains(33, -1);
        copy_run(halves.data(), from.data(), Kind::f16, 32, stride);
        copy_run(brains.data(), from.data(), Kind::bf16, 32, stride);
        for (int64_t i = 0; i < 32; ++i) {
            CHECK(same(halves[i], half_by_definition(from[i * stride])));
            CHECK(same(brains[i], bfloat_by_definition(from[i * stride])));
        }
        CHECK(halves[32] == -1);
        CHECK(brains[32] == -1);
    }
}

void norm_and_write() {
    const int64_t count = 1000003;
    const auto values = test::random_values(count, 1);
    std::vector<float> d(values.begin(), values.end());
    long double expected = 0;
    for (const float v : d) expected += static_cast<long double>(v) * v;
    CHECK(std::abs(sum_of_squares(d.data(), count) / static_cast<double>(expected) - 1) < 1e-12);
    const std::vector<float> big(100, 1e30f), small(100, 1e-44f);
    CHECK(std::abs(sum_of_squares(big.data(), 100) / 1e62 - 1) < 1e-6);
    CHECK(sum_of_squares(small.data(), 100) > 0);
    std::vector<float> w(257, 1.0f);
    add_scaled(w.data(), Kind::f32, d.data(), 256, -0.5);
    for (int64_t i = 0; i < 256; ++i) CHECK(w[i] == static_cast<float>(1.0 - 0.5 * static_cast<double>(d[i])));
    CHECK(w[256] == 1.0f);
}

} // namespace

int main() {
    conversions();
    strided_copies();
    norm_and_write();
    return test::finish("elements");
}
