// Rotary embedding: heads of q and of k, rotated by the same angles (abi/rotation.h).
#pragma once

#include "rowwise/tables.h"

namespace qkv {
namespace QKV_ISA {

// A channel x and the other one of its pair, by their factors. Rounded as torch's operators do: given the same tables,
// the bits are the same.
[[gnu::always_inline]] static inline vec turn(vec x, const float* same, vec y, const float* other) {
    return rounded(x * load(same)) + rounded(y * load(other));
}

// Rotates `count` pairs of a head. Of interleaved pairs, `first` and `to_first` are all channels.
template <bool INTERLEAVED>
[[gnu::always_inline]] static inline void rotate_pairs(Dtype dtype, Dtype out_dtype, const char* first,
                                                       const char* second, char* to_first, char* to_second,
                                                       int64_t count, const Table& table) {
    const int64_t item = size_of(dtype), out_item = size_of(out_dtype);
    if constexpr (INTERLEAVED) {
        for (int64_t c = 0; c < 2 * count; c += LANES) {
            const vec x = load_part(dtype, first + c * item, 2 * count - c), y = shuffle(x, x, Across<1>());
            store_part(out_dtype, to_first + c * out_item, turn(x, table.same + c, y, table.other + c), 2 * count - c);
        }
    } else {
        const float *const same = table.same + ROTARY_PAIRS, *const other = table.other + ROTARY_PAIRS;
        for (int64_t n = 0; n < count; n += LANES) {
            const vec x = load_part(dtype, first + n * item, count - n);
            const vec y = load_part(dtype, second + n * item, count - n);
            store_part(out_dtype, to_first + n * out_item, turn(x, table.same + n, y, table.other + n), count - n);
            store_part(out_dtype, to_second + n * out_item, turn(y, same + n, x, other + n), count - n);
        }
    }
}

// Copies `count` channels.
static inline void copy_channels(Dtype dtype, Dtype out_dtype, const char* from, char* to, int64_t count) {
    if (dtype == out_dtype) {
        if (from != to) std::memcpy(to, from, count * size_of(dtype));
        return;
    }
    for (int64_t c = 0; c < count; c += LANES)
        store_part(out_dtype, to + c * size_of(out_dtype), load_part(dtype, from + c * size_of(dtype), count - c),
                   count - c);
}

// Rotates pairs [first, first + count) of all heads of tokens [begin, end), at most ROTARY_TOKENS.
template <bool INTERLEAVED>
[[gnu::always_inline]] static inline void rotate_heads(const Rotation& r, Dtype dtype, Dtype out_dtype, int64_t batch,
                                                       int64_t begin, int64_t end, int64_t first, int64_t count,
                                                       const Table* tables) {
    const int64_t at = INTERLEAVED ? 2 * first : first, item = size_of(dtype), out_item = size_of(out_dtype);
    for (int which = 0; which < 2; ++which)
        for (int64_t head = 0; head < r.heads[which]; ++head)
            for (int64_t token = begin; token < end; ++token) {
                const char* const from = row_of(dtype, r.from[which], batch, head, token);
                char* const to = row_of(out_dtype, r.to[which], batch, head, token);
                rotate_pairs<INTERLEAVED>(dtype, out_dtype, from + at * item, from + (at + r.pairs) * item,
                                          to + at * out_item, to + (at + r.pairs) * out_item, count,
                                          tables[token - begin]);
                const int64_t rotated = 2 * r.pairs;
                if (first == 0 && rotated < r.width)
                    copy_channels(dtype, out_dtype, from + rotated * item, to + rotated * out_item, r.width - rotated);
            }
}

// Calls work with the dtypes of a rotation as constants.
template <class Work>
static inline void for_dtypes(const Rotation& r, Work work) {
    for_dtype(r.dtype, [&](auto dtype) {
        if (r.dtype == r.out_dtype) return work(dtype, dtype);
        if constexpr (dtype == Dtype::f32) for_dtype(r.out_dtype, [&](auto out_dtype) { work(dtype, out_dtype); });
    });
}

// Rotates all heads of tokens [begin, end) of a batch, on this thread. Allocates nothing.
static inline void rotate_tokens(const Rotation& r, int64_t batch, int64_t begin, int64_t end) {
    Table tables[ROTARY_TOKENS];
    for (; begin < end; begin += ROTARY_TOKENS) {
        const int64_t stop = std::min<int64_t>(begin + ROTARY_TOKENS, end);
        int64_t first = 0;
        do {  // once even without pairs, for the channels that are copied
            const int64_t count = std::min<int64_t>(ROTARY_PAIRS, r.pairs - first);
            for (int64_t token = begin; token < stop; ++token)
                fill(r, batch, token, first, count, tables[token - begin]);
            for_dtypes(r, [&](auto dtype, auto out_dtype) {
                if (r.interleaved)
                    rotate_heads<true>(r, dtype, out_dtype, batch, begin, stop, first, count, tables);
                else
                    rotate_heads<false>(r, dtype, out_dtype, batch, begin, stop, first, count, tables);
            });
        } while ((first += ROTARY_PAIRS) < r.pairs);
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
