// Attention forward for up to a vector of rows of several queries: tokens that a small model has proposed, or the end
// of a prompt.
//
// They would leave lanes of query rows empty, so the operands of both products are exchanged: lanes lie along keys in
// the first, for which keys are transposed, four numbers of each at a time, and along the width in the second. Each sum
// adds the same terms in the same order as in prefill, so it has the same bits. Keys and values are read in place, and
// widened in registers.
#pragma once

#include "attention/decode.h"

namespace qkv {
namespace QKV_ISA {

// A kind of product with its operands exchanged, for keys and values of this dtype. STEP elements of a row are what one
// multiply-add takes.
template <class Kind, Dtype DTYPE>
struct ShortQuery;

template <Dtype DTYPE>
struct ShortQuery<F32, DTYPE> : F32 {
    using Element = std::conditional_t<DTYPE == Dtype::f32, float, uint16_t>;
    using Products = Widened<DTYPE>;

    static constexpr int STEP = 1;

    // Four steps of each of LANES / 4 rows, side by side.
    static vec fours(const Element* row, int64_t stride) {
        return load_fours(DTYPE, (const char*)row, stride * (int64_t)sizeof *row);
    }

    // The first steps of a row, and zeros beyond its end.
    static vec take(const Element* row, int64_t left) { return load_part(DTYPE, row, left); }
};

#if defined(QKV_DOT_BF16)
template <>
struct ShortQuery<Bf16Dot, Dtype::bf16> : Bf16Dot {
    using Element = uint16_t;
    using Products = Dots<Halves>;

    static constexpr int STEP = 2;

    static vec fours(const Element* row, int64_t stride) {
        return load_fours(Dtype::f32, (const char*)row, stride * (int64_t)sizeof *row);
    }

    static vec take(const Element* row, int64_t left) { return (vec)Halves::take((const char*)row, left); }
};
#endif

template <class Kind, Dtype DTYPE>
struct OperandPacking<ShortQuery<Kind, DTYPE>> : OperandPacking<Kind> {
    using Element = typename ShortQuery<Kind, DTYPE>::Element;

    static constexpr int KEYS_PER_ROW = 1;

    // The width is filled up with zeros to a multiple of four steps.
    static void pack_as_lanes(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        const int64_t steps = OperandPacking<Kind>::steps(width);
        OperandPacking<Kind>::pack_as_lanes(p, t, view, width, to);
        std::fill(to + steps * LANES, to + (steps + 3) / 4 * 4 * LANES, 0.0f);
    }

    static Operand<const Element> along_width(const Problem& p, const HeadRef& head, const View& view, int64_t,
                                              int64_t first, int64_t, float*) {
        return {(const Element*)row_of(p, view, head, first), view.row};
    }

    static Operand<const Element> along_keys(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                             int64_t first, int64_t count, float* scratch) {
        return along_width(p, head, view, width, first, count, scratch);
    }

    static Operand<Element> writable(const Operand<const Element>& from, int64_t width, int64_t count, float* scratch) {
        Element* const to = (Element*)scratch;
        for (int64_t j = 0; j < count; ++j)
            std::memcpy(to + j * width, from.data + j * from.stride, width * sizeof *to);
        return {to, width};
    }

    static void clear(const Operand<Element>& along_keys, int64_t j, int64_t d) {
        along_keys.data[j * along_keys.stride + d] = 0;
    }
};

// Rows of out lie as the products sum them.
template <class Products>
struct ShortQueryState : DecodeState {
    using DecodeState::DecodeState;

    float& at(const Problem& p, const Tile& t, int r, int64_t d) const {
        return DecodeState::at(p, t, r, Products::column(d));
    }
};

template <class Products>
static void finish(const Problem& p, const Tile& t, const ShortQueryState<Products>& state) {
    finish<Products>(p, t, (const DecodeState&)state);
}

// Prefetches the cache lines of rows in the order of memory, into the nearest cache: they are read next.
struct PrefetchLines {
    const char* row;
    int64_t stride, bytes, at = 0;

    void prefetch(int count) {
        for (int i = 0; i < count; ++i) {
            __builtin_prefetch(row + at, 0, 3);
            at += 64;
            if (at >= bytes) {
                at = 0;
                row += stride;
            }
        }
    }
};

// Four steps of `count` keys and of the last of them again, where a vector of keys or a row ends. Never inlined: most
// vectors are whole.
template <class Keys>
[[gnu::noinline]] static void load_edge(const typename Keys::Element* keys, int64_t stride, int count, int64_t left,
                                        vec* square) {
    float rows[LANES][4];
    for (int i = 0; i < LANES; ++i) {
        const vec row = Keys::take(keys + std::min(i, count - 1) * stride, left);
        std::memcpy(rows[i], &row, sizeof rows[i]);
    }
    for (int i = 0; i < 4; ++i) square[i] = load_fours(Dtype::f32, (const char*)rows[i], 4 * sizeof rows[i]);
}

// Scores of `count` keys, up to a vector, whose rows are transposed in registers, four steps at a time.
template <class Kind, Dtype DTYPE, int COUNT>
static inline void multiply_vector(const typename ShortQuery<Kind, DTYPE>::Element* keys, int64_t stride, int count,
                                   int64_t width, const float* packed, vec* scores) {
    using Keys = ShortQuery<Kind, DTYPE>;
    if (width < 1) __builtin_unreachable();  // otherwise compilers keep the sums in memory as well
    constexpr int FOUR = 4 * Keys::STEP, SIZE = sizeof(typename Keys::Element);
    PrefetchLines next = {(const char*)(keys + LANES * stride), stride * SIZE, width * SIZE};
    for (int r = 0; r < COUNT; ++r) scores[r] = vec{};
    for (int64_t d = 0, end; d < width;) {
        end = std::min(d + Kind::CHAIN * Keys::STEP, width);
        vec acc[COUNT] = {};
        for (; d < end; d += FOUR, packed += 4 * LANES) {
            vec square[4];
            if (count == LANES && d + FOUR <= width) {
                next.prefetch(LANES * FOUR * SIZE / 64);
                const typename Keys::Element* row = keys + d;
                for (int i = 0; i < 4; ++i) {
                    square[i] = Keys::fours(row, 4 * stride);
                    row += stride;
                    asm("" : "+r"(row));  // without it compilers keep sixteen distances
                }
            } else {
                vec edge[4];  // of its own: `square` would be kept in memory if its address were taken
                load_edge<Keys>(keys + d, stride, count, width - d, edge);
                for (int i = 0; i < 4; ++i) square[i] = edge[i];
            }
            transpose<4>(square);
            for (int i = 0; i < 4; ++i) {
                for (int r = 0; r < COUNT; ++r) {
                    typename Kind::Element query;
                    std::memcpy(&query, packed + i * LANES + r, sizeof query);
                    acc[r] = Kind::madd(acc[r], query, square[i]);
                }
            }
        }
        for (int r = 0; r < COUNT; ++r) scores[r] = scores[r] + acc[r];
    }
    for (int r = COUNT; r < LANES; ++r) scores[r] = scores[COUNT - 1];
}

// The two products of matmul/operands.h that forward needs: overloads for ShortQuery. The number of rows becomes a
// constant, so that their sums stay in registers.

template <class Kind, Dtype DTYPE>
static inline void multiply_rows(ShortQuery<Kind, DTYPE>, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const typename ShortQuery<Kind, DTYPE>::Element>& keys,
                                 const float* packed, float* to) {
    with_count<1, LANES>(t.count, [&](auto rows) {
        constexpr int COUNT = decltype(rows)::value;
        for (int j = s.begin; j < s.end; j += LANES) {
            const int count = std::min(LANES, s.end - j);
            vec scores[LANES];
            multiply_vector<Kind, DTYPE, COUNT>(keys.data + j * keys.stride, keys.stride, count, width, packed, scores);
            transpose(scores);
            for (int i = 0; i < count; ++i) store(to + (j + i) * LANES, scores[i]);
        }
    });
}

template <class Kind, Dtype DTYPE>
static inline void sum_over_keys(ShortQuery<Kind, DTYPE>, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const typename ShortQuery<Kind, DTYPE>::Element>& values,
                                 const float* weights, float* to, bool sum_first) {
    with_count<1, LANES>(t.count, [&](auto rows) {
        using Products = typename ShortQuery<Kind, DTYPE>::Products;
        const char* const from = (const char*)(values.data + s.begin * values.stride);
        const float* const factors = weights + OperandPacking<Kind>::steps(s.begin) * LANES;
        const int64_t step = values.stride * (int64_t)sizeof *values.data;
        const auto add = [&](auto first) {
            Products::template add<decltype(rows)::value, LANES, decltype(first)::value>(
                from, step, s.end - s.begin, width, factors, vec{}, to,
                PrefetchStream{from + SHORT_PREFETCH_VALUES * step, step});
        };
        sum_first ? add(std::true_type()) : add(std::false_type());
    });
}

// Calls work with the kind of product for a short query. Returns whether there is one.
template <class Work>
static bool for_short_query(const Problem& p, [[maybe_unused]] Work work) {
    if (rows_of_head(p) > LANES) return false;
    switch (p.dtype) {
#if !defined(QKV_EXTENDS_BASE)
        case Dtype::f32: return work(ShortQuery<F32, Dtype::f32>()), true;
        case Dtype::f16: return work(ShortQuery<F32, Dtype::f16>()), true;
#endif
#if defined(__AMX_BF16__)
        default: return false;  // tiles multiply few rows as they are
#elif defined(QKV_DOT_BF16)
        default: return work(ShortQuery<Bf16Dot, Dtype::bf16>()), true;
#else
        default: return work(ShortQuery<F32, Dtype::bf16>()), true;
#endif
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
