// How rows, keys, values and weights lie for the micro-kernel: in fp32, or as pairs of bf16.
#pragma once

#include <memory>

#include "matmul/microkernel.h"
#include "runtime/huge_pages.h"
#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

// Keys or values in the order in which a product reads them. The stride is in elements, from row to row of
// `along_width` and from KEYS_PER_ROW keys to the next of `along_keys`.
template <class Element>
struct Operand {
    Element* data;
    int64_t stride;
};

// How the operands of a kind of product lie. `width` counts numbers; `scratch` is taken where they cannot be read in
// place, and is `floats` numbers long.
//
//     Element, PACKS                   of the kind; whether weights are packed, two keys side by side
//     KEYS_PER_ROW                     keys of a row of `along_keys`
//     steps(count)                     steps of a product that sums over so many numbers
//     floats(count, width)             scratch for so many keys or values
//
// A, which is read element by element:
//     along_width(...)                 keys or values whose width is summed over, as an `Operand`
//     along_keys(...)                  those that are summed over
//     writable(along_keys, ...)        the same in memory that may be written, `scratch`
//     clear(writable, j, d)            makes column d of key j 0
//     pack_weights_as_a(t, s, weights) weights, in place, as A of a sum over rows
//
// B, a row of vectors for each step:
//     pack_as_lanes(...)               rows of a tile as lanes, (steps of the width, lanes)
//     pack_as_rows(...), clear_row(...) rows of a tile as they are, (steps of the rows, whole vectors of the width);
//                                      makes one of them 0
//     pack_weights(t, s, weights, to)  weights as B of a sum over keys; `to` may be `weights`
//     pad_weights(t, s, to)            what is left of `pack_weights` if weights are pairs already
template <class Kind>
struct OperandPacking;

// fp32: keys and values are read in place, unless their rows lie far apart; 16-bit ones are widened.
template <>
struct OperandPacking<F32> {
    using Element = float;

    static constexpr bool PACKS = false;
    static constexpr int KEYS_PER_ROW = 1;

    static int64_t steps(int64_t count) { return count; }
    static int64_t floats(int64_t count, int64_t width) { return count * (width + 1); }

    static void pack_as_lanes(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        const char* rows[BLOCK_M];
        for (int r = 0; r < t.lanes(); ++r) rows[r] = t.row(p, view, r);
        for_dtype(p.dtype, [&](auto dtype) {
            rows_to_lanes(t.lanes(), width, to, t.lanes(), [&](int64_t r, int64_t c, int64_t count) {
                return load_part(dtype, rows[r] + c * size_of(dtype), count);
            });
        });
    }

    static void pack_as_rows(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        for_dtype(p.dtype, [&](auto dtype) {
            for (int r = 0; r < t.count; ++r, to += whole_vectors(width)) {
                const char* row = t.row(p, view, r);
                for_columns(width, [&](int64_t d, int64_t count) {
                    store(to + d, load_part(dtype, row + d * size_of(dtype), count));
                });
            }
        });
    }

    static void clear_row(float* rows, int64_t width, int r) {
        std::fill(rows + r * whole_vectors(width), rows + (r + 1) * whole_vectors(width), 0.0f);
    }

    // Whether rows are copied side by side. Each lies in a page of its own otherwise, and a block of keys and values in
    // more pages than a core's TLB holds. For a vector of query rows or fewer, or for few keys, the copy costs more
    // than that.
    static bool are_far(const Problem& p, const View& view, int64_t width) {
        return view.row > FAR_STRIDE && view.row != width && rows_of_head(p) > LANES && p.lk > FEW_KEYS;
    }

    static Operand<const float> along_width(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                            int64_t first, int64_t count, float* scratch) {
        const char* from = row_of(p, view, head, first);
        if (p.dtype == Dtype::f32 && !are_far(p, view, width)) return {(const float*)from, view.row};
        const int64_t stride = width;
        for_dtype(p.dtype, [&](auto dtype) {
            for (int64_t j = 0; j < count; ++j, from += view.row * size_of(dtype)) {
                prefetch(from + PREFETCH_ROWS * view.row * size_of(dtype), width * size_of(dtype));
                for_columns(width, [&](int64_t d, int64_t part) {
                    store_part(Dtype::f32, scratch + j * stride + d, load_part(dtype, from + d * size_of(dtype), part),
                               part);
                });
            }
        });
        return {scratch, stride};
    }

    static Operand<const float> along_keys(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                           int64_t first, int64_t count, float* scratch) {
        return along_width(p, head, view, width, first, count, scratch);
    }

    static void pack_weights(const Tile&, const Segment&, const float*, float*) {}
    static void pad_weights(const Tile&, const Segment&, float*) {}
    static void pack_weights_as_a(const Tile&, const Segment&, float*) {}

    static Operand<float> writable(const Operand<const float>& from, int64_t width, int64_t count, float* scratch) {
        if (from.data == scratch) return {scratch, from.stride};
        for (int64_t j = 0; j < count; ++j)
            std::memcpy(scratch + j * width, from.data + j * from.stride, width * sizeof(float));
        return {scratch, width};
    }

    static void clear(const Operand<float>& along_keys, int64_t j, int64_t d) {
        along_keys.data[j * along_keys.stride + d] = 0;
    }
};

#if defined(QKV_DOT_BF16)
// Pairs of bf16, of neighbours along the dimension that a product sums over.
template <>
struct OperandPacking<Bf16Dot> {
    using Element = uint32_t;

    static constexpr bool PACKS = true;
    static constexpr int KEYS_PER_ROW = 2;

    static int64_t steps(int64_t count) { return (count + 1) / 2; }

    static int64_t floats(int64_t count, int64_t width) { return count * (width + 1); }

    static void pack_as_lanes(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        const char* rows[BLOCK_M];
        for (int r = 0; r < t.lanes(); ++r) rows[r] = t.row(p, view, r);
        rows_to_lanes(t.lanes(), steps(width), to, t.lanes(), [&](int64_t r, int64_t c, int64_t count) {
            vec x = {};
            std::memcpy(&x, rows[r] + c * 4, std::min(count * 4, (width - 2 * c) * 2));
            return x;
        });
    }

    // Pairs of neighbouring rows: (count / 2, whole vectors of the width).
    static void pack_as_rows(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        for (int r = 0; r < t.count; r += 2, to += whole_vectors(width)) {
            const uint16_t* low = (const uint16_t*)t.row(p, view, r);
            interleave(low, r + 1 < t.count ? (const uint16_t*)t.row(p, view, r + 1) : nullptr, width, (uint32_t*)to);
            std::fill(to + width, to + whole_vectors(width), 0.0f);
        }
    }

    static void clear_row(float* rows, int64_t width, int r) {
        for (int64_t d = 0; d < width; ++d) clear({(uint32_t*)rows, whole_vectors(width)}, r, d);
    }

    // In place if every row starts on a pair and the width is even.
    static Operand<const uint32_t> along_width(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                               int64_t first, int64_t count, float* scratch) {
        const uint16_t* from = (const uint16_t*)row_of(p, view, head, first);
        if (width % 2 == 0 && view.row % 2 == 0) return {(const uint32_t*)from, view.row / 2};
        const int64_t stride = steps(width);
        uint16_t* to = (uint16_t*)scratch;
        for (int64_t j = 0; j < count; ++j, to += 2 * stride) {
            std::memcpy(to, from + j * view.row, width * sizeof(uint16_t));
            if (width % 2) to[width] = 0;
        }
        return {(const uint32_t*)scratch, stride};
    }

    static Operand<const uint32_t> along_keys(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                              int64_t first, int64_t count, float* scratch) {
        for (int64_t j = 0; j < count; j += 2) {
            const uint16_t* low = (const uint16_t*)row_of(p, view, head, first + j);
            for (int i = 0; i < 2; ++i)
                prefetch((const char*)(low + (PREFETCH_ROWS + i) * view.row), width * sizeof(uint16_t));
            interleave(low, j + 1 < count ? low + view.row : nullptr, width, (uint32_t*)scratch + j / 2 * width);
        }
        return {(const uint32_t*)scratch, width};
    }

    // Rounds weights to bf16 and interleaves those of two neighbouring keys. In place if `to` is `weights`: row j / 2
    // is written after rows j and j + 1 were read.
    static void pack_weights(const Tile& t, const Segment& s, const float* weights, float* to) {
        for (int j = s.begin; j < s.end; j += 2) {
            for (int n = s.first; n < s.last; ++n) {
                const float* row = weights + j * t.lanes() + n * LANES;
                const vec high = j + 1 < s.end ? load(row + t.lanes()) : vec{};
                store(to + j / 2 * t.lanes() + n * LANES, pair_bf16(load(row), high));
            }
        }
    }

    static void pad_weights(const Tile&, const Segment&, float*) {}

    // A row of weights becomes half a row of pairs.
    static void pack_weights_as_a(const Tile& t, const Segment& s, float* weights) {
        for (int j = s.begin; j < s.end; ++j) {
            float* const row = weights + j * t.lanes();
            for (int n = s.first; n < s.last; ++n) {
                store_halves(row + n * LANES / 2, round_to_bf16(load(row + n * LANES)));
            }
        }
    }

    static Operand<uint32_t> writable(const Operand<const uint32_t>& from, int64_t, int64_t, float* scratch) {
        return {(uint32_t*)scratch, from.stride};
    }

    static void clear(const Operand<uint32_t>& along_keys, int64_t j, int64_t d) {
        along_keys.data[j / 2 * along_keys.stride + d] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
    }

   private:
    static void interleave(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* to) {
        if (high)
            for (int64_t d = 0; d < count; ++d) to[d] = low[d] | (uint32_t)high[d] << 16;
        else
            for (int64_t d = 0; d < count; ++d) to[d] = low[d];
    }
};
#endif

// The three products, for kinds that run on the micro-kernel. matmul/amx.h and attention/short_query.h overload them
// for theirs; the first argument chooses.

// Q K^T of a segment, or dO V^T: (key, row), from keys along the width and the packed rows.
template <class Kind>
static inline void multiply_rows(Kind, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const typename Kind::Element>& keys, const float* packed, float* to) {
    product<Kind, Along::k, false>(s.end - s.begin, s.last - s.first, OperandPacking<Kind>::steps(width),
                                   keys.data + s.begin * keys.stride, packed + s.first * LANES,
                                   to + s.begin * t.lanes() + s.first * LANES, {keys.stride, t.lanes(), t.lanes()});
}

// Adds weights times values, or gradients of scores times keys, to (width, row), from values along the keys.
// `sum_first` sums the segment on its own and then adds that; it is never set for kinds that pack.
template <class Kind>
static inline void sum_over_keys(Kind, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const typename Kind::Element>& values, const float* weights, float* to,
                                 bool sum_first = false) {
    constexpr int STEP = OperandPacking<Kind>::PACKS ? 2 : 1;
    product<Kind, Along::m, true>(width, s.last - s.first, OperandPacking<Kind>::steps(s.end - s.begin),
                                  values.data + s.begin / STEP * values.stride,
                                  weights + s.begin / STEP * t.lanes() + s.first * LANES, to + s.first * LANES,
                                  {values.stride, t.lanes(), t.lanes()}, sum_first);
}

// Adds transposed weights times rows to (key, whole vectors of the width).
template <class Kind>
static inline void sum_over_rows(Kind, const Tile& t, const Segment& s, int64_t width, const float* weights,
                                 const float* rows, float* to) {
    constexpr int STEP = OperandPacking<Kind>::PACKS ? 2 : 1;
    const int64_t pitch = whole_vectors(width), first = s.first * LANES / STEP;
    const int64_t count = std::min<int64_t>(t.count, s.last * LANES) - s.first * LANES;
    product<Kind, Along::k, true>(s.end - s.begin, (int)(pitch / LANES), OperandPacking<Kind>::steps(count),
                                  (const typename Kind::Element*)weights + s.begin * t.lanes() + first,
                                  rows + first * pitch, to + s.begin * pitch, {t.lanes(), pitch, pitch});
}

// Whether the rows of keys or values are all finite.
static bool all_finite(const Problem& p, const HeadRef& head, const View& view, int64_t width, int64_t first,
                       int64_t count) {
    vec zero = {};  // stays so, unless a number is not finite
    for_dtype(p.dtype, [&](auto dtype) {
        const char* row = row_of(p, view, head, first);
        for (int64_t j = 0; j < count; ++j, row += view.row * size_of(dtype)) {
            for_columns(width, [&](int64_t d, int64_t part) {
                zero = zero + 0.0f * load_part(dtype, row + d * size_of(dtype), part);
            });
        }
    });
    return !any(zero != 0.0f);
}

// Heads of keys and values, and how many threads may pack them.
struct HeadRange {
    int64_t first, count;
    int threads;
};

// K and V of a head as operands, packed per block.
template <class Kind>
struct PackedPerBlock {
    using ConstOperand = Operand<const typename Kind::Element>;

    ConstOperand keys(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        return OperandPacking<Kind>::along_width(p, t, p.k, p.width, first, count, scratch);
    }

    ConstOperand values(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        return OperandPacking<Kind>::along_keys(p, t, p.v, p.value_width, first, count, scratch);
    }

    // Whether the values of a block are finite.
    bool are_finite(const Problem& p, const Tile& t, int64_t first, int64_t count) const {
        return all_finite(p, t, p.v, p.value_width, first, count);
    }
};

// K and V of some heads as operands, packed once for all tiles where that pays (see PREPARE_TILES); by default, as
// `PackedPerBlock`.
template <class Kind>
struct PackedPerHead : PackedPerBlock<Kind> {
    PackedPerHead(const Problem&, const KeyVisibility&, const HeadRange&) {}
};

// fp32 rows that lie far apart are copied side by side once, if a head has many tiles: for few, fresh memory costs more
// than a copy for each of them. The memory of one head after another is not fresh, so there fewer tiles suffice.
template <>
class PackedPerHead<F32> : public PackedPerBlock<F32> {
   public:
    PackedPerHead(const Problem& p, const KeyVisibility&, const HeadRange& heads) : heads(heads) {
        const int64_t many = heads.count == 1 ? PREPARE_TILES_OWN : PREPARE_TILES;
        if (p.dtype != Dtype::f32 || tiles_of_head(p) < many || p.lk > PREPARE_KEYS * rows_of_head(p)) return;
        copy_contiguous(p, p.k, p.width, contiguous_keys);
        copy_contiguous(p, p.v, p.value_width, contiguous_values);
    }

    ConstOperand keys(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        if (!contiguous_keys) return PackedPerBlock::keys(p, t, first, count, scratch);
        return {contiguous_keys.get() + row_of_key(p, t, first) * p.width, p.width};
    }

    ConstOperand values(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        if (!contiguous_values) return PackedPerBlock::values(p, t, first, count, scratch);
        return {contiguous_values.get() + row_of_key(p, t, first) * p.value_width, p.value_width};
    }

   private:
    void copy_contiguous(const Problem& p, const View& view, int64_t width, std::unique_ptr<float[]>& to) const {
        if (!OperandPacking<F32>::are_far(p, view, width)) return;
        const int64_t parts = (p.lk + COPY_ROWS - 1) / COPY_ROWS;
        to.reset(new float[heads.count * p.lk * width]);
        prefer_huge_pages(to.get(), heads.count * p.lk * width * (int64_t)sizeof(float));
        parallel_for(heads.count * parts, heads.threads, [&](int64_t item) {
            const int64_t n = item / parts, head = heads.first + n;
            const int64_t end = std::min(p.lk, (item % parts + 1) * COPY_ROWS);
            for (int64_t row = item % parts * COPY_ROWS; row < end; ++row)
                std::memcpy(to.get() + (n * p.lk + row) * width, row_of(p, view, head_at(p, head), row),
                            width * sizeof(float));
        });
    }

    // The row of a key among those of the heads.
    int64_t row_of_key(const Problem& p, const Tile& t, int64_t key) const {
        return (t.batch * p.kv_heads + t.kv_head - heads.first) * p.lk + key;
    }

    const HeadRange heads;

    std::unique_ptr<float[]> contiguous_keys, contiguous_values;
};

}  // namespace QKV_ISA
}  // namespace qkv
