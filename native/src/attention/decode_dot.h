// The products of decoding, key by key: lanes lie along the width.
//
// Numbers of 8 and 16 bits are widened in registers; where there are dot products of pairs of 16 bits, those of bf16
// are multiplied as they are, and those of 8 bits with queries and weights in fixed point.
#pragma once

#include "matmul/operands.h"

namespace qkv {
namespace QKV_ISA {

// Rows of one query that decoding takes, at most.
constexpr int MAX_DECODE_ROWS = LANES < DECODE_ROWS ? LANES : DECODE_ROWS;
#if defined(__AMX_BF16__)
constexpr int MAX_DECODE_ROWS_BF16 = LANES;
#else
constexpr int MAX_DECODE_ROWS_BF16 = MAX_DECODE_ROWS;
#endif

static inline int decode_rows(const Problem& p) {
    return p.kv_dtype == Dtype::bf16 ? MAX_DECODE_ROWS_BF16 : MAX_DECODE_ROWS;
}

// Lanes for so many rows: the next power of two.
static constexpr int lanes_of(int count) { return count <= 2 ? count : (count <= 4 ? 4 : (count <= 8 ? 8 : 16)); }

// Numbers from the start of a row to that of the next, for rows of this width.
static inline int64_t pitch_of(int64_t width) { return (width + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Rows that are read next. Products prefetch them line by line while they read others, to keep memory bandwidth busy.
struct PrefetchStream {
    const char* rows;
    int64_t stride;

    void prefetch(int64_t row, int64_t byte) const { QKV_ISA::prefetch(rows + row * stride + byte, 1); }
};

// The products of decoding, the template parameter `Products`. Of each block of keys:
//
//     LEAST, MOST                    rows that they take
//     Registers                      as those of a kind of product
//     ON_TILES                       whether `score` takes a block of keys, not one or two, and `add` needs no `pack`;
//                                    and whether the number of rows is no constant
//     SCALED                         whether keys and values are int8, with a scale for each row
//     pack_queries(p, t, to, q_scale)
//                                    the rows of queries as `score` takes them, and the scale of each row, which
//                                    products with its numbers are multiplied by (fixed point; 1 otherwise)
//     score(...)                     products of keys with all rows
//     pack(weights, count)           weights, in place, as `add` takes them; returns the scale of each lane's row
//     add(...)                       adds weights times values to rows of out
//     column(d), columns(out, d)     where column d of a row of out lies; a vector of them from d on
//     Prefetcher<ROWS>               prefetches the next block: maxima(n) and weights(n) begin a part of the work that
//                                    calls step() n times
//
// They are Widened and Dots here and OnTiles in attention/decode_amx.h.

// Products that read one or two keys at a time, and prefetch their values meanwhile; and while they read values, the
// keys of the next block.
struct KeyByKey {
    static constexpr int LEAST = 1, MOST = MAX_DECODE_ROWS;  // rows
    static constexpr bool ON_TILES = false;

    using Registers = NoRegisterState;

    // Nothing: the products prefetch.
    template <int ROWS>
    struct Prefetcher {
        template <class... Any>
        explicit Prefetcher(const Any&...) {}
        void maxima(int) {}
        void weights(int) {}
        void step() {}
    };

   protected:
    // Several rows take long enough to prefetch keys once more shortly before they are read.
    template <int COUNT>
    static inline void prefetch_ahead(const char* key, int64_t stride) {
        if (COUNT > 1) prefetch(key + DECODE_PREFETCH_KEYS * stride, 1);
    }
};

// Both products in fp32, for keys and values of this dtype, widened in registers.
template <Dtype DTYPE>
struct Widened : KeyByKey {
    static constexpr bool SCALED = DTYPE == Dtype::i8;

    static void pack_queries(const Problem& p, const Tile& t, float* to, float* q_scale) {
        std::fill(q_scale, q_scale + t.count, 1.0f);
        for (int r = 0; r < t.count; ++r, to += pitch_of(p.width))
            for (int64_t d = 0; d < p.width; d += LANES)
                store(to + d, load_part(p.dtype, t.row(p, p.q, r) + d * size_of(p.dtype), p.width - d));
    }

    // sums[j * ROWS + r] = key j times row r, whose lanes are not added up yet.
    template <int COUNT, int ROWS, int KEYS>
    static inline void score(const char* keys, int64_t stride, int64_t width, const float* queries, vec* sums,
                             PrefetchStream values) {
        if (width < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width), item = size_of(DTYPE);
        for (int64_t begin = 0, end; begin < width; begin = end) {
            end = std::min(begin + F32::CHAIN * LANES, width);
            vec acc[KEYS][COUNT] = {};
            const auto add_columns = [&](int64_t d, auto vecs) {
                for (int n = 0; n < decltype(vecs)::value; ++n, d += LANES) {
                    const bool whole = decltype(vecs)::value > 1 || d + LANES <= width;
                    vec key[KEYS];
                    for (int j = 0; j < KEYS; ++j) {
                        const char* const at = keys + j * stride + d * item;
                        if (n == 0) {
                            prefetch_ahead<COUNT>(at, stride);
                            values.prefetch(j, d * item);
                        }
                        key[j] = whole ? load_as(DTYPE, at) : load_part(DTYPE, at, width - d);
                    }
                    for (int r = 0; r < COUNT; ++r) {
                        const vec query = load(queries + r * pitch + d);
                        for (int j = 0; j < KEYS; ++j) acc[j][r] += key[j] * query;
                    }
                }
            };
            constexpr int VECS = decode_vecs(LANES);
            int64_t d = begin;
            if constexpr (VECS > 1)
                for (; d + VECS * LANES <= std::min(end, width); d += VECS * LANES)
                    add_columns(d, std::integral_constant<int, VECS>());
            for (; d < end; d += LANES) add_columns(d, std::integral_constant<int, 1>());
            for (int j = 0; j < KEYS; ++j) {
                for (int r = 0; r < COUNT; ++r) {
                    vec& sum = sums[j * ROWS + r];
                    sum = begin == 0 ? acc[j][r] : sum + acc[j][r];
                }
            }
        }
    }

    template <int ROWS>
    static vec pack(float*, int) {
        return set1(1.0f);
    }

    // SUM_FIRST sums the block on its own and then adds that. It is a constant: sums of a short query would leave the
    // registers otherwise.
    template <int COUNT, int ROWS, bool SUM_FIRST>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights, vec, float* out,
                    PrefetchStream keys) {
        int64_t d = 0;
        const auto run = [&](auto vecs) {
            constexpr int VECS = decltype(vecs)::value;
            // Sums, a row of values and a weight must fit the registers.
            if constexpr (VECS == 1 || (COUNT + 1) * VECS < REGISTERS - 1)
                for (; d + (VECS - 1) * LANES < width; d += VECS * LANES)
                    add_columns<COUNT, ROWS, VECS, SUM_FIRST>(values, stride, count, d, width, weights, out, keys);
        };
        run(std::integral_constant<int, 4>());
        run(std::integral_constant<int, 2>());
        run(std::integral_constant<int, 1>());
    }

    static int64_t column(int64_t d) { return d; }
    static vec columns(const float* out, int64_t d) { return load(out + d); }

   private:
    // `add` for VECS vectors of columns from column d on.
    template <int COUNT, int ROWS, int VECS, bool SUM_FIRST>
    static inline void add_columns(const char* values, int64_t stride, int count, int64_t d, int64_t width,
                                   const float* weights, float* out, PrefetchStream keys) {
        if (count < 1) __builtin_unreachable();  // otherwise compilers keep the sums in memory as well
        const int64_t pitch = pitch_of(width), item = size_of(DTYPE), left = width - d;
        values += d * item, out += d;
        vec acc[COUNT][VECS];
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < VECS; ++n) acc[r][n] = SUM_FIRST ? vec{} : load(out + r * pitch + n * LANES);
        for (int j = 0; j < count; ++j, values += stride) {
            vec x[VECS];
            for (int n = 0; n < VECS; ++n) {
                if (n % decode_vecs(LANES) == 0) keys.prefetch(j, (d + n * LANES) * item);
                const char* const at = values + n * LANES * item;
                x[n] = n + 1 < VECS ? load_as(DTYPE, at) : load_part(DTYPE, at, left - n * LANES);
            }
            for (int r = 0; r < COUNT; ++r)
                for (int n = 0; n < VECS; ++n) acc[r][n] += weights[j * ROWS + r] * x[n];
        }
        for (int r = 0; r < COUNT; ++r) {
            for (int n = 0; n < VECS; ++n) {
                float* const to = out + r * pitch + n * LANES;
                store(to, SUM_FIRST ? load(to) + acc[r][n] : acc[r][n]);
            }
        }
    }
};

// The largest of the lanes that lie a multiple of ROWS apart.
template <int ROWS>
static inline vec largest(vec x) {
    if constexpr (ROWS < LANES) return largest<2 * ROWS>(max(x, shuffle(x, x, Across<ROWS>())));
    return x;
}

// The scale of each row of fixed point: its largest number is `largest_code` times that. At least FLT_MIN, so that it
// has an inverse. inf if any number is NaN: all quantised numbers are then 0, and the products 0 * inf = NaN.
// `vectors(i)` gives numbers i to i + LANES - 1; those of ROWS rows alternate.
template <int ROWS, class Vectors>
static inline vec fixed_point_scale(int64_t count, float largest_code, Vectors vectors) {
    vec most = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const vec x = vectors(i), size = max(x, -x);
        most = max(size == size ? size : set1(INF), most);
    }
    return max(largest<ROWS>(most) / largest_code, set1(std::numeric_limits<float>::min()));
}

#if defined(QKV_DOT_BF16)
// bf16 times bf16.
struct Halves {
    static constexpr int SIZE = 2;
    static constexpr bool FIXED_POINT = false;

    // A vector of pairs of numbers from `row`, of which `left` are left, and zeros.
    static pair_vec take(const char* row, int64_t left) {
        return left >= 2 * LANES ? load_pairs(row) : load_first_pairs(row, left);
    }

    // Queries or weights in the form in which they multiply them.
    static half_vec factors(vec x) { return round_to_bf16(x); }
    static vec pair(vec low, vec high) { return pair_bf16(low, high); }

    static vec dot(vec sum, pair_vec a, pair_vec b) { return dot_bf16(sum, a, (vec)b); }

    static vec total(vec sum) { return sum; }
};
#endif

#if defined(__AVX512F__)
// int8 times int16 in fixed point: multiples of a scale, which is a 32767th of the largest number of a row.
struct Codes {
    static constexpr int SIZE = 1;
    static constexpr bool FIXED_POINT = true;
    static constexpr int LARGEST = 32767;
    static constexpr int64_t MOST_PRODUCTS = LANES * (1ll << 31) / (LARGEST + 1) / 128;  // whose sums fit 32 bits

    static __m512i take(const char* row, int64_t left) {
        if (left >= 2 * LANES) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)row));
        return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((1ull << left) - 1), row));
    }

    static __m256i factors(vec x) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x)); }

    static vec dot(vec sum, __m512i a, __m512i b) { return dot_i16(sum, a, b); }

    static vec total(vec sum) { return (vec)_mm512_cvtepi32_ps((__m512i)sum); }
};

static_assert(BLOCK_N <= Codes::MOST_PRODUCTS / LANES);
#endif

#if defined(__AVX512F__) || defined(QKV_DOT_BF16)
// Both products in dot products of pairs, for queries of 16 bits. Columns of out alternate as `pair` interleaves them:
// runs of four in one vector, the next four in the other.
template <class Numbers>
struct Dots : KeyByKey {
    static constexpr int STEP = 2 * LANES;
    static constexpr bool SCALED = Numbers::FIXED_POINT;

    static void pack_queries(const Problem& p, const Tile& t, float* to, float* q_scale) {
        for (int r = 0; r < t.count; ++r, to += pitch_of(p.width)) {
            std::fill(to, to + pitch_of(p.width) / 2, 0.0f);
            const char* const row = t.row(p, p.q, r);
            const auto numbers = [&](int64_t d) { return load_part(p.dtype, row + 2 * d, p.width - d); };
            vec scale = set1(1.0f);
            if constexpr (Numbers::FIXED_POINT) scale = fixed_point_scale<1>(p.width, Numbers::LARGEST, numbers);
            q_scale[r] = scale[0];
            for (int64_t d = 0; d < p.width; d += LANES) store_halves(to + d / 2, Numbers::factors(numbers(d) / scale));
        }
    }

    template <int COUNT, int ROWS, int KEYS>
    static inline void score(const char* keys, int64_t stride, int64_t width, const float* queries, vec* sums,
                             PrefetchStream values) {
        if (width < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width);
        vec acc[KEYS][COUNT] = {};
        for (int64_t d = 0; d < width; d += STEP) {
            pair_vec key[KEYS];
            for (int j = 0; j < KEYS; ++j) {
                const char* const at = keys + j * stride + Numbers::SIZE * d;
                prefetch_ahead<COUNT>(at, stride);
                values.prefetch(j, Numbers::SIZE * d);
                key[j] = Numbers::take(at, width - d);
            }
            for (int r = 0; r < COUNT; ++r) {
                const pair_vec query = load_pairs(queries + r * pitch + d / 2);
                for (int j = 0; j < KEYS; ++j) acc[j][r] = Numbers::dot(acc[j][r], key[j], query);
            }
        }
        for (int j = 0; j < KEYS; ++j)
            for (int r = 0; r < COUNT; ++r) sums[j * ROWS + r] = Numbers::total(acc[j][r]);
    }

    // Weights of neighbouring keys become pairs: (key / 2, row).
    template <int ROWS>
    static vec pack(float* weights, int count) {
        vec scale = set1(1.0f);
        if constexpr (Numbers::FIXED_POINT)
            scale =
                fixed_point_scale<ROWS>(count * ROWS, Numbers::LARGEST, [&](int64_t i) { return load(weights + i); });
        const vec inverse = 1.0f / scale;
        if constexpr (ROWS == LANES) {
            for (int j = 0; j < count; j += 2) {
                const vec low = load(weights + j * LANES),
                          high = j + 1 < count ? load(weights + (j + 1) * LANES) : vec{};
                store(weights + j / 2 * LANES, Numbers::pair(low, high));
            }
            return scale;
        }
        alignas(32) uint16_t from[LANES];
        for (int i = 0; i < LANES; ++i) from[i] = (uint16_t)((i / 2 / ROWS * 2 + i % 2) * ROWS + i / 2 % ROWS);
        for (int i = 0; i < count * ROWS; i += LANES)
            store_halves(weights + i / 2, permute_halves(Numbers::factors(load(weights + i) * inverse), from));
        return scale;
    }

    template <int COUNT, int ROWS, bool>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights,
                    vec weight_scale, float* out, PrefetchStream keys) {
        constexpr int SPANS = dot_spans(COUNT);
        int64_t d = 0;
        for (; d + SPANS * STEP <= width; d += SPANS * STEP)
            add_columns<COUNT, ROWS, SPANS>(values, stride, count, d, width, weights, weight_scale, out, keys);
        for (; d < width; d += STEP)
            add_columns<COUNT, ROWS, 1>(values, stride, count, d, width, weights, weight_scale, out, keys);
    }

    static int64_t column(int64_t d) { return d / STEP * STEP + d % STEP / 8 * 4 + d % 4 + (d & 4 ? LANES : 0); }

    static vec columns(const float* out, int64_t d) {
        const float* const step = out + d / STEP * STEP;
        const vec low = load(step), high = load(step + LANES);
        return d % STEP == 0 ? shuffle(low, high, Merged<0>()) : shuffle(low, high, Merged<LANES>());
    }

   private:
    template <int FROM>
    struct Merged {
        static constexpr int at(int i) { return (FROM + i) / 8 * 4 + i % 4 + ((FROM + i) & 4 ? LANES : 0); }
    };

    // Pairs of the numbers of two rows of values.
    static void pair(const char* row, const char* next, int64_t left, pair_vec* pairs) {
        const pair_vec low = Numbers::take(row, left), high = next ? Numbers::take(next, left) : pair_vec{};
        pairs[0] = alternate_low(low, high);
        pairs[1] = alternate_high(low, high);
    }

    // `add` for SPANS * STEP columns from column d on.
    template <int COUNT, int ROWS, int SPANS>
    static inline void add_columns(const char* values, int64_t stride, int count, int64_t d, int64_t width,
                                   const float* weights, vec weight_scale, float* out, PrefetchStream keys) {
        if (count < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width), left = width - d;
        values += Numbers::SIZE * d, out += d;
        vec acc[COUNT][2 * SPANS] = {};
        if (!Numbers::FIXED_POINT)
            for (int r = 0; r < COUNT; ++r)
                for (int n = 0; n < 2 * SPANS; ++n) acc[r][n] = load(out + r * pitch + n * LANES);
        for (int j = 0; j < count; j += 2, values += 2 * stride) {
            pair_vec x[2 * SPANS];
            for (int n = 0; n < SPANS; ++n) {
                const char* const row = values + n * STEP * Numbers::SIZE;
                for (int i = 0; i < 2; ++i) keys.prefetch(j + i, (d + n * STEP) * Numbers::SIZE);
                pair(row, j + 1 < count ? row + stride : nullptr, left - n * STEP, x + 2 * n);
            }
            for (int r = 0; r < COUNT; ++r) {
                const pair_vec weight = repeat_pair(((const uint32_t*)weights)[j / 2 * ROWS + r]);
                for (int n = 0; n < 2 * SPANS; ++n) acc[r][n] = Numbers::dot(acc[r][n], x[n], weight);
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < 2 * SPANS; ++n) {
                float* const to = out + r * pitch + n * LANES;
                store(to, Numbers::FIXED_POINT ? load(to) + weight_scale[r] * Numbers::total(acc[r][n]) : acc[r][n]);
            }
    }
};

#endif

}  // namespace QKV_ISA
}  // namespace qkv
