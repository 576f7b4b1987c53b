// The products of decoding in bf16 on tile registers.
#pragma once

#include "attention/decode_dot.h"

namespace qkv {
namespace QKV_ISA {

#if defined(__AMX_BF16__)
// Fewer rows than tiles take.
struct FewHalves : Dots<Halves> {
    static constexpr int MOST = AMX_DECODE_ROWS - 1;
};

// Calls work(0) to work(COUNT - 1), with constants.
template <class Work, int... I>
static inline void repeat(Work work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class Work>
static inline void repeat(Work work) {
    repeat(work, std::make_integer_sequence<int, COUNT>());
}

// Prefetches the keys and values of the next block step by step while this one is computed: few requests can be
// outstanding, so bandwidth would drop after a burst. Values that lie in their keys, as those of latents do, come with
// them.
template <int ROWS>
struct PrefetchBlock {
    PrefetchBlock(const Problem& p, const Tile& t, int64_t first)
        : key_stride(p.k.row * 2), value_stride(p.v.row * 2), key_bytes(p.width * 2), value_bytes(p.value_width * 2),
          keys(row_of(p, p.k, t, first) + BLOCK_N * key_stride),
          values(row_of(p, p.v, t, first) + BLOCK_N * value_stride),
          count((int)std::max<int64_t>(0, std::min<int64_t>(BLOCK_N, t.end - first - BLOCK_N))),
          latents(key_stride == value_stride && keys <= values && values + value_bytes <= keys + key_bytes),
          total(latents ? count : 2 * count) {}

    // The parts of the work on a block in their order; each calls `step` `steps` times. A product of a key
    // costs about as much as 16 rows of its scores, and that of a latent far more.
    void scores(int steps) { plan(latents ? LATENT_SCORES : 16, steps); }
    void maxima(int steps) { plan(latents ? LATENT_MAXIMA : 16 + ROWS, steps); }
    void weights(int steps) { plan(latents ? LATENT_WEIGHTS : 16 + 3 * ROWS, steps); }
    void sums(int steps) { plan(WORK, steps); }

    void step() {
        due += rate;
        for (; done < due / 256; ++done)
            if (done < count)
                prefetch(keys + done * key_stride, key_bytes);
            else
                prefetch(values + (done - count) * value_stride, value_bytes);
    }

   private:
    static constexpr int WORK = (ROWS > 8 ? 48 : 32) + 4 * ROWS;
    static constexpr int LATENT_SCORES = WORK * 35 / 100, LATENT_MAXIMA = WORK * 38 / 100,  // step 132
        LATENT_WEIGHTS = WORK * 43 / 100;

    void plan(int work, int steps) { rate = (total * 256 * work / WORK - due) / steps; }

    const int64_t key_stride, value_stride, key_bytes, value_bytes;
    const char *const keys, *const values;
    const int count;     // of keys, and of values
    const bool latents;  // whether values lie in their keys
    const int total;     // of rows to prefetch
    int done = 0;        // keys and values prefetched
    int due = 0;         // how many should be prefetched, times 256
    int rate = 0;        // growth of `due` per step
};

// Both products of a block of keys of bf16, on tiles, which take keys and values as they lie in memory.
//
// Scores are keys times queries: 16 keys and 16 rows of queries, which repeat where there are fewer.
//
// A bf16 tile of values pairs neighbouring columns, but the product needs pairs of keys. So values are multiplied by
// (weight, 0) for the even columns and by (0, weight) for the odd ones; up to eight rows share a tile. Columns of out
// lie likewise: sixteen even ones, then the sixteen odd ones between them.
struct OnTiles {
    static constexpr int LEAST = AMX_DECODE_ROWS, MOST = LANES;  // fewer are as fast in dot products, with less set-up
    static constexpr bool ON_TILES = true, SCALED = false;
    using Registers = TileRegisters;
    template <int ROWS>
    using Prefetcher = PrefetchBlock<ROWS>;

    static constexpr int STEP = 2 * LANES, GROUP = LANES, FLOATS = LANES * LANES;  // columns, keys and floats of a tile

    // Packs queries as B: (column / 2, row), two neighbouring columns a lane. bf16 needs no scale.
    static void pack_queries(const Problem& p, const Tile& t, float* to, float* q_scale) {
        std::fill(q_scale, q_scale + t.count, 1.0f);
        const char* rows[LANES];
        for (int r = 0; r < LANES; ++r) rows[r] = t.row(p, p.q, std::min(r % lanes_of(t.count), t.count - 1));
        rows_to_lanes(LANES, pitch_of(p.width) / 2, to, LANES, [&](int64_t r, int64_t c, int64_t) {
            return (vec)Halves::take(rows[r] + 4 * c, p.width - 2 * c);
        });
    }

    // scores[LANES * j + r] = key j times row r.
    template <int ROWS>
    static void score(const char* keys, int64_t stride, int count, int64_t width, const float* queries, float* scores,
                      PrefetchBlock<ROWS>& prefetcher) {
        prefetcher.scores(steps_of(count, width));
        const auto run = [&](auto groups, int j) {
            score_groups<groups>(keys + j * stride, stride, count - j, width, queries, scores + j * LANES, prefetcher);
        };
        int j = 0;
        for (; j + 2 * GROUP < count; j += 3 * GROUP) run(std::integral_constant<int, 3>(), j);
        for (; j < count; j += GROUP) run(std::integral_constant<int, 1>(), j);
    }

    // Scores from key j on, in the lanes of `DecodeLanes`.
    template <int ROWS>
    static vec load_scores(const float* scores, int j) {
        vec x = load(scores + j * LANES);
        for (int i = 1; i < LANES / ROWS; ++i)
            x = (vec)_mm512_mask_loadu_ps((__m512)x, (__mmask16)(0xffff << i * ROWS), scores + (j + i) * LANES);
        return x;
    }

    // Adds weights times values to rows of out.
    template <int ROWS>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights, float* out,
                    int rows, PrefetchBlock<ROWS>& prefetcher) {
        constexpr int SPANS = ROWS > 8 ? 2 : 4;
        alignas(64) float factors[BLOCK_N / GROUP * (ROWS > 8 ? 2 : 1) * FLOATS];
        prefetcher.sums(steps_of(count, width));
        for (int64_t d = 0; d < width;) {
            const auto run = [&](auto spans) {
                add_columns<ROWS, decltype(spans)::value>(values + 2 * d, stride, count, width - d, d == 0, weights,
                                                          factors, out + d, pitch_of(width), rows, prefetcher);
                d += spans * STEP;
            };
            const int64_t left = width - d;
            if (SPANS == 4 && left > 3 * STEP)
                run(std::integral_constant<int, SPANS>());
            else if (left > STEP)
                run(std::integral_constant<int, 2>());
            else
                run(std::integral_constant<int, 1>());
        }
    }

    static int64_t column(int64_t d) { return d / STEP * STEP + d % STEP / 2 + (d & 1 ? LANES : 0); }

    static vec columns(const float* out, int64_t d) {
        const float* const step = out + d / STEP * STEP;
        const vec even = load(step), odd = load(step + LANES);
        return d % STEP == 0 ? shuffle(even, odd, Merged<0>()) : shuffle(even, odd, Merged<LANES / 2>());
    }

   private:
    // Loads of keys or values.
    static int steps_of(int count, int64_t width) {
        return (count + GROUP - 1) / GROUP * (int)((width + STEP - 1) / STEP);
    }

    template <int FROM>
    struct Merged {
        static constexpr int at(int i) { return FROM + i / 2 + (i & 1 ? LANES : 0); }
    };

    // Loads `count` rows of `left` columns, up to a tile, and zeros for the rest.
    template <int TO>
    static inline void take(const char* from, int64_t stride, int count, int64_t left) {
        if (count >= GROUP && left >= STEP) return tile_load<TO>(from, stride);
        alignas(64) float rows[FLOATS];
        for (int i = 0; i < GROUP; ++i)
            store(rows + i * LANES, i < count ? (vec)Halves::take(from + i * stride, left) : vec{});
        tile_load<TO>(rows, 64);
    }

    template <int GROUPS, int ROWS>
    static inline void score_groups(const char* keys, int64_t stride, int count, int64_t width, const float* queries,
                                    float* scores, PrefetchBlock<ROWS>& prefetcher) {
        repeat<GROUPS>([](auto n) { tile_zero<n>(); });
        for (int64_t d = 0; d < width; d += STEP) {
            tile_load<7>(queries + d / 2 * LANES, 64);
            repeat<GROUPS>([&](auto n) {
                prefetcher.step();
                take<3 + n>(keys + n * GROUP * stride + 2 * d, stride, count - n * GROUP, width - d);
                tile_dot<n, 3 + n, 7>();
            });
        }
        repeat<GROUPS>([&](auto n) { tile_store<n>(scores + n * FLOATS, 64); });
    }

    // Orders the lanes of row r by key: lane i is taken from lane i / KEYS + i % KEYS * ROWS.
    template <int ROWS>
    struct Keys {
        static constexpr int KEYS = LANES / ROWS;
        static constexpr int at(int i) { return i / KEYS + i % KEYS * ROWS; }
    };

    // Weights of 16 keys as pairs with 0, (row, key).
    template <int ROWS>
    static inline void pair(const float* weights, int count, float* factors) {
        constexpr int KEYS = LANES / ROWS;
        vec x[ROWS];
        for (int i = 0; i < ROWS; ++i) x[i] = i * KEYS < count ? load(weights + i * LANES) : vec{};
        transpose<ROWS>(x);
        for (int r = 0; r < ROWS; ++r) {
            const vec row = shuffle(x[r], x[r], Keys<ROWS>());
            const __m512i even = _mm512_cvtepu16_epi32(Halves::factors(row));
            store(factors + r * LANES, (vec)even);
            store(factors + (r + (ROWS > 8 ? LANES : LANES / 2)) * LANES, (vec)_mm512_slli_epi32(even, 16));
        }
    }

    // `add` for SPANS * STEP columns. The `first` such call pairs the weights for all.
    template <int ROWS, int SPANS>
    static inline void add_columns(const char* values, int64_t stride, int count, int64_t left, bool first,
                                   const float* weights, float* factors, float* out, int64_t pitch, int rows,
                                   PrefetchBlock<ROWS>& prefetcher) {
        constexpr bool SEPARATE = ROWS > 8;  // odd columns have tiles of their own
        constexpr int TILES = SEPARATE ? 2 : 1, ODD = SEPARATE ? SPANS * FLOATS : FLOATS / 2;
        alignas(64) float sums[TILES * SPANS * FLOATS];
        repeat<TILES * SPANS>([](auto n) { tile_zero<n>(); });
        for (int j = 0; j < count; j += GROUP) {
            float* const tile = factors + j * TILES * LANES;
            if (first) pair<ROWS>(weights + j * ROWS, count - j, tile);
            tile_load<4>(tile, 64);
            if (SEPARATE) tile_load<5>(tile + FLOATS, 64);
            repeat<SPANS>([&](auto n) {
                constexpr int VALUES = 6 + n % 2;
                prefetcher.step();
                take<VALUES>(values + j * stride + n * 2 * STEP, stride, count - j, left - n * STEP);
                tile_dot<n, 4, VALUES>();
                if constexpr (SEPARATE) tile_dot<SPANS + n, 5, VALUES>();
            });
        }
        repeat<TILES * SPANS>([&](auto n) { tile_store<n>(sums + n * FLOATS, 64); });
        for (int r = 0; r < rows; ++r) {
            const float* const even = sums + r * LANES;
            float* const row = out + r * pitch;
            vec nonfinite = {};  // NaN where a sum is
            for (int n = 0; n < SPANS; ++n)
                for (const float* sum : {even + n * FLOATS, even + n * FLOATS + ODD})
                    nonfinite += load(sum) - load(sum);
            if (any(nonfinite != 0.0f)) {
                add_nonfinite(values, stride, count, std::min<int64_t>(left, SPANS * STEP), weights + r, ROWS, row);
                continue;
            }
            for (int n = 0; n < SPANS; ++n) {
                store(row + n * STEP, load(row + n * STEP) + load(even + n * FLOATS));
                store(row + n * STEP + LANES, load(row + n * STEP + LANES) + load(even + n * FLOATS + ODD));
            }
        }
    }

    // `add` for a row whose sums are not finite: inf or NaN times the 0 of a pair is NaN in the next column.
    static void add_nonfinite(const char* values, int64_t stride, int count, int64_t width, const float* weights,
                              int rows, float* out) {
        for (int j = 0; j < count; ++j)
            for (int64_t d = 0; d < width; d += STEP) {
                const uvec pairs = (uvec)Halves::take(values + j * stride + 2 * d, width - d);
                store(out + d, load(out + d) + weights[j * rows] * (vec)(pairs << 16));
                store(out + d + LANES, load(out + d + LANES) + weights[j * rows] * (vec)(pairs >> 16 << 16));
            }
    }
};
#endif

}  // namespace QKV_ISA
}  // namespace qkv
