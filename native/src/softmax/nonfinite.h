// Numbers that are not finite: a raw score makes its row NaN, and a value reaches the rows that see it alone.
#pragma once

#include <cmath>

#include "mask/key_block.h"

namespace qkv {
namespace QKV_ISA {

// NaN for a score that is not finite, be it -inf, which would pass for hidden.
static inline vec finite_or_nan(vec x) { return x + 0.0f * x; }

// Whether scores of a segment are not finite, before anything has been added to them or hidden. A key that is not
// finite makes those of all rows so, and a row those of all keys, so checking one vector of each key and one key of
// each vector suffices.
static inline bool have_nonfinite(const Tile& t, const Segment& s, const float* scores) {
    const int64_t lanes = t.lanes();
    const float* const corner = scores + s.begin * lanes + s.first * LANES;
    const int keys = s.end - s.begin;
    vec zero[SUMS_AT_ONCE] = {};  // stay so, unless a number is not finite
    int j = 0;
    for (; j + SUMS_AT_ONCE <= keys; j += SUMS_AT_ONCE)
        for (int i = 0; i < SUMS_AT_ONCE; ++i) zero[i] += 0.0f * load(corner + (j + i) * lanes);
    for (; j < keys; ++j) zero[0] += 0.0f * load(corner + j * lanes);
    for (int n = 1; n < s.last - s.first; ++n) zero[1] += 0.0f * load(corner + n * LANES);
    return any((zero[0] + zero[1]) + (zero[2] + zero[3]) != 0.0f);
}

// Makes NaN of the scores of a segment that are not finite.
static void spread_nan(const Tile& t, const Segment& s, float* scores) {
    for (int j = s.begin; j < s.end; ++j) {
        for (int n = s.first; n < s.last; ++n) {
            float* const at = scores + j * t.lanes() + n * LANES;
            store(at, finite_or_nan(load(at)));
        }
    }
}

// 0 * inf is NaN, so values of masked keys that are not finite must be 0 in the product, and those of visible keys are
// added separately. For each such column d of key j of a segment, calls add(j, r, d, value) for the rows r for which
// sees(j, r), and then clear(j, d).
template <class Sees, class Add, class Clear>
static inline void separate_nonfinite(const Problem& p, const Tile& t, const Block& b, const Segment& s, Sees sees,
                                      Add add, Clear clear) {
    for (int j = s.begin; j < s.end; ++j) {
        const char* const row = row_of(p, p.v, t, b.first + j);
        for (int64_t d = 0; d < p.value_width; ++d) {
            const float x = read(p.dtype, row, d);
            if (std::isfinite(x)) continue;
            for (int r = s.first * LANES; r < std::min(t.count, s.last * LANES); ++r)
                if (sees(j, r)) add(j, r, d, x);
            clear(j, d);
        }
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
