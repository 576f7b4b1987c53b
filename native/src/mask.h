// Which keys the rows of a tile see: whole blocks and segments that nobody sees are passed over, and single scores
// hidden only where some row sees them and another does not.
#pragma once

#include "layout.h"
#include "tile.h"

namespace qkv {
namespace QKV_ISA {

// What documents and padding say about each block of keys.
class Outline {
   public:
    explicit Outline(const Problem& p) : blocks((p.lk + BLOCK - 1) / BLOCK) {
        if (!p.documents && !p.keep) return;
        const bool shared = p.documents_batch == 0 && p.keep_batch == 0;
        rows = shared ? 1 : p.batch;
        parts.resize(rows * blocks);
        for (int64_t i = 0; i < rows * blocks; ++i) {
            Part& part = parts[i];
            const int64_t batch = i / blocks, first = i % blocks * BLOCK, last = std::min(p.lk, first + BLOCK);
            for (int64_t key = first; p.documents && key < last; ++key) {
                const int64_t document = p.documents[batch * p.documents_batch + key];
                part.low = std::min(part.low, document);
                part.high = std::max(part.high, document);
            }
            for (int64_t key = first; p.keep && key < last; ++key) {
                const bool kept = p.keep[batch * p.keep_batch + key];
                part.some |= kept;
                part.all &= kept;
            }
        }
    }

    // Whether any row of the tile may see a key of the block that holds `key`.
    bool shows(const Problem& p, const Tile& t, int64_t key) const {
        if (parts.empty()) return true;
        const Part& part = of(t, key);
        if (p.keep && !part.some) return false;
        if (!p.documents) return true;
        for (int r = 0; r < t.count; ++r)
            if (t.document[r] >= part.low && t.document[r] <= part.high) return true;
        return false;
    }

    // Whether every row of the tile may see every key of the block.
    bool is_open(const Problem& p, const Tile& t, int64_t key) const {
        if (parts.empty()) return true;
        const Part& part = of(t, key);
        if (p.keep && !part.all) return false;
        if (!p.documents) return true;
        for (int r = 0; r < t.count; ++r)
            if (t.document[r] != part.low || t.document[r] != part.high) return false;
        return true;
    }

   private:
    struct Part {
        int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
        bool some = false, all = true;
    };

    const Part& of(const Tile& t, int64_t key) const { return parts[(rows == 1 ? 0 : t.batch) * blocks + key / BLOCK]; }

    int64_t blocks, rows = 0;
    std::vector<Part> parts;
};

// Whether any row of the tile may see any of the keys [begin, end). `begin` lies at the start of a block.
static inline bool shows_any(const Problem& p, const Tile& t, const Outline& outline, int64_t begin, int64_t end) {
    end = std::min(end, t.end);
    for (int64_t key = begin; key < end; key += BLOCK)
        if ((key + BLOCK > t.begin || key < p.sink_tokens) && outline.shows(p, t, key)) return true;
    return false;
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
    Segment parts[BLOCK / SEGMENT];

    // The keys [first, min(first + BLOCK, end)).
    Block(const Problem& p, const Tile& t, const Outline& outline, int64_t first, int64_t end, Grain grain)
        : first(first), size((int)std::min<int64_t>(BLOCK, end - first)), count(0) {
        if ((first + BLOCK <= t.begin && first >= p.sink_tokens) || !outline.shows(p, t, first)) return;
        const bool interval =
            first + size - 1 > t.low + p.right || (first + size > p.sink_tokens && first < t.high - p.left);
        ragged = p.allow.data || !outline.is_open(p, t, first);
        edge = interval || ragged;
        if (!interval) {
            parts[count++] = {0, size, 0, t.vecs};
            return;
        }
        for (int begin = 0; begin < size; begin += grain.keys) {
            const int stop = std::min(begin + grain.keys, size);
            int from = 0, to = t.count;
            while (from < to && t.position[from] + p.right < first + begin) ++from;
            if (first + begin >= p.sink_tokens)
                while (to > from && t.position[to - 1] - p.left > first + stop - 1) --to;
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

static inline ivec positions(const Tile& t, int n) {
    ivec position;
    std::memcpy(&position, t.position + n * LANES, sizeof position);
    return position;
}

// A block of a matrix, as scores lie: (key, row).
static void gather(const Tile& t, const Matrix& matrix, int64_t first, int size, float* to) {
    const int64_t item = size_of(matrix.dtype);
    const char* rows[ROWS];
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

// Whether all but a dense mask shows a key to row r.
static inline bool may_see(const Problem& p, const Tile& t, int r, int64_t key) {
    const int64_t position = t.position[r];
    return key <= position + p.right && (key >= position - p.left || key < p.sink_tokens) &&
           (!p.keep || p.keep[t.batch * p.keep_batch + key]) &&
           (!p.documents || p.documents[t.batch * p.documents_batch + key] == t.document[r]);
}

// Whether the interval shows all keys of a segment to all rows of vector n.
static inline bool sees_all(const Problem& p, const Tile& t, const Block& b, const Segment& s, int n) {
    const int64_t low = t.position[n * LANES], high = t.position[(n + 1) * LANES - 1];
    return b.first + s.end - 1 <= low + p.right &&
           (b.first + s.begin >= high - p.left || b.first + s.end <= p.sink_tokens);
}

// Puts `filler` where a row does not see a key.
static void hide(const Problem& p, const Tile& t, const Block& b, const Segment& s, const float* allowed, float filler,
                 float* scores) {
    const int64_t limit = 1 << 30, lanes = t.lanes();
    const int32_t right = (int32_t)std::min(p.right, limit), left = (int32_t)std::min(p.left, limit);
    for (int n = s.first; n < s.last; ++n) {
        if (!b.ragged && sees_all(p, t, b, s, n)) continue;
        const ivec position = positions(t, n);
        for (int64_t j = s.begin; j < s.end; ++j) {
            const int64_t key = b.first + j;
            float* const at = scores + j * lanes + n * LANES;
            const ivec distance = position - (int32_t)key;  // keys to the left
            ivec seen = distance >= -right;
            if (key >= p.sink_tokens) seen &= distance <= left;
            if (b.ragged) {
                if (p.keep && !p.keep[t.batch * p.keep_batch + key]) seen = ivec{};
                if (p.documents) {
                    const int64_t document = p.documents[t.batch * p.documents_batch + key];
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
