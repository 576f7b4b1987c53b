// Which keys the rows of a tile see: blocks and segments that no row sees are skipped, and single scores are hidden
// only where some row sees the key and another does not.
#pragma once

#include "mask/query_tile.h"
#include "simd/transpose.h"

namespace qkv {
namespace QKV_ISA {

// Whether padding, documents and global tokens show any key of the block that begins with `key` to any row (the
// interval may not).
static inline bool may_see_block(const Problem& p, const Tile& t, int64_t key) {
    if (!t.keys.parts) return true;
    const KeyVisibility::BlockSummary& part = t.keys.parts[key / BLOCK_N];
    if (t.keys.is_global && !part.any_global && t.end_global == 0 && key >= p.sink_tokens &&
        (key + BLOCK_N <= t.band_begin || key >= t.band_end))
        return false;
    if (t.keys.keep && !part.any) return false;
    if (!t.keys.documents) return true;
    for (int r = 0; r < t.count; ++r)
        if (t.document[r] >= part.low && t.document[r] <= part.high) return true;
    return false;
}

// Whether padding and documents hide no key of the block from any row (the interval may).
static inline bool is_unmasked(const Tile& t, int64_t key) {
    if (!t.keys.parts) return true;
    const KeyVisibility::BlockSummary& part = t.keys.parts[key / BLOCK_N];
    if (t.keys.keep && !part.all) return false;
    if (!t.keys.documents) return true;
    for (int r = 0; r < t.count; ++r)
        if (t.document[r] != part.low || t.document[r] != part.high) return false;
    return true;
}

// Whether any row of the tile may see any of the keys [begin, end). `begin` lies at the start of a block.
static inline bool may_see_any(const Problem& p, const Tile& t, int64_t begin, int64_t end) {
    end = std::min(end, t.end);
    for (int64_t key = begin; key < end; key += BLOCK_N)
        if ((key + BLOCK_N > t.begin || key < p.sink_tokens) && may_see_block(p, t, key)) return true;
    return false;
}

// Adds the rows that see any of the keys [begin, end) because they or a key are global tokens to the rows [from, to).
static inline void add_global(const Tile& t, int64_t begin, int64_t end, int& from, int& to) {
    const uint8_t* const keys = t.keys.is_global;
    const bool any = std::any_of(keys + begin, keys + end, [](uint8_t is_global) { return is_global; });
    const int first = any ? 0 : t.first_global, last = any ? t.count : t.end_global;
    if (first == last) return;
    from = from == to ? first : std::min(from, first);
    to = std::max(to, last);
}

// Keys [begin, end) of a block for the vectors [first, last) of rows that see any of them.
struct Segment {
    int begin, end, first, last;
};

// What segments are cut to: keys, and vectors of rows.
struct Grain {
    int keys, vecs;
};

// A block of keys as a tile sees it.
struct Block {
    int64_t first;
    int size;
    bool ragged;  // whether more than the interval hides some key from some row
    bool edge;    // whether anything does
    int count;    // segments: one where the interval hides nothing, none where no row sees any key
    Segment parts[BLOCK_N / SUBBLOCK];

    // The keys [first, min(first + BLOCK_N, end)).
    Block(const Problem& p, const Tile& t, int64_t first, int64_t end, Grain grain)
        : first(first), size((int)std::min<int64_t>(BLOCK_N, end - first)), count(0) {
        if ((first + BLOCK_N <= t.begin && first >= p.sink_tokens) || !may_see_block(p, t, first)) return;
        const bool interval =
            first + size - 1 > t.last_key[0] || (first + size > p.sink_tokens && first < t.first_key[t.count - 1]);
        ragged = p.allow.data || p.dilation > 1 || !is_unmasked(t, first);
        edge = interval || ragged;
        if (!interval) {
            parts[count++] = {0, size, 0, t.vecs};
            return;
        }
        for (int begin = 0; begin < size; begin += grain.keys) {
            const int stop = std::min(begin + grain.keys, size);
            int from = 0, to = t.count;
            while (from < to && t.last_key[from] < first + begin) ++from;
            if (first + begin >= p.sink_tokens)
                while (to > from && t.first_key[to - 1] > first + stop - 1) --to;
            if (t.keys.is_global) add_global(t, first + begin, first + stop, from, to);
            if (from == to) continue;
            const int lanes = grain.vecs * LANES;
            const Segment s = {begin, stop, from / lanes * grain.vecs,
                               std::min((to + lanes - 1) / lanes * grain.vecs, t.vecs)};
            Segment* const last = count ? &parts[count - 1] : nullptr;
            if (last && last->end == begin && last->first == s.first && last->last == s.last)
                last->end = stop;
            else
                parts[count++] = s;
        }
    }
};

// Vector n of a number for each row.
static inline ivec vector_of(const int32_t* numbers, int n) {
    ivec lanes;
    std::memcpy(&lanes, numbers + n * LANES, sizeof lanes);
    return lanes;
}

// A block of a matrix, as scores lie: (key, row).
static void gather(const Tile& t, const Matrix& matrix, int64_t first, int size, float* to) {
    const int64_t item = size_of(matrix.dtype);
    const char* rows[BLOCK_M];
    for (int r = 0; r < t.lanes(); ++r)
        rows[r] =
            (const char*)matrix.data +
            (t.batch * matrix.batch + t.head[r] * matrix.head + t.token[r] * matrix.row + first * matrix.column) * item;
    rows_to_lanes(t.lanes(), size, to, t.lanes(), [&](int64_t r, int64_t c, int64_t count) {
        if (matrix.column == 1) return load_part(matrix.dtype, rows[r] + c * item, count);
        vec x = {};
        for (int64_t i = 0; i < count; ++i) x[i] = read(matrix.dtype, rows[r], (c + i) * matrix.column);
        return x;
    });
}

// Whether row r may see a key, dense mask aside.
static inline bool may_see(const Problem& p, const Tile& t, int r, int64_t key) {
    const bool near = key >= t.first_key[r] && (p.dilation <= 1 || key % p.dilation == t.residue[r]);
    const bool seen = key <= t.last_key[r] && (near || key < p.sink_tokens);
    return (seen || (t.keys.is_global && (t.is_global[r] || t.keys.is_global[key]))) &&
           (!t.keys.keep || t.keys.keep[key]) && (!t.keys.documents || t.keys.documents[key] == t.document[r]);
}

// Whether the interval shows all keys of a segment to all rows of vector n.
static inline bool sees_all(const Problem& p, const Tile& t, const Block& b, const Segment& s, int n) {
    return b.first + s.end - 1 <= t.last_key[n * LANES] &&
           (b.first + s.begin >= t.first_key[(n + 1) * LANES - 1] || b.first + s.end <= p.sink_tokens);
}

// Puts `filler` where a row does not see a key.
static void hide(const Problem& p, const Tile& t, const Block& b, const Segment& s, const float* allowed, float filler,
                 float* scores) {
    const int64_t lanes = t.lanes();
    for (int n = s.first; n < s.last; ++n) {
        if (!b.ragged && sees_all(p, t, b, s, n)) continue;
        const ivec first_key = vector_of(t.first_key, n), last_key = vector_of(t.last_key, n);
        for (int64_t j = s.begin; j < s.end; ++j) {
            const int64_t key = b.first + j;
            float* const at = scores + j * lanes + n * LANES;
            ivec seen = last_key >= (int32_t)key;
            if (key >= p.sink_tokens) {
                seen &= first_key <= (int32_t)key;
                if (p.dilation > 1) seen &= vector_of(t.residue, n) == (int32_t)(key % p.dilation);
            }
            if (t.keys.is_global) seen |= t.keys.is_global[key] ? ~ivec{} : vector_of(t.is_global, n);
            if (b.ragged) {
                if (t.keys.keep && !t.keys.keep[key]) seen = ivec{};
                if (t.keys.documents) {
                    const int64_t document = t.keys.documents[key];
                    for (int i = 0; i < LANES; ++i) seen[i] &= t.document[n * LANES + i] == document ? -1 : 0;
                }
                if (p.allow.data) seen &= load(allowed + j * lanes + n * LANES) != 0.0f;
            }
            store(at, seen ? load(at) : set1(filler));
        }
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
