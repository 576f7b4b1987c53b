// Products for a handful of rows, as in decoding: lanes along the width instead of along the rows.
//
// A single query fills one lane of sixteen. Here a key is read as vectors, 16-bit ones are widened in registers, and
// each is used for all rows while it is there, so that the speed is that of memory.
#pragma once

#include "format.h"

namespace qkv {
namespace QKV_ISA {

constexpr int FEW = 8;    // rows at most
constexpr int PARTY = 4;  // rows at a time

struct Few {
    typedef char Element;
};

template <Dtype DTYPE>
static inline vec load_wide(const char* row, int64_t d) {
    if (DTYPE == Dtype::f32) return load((const float*)row + d);
    float wide[LANES];
    const uint16_t* from = (const uint16_t*)row + d;
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)from);
    if (DTYPE == Dtype::bf16) return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    return (vec)_mm512_cvtph_ps(half);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128((const __m128i*)from);
    if (DTYPE == Dtype::bf16) return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    return (vec)_mm256_cvtph_ps(half);
#endif
    widen(DTYPE, from, wide, LANES);
    return load(wide);
}

// The rest of a row that fills no vector, and zeros.
template <Dtype DTYPE>
static inline vec load_rest(const char* row, int64_t d, int64_t width) {
    float wide[LANES] = {};
    for (int64_t i = d; i < width; ++i) wide[i - d] = read(DTYPE, row, i);
    return load(wide);
}

// Lane i of the result is the sum over the lanes of a[i].
static inline vec sum_each(vec* a) {
    for (int distance = 1, count = LANES; distance < LANES; distance *= 2, count /= 2) {
        ivec here, there;
        for (int lane = 0; lane < LANES; ++lane) {
            const int from = lane & distance ? LANES : 0;  // the second of two vectors
            here[lane] = from + lane;
            there[lane] = from + (lane ^ distance);
        }
        for (int i = 0; i < count / 2; ++i)
            a[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], here) + __builtin_shuffle(a[2 * i], a[2 * i + 1], there);
    }
    return a[0];
}

// Rows that will be read next, asked for a row at a time between others: more at once would overrun the queue.
struct Ahead {
    const char* rows;
    int64_t stride, bytes;
    bool first;  // whether no party has been here before

    void ask(int64_t row) const {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(rows + row * stride + byte);
    }
};

// Key by key, since memory is fastest in order.
template <Dtype DTYPE, int KEYS, int PARTIES>
static inline void score_some(const char* keys, int64_t stride, int64_t width, const float* queries, int64_t pitch,
                              float* scores, int64_t lanes, const Ahead& ahead) {
    vec acc[(KEYS * PARTIES + LANES - 1) / LANES * LANES] = {};  // whole groups for sum_each
    for (int j = 0; j < KEYS; ++j) {
        const char* row = keys + j * stride;
        ahead.ask(j);
        vec sum[PARTIES] = {};
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const vec key = load_wide<DTYPE>(row, d);
            for (int r = 0; r < PARTIES; ++r) sum[r] += key * load(queries + r * pitch + d);
        }
        if (d < width) {
            const vec key = load_rest<DTYPE>(row, d, width);
            for (int r = 0; r < PARTIES; ++r) sum[r] += key * load(queries + r * pitch + d);
        }
        for (int r = 0; r < PARTIES; ++r) acc[j * PARTIES + r] = sum[r];
    }
    for (int first = 0; first < KEYS * PARTIES; first += LANES) {
        float sums[LANES];
        store(sums, sum_each(acc + first));
        for (int i = first; i < std::min(first + LANES, KEYS * PARTIES); ++i) {
            float* at = scores + i / PARTIES * lanes + i % PARTIES;
            if (ahead.first && i % PARTIES == 0)
                store(at, set1(sums[i - first]));  // lanes without a row follow the first
            else
                *at = sums[i - first];
        }
    }
}

template <Dtype DTYPE, int PARTIES>
static inline void score_rows(const char* keys, int64_t stride, int64_t count, int64_t width, const float* queries,
                              int64_t pitch, float* scores, int64_t lanes, Ahead ahead) {
    constexpr int KEYS = PARTIES == 1 ? 16 : (PARTIES == 2 ? 8 : 4);
    int64_t j = 0;
    const auto some = [&](auto keys_at_once) {
        constexpr int COUNT = decltype(keys_at_once)::value;
        score_some<DTYPE, COUNT, PARTIES>(keys + j * stride, stride, width, queries, pitch, scores + j * lanes, lanes,
                                          {ahead.rows + j * ahead.stride, ahead.stride, ahead.bytes, ahead.first});
        j += COUNT;
    };
    while (j + KEYS <= count) some(std::integral_constant<int, KEYS>());
    while (j < count) some(std::integral_constant<int, 1>());
}

template <Dtype DTYPE, int PARTIES, int VECS>
static inline void add_some(const char* values, int64_t stride, int64_t count, int64_t d, int64_t width,
                            const float* weights, int64_t lanes, float* out) {
    vec acc[PARTIES][VECS] = {};
    const bool whole = d + VECS * LANES <= width;
    for (int64_t j = 0; j < count; ++j) {
        const char* row = values + j * stride;
        vec value[VECS];
        for (int n = 0; n < VECS; ++n)
            value[n] = whole ? load_wide<DTYPE>(row, d + n * LANES) : load_rest<DTYPE>(row, d + n * LANES, width);
        for (int r = 0; r < PARTIES; ++r)
            for (int n = 0; n < VECS; ++n) acc[r][n] += weights[j * lanes + r] * value[n];
    }
    for (int r = 0; r < PARTIES; ++r)
        for (int64_t i = 0; i < std::min<int64_t>(VECS * LANES, width - d); ++i)
            out[(d + i) * lanes + r] += acc[r][i / LANES][i % LANES];
}

template <Dtype DTYPE, int PARTIES>
static inline void add_rows(const char* values, int64_t stride, int64_t count, int64_t width, const float* weights,
                            int64_t lanes, float* out) {
    constexpr int VECS = 4;
    int64_t d = 0;
    for (; d + VECS * LANES <= width; d += VECS * LANES)
        add_some<DTYPE, PARTIES, VECS>(values, stride, count, d, width, weights, lanes, out);
    for (; d < width; d += LANES)
        add_some<DTYPE, PARTIES, 1>(values, stride, count, d, width, weights, lanes, out);
}

// Calls work(dtype, rows) with both as constants, for the dtype of the problem and up to PARTY rows at a time.
template <class Work>
static inline void each_party(const Problem& p, const Tile& t, Work work) {
    const auto with = [&](auto dtype) {
        for (int r = 0; r < t.count; r += PARTY) {
            switch (std::min(PARTY, t.count - r)) {
                case 1: work(dtype, std::integral_constant<int, 1>(), r); break;
                case 2: work(dtype, std::integral_constant<int, 2>(), r); break;
                case 3: work(dtype, std::integral_constant<int, 3>(), r); break;
                default: work(dtype, std::integral_constant<int, 4>(), r); break;
            }
        }
    };
    switch (p.dtype) {
        case Dtype::f32: with(std::integral_constant<Dtype, Dtype::f32>()); break;
        case Dtype::bf16: with(std::integral_constant<Dtype, Dtype::bf16>()); break;
        default: with(std::integral_constant<Dtype, Dtype::f16>()); break;
    }
}

template <>
struct Format<Few> {
    static constexpr int BLOCK = PIECE;  // outputs are written once a block, and lie across

    static int64_t pitch(const Problem& p) { return (p.width + LANES - 1) / LANES * LANES; }

    static void queries(const Problem& p, const Tile& t, float* panel) {
        for (int r = 0; r < t.count; ++r, panel += pitch(p)) {
            const char* row = t.query(p, r);
            for (int64_t d = 0; d < pitch(p); ++d) panel[d] = d < p.width ? read(p.dtype, row, d) : 0.0f;
        }
    }

    static const char* keys(const Problem& p, const Tile& t, int64_t first, int64_t, float*, int64_t& stride) {
        stride = p.k.row * size_of(p.dtype);
        return row_of(p, p.k, t.batch, t.kv_head, first);
    }

    static const char* values(const Problem& p, const Tile& t, int64_t first, int64_t, float*, int64_t& stride) {
        stride = p.v.row * size_of(p.dtype);
        return row_of(p, p.v, t.batch, t.kv_head, first);
    }

    static void score(const Problem& p, const Tile& t, int64_t block, const char* keys, int64_t stride, const Segment& s,
                      const float* queries, float* scores) {
        // Values are asked for while their keys are read.
        const char* values = row_of(p, p.v, t.batch, t.kv_head, block + s.begin);
        each_party(p, t, [&](auto dtype, auto rows, int r) {
            const int64_t bytes = r == 0 ? p.value_width * size_of(p.dtype) : 0;
            score_rows<decltype(dtype)::value, decltype(rows)::value>(
                keys + s.begin * stride, stride, s.end - s.begin, p.width, queries + r * pitch(p), pitch(p),
                scores + s.begin * t.lanes() + r, t.lanes(), {values, p.v.row * size_of(p.dtype), bytes, r == 0});
        });
    }

    static void pack_weights(const Tile&, const Segment&, float*) {}

    static void accumulate(const Problem& p, const Tile& t, const char* values, int64_t stride, const Segment& s,
                           const float* weights, float* out) {
        each_party(p, t, [&](auto dtype, auto rows, int r) {
            add_rows<decltype(dtype)::value, decltype(rows)::value>(values + s.begin * stride, stride, s.end - s.begin,
                                                                    p.value_width, weights + s.begin * t.lanes() + r,
                                                                    t.lanes(), out + r);
        });
    }

    static char* own_values(const Problem& p, const char* values, int64_t count, float* scratch, int64_t& stride) {
        const int64_t bytes = p.value_width * size_of(p.dtype);
        for (int64_t j = 0; j < count; ++j) std::memcpy((char*)scratch + j * bytes, values + j * stride, bytes);
        stride = bytes;
        return (char*)scratch;
    }

    static void clear_value(const Problem& p, char* values, int64_t stride, int64_t j, int64_t d) {
        write(p.dtype, values + j * stride, d, 0.0f);
    }
};

}  // namespace QKV_ISA
}  // namespace qkv
