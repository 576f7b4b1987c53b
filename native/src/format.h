// How queries, keys, values and weights lie for the micro-kernel: in fp32, or as pairs of bf16.
#pragma once

#include "product.h"
#include "tile.h"

namespace qkv {
namespace QKV_ISA {

template <class Kind>
struct Format;

// fp32: keys and values are read in place; 16-bit ones are widened a block at a time.
template <>
struct Format<Single> {
    static constexpr int BLOCK = QKV_ISA::BLOCK;

    static void queries(const Problem& p, const Tile& t, float* panel) {
        const int64_t lanes = t.lanes(), width = p.width;
        for (int r = 0; r < lanes; ++r) {
            const char* row = t.query(p, std::min(r, t.count - 1));
            if (p.dtype == Dtype::f32)
                for (int64_t d = 0; d < width; ++d) panel[d * lanes + r] = ((const float*)row)[d];
            else
                for (int64_t d = 0; d < width; ++d) panel[d * lanes + r] = read(p.dtype, row, d);
        }
    }

    static const float* keys(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch,
                             int64_t& stride) {
        return rows(p, t, p.k, first, count, p.width, scratch, stride);
    }

    static const float* values(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch,
                               int64_t& stride) {
        return rows(p, t, p.v, first, count, p.value_width, scratch, stride);
    }

    static void score(const Problem& p, const Tile& t, int64_t, const float* keys, int64_t stride, const Segment& s,
                      const float* queries, float* scores) {
        product<Single, Along::k, false>(s.end - s.begin, s.last - s.first, p.width, keys + s.begin * stride,
                                         queries + s.first * LANES, scores + s.begin * t.lanes() + s.first * LANES,
                                         {stride, t.lanes(), t.lanes()});
    }

    static void pack_weights(const Tile&, const Segment&, float*) {}

    static void accumulate(const Problem& p, const Tile& t, const float* values, int64_t stride, const Segment& s,
                           const float* weights, float* out) {
        product<Single, Along::m, true>(p.value_width, s.last - s.first, s.end - s.begin, values + s.begin * stride,
                                        weights + s.begin * t.lanes() + s.first * LANES, out + s.first * LANES,
                                        {stride, t.lanes(), t.lanes()});
    }

    // The values in memory that may be written to.
    static float* own_values(const Problem& p, const float* values, int64_t count, float* scratch, int64_t& stride) {
        if (values != scratch) {
            for (int64_t j = 0; j < count; ++j)
                std::memcpy(scratch + j * p.value_width, values + j * stride, p.value_width * sizeof(float));
            stride = p.value_width;
        }
        return scratch;
    }

    static void clear_value(const Problem&, float* values, int64_t stride, int64_t j, int64_t d) { values[j * stride + d] = 0; }

   private:
    static const float* rows(const Problem& p, const Tile& t, const View& view, int64_t first, int64_t count,
                             int64_t width, float* scratch, int64_t& stride) {
        const char* from = row_of(p, view, t.batch, t.kv_head, first);
        if (p.dtype == Dtype::f32) {
            stride = view.row;
            return (const float*)from;
        }
        for (int64_t j = 0; j < count; ++j)
            widen(p.dtype, (const uint16_t*)from + j * view.row, scratch + j * width, width);
        stride = width;
        return scratch;
    }
};

#if defined(__AVX512BF16__)
// Pairs of bf16: of neighbours along the width for queries and keys, of neighbouring keys for weights and values.
template <>
struct Format<Pair> {
    static constexpr int BLOCK = QKV_ISA::BLOCK;

    static void queries(const Problem& p, const Tile& t, float* panel) {
        const int64_t pairs = (p.width + 1) / 2;
        for (int r = 0; r < t.lanes(); ++r) {
            const uint16_t* row = (const uint16_t*)t.query(p, std::min(r, t.count - 1));
            for (int64_t d = 0; d < pairs; ++d) {
                const uint32_t pair = row[2 * d] | (2 * d + 1 < p.width ? (uint32_t)row[2 * d + 1] << 16 : 0);
                std::memcpy(panel + d * t.lanes() + r, &pair, sizeof pair);
            }
        }
    }

    // In place where every row starts on a pair and the width is even.
    static const uint32_t* keys(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch,
                                int64_t& stride) {
        const uint16_t* from = (const uint16_t*)row_of(p, p.k, t.batch, t.kv_head, first);
        if (p.width % 2 == 0 && p.k.row % 2 == 0) {
            stride = p.k.row / 2;
            return (const uint32_t*)from;
        }
        stride = (p.width + 1) / 2;
        uint16_t* to = (uint16_t*)scratch;
        for (int64_t j = 0; j < count; ++j, to += 2 * stride) {
            std::memcpy(to, from + j * p.k.row, p.width * sizeof(uint16_t));
            if (p.width % 2) to[p.width] = 0;
        }
        return (const uint32_t*)scratch;
    }

    static const uint32_t* values(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch,
                                  int64_t& stride) {
        stride = p.value_width;
        for (int64_t j = 0; j < count; j += 2) {
            const uint16_t* low = (const uint16_t*)row_of(p, p.v, t.batch, t.kv_head, first + j);
            const uint16_t* high = low + p.v.row;
            uint32_t* to = (uint32_t*)scratch + j / 2 * stride;
            if (j + 1 < count)
                for (int64_t d = 0; d < stride; ++d) to[d] = low[d] | (uint32_t)high[d] << 16;
            else
                for (int64_t d = 0; d < stride; ++d) to[d] = low[d];
        }
        return (const uint32_t*)scratch;
    }

    static void score(const Problem& p, const Tile& t, int64_t, const uint32_t* keys, int64_t stride, const Segment& s,
                      const float* queries, float* scores) {
        product<Pair, Along::k, false>(s.end - s.begin, s.last - s.first, (p.width + 1) / 2, keys + s.begin * stride,
                                       queries + s.first * LANES, scores + s.begin * t.lanes() + s.first * LANES,
                                       {stride, t.lanes(), t.lanes()});
    }

    // Weights of two keys become one row of pairs, in place: row j / 2 lies before all that is still to be read.
    static void pack_weights(const Tile& t, const Segment& s, float* weights) {
        for (int j = s.begin; j < s.end; j += 2) {
            for (int n = s.first; n < s.last; ++n) {
                const float* row = weights + j * t.lanes() + n * LANES;
                const vec low = load(row), high = j + 1 < s.end ? load(row + t.lanes()) : vec{};
                const __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
                const __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
                store(weights + j / 2 * t.lanes() + n * LANES, (vec)_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
            }
        }
    }

    static void accumulate(const Problem& p, const Tile& t, const uint32_t* values, int64_t stride, const Segment& s,
                           const float* weights, float* out) {
        product<Pair, Along::m, true>(p.value_width, s.last - s.first, (s.end - s.begin + 1) / 2,
                                      values + s.begin / 2 * stride,
                                      weights + s.begin / 2 * t.lanes() + s.first * LANES, out + s.first * LANES,
                                      {stride, t.lanes(), t.lanes()});
    }

    static uint32_t* own_values(const Problem&, const uint32_t*, int64_t, float* scratch, int64_t&) {
        return (uint32_t*)scratch;
    }

    static void clear_value(const Problem&, uint32_t* values, int64_t stride, int64_t j, int64_t d) {
        values[j / 2 * stride + d] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }
};
#endif

}  // namespace QKV_ISA
}  // namespace qkv
