// The transforms of Winograd's minimal filtering of three taps in one dimension, for tiles of kTile outputs: D, the sums of z
// times what each tap reads of x, is back(sum over tiles of x(tile) * z(tile)). A tile is evaluated, as a polynomial, at
// kTile + 2 points, one of which is infinity; what is divided by on the way is divided by in back(), which runs once.
#pragma once

#include "vectors.h"

namespace localsgd {

template <typename Acc, int kBytes, int kTile>
struct Rules;

// Points 0, 1 and -1: 4 multiplications in the place of 6.
template <typename Acc, int kBytes>
struct Rules<Acc, kBytes, 2> {
    using V = typename Vector<Acc, kBytes>::Type;

    struct OfX { // whose tiles overlap by two elements
        static constexpr int kTile = 2, kIn = 4, kOut = 4;
        static LOCALSGD_INLINE void apply(const V (&x)[4], V (&out)[4]) {
            out[0] = x[0] - x[2];
            out[1] = x[1] + x[2];
            out[2] = x[2] - x[1];
            out[3] = x[3] - x[1];
        }
    };
    struct OfZ {
        static constexpr int kTile = 2, kIn = 2, kOut = 4;
        static LOCALSGD_INLINE void apply(const V (&z)[2], V (&out)[4]) {
            out[0] = z[0];
            out[1] = z[0] + z[1];
            out[2] = z[0] - z[1];
            out[3] = z[1];
        }
    };
    static LOCALSGD_INLINE void back(const V (&sum)[4], V (&taps)[3]) {
        const V even = (sum[1] + sum[2]) * Acc(0.5);
        taps[0] = sum[0] + even;
        taps[1] = (sum[1] - sum[2]) * Acc(0.5);
        taps[2] = even + sum[3];
    }
};

// Points 0, a, -a, b and -b: 6 multiplications in the place of 12. With a = 1 and b = 2, which are usual, rounding would be
// twice as much; all constants before back() are exact.
template <typename Acc, int kBytes>
struct Rules<Acc, kBytes, 4> {
    using V = typename Vector<Acc, kBytes>::Type;
    static constexpr Acc a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;

    struct OfX {
        static constexpr int kTile = 4, kIn = 6, kOut = 6;
        static LOCALSGD_INLINE void apply(const V (&x)[6], V (&out)[6]) {
            const V even_a = x[4] - x[2] * b2, odd_a = (x[3] - x[1] * b2) * a;
            const V even_b = x[4] - x[2] * a2, odd_b = (x[3] - x[1] * a2) * b;
            out[0] = x[0] * (a2 * b2) - x[2] * (a2 + b2) + x[4];
            out[1] = even_a + odd_a;
            out[2] = even_a - odd_a;
            out[3] = even_b + odd_b;
            out[4] = even_b - odd_b;
            out[5] = x[1] * (a2 * b2) - x[3] * (a2 + b2) + x[5];
        }
    };
    struct OfZ {
        static constexpr int kTile = 4, kIn = 4, kOut = 6;
        static LOCALSGD_INLINE void apply(const V (&z)[4], V (&out)[6]) {
            const V even_a = z[0] + z[2] * a2, odd_a = (z[1] + z[3] * a2) * a;
            const V even_b = z[0] + z[2] * b2, odd_b = (z[1] + z[3] * b2) * b;
            out[0] = z[0];
            out[1] = even_a + odd_a;
            out[2] = even_a - odd_a;
            out[3] = even_b + odd_b;
            out[4] = even_b - odd_b;
            out[5] = z[3];
        }
    };
    static LOCALSGD_INLINE void back(const V (&sum)[6], V (&taps)[3]) {
        constexpr Acc of_0 = 1 / (a2 * b2), of_a = 1 / (2 * a2 * (a2 - b2)), of_b = 1 / (2 * b2 * (b2 - a2));
        const V even_a = (sum[1] + sum[2]) * of_a, even_b = (sum[3] + sum[4]) * of_b;
        taps[0] = sum[0] * of_0 + even_a + even_b;
        taps[1] = (sum[1] - sum[2]) * (of_a * a) + (sum[3] - sum[4]) * (of_b * b);
        taps[2] = even_a * a2 + even_b * b2 + sum[5];
    }
};

} // namespace localsgd
