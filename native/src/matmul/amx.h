// The products of bf16 on tile registers, which multiply 16 x 32 numbers by 32 x 16 in one instruction.
//
// C[m][lane] (+)= sum_k A[m][k] B[k][lane], as in matmul/microkernel.h. A tile of A is 16 rows of 32 neighbours along
// k: rows of keys and values in place, and for sums over keys blocks of AMX_K keys, transposed. A tile of
// B is 16 rows of pairs of neighbours along k. What is left of 16 rows, or of 32 along k, is filled up with zeros.
#pragma once

#include "matmul/operands.h"

namespace qkv {
namespace QKV_ISA {

#if defined(__AMX_BF16__)
constexpr int TILE = 16;   // rows of a tile; numbers of fp32, or pairs of bf16, of a row
constexpr int AMX_K = 32;  // numbers of bf16 of a row: the K of a block (k_block) of operands

static inline int64_t tiles_of(int64_t count) { return (count + TILE - 1) / TILE; }
static inline int64_t k_blocks_of(int64_t count) { return (count + AMX_K - 1) / AMX_K; }

// A kind of product: see matmul/microkernel.h.
struct Amx {
    using Element = uint16_t;
    using Registers = TileRegisters;
    static inline vec of(vec low, vec high) { return pair_bf16(low, high); }

    // A product that nothing reads: half a microsecond after the last, the next waits for a third of one (docs/log.md,
    // step 83).
    static inline void keep_amx_warm() { tile_dot<0, 4, 6>(); }

    // Sums over keys take AMX_K of them at a time, and sums over rows two vectors.
    static constexpr Grain GRAIN = {AMX_K, 2};
};

// Where the tiles of an operand lie. All in bytes.
struct Tiles {
    char* data;
    int64_t row;   // from a row to the next
    int64_t tile;  // from a tile to the next along m or the lanes
    int64_t step;  // from a tile to the next along k
};

// C of M x N tiles, where the first of each operand lies at `left`, `right` and `out`.
template <bool ADD, int M, int N>
static inline void tile_product(int64_t steps, const char* left, const Tiles& a, const char* right, const Tiles& b,
                                char* out, const Tiles& c) {
    char* const below = out + c.tile;
    if constexpr (ADD) {
        tile_load<0>(out, c.row);
        if constexpr (N > 1) tile_load<1>(out + 64, c.row);
        if constexpr (M > 1) tile_load<2>(below, c.row);
        if constexpr (M > 1 && N > 1) tile_load<3>(below + 64, c.row);
    } else {
        tile_zero<0>();
        if constexpr (N > 1) tile_zero<1>();
        if constexpr (M > 1) tile_zero<2>();
        if constexpr (M > 1 && N > 1) tile_zero<3>();
    }
    for (int64_t k = 0; k < steps; ++k, left += a.step, right += b.step) {
        tile_load<4>(left, a.row);
        tile_load<6>(right, b.row);
        tile_dot<0, 4, 6>();
        if constexpr (N > 1) {
            tile_load<7>(right + b.tile, b.row);
            tile_dot<1, 4, 7>();
        }
        if constexpr (M > 1) {
            tile_load<5>(left + a.tile, a.row);
            tile_dot<2, 5, 6>();
        }
        if constexpr (M > 1 && N > 1) tile_dot<3, 5, 7>();
    }
    tile_store<0>(out, c.row);
    if constexpr (N > 1) tile_store<1>(out + 64, c.row);
    if constexpr (M > 1) tile_store<2>(below, c.row);
    if constexpr (M > 1 && N > 1) tile_store<3>(below + 64, c.row);
}

// C of m x n tiles.
template <bool ADD>
static void product_of_tiles(int64_t m, int64_t n, int64_t steps, const Tiles& a, const Tiles& b, const Tiles& c) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    for (int64_t j = 0; j < n; j += 2) {
        const char *left = a.data, *const right = b.data + j * b.tile;
        char* out = c.data + j * 64;
        const auto run = [&](auto height) {
            constexpr int M = decltype(height)::value;
            if (j + 2 <= n)
                tile_product<ADD, M, 2>(steps, left, a, right, b, out, c);
            else
                tile_product<ADD, M, 1>(steps, left, a, right, b, out, c);
            left += M * a.tile;
            out += M * c.tile;
        };
        for (int64_t i = 0; i + 2 <= m; i += 2) run(Two());
        if (m % 2) run(One());
    }
}

template <>
struct OperandPacking<Amx> {
    using Element = uint16_t;

    static constexpr bool PACKS = true;
    static constexpr int KEYS_PER_ROW = AMX_K;

    static int64_t padded(int64_t width) { return tiles_of(width) * TILE; }

    // For a multiple of BLOCK_N keys or values.
    static int64_t floats(int64_t count, int64_t width) { return count * (width + TILE); }

    static void pack_as_lanes(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        OperandPacking<Bf16Dot>::pack_as_lanes(p, t, view, width, to);
        const int64_t used = OperandPacking<Bf16Dot>::steps(width);
        std::fill(to + used * t.lanes(), to + k_blocks_of(width) * TILE * t.lanes(), 0.0f);
    }

    static void pack_as_rows(const Problem& p, const Tile& t, const View& view, int64_t width, float* to) {
        OperandPacking<Bf16Dot>::pack_as_rows(p, t, view, width, to);
        const int64_t pitch = whole_vectors(width), used = OperandPacking<Bf16Dot>::steps(t.count);
        std::fill(to + used * pitch, to + k_blocks_of(t.count) * TILE * pitch, 0.0f);
    }

    static void clear_row(float* rows, int64_t width, int r) { OperandPacking<Bf16Dot>::clear_row(rows, width, r); }

    // In place if tiles end with the width, and no further than the keys.
    static Operand<const Element> along_width(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                              int64_t first, int64_t count, float* scratch) {
        const Element* from = (const Element*)row_of(p, view, head, first);
        if (width % AMX_K == 0 && first + tiles_of(count) * TILE <= p.lk) return {from, view.row};
        const int64_t stride = k_blocks_of(width) * AMX_K;
        Element* to = (Element*)scratch;
        for (int64_t j = 0; j < count; ++j, to += stride, from += view.row) {
            std::memcpy(to, from, width * sizeof *to);
            std::fill(to + width, to + stride, 0);
        }
        std::fill(to, to + (tiles_of(count) * TILE - count) * stride, 0);
        return {(const Element*)scratch, stride};
    }

    // Blocks of AMX_K keys, transposed: (width, key).
    static Operand<const Element> along_keys(const Problem& p, const HeadRef& head, const View& view, int64_t width,
                                             int64_t first, int64_t count, float* scratch) {
        const int64_t stride = padded(width) * AMX_K;
        count = std::min(k_blocks_of(count) * AMX_K, p.lk - first);
        Element* to = (Element*)scratch;
        for (int64_t j = 0; j < count; j += AMX_K, to += stride) {
            const char* const rows = row_of(p, view, head, first + j);
            pack_k_block((const Element*)rows, view.row, std::min<int64_t>(AMX_K, count - j), width, to);
        }
        return {(const Element*)scratch, stride};
    }

    // Pairs of the weights of two keys, and zeros for the rest of the last AMX_K keys.
    static void pack_weights(const Tile& t, const Segment& s, const float* weights, float* to) {
        OperandPacking<Bf16Dot>::pack_weights(t, s, weights, to);
        pad_weights(t, s, to);
    }

    static void pad_weights(const Tile& t, const Segment& s, float* pairs) {
        for (int64_t j = (s.end + 1) / 2; j < k_blocks_of(s.end) * TILE; ++j)
            for (int n = s.first; n < s.last; ++n) store(pairs + j * t.lanes() + n * LANES, vec{});
    }

    static void pack_weights_as_a(const Tile& t, const Segment& s, float* weights) {
        OperandPacking<Bf16Dot>::pack_weights_as_a(t, s, weights);
        const int odd = s.last % 2;
        float* row = weights + s.begin * t.lanes() + s.first * LANES / 2;
        for (int j = s.begin; odd && j < s.end; ++j) {
            float* const end = row + (j - s.begin) * t.lanes() + (s.last - s.first) * LANES / 2;
            std::fill(end, end + LANES / 2, 0.0f);
        }
        for (int j = s.end; j < s.begin + tiles_of(s.end - s.begin) * TILE; ++j) {
            float* const rest = row + (j - s.begin) * t.lanes();
            std::fill(rest, rest + (s.last - s.first + odd) * LANES / 2, 0.0f);
        }
    }

    static Operand<Element> writable(const Operand<const Element>& from, int64_t, int64_t count, float* scratch) {
        Element* const to = (Element*)scratch;
        if (from.data != to) std::copy(from.data, from.data + k_blocks_of(count) * from.stride, to);
        return {to, from.stride};
    }

    static void clear(const Operand<Element>& along_keys, int64_t j, int64_t d) {
        along_keys.data[j / AMX_K * along_keys.stride + d * AMX_K + j % AMX_K] = 0;
    }

    // Up to 32 rows of a width become (width, row), filled up with zeros. Returns whether they are finite.
    static bool pack_k_block(const Element* rows, int64_t row, int64_t count, int64_t width, Element* to) {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __mmask32 nonfinite = 0;
        for (int64_t d = 0; d < width; d += AMX_K) {
            const __mmask32 columns = width - d >= AMX_K ? ~0u : (1u << (width - d)) - 1;
            const auto take = [&](int64_t j) {
                const __m512i x = j < count ? _mm512_maskz_loadu_epi16(columns, rows + j * row + d) : __m512i{};
                nonfinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                return x;
            };
            // Pairs of rows: of the columns 8 i to 8 i + 3, and of those after them.
            vec low[TILE], high[TILE];
            for (int i = 0; i < TILE; ++i) {
                const __m512i even = take(2 * i), odd = take(2 * i + 1);
                low[i] = (vec)_mm512_unpacklo_epi16(even, odd);
                high[i] = (vec)_mm512_unpackhi_epi16(even, odd);
            }
            transpose(low);
            transpose(high);
            for (int i = 0; i < TILE; ++i) {
                const int64_t column = d + i / 4 * 8 + i % 4, end = padded(width);
                if (column < end) store((float*)(to + column * AMX_K), low[i]);
                if (column + 4 < end) store((float*)(to + (column + 4) * AMX_K), high[i]);
            }
        }
        return !nonfinite;
    }
};

// All values in blocks of AMX_K keys, and keys if they cannot be read in place.
template <>
class PackedPerHead<Amx> : public PackedPerBlock<Amx> {
   public:
    using F = OperandPacking<Amx>;

    PackedPerHead(const Problem& p, const KeyVisibility& visibility, const HeadRange& heads)
        : heads(heads), k_blocks(tiles_of_head(p) > 1 ? k_blocks_of(p.lk) : 0), in_place(p.width % AMX_K == 0),
          value_block(F::padded(p.value_width) * AMX_K), key_block(k_blocks_of(p.width) * AMX_K * AMX_K) {
        const int64_t count = heads.count * k_blocks;
        if (count == 0) return;
        packed_values.reset(new uint16_t[count * value_block]);
        prefer_huge_pages(packed_values.get(), count * value_block * (int64_t)sizeof(uint16_t));
        if (!in_place) packed_keys.reset(new uint16_t[count * key_block]);
        finite.assign(count, true);
        const int64_t parts = (k_blocks + COPY_K_BLOCKS - 1) / COPY_K_BLOCKS;
        parallel_for(heads.count * parts, heads.threads, [&](int64_t item) {
            const HeadRef head = head_at(p, heads.first + item / parts);
            const int64_t begin = Tile(p, visibility, head, 0).begin;
            const int64_t end = Tile(p, visibility, head, tiles_of_head(p) - 1).end;
            for (int64_t i = item % parts * COPY_K_BLOCKS; i < std::min(k_blocks, (item % parts + 1) * COPY_K_BLOCKS);
                 ++i)
                if (i * AMX_K < end && ((i + 1) * AMX_K > begin || i * AMX_K < p.sink_tokens)) pack(p, head, i);
        });
    }

    ConstOperand keys(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        if (in_place || !k_blocks) return PackedPerBlock::keys(p, t, first, count, scratch);
        return {packed_keys.get() + index_of(p, t, first / AMX_K) * key_block, key_block / AMX_K};
    }

    ConstOperand values(const Problem& p, const Tile& t, int64_t first, int64_t count, float* scratch) const {
        if (!k_blocks) return PackedPerBlock::values(p, t, first, count, scratch);
        return {packed_values.get() + index_of(p, t, first / AMX_K) * value_block, value_block};
    }

    bool are_finite(const Problem& p, const Tile& t, int64_t first, int64_t count) const {
        if (!k_blocks)
            return PackedPerBlock::are_finite(p, t, first, std::min(k_blocks_of(count) * AMX_K, p.lk - first));
        const char* const flags = &finite[index_of(p, t, first / AMX_K)];
        return std::all_of(flags, flags + k_blocks_of(count), [](bool flag) { return flag; });
    }

   private:
    int64_t index_of(const Problem& p, const HeadRef& head, int64_t k_block) const {
        return (head.batch * p.kv_heads + head.kv_head - heads.first) * k_blocks + k_block;
    }

    void pack(const Problem& p, const HeadRef& head, int64_t k_block) {
        const int64_t at = index_of(p, head, k_block), first = k_block * AMX_K;
        const int64_t count = std::min<int64_t>(AMX_K, p.lk - first);
        const uint16_t* const rows = (const uint16_t*)row_of(p, p.v, head, first);
        finite[at] = F::pack_k_block(rows, p.v.row, count, p.value_width, packed_values.get() + at * value_block);
        if (!in_place) F::along_width(p, head, p.k, p.width, first, count, (float*)&packed_keys[at * key_block]);
    }

    const HeadRange heads;
    const int64_t k_blocks;  // of a head; none where a head has one tile, which then packs them itself
    const bool in_place;
    const int64_t value_block, key_block;  // elements of a k_block
    std::unique_ptr<uint16_t[]> packed_values, packed_keys;
    std::vector<char> finite;  // of each k_block, whether the values are
};

// The three products of matmul/operands.h on tiles: overloads for Amx.

static inline void multiply_rows(Amx, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const uint16_t>& keys, const float* packed, float* to) {
    const int64_t lanes = t.lanes() * (int64_t)sizeof(float), row = keys.stride * (int64_t)sizeof(uint16_t);
    const Tiles a = {(char*)(keys.data + s.begin * keys.stride), row, TILE * row, 64};
    const Tiles b = {(char*)(packed + s.first * LANES), lanes, 64, TILE * lanes};
    const Tiles c = {(char*)(to + s.begin * t.lanes() + s.first * LANES), lanes, TILE * lanes, 0};
    product_of_tiles<false>(tiles_of(s.end - s.begin), s.last - s.first, k_blocks_of(width), a, b, c);
}

static inline void sum_over_keys(Amx, const Tile& t, const Segment& s, int64_t width,
                                 const Operand<const uint16_t>& values, const float* weights, float* to, bool = false) {
    const int64_t lanes = t.lanes() * (int64_t)sizeof(float);
    const Tiles a = {(char*)(values.data + s.begin / AMX_K * values.stride), 64, TILE * 64,
                     values.stride * (int64_t)sizeof(uint16_t)};
    const Tiles b = {(char*)(weights + s.begin / 2 * t.lanes() + s.first * LANES), lanes, 64, TILE * lanes};
    const Tiles c = {(char*)(to + s.first * LANES), lanes, TILE * lanes, 0};
    product_of_tiles<true>(tiles_of(width), s.last - s.first, k_blocks_of(s.end - s.begin), a, b, c);
}

static inline void sum_over_rows(Amx, const Tile& t, const Segment& s, int64_t width, const float* weights,
                                 const float* rows, float* to) {
    const int64_t lanes = t.lanes() * (int64_t)sizeof(float), pitch = whole_vectors(width);
    const int64_t row = pitch * (int64_t)sizeof(float);
    const Tiles a = {(char*)(weights + s.begin * t.lanes() + s.first * LANES / 2), lanes, TILE * lanes, 64};
    const Tiles b = {(char*)(rows + s.first * LANES / 2 * pitch), row, 64, TILE * row};
    const Tiles c = {(char*)(to + s.begin * pitch), row, TILE * row, 0};
    product_of_tiles<true>(tiles_of(s.end - s.begin), pitch / TILE, (s.last - s.first + 1) / 2, a, b, c);
}
#endif

}  // namespace QKV_ISA
}  // namespace qkv
