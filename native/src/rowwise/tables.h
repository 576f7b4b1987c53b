// The factors of a token's channels in a rotation: cos and sin, signed and in the order of the channels.
#pragma once

#include <algorithm>

#include "abi/rotation.h"
#include "rowwise/sin_cos.h"
#include "simd/dtypes.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

// Channel c becomes same[c] * c + other[c] * (the other channel of its pair). Of interleaved pairs, both channels are
// next to each other; else those of all second channels begin at ROTARY_PAIRS.
struct Table {
    alignas(64) float same[2 * ROTARY_PAIRS], other[2 * ROTARY_PAIRS];

    // Fills in the factors of pairs `n` to n + LANES.
    void set(bool interleaved, int n, vec same_first, vec other_first, vec same_second, vec other_second) {
        if (interleaved) {
            interleave(same + 2 * n, same_first, same_second);
            interleave(other + 2 * n, other_first, other_second);
        } else {
            store(same + n, same_first), store(same + ROTARY_PAIRS + n, same_second);
            store(other + n, other_first), store(other + ROTARY_PAIRS + n, other_second);
        }
    }

   private:
    template <int FIRST>
    struct Alternating {
        static constexpr int at(int i) { return FIRST + i / 2 + (i & 1 ? LANES : 0); }
    };

    static void interleave(float* to, vec even, vec odd) {
        store(to, shuffle(even, odd, Alternating<0>()));
        store(to + LANES, shuffle(even, odd, Alternating<LANES / 2>()));
    }
};

// The positions of pairs [pair, pair + count), count <= LANES.
static inline vec positions_of(const Rotation& r, int64_t batch, int64_t token, int64_t pair, int64_t count) {
    if (!r.positions) return set1((float)(r.offset + (r.offsets ? r.offsets[batch * r.offsets_batch] : 0) + token));
    const int64_t* const of_token = r.positions + batch * r.positions_batch + token * r.positions_token;
    if (!r.axes) return set1((float)*of_token);
    vec positions = {};
    for (int64_t i = 0; i < count; ++i) positions[i] = (float)of_token[r.axes[pair + i] * r.positions_axis];
    return positions;
}

// Fills in the factors of pairs [first, first + count) of a token, count <= ROTARY_PAIRS.
static inline void fill(const Rotation& r, int64_t batch, int64_t token, int64_t first, int64_t count, Table& table) {
    for (int n = 0; n < count; n += LANES) {
        const int64_t pair = first + n, rest = count - n;
        if (r.frequencies) {
            const float* const frequencies =
                r.frequencies + batch * r.frequencies_batch + token * r.frequencies_token + pair;
            const vec position = positions_of(r, batch, token, pair, std::min<int64_t>(rest, LANES));
            const vec angle = position * r.position_scale * load_part(Dtype::f32, frequencies, rest);
            const SinCos turn = sin_cos(angle);
            const vec cos = turn.cos * r.attention_factor, sin = turn.sin * r.attention_factor;
            table.set(r.interleaved, n, cos, r.inverse ? sin : -sin, cos, r.inverse ? -sin : sin);
        } else {
            const int64_t item = size_of(r.table_dtype);
            const char* const cos = (const char*)r.cos + (batch * r.cos_batch + token * r.cos_token + pair) * item;
            const char* const sin = (const char*)r.sin + (batch * r.sin_batch + token * r.sin_token + pair) * item;
            const vec cos_first = load_part(r.table_dtype, cos, rest), sin_first = load_part(r.table_dtype, sin, rest);
            const vec cos_second = load_part(r.table_dtype, cos + r.second * item, rest);
            const vec sin_second = load_part(r.table_dtype, sin + r.second * item, rest);
            if (r.inverse)
                table.set(r.interleaved, n, cos_first, sin_second, cos_second, -sin_first);
            else
                table.set(r.interleaved, n, cos_first, -sin_first, cos_second, sin_second);
        }
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
