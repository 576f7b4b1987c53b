// Attention forward for the rows of a single query, as in decoding: one to eight heads that share their keys and
// values.
//
// A handful of rows would fill a handful of sixteen lanes. Here lanes lie along the width in both products, and along
// keys and rows in between; every key and value is read once, in the order of memory, for all rows: the speed is that
// of memory. Numbers of 8 and 16 bits are widened in registers; where there are dot products of pairs of 16 bits, those
// of bf16 are multiplied as they are, and those of 8 bits with queries and weights in fixed point.
#pragma once

#include "forward.h"

namespace qkv {
namespace QKV_ISA {

constexpr int FEW = LANES < 8 ? LANES : 8;  // rows at most

constexpr int AHEAD = 16;  // keys that are asked for before they are read

static inline void prefetch(const char* row, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// Numbers from the start of a row to that of the next, for rows of this width.
static inline int64_t pitch_of(int64_t width) { return (width + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// `State` of a few rows: rows of out lie as `Products` sums them.
struct FewState {
    float *top, *sum, *out;

    FewState(float* memory, const Tile&) : top(memory), sum(memory + FEW), out(memory + 2 * FEW) {}

    static int64_t floats(const Problem& p) { return FEW * (2 + pitch_of(p.value_width)); }

    void clear(const Problem& p, const Tile& t) const {
        std::fill(top, top + t.count, -INF);
        std::fill(sum, sum + t.count, 0.0f);
        std::fill(out, out + t.count * pitch_of(p.value_width), 0.0f);
    }
};

// Memory for a few rows.
struct FewRoom {
    float *queries, *steps, *scores, *values, *state, *total;

    FewRoom(const Problem& p, Placer& place) {
        queries = place(FEW * pitch_of(p.width));
        steps = place(FEW);
        scores = place(FEW * BLOCK);
        values = place(BLOCK * p.value_width);
        state = place(FewState::floats(p));
        total = place(FewState::floats(p));
    }
};

// Both products of a block of keys of this dtype, for rows of queries as fp32.
template <Dtype DTYPE>
struct Widened {
    // Rows of queries, and the step of each, which products with its numbers are to be multiplied by.
    static void queries(const Problem& p, const Tile& t, float* to, float* steps) {
        std::fill(steps, steps + t.count, 1.0f);
        for (int r = 0; r < t.count; ++r, to += pitch_of(p.width))
            for (int64_t d = 0; d < p.width; d += LANES)
                store(to + d, load_part(p.dtype, t.row(p, p.q, r) + d * size_of(p.dtype), p.width - d));
    }

    // sums[j * ROWS + r] = key j times row r, as lanes that are still to be added up.
    template <int COUNT, int ROWS, int KEYS>
    static inline void score(const char* keys, int64_t stride, int64_t width, const float* queries, vec* sums) {
        if (width < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width), item = size_of(DTYPE);
        vec acc[KEYS][COUNT] = {};
        for (int64_t d = 0; d < width; d += LANES) {
            const bool whole = d + LANES <= width;
            vec key[KEYS];
            for (int j = 0; j < KEYS; ++j) {
                const char* const at = keys + j * stride + d * item;
                key[j] = whole ? load_as(DTYPE, at) : load_part(DTYPE, at, width - d);
            }
            for (int r = 0; r < COUNT; ++r) {
                const vec query = load(queries + r * pitch + d);
                for (int j = 0; j < KEYS; ++j) acc[j][r] += key[j] * query;
            }
        }
        for (int j = 0; j < KEYS; ++j)
            for (int r = 0; r < COUNT; ++r) sums[j * ROWS + r] = acc[j][r];
    }

    // Makes of weights, in place, what `add` takes, and returns the step of each lane's row.
    template <int ROWS>
    static vec pack(float*, int) {
        return set1(1.0f);
    }

    // Adds weights times values to rows of out.
    template <int COUNT, int ROWS>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights, vec,
                    float* out) {
        constexpr int VECS = COUNT <= 4 ? 4 : 2;
        int64_t d = 0;
        for (; d + VECS * LANES <= width; d += VECS * LANES)
            some<COUNT, ROWS, VECS>(values + d * size_of(DTYPE), stride, count, width - d, weights, out + d, width);
        for (; d < width; d += LANES)
            some<COUNT, ROWS, 1>(values + d * size_of(DTYPE), stride, count, width - d, weights, out + d, width);
    }

    // Where column d of a row of out lies.
    static int64_t column(int64_t d) { return d; }

    // The columns of a row of out from d on, a multiple of LANES.
    static vec columns(const float* out, int64_t d) { return load(out + d); }

   private:
    template <int COUNT, int ROWS, int VECS>
    static inline void some(const char* values, int64_t stride, int count, int64_t left, const float* weights,
                            float* out, int64_t width) {
        const int64_t pitch = pitch_of(width), item = size_of(DTYPE);
        vec acc[COUNT][VECS];
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < VECS; ++n) acc[r][n] = load(out + r * pitch + n * LANES);
        for (int j = 0; j < count; ++j, values += stride) {
            vec x[VECS];
            for (int n = 0; n < VECS; ++n)
                x[n] =
                    left >= VECS * LANES ? load_as(DTYPE, values + n * LANES * item) : load_part(DTYPE, values, left);
            for (int r = 0; r < COUNT; ++r)
                for (int n = 0; n < VECS; ++n) acc[r][n] += weights[j * ROWS + r] * x[n];
        }
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < VECS; ++n) store(out + r * pitch + n * LANES, acc[r][n]);
    }
};

// The largest of the lanes that lie a multiple of ROWS apart.
template <int ROWS>
static inline vec largest(vec x) {
    if constexpr (ROWS < LANES) return largest<2 * ROWS>(max(x, shuffle(x, x, Across<ROWS>())));
    return x;
}

#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
// Numbers of bf16, which are multiplied by numbers of bf16.
struct Halves {
    static constexpr int SIZE = 2;
    static constexpr bool IN_STEPS = false;

    // The numbers at `row`, zeros for those that are not left.
    static __m512i take(const char* row, int64_t left) {
        if (left >= 2 * LANES) return _mm512_loadu_si512(row);
        return _mm512_maskz_loadu_epi16((__mmask32)((1ull << left) - 1), row);
    }

    // What they are multiplied by, from fp32.
    static __m256i factors(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

    static vec dot(vec sum, __m512i a, __m512i b) { return Pair::dot(sum, a, (vec)b); }

    static vec total(vec sum) { return sum; }
};
#endif

// Numbers of i8, which are multiplied by numbers of 16 bits in fixed point: multiples of a step, a 32767th of the
// largest of its kind.
struct Codes {
    static constexpr int SIZE = 1;
    static constexpr bool IN_STEPS = true;
    static constexpr int LARGEST = 32767;
    static constexpr int64_t MOST = LANES * (1ll << 31) / (LARGEST + 1) / 128;  // products, whose sums fit 32 bits

    static __m512i take(const char* row, int64_t left) {
        if (left >= 2 * LANES) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)row));
        return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((1ull << left) - 1), row));
    }

    static __m256i factors(vec x) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)x)); }

    static vec dot(vec sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
        return (vec)_mm512_dpwssd_epi32((__m512i)sum, a, b);
#else
        return (vec)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16(a, b));
#endif
    }

    static vec total(vec sum) { return (vec)_mm512_cvtepi32_ps((__m512i)sum); }
};

// Both products of a block of keys in dot products of pairs, for queries of 16 bits. Rows of out lie as pairs do: runs
// of four columns of two rows of values take turns.
template <class Numbers>
struct Dots {
    static constexpr int STEP = 2 * LANES;

    static void queries(const Problem& p, const Tile& t, float* to, float* steps) {
        for (int r = 0; r < t.count; ++r, to += pitch_of(p.width)) {
            std::fill(to, to + pitch_of(p.width) / 2, 0.0f);
            const char* const row = t.row(p, p.q, r);
            const auto numbers = [&](int64_t d) { return load_part(p.dtype, row + 2 * d, p.width - d); };
            vec divisor = set1(1.0f);
            if (Numbers::IN_STEPS) divisor = step_of<1>(p.width, numbers);
            steps[r] = divisor[0];
            for (int64_t d = 0; d < p.width; d += LANES)
                _mm256_storeu_si256((__m256i*)(to + d / 2), Numbers::factors(numbers(d) / divisor));
        }
    }

    template <int COUNT, int ROWS, int KEYS>
    static inline void score(const char* keys, int64_t stride, int64_t width, const float* queries, vec* sums) {
        if (width < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width);
        vec acc[KEYS][COUNT] = {};
        for (int64_t d = 0; d < width; d += STEP) {
            __m512i key[KEYS];
            for (int j = 0; j < KEYS; ++j) key[j] = Numbers::take(keys + j * stride + Numbers::SIZE * d, width - d);
            for (int r = 0; r < COUNT; ++r) {
                const __m512i query = _mm512_loadu_si512(queries + r * pitch + d / 2);
                for (int j = 0; j < KEYS; ++j) acc[j][r] = Numbers::dot(acc[j][r], key[j], query);
            }
        }
        for (int j = 0; j < KEYS; ++j)
            for (int r = 0; r < COUNT; ++r) sums[j * ROWS + r] = Numbers::total(acc[j][r]);
    }

    // Weights of neighbouring keys become pairs: (key / 2, row).
    template <int ROWS>
    static vec pack(float* weights, int count) {
        vec step = set1(1.0f);
        if (Numbers::IN_STEPS) step = step_of<ROWS>(count * ROWS, [&](int64_t i) { return load(weights + i); });
        const vec inverse = 1.0f / step;
        alignas(32) uint16_t from[LANES];
        for (int i = 0; i < LANES; ++i) from[i] = (uint16_t)((i / 2 / ROWS * 2 + i % 2) * ROWS + i / 2 % ROWS);
        const __m256i order = _mm256_load_si256((const __m256i*)from);
        for (int i = 0; i < count * ROWS; i += LANES) {
            const __m256i factors = Numbers::factors(load(weights + i) * inverse);
            _mm256_storeu_si256((__m256i*)(weights + i / 2), _mm256_permutexvar_epi16(order, factors));
        }
        return step;
    }

    template <int COUNT, int ROWS>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights, vec steps,
                    float* out) {
        constexpr int SPANS = COUNT <= 4 ? 2 : 1;
        int64_t d = 0;
        for (; d + SPANS * STEP <= width; d += SPANS * STEP)
            some<COUNT, ROWS, SPANS>(values + Numbers::SIZE * d, stride, count, width - d, weights, steps, out + d,
                                     width);
        for (; d < width; d += STEP)
            some<COUNT, ROWS, 1>(values + Numbers::SIZE * d, stride, count, width - d, weights, steps, out + d, width);
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
        static constexpr int at(int i) { return (FROM + i) / 8 * 4 + i % 4 + (i & 4 ? LANES : 0); }
    };

    // The step in which the largest of the numbers of each row is the last, and no smaller than has an inverse. Where
    // one of them is no number it is inf, so that all are 0 in such steps, and products NaN. They are given a vector at
    // a time; rows are ROWS and take turns.
    template <int ROWS, class Vectors>
    static vec step_of(int64_t count, Vectors vectors) {
        vec most = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const vec x = vectors(i), size = max(x, -x);
            most = max(size == size ? size : set1(INF), most);
        }
        return max(largest<ROWS>(most) / (float)Codes::LARGEST, set1(std::numeric_limits<float>::min()));
    }

    // Pairs of the numbers of two rows of values.
    static void pair(const char* row, const char* next, int64_t left, __m512i* pairs) {
        const __m512i low = Numbers::take(row, left), high = next ? Numbers::take(next, left) : __m512i{};
        pairs[0] = _mm512_unpacklo_epi16(low, high);
        pairs[1] = _mm512_unpackhi_epi16(low, high);
    }

    template <int COUNT, int ROWS, int SPANS>
    static inline void some(const char* values, int64_t stride, int count, int64_t left, const float* weights,
                            vec steps, float* out, int64_t width) {
        const int64_t pitch = pitch_of(width);
        vec acc[COUNT][2 * SPANS] = {};
        if (!Numbers::IN_STEPS)
            for (int r = 0; r < COUNT; ++r)
                for (int n = 0; n < 2 * SPANS; ++n) acc[r][n] = load(out + r * pitch + n * LANES);
        for (int j = 0; j < count; j += 2, values += 2 * stride) {
            __m512i x[2 * SPANS];
            for (int n = 0; n < SPANS; ++n) {
                const char* const row = values + n * STEP * Numbers::SIZE;
                pair(row, j + 1 < count ? row + stride : nullptr, left - n * STEP, x + 2 * n);
            }
            for (int r = 0; r < COUNT; ++r) {
                const __m512i weight = _mm512_set1_epi32(((const int32_t*)weights)[j / 2 * ROWS + r]);
                for (int n = 0; n < 2 * SPANS; ++n) acc[r][n] = Numbers::dot(acc[r][n], x[n], weight);
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < 2 * SPANS; ++n) {
                float* const to = out + r * pitch + n * LANES;
                store(to, Numbers::IN_STEPS ? load(to) + steps[r] * Numbers::total(acc[r][n]) : acc[r][n]);
            }
    }
};

static_assert(BLOCK <= Codes::MOST / LANES);
#endif

// Lane i stands for key first + i / ROWS and row i % ROWS; lanes without a row follow the last one.
template <int COUNT, int ROWS>
struct Spread {
    const Problem& p;
    const Tile& t;

    static int row(int lane) { return std::min(lane % ROWS, COUNT - 1); }

    template <class Value>
    static vec each(Value value) {
        vec x;
        for (int i = 0; i < LANES; ++i) x[i] = value(i);
        return x;
    }

    vec of(const Matrix& m, int64_t first) const {
        return each([&](int i) {
            const int64_t key = std::min(first + i / ROWS, p.lk - 1), head = t.head[row(i)];
            return read(m.dtype, m.data, t.batch * m.batch + head * m.head + key * m.column);
        });
    }

    struct Repeated {
        static constexpr int at(int i) { return i / ROWS; }
    };

    // The scale of each key.
    vec of(const Scales& scales, int64_t first) const {
        const float* const at = scales.data + t.batch * scales.batch + t.kv_head * scales.head + first;
        const vec each = load_part(Dtype::f32, at, p.lk - first);
        return shuffle(each, each, Repeated());
    }

    // Scores from products.
    vec transform(int64_t first, vec x) const {
        x = x * p.scale;
        if (p.softcap != 0) x = p.softcap * tanh(x / p.softcap);
        if (p.bias.data) x = x + bounded(of(p.bias, first));
        if (p.alibi) {
            const int64_t position = t.position[0];
            x = x - each([&](int i) { return t.slope[row(i)] * (float)std::abs(position - (first + i / ROWS)); });
        }
        return x;
    }

    bool may_see(int64_t key) const { return QKV_ISA::may_see(p, t, 0, key); }

    // -inf for keys that are hidden, or do not exist.
    vec hide(int64_t first, int64_t end, vec x) const {
        x = each([&](int i) { return first + i / ROWS < end && may_see(first + i / ROWS) ? 0.0f : -INF; }) == 0.0f
                ? x
                : set1(-INF);
        return p.allow.data ? (of(p.allow, first) != 0.0f ? x : set1(-INF)) : x;
    }
};

// `without_poison` for a few rows: leaves the values of a block in room.values.
template <class Products, int COUNT, int ROWS>
static void without_poison_few(const Problem& p, const Tile& t, const Block& b, const char* values, const FewRoom& room,
                               const FewState& state) {
    const Spread<COUNT, ROWS> spread{p, t};
    const int64_t item = size_of(p.dtype), pitch = pitch_of(p.value_width);
    for (int j = 0; j < b.size; ++j) {
        const char* const row = values + j * p.v.row * item;
        char* const clean = (char*)room.values + j * p.value_width * item;
        std::memcpy(clean, row, p.value_width * item);
        const vec seen = spread.hide(b.first + j, b.first + b.size, vec{});
        for (int64_t d = 0; d < p.value_width; ++d) {
            const float x = read(p.dtype, row, d);
            if (std::isfinite(x)) continue;
            write(p.dtype, clean, d, 0.0f);
            for (int r = 0; r < COUNT; ++r)
                if (seen[r] == 0) state.out[r * pitch + Products::column(d)] += room.scores[j * ROWS + r] * x;
        }
    }
}

// Folds the keys [begin, end) into a state that was empty. COUNT is the number of rows, ROWS the next power of two.
template <class Products, int COUNT, int ROWS>
static void fold_few(const Problem& p, const Tile& t, const Outline& outline, const Dropout& dropout, int64_t begin,
                     int64_t end, const FewRoom& room, const FewState& state) {
    typedef Spread<COUNT, ROWS> Spread;
    constexpr int KEYS = LANES / ROWS;                           // keys of a vector
    constexpr int ABREAST = COUNT == 1 ? 1 : std::min(KEYS, 2);  // keys read side by side: more would slow memory down
    const Spread spread{p, t};
    const bool plain = plain_scores(p);
    const float factor = exponent_factor(p);
    const int64_t pitch = pitch_of(p.value_width), item = size_of(p.kv_dtype), key_stride = p.k.row * item;
    const bool scaled = p.k_scale.data;
    const vec steps = Spread::each([&](int i) { return room.steps[Spread::row(i)]; });
    vec top = set1(-INF), sum = {};
    state.clear(p, t);
    for (int64_t first = begin; first < end; first += BLOCK) {
        const Block b(p, t, outline, first, end, Single::GRAIN);
        if (b.count == 0) continue;
        // What lies before a window is not read.
        const int from = first < p.sink_tokens ? 0 : (int)std::max<int64_t>(0, t.begin - first) / LANES * LANES;
        float* const scores = room.scores + from * ROWS;
        const char* const keys = row_of(p.kv_dtype, p.k, t.batch, t.kv_head, first);
        const char* values = row_of(p.kv_dtype, p.v, t.batch, t.kv_head, first);
        int64_t value_stride = p.v.row * item;
        vec peak = set1(-INF);
        for (int j = from; j < b.size; j += KEYS) {
            vec sums[LANES] = {};
            for (int i = 0; i < KEYS; i += ABREAST) {
                if (j + i >= b.size) break;
                // Values are asked for while their keys are read, and keys before, where several rows take long enough
                // to let memory rest. Not into the nearest cache, whose few requests under way would hold up what is
                // read.
                for (int n = 0; n < ABREAST; ++n) {
                    if (COUNT > 1) prefetch(keys + (j + i + n + AHEAD) * key_stride, p.width * item);
                    prefetch(values + (j + i + n) * value_stride, p.value_width * item);
                }
                if (j + i + ABREAST <= b.size)
                    Products::template score<COUNT, ROWS, ABREAST>(keys + (j + i) * key_stride, key_stride, p.width,
                                                                   room.queries, sums + i * ROWS);
                else
                    Products::template score<COUNT, ROWS, 1>(keys + (j + i) * key_stride, key_stride, p.width,
                                                             room.queries, sums + i * ROWS);
            }
            vec x = sum_each(sums);
            if (scaled) x = x * (spread.of(p.k_scale, first + j) * steps);
            if (!plain) x = spread.transform(first + j, x);
            if (b.edge || j + KEYS > b.size) x = spread.hide(first + j, first + b.size, x);
            peak = max(x, peak);
            store(room.scores + j * ROWS, x);
        }
        const Rise rise(p, top, largest<ROWS>(peak));
        if (any(rise.rows)) {
            top = rise.top;
            sum = sum * rise.shrink;
            for (int r = 0; r < COUNT; ++r)
                for (int64_t d = 0; d < pitch; d += LANES)
                    store(state.out + r * pitch + d, load(state.out + r * pitch + d) * rise.shrink[r]);
        }
        for (int j = from; j < b.size; j += KEYS) {
            const vec score = load(room.scores + j * ROWS);
            vec weight = exp2(exponents(plain, score, factor, rise.shift));
            sum = sum + weight;
            if (p.dropout > 0) weight = weight * dropout.factors_of(first + j, ROWS, Spread::row);
            // The scale of a hidden key may be NaN.
            if (scaled) weight = score == -INF ? weight : weight * spread.of(p.v_scale, first + j);
            store(room.scores + j * ROWS, weight);
        }
        if (b.edge && !scaled && !all_finite(p, t.batch, t.kv_head, p.v, p.value_width, first + from, b.size - from)) {
            without_poison_few<Products, COUNT, ROWS>(p, t, b, values, room, state);
            values = (const char*)room.values;
            value_stride = p.value_width * item;
        }
        const vec weight_steps = Products::template pack<ROWS>(scores, b.size - from);
        Products::template add<COUNT, ROWS>(values + from * value_stride, value_stride, b.size - from, p.value_width,
                                            scores, weight_steps, state.out);
    }
    for (int r = 0; r < COUNT; ++r) {
        state.top[r] = top[r];
        for (int i = r; i < LANES; i += ROWS) state.sum[r] += sum[i];
    }
}

static void merge(const Problem& p, const Tile& t, const FewState& total, const FewState& piece) {
    const float factor = exponent_factor(p);
    const int64_t pitch = pitch_of(p.value_width);
    for (int r = 0; r < t.count; ++r) {
        const float a = total.top[r], b = piece.top[r], top = a > b ? a : b, base = top == -INF ? 0.0f : top;
        const float left = std::exp2((a - base) * factor), right = std::exp2((b - base) * factor);
        total.top[r] = top;
        total.sum[r] = total.sum[r] * left + piece.sum[r] * right;
        for (int64_t d = r * pitch; d < (r + 1) * pitch; d += LANES)
            store(total.out + d, load(total.out + d) * left + load(piece.out + d) * right);
    }
}

template <class Products>
static void finish(const Problem& p, const Tile& t, const FewState& state) {
    for (int r = 0; r < t.count; ++r) {
        const float factor = normalise(p, t, r, state.top[r], state.sum[r]);
        char* const row = t.row(p, p.out, r);
        for_columns(p.value_width, [&](int64_t d, int64_t count) {
            const vec x = Products::columns(state.out + r * pitch_of(p.value_width), d) * factor;
            store_part(p.dtype, row + d * size_of(p.dtype), x, count);
        });
    }
}

// Calls work(products, count) with types for the dtype of the keys and the number of rows.
template <int COUNT = FEW, class Products, class Work>
static inline void with_count(Products products, int count, Work work) {
    if (count == COUNT)
        work(products, std::integral_constant<int, COUNT>());
    else if constexpr (COUNT > 1)
        with_count<COUNT - 1>(products, count, work);
}

template <class Work>
static inline void for_few(const Problem& p, int count, Work work) {
    switch (p.kv_dtype) {
        case Dtype::f32: return with_count(Widened<Dtype::f32>(), count, work);
#if defined(__AVX512BF16__)
        case Dtype::bf16: return with_count(Dots<Halves>(), count, work);
#else
        case Dtype::bf16: return with_count(Widened<Dtype::bf16>(), count, work);
#endif
        case Dtype::f16: return with_count(Widened<Dtype::f16>(), count, work);
        default: break;
    }
#if defined(__AVX512F__)
    if (p.dtype != Dtype::f32 && p.width <= Codes::MOST) return with_count(Dots<Codes>(), count, work);
#endif
    with_count(Widened<Dtype::i8>(), count, work);
}

}  // namespace QKV_ISA
}  // namespace qkv
