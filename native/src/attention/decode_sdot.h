// The products of decoding in int8 on NEON, which multiplies fours of int8 but no pairs of 8 and 16 bits.
#pragma once

#include "attention/decode_dot.h"

namespace qkv {
namespace QKV_ISA {

#if defined(QKV_DOT_I8)
// int8 times int16 in fixed point: multiples of a scale, which is a 32639th of the largest number of a row. Each number
// of 16 bits is 256 times a byte plus another, both signed, and takes two dot products.
struct SplitCodes : KeyByKey {
    static constexpr bool SCALED = true;
    static constexpr int STEP = 4 * LANES;           // columns of a vector of int8
    static constexpr int LARGEST = 127 * 256 + 127;  // whose bytes are signed
    // Whose sums fit 32 bits: a lane sums up four columns of each STEP, also of the last, which may lack some.
    static constexpr int64_t MOST_PRODUCTS = (1ll << 31) / (LARGEST + 1) / 128 / 4 * STEP;

    // The bytes of LANES numbers: the first ones, and what is left.
    struct Bytes {
        int8_t high[LANES], low[LANES];

        explicit Bytes(vec x) {
            const int16x4_t whole = vmovn_s32(vcvtnq_s32_f32((float32x4_t)x));
            const int16x4_t first = vshr_n_s16(vadd_s16(whole, vdup_n_s16(128)), 8);
            const int16x4_t left = vsub_s16(whole, vshl_n_s16(first, 8));
            const int8x8_t both = vmovn_s16(vcombine_s16(first, left));
            static_assert(sizeof *this == sizeof both);
            std::memcpy(this, &both, sizeof both);
        }
    };

    // Sums of products with numbers of 16 bits.
    struct Sum {
        int32x4_t high, low;

        void add(int8x16_t x, int8x16_t by_high, int8x16_t by_low) {
            high = dot_i8(high, x, by_high);
            low = dot_i8(low, x, by_low);
        }

        vec total() const { return (vec)vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low)); }
    };

    // (column / 16): the high bytes of 16 columns, then the low ones.
    static void pack_queries(const Problem& p, const Tile& t, float* to, float* q_scale) {
        for (int r = 0; r < t.count; ++r, to += pitch_of(p.width)) {
            std::fill(to, to + pitch_of(p.width), 0.0f);
            const char* const row = t.row(p, p.q, r);
            const auto numbers = [&](int64_t d) { return load_part(p.dtype, row + 2 * d, p.width - d); };
            const vec scale = fixed_point_scale<1>(p.width, LARGEST, numbers);
            q_scale[r] = scale[0];
            for (int64_t d = 0; d < p.width; d += LANES) {
                const Bytes bytes(numbers(d) / scale);
                char* const at = (char*)to + d / STEP * 2 * STEP + d % STEP;
                std::memcpy(at, bytes.high, LANES);
                std::memcpy(at + STEP, bytes.low, LANES);
            }
        }
    }

    template <int COUNT, int ROWS, int KEYS>
    static inline void score(const char* keys, int64_t stride, int64_t width, const float* queries, vec* sums,
                             PrefetchStream values) {
        if (width < 1) __builtin_unreachable();
        const int64_t pitch = pitch_of(width);
        Sum acc[KEYS][COUNT] = {};
        for (int64_t d = 0; d < width; d += STEP) {
            int8x16_t key[KEYS];
            for (int j = 0; j < KEYS; ++j) {
                const char* const at = keys + j * stride + d;
                prefetch_ahead<COUNT>(at, stride);
                values.prefetch(j, d);
                key[j] = take(at, width - d);
            }
            for (int r = 0; r < COUNT; ++r) {
                const int8_t* const query = (const int8_t*)(queries + r * pitch) + 2 * d;
                const int8x16_t high = vld1q_s8(query), low = vld1q_s8(query + STEP);
                for (int j = 0; j < KEYS; ++j) acc[j][r].add(key[j], high, low);
            }
        }
        for (int j = 0; j < KEYS; ++j)
            for (int r = 0; r < COUNT; ++r) sums[j * ROWS + r] = acc[j][r].total();
    }

    // (key / 4, row): the high bytes of the weights of four keys, then the low ones.
    template <int ROWS>
    static vec pack(float* weights, int count) {
        const vec scale = fixed_point_scale<ROWS>(count * ROWS, LARGEST, [&](int64_t i) { return load(weights + i); });
        const vec inverse = 1.0f / scale;
        for (int j = 0; j < count; j += 4) {
            vec four[ROWS];  // ROWS vectors of (key, row), then of (row, key)
            for (int i = 0; i < ROWS; ++i) {
                const bool exists = (j * ROWS + i * LANES) < count * ROWS;
                four[i] = exists ? load(weights + j * ROWS + i * LANES) * inverse : vec{};
            }
            keys_first<ROWS>(four);
            for (int r = 0; r < ROWS; ++r) {
                const Bytes bytes(four[r]);
                std::memcpy(weights + (j / 4 * ROWS + r) * 2, &bytes, sizeof bytes);
            }
        }
        return scale;
    }

    template <int COUNT, int ROWS, bool>
    static void add(const char* values, int64_t stride, int count, int64_t width, const float* weights,
                    vec weight_scale, float* out, PrefetchStream keys) {
        constexpr int VECS = COUNT <= 2 ? 4 : 2;
        for (int64_t d = 0; d < width; d += VECS * LANES)
            add_columns<COUNT, ROWS, VECS>(values, stride, count, d, width, weights, weight_scale, out, keys);
    }

    static int64_t column(int64_t d) { return d; }
    static vec columns(const float* out, int64_t d) { return load(out + d); }

   private:
    // A vector of numbers from `row`, of which `left` are left, and zeros.
    static int8x16_t take(const char* row, int64_t left) {
        return vld1q_s8((left >= STEP ? (const int8_t*)row
                                      : Padded<int8_t, STEP>(row, left).data));  // a macro, with Clang
    }

    // The first COUNT = 8 or 16 of them, at least.
    template <int64_t COUNT>
    static int8x16_t take_columns(const char* row, int64_t left) {
        if (COUNT < STEP && left >= COUNT) return vcombine_s8(vld1_s8((const int8_t*)row), int8x8_t{});
        return take(row, std::min(left, COUNT));
    }

    static int8x16_t repeat(int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }

    // Lanes of (key, row) as lanes of (row, key).
    template <int ROWS>
    static void keys_first(vec* four) {
        if constexpr (ROWS == 4) transpose(four);
        if constexpr (ROWS == 2) {
            const float32x4_t a = (float32x4_t)four[0], b = (float32x4_t)four[1];
            four[0] = (vec)vuzp1q_f32(a, b);
            four[1] = (vec)vuzp2q_f32(a, b);
        }
    }

    // Fours of the numbers of four rows of values, for VECS * LANES columns.
    template <int VECS>
    static void interleave(const int8x16_t (&row)[4], int8x16_t* fours) {
        const int8x16_t even = vzip1q_s8(row[0], row[2]), odd = vzip1q_s8(row[1], row[3]);
        fours[0] = vzip1q_s8(even, odd);
        fours[1] = vzip2q_s8(even, odd);
        if constexpr (VECS == 4) {
            const int8x16_t even = vzip2q_s8(row[0], row[2]), odd = vzip2q_s8(row[1], row[3]);
            fours[2] = vzip1q_s8(even, odd);
            fours[3] = vzip2q_s8(even, odd);
        }
    }

    // `add` for VECS * LANES columns from column d on.
    template <int COUNT, int ROWS, int VECS>
    static inline void add_columns(const char* values, int64_t stride, int count, int64_t d, int64_t width,
                                   const float* weights, vec weight_scale, float* out, PrefetchStream keys) {
        if (count < 1) __builtin_unreachable();
        constexpr int64_t COLUMNS = VECS * LANES;
        const int64_t pitch = pitch_of(width), left = width - d;
        values += d, out += d;
        Sum acc[COUNT][VECS] = {};
        for (int j = 0; j < count; j += 4, values += 4 * stride) {
            int8x16_t row[4], x[VECS];
            for (int i = 0; i < 4; ++i) {
                keys.prefetch(j + i, d);
                row[i] = j + i < count ? take_columns<COLUMNS>(values + i * stride, left) : int8x16_t{};
            }
            interleave<VECS>(row, x);
            for (int r = 0; r < COUNT; ++r) {
                const int32_t* const weight = (const int32_t*)weights + (j / 4 * ROWS + r) * 2;
                const int8x16_t high = repeat(weight[0]), low = repeat(weight[1]);
                for (int n = 0; n < VECS; ++n) acc[r][n].add(x[n], high, low);
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int n = 0; n < VECS && d + n * LANES < pitch; ++n) {
                float* const to = out + r * pitch + n * LANES;
                store(to, load(to) + weight_scale[r] * acc[r][n].total());
            }
    }
};

static_assert(BLOCK_N <= SplitCodes::MOST_PRODUCTS / LANES);
#endif

}  // namespace QKV_ISA
}  // namespace qkv
