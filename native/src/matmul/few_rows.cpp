#include "matmul/few_rows.h"

#include <algorithm>
#include <vector>

#include "runtime/parallel.h"
#include "simd/dtypes.h"
#include "sizes.h"

namespace qkv {
namespace QKV_ISA {

constexpr int64_t SPAN = 2 * LANES;  // columns that are multiplied at a time

// Otherwise compilers read a row of x from memory for each weight, more often than a core can load.
static inline void keep_in_register([[maybe_unused]] vec& x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// Calls work(i, address) for COUNT rows from `at` on. One address reaches three rows; without the barrier, compilers
// keep more distances in registers than there are.
template <int COUNT, class Work>
[[gnu::always_inline]] static inline void for_weights(const char* at, int64_t stride, Work work) {
    for (int i = 0; i < COUNT; ++i) {
        work(i, at + i % 3 * stride);
        if (i % 3 == 2 && i + 1 < COUNT) {
            at += 3 * stride;
            asm("" : "+r"(at));
        }
    }
}

// How numbers of a dtype are multiplied, SPAN columns at a time:
//
//     ITEM                   bytes of a number
//     FLOATS                 memory that a row of x takes for a span, in floats
//     pack(x, count, to)     the first `count` of a span of x, then zeros, as `add` reads them
//     add(weight, stride, x, sums)
//                            adds the products of a span of weights, whose rows are `stride` bytes apart, and of x
//
// Numbers are widened in registers, in two halves. Those of bf16 are widened without a shuffle: the halves are the even
// columns and the odd ones.
template <Dtype DTYPE>
struct Widening {
    static constexpr int64_t ITEM = size_of(DTYPE), FLOATS = SPAN;

    // LANES of the SPAN columns: half 0 is the even ones of bf16, else the first ones; half 1 the odd or the last ones.
    template <int HALF>
    static vec load_half(const char* span) {
        if constexpr (DTYPE == Dtype::bf16) {
            uvec pairs;
            std::memcpy(&pairs, span, sizeof pairs);
            return (vec)(HALF == 0 ? pairs << 16 : pairs & 0xffff0000u);
        } else {
            return load_as(DTYPE, span + HALF * LANES * size_of(DTYPE));
        }
    }

    static void pack(const char* x, int64_t count, float* to) {
        alignas(64) char whole[SPAN * sizeof(float)] = {};
        if (count < SPAN) x = (const char*)std::memcpy(whole, x, count * size_of(DTYPE));
        store(to, load_half<0>(x));
        store(to + LANES, load_half<1>(x));
    }

    template <int WEIGHTS, int ROWS>
    [[gnu::always_inline]] static void add(const char* weight, int64_t stride, const float* x,
                                           vec (&sums)[WEIGHTS][ROWS]) {
        add_half<0>(weight, stride, x, sums);
        add_half<1>(weight, stride, x + LANES, sums);
    }

   private:
    template <int HALF, int WEIGHTS, int ROWS>
    [[gnu::always_inline]] static void add_half(const char* weight, int64_t stride, const float* x,
                                                vec (&sums)[WEIGHTS][ROWS]) {
        vec wide[WEIGHTS];
        for_weights<WEIGHTS>(weight, stride, [&](int i, const char* at) { wide[i] = load_half<HALF>(at); });
        for (int r = 0; r < ROWS; ++r) {
            vec row = load(x + r * FLOATS);
            keep_in_register(row);
            for (int i = 0; i < WEIGHTS; ++i) sums[i][r] += wide[i] * row;
        }
    }
};

#if defined(QKV_DOT_BF16)
// bf16 in dot products of pairs, as it is.
struct PairsOfBf16 {
    static constexpr int64_t ITEM = 2, FLOATS = LANES;

    static void pack(const char* x, int64_t count, float* to) {
        std::memset(to, 0, SPAN * sizeof(uint16_t));
        std::memcpy(to, x, count * sizeof(uint16_t));
    }

    template <int WEIGHTS, int ROWS>
    [[gnu::always_inline]] static void add(const char* weight, int64_t stride, const float* x,
                                           vec (&sums)[WEIGHTS][ROWS]) {
        pair_vec pairs[WEIGHTS];
        for_weights<WEIGHTS>(weight, stride, [&](int i, const char* at) { pairs[i] = load_pairs(at); });
        for (int r = 0; r < ROWS; ++r) {
            vec row = load(x + r * FLOATS);
            keep_in_register(row);
            for (int i = 0; i < WEIGHTS; ++i) sums[i][r] = dot_bf16(sums[i][r], pairs[i], row);
        }
    }
};
#endif

// Calls run with how numbers of this dtype are multiplied.
template <class Run>
static void for_products(Dtype dtype, Run run) {
#if defined(QKV_DOT_BF16)
    if (dtype == Dtype::bf16) return run(PairsOfBf16());
#endif
    for_dtype(dtype, [&](auto constant) { run(Widening<decltype(constant)::value>()); });
}

// Columns of a cache line of the weight, in whole spans.
template <class Products>
constexpr int64_t LINE = std::max<int64_t>(SPAN, 64 / Products::ITEM);

// How many floats the packed rows of x take.
template <class Products>
static int64_t packed_floats(int64_t rows, int64_t columns) {
    return (columns + LINE<Products> - 1) / LINE<Products> * (LINE<Products> / SPAN) * rows * Products::FLOATS;
}

// Packs the rows of x as they are multiplied: span by span, all rows of each, with zeros up to a whole line.
template <class Products>
static void pack_rows(const Projection& p, float* to) {
    const float* const end = to + packed_floats<Products>(p.rows, p.in_features);
    for (int64_t d = 0; to < end; d += SPAN)
        for (int64_t r = 0; r < p.rows; ++r, to += Products::FLOATS) {
            const int64_t left = std::max<int64_t>(0, p.in_features - d);
            Products::pack((const char*)p.x + (r * p.x_row + d) * Products::ITEM, std::min(SPAN, left), to);
        }
}

// The weights that are read next, which are prefetched: the lines of several rows in turn, as they are read; or, where
// rows are short and follow each other, in the order of memory.
struct NextWeights {
    const char* at;
    int64_t stride;  // of rows; 0 for the order of memory

    NextWeights after(int64_t rows, int64_t row_bytes) const {
        return {at + rows * (stride ? stride : row_bytes), stride};
    }
};

// The sums of a chunk, (row of x, row of the weight), over lanes that are still to be added up.
struct ChunkSums {
    vec* first;
    int64_t row;  // vectors from one row of x to the next: rows of the weight in the chunk
    bool is_new;  // whether there is nothing in them yet

    ChunkSums from(int64_t x_row, int64_t weight_row) const { return {first + x_row * row + weight_row, row, is_new}; }
};

// Adds to sums a chain of products: `lines` lines of WEIGHTS rows of the weight with ROWS of `rows` rows of x.
template <class Products, int WEIGHTS, int ROWS>
[[gnu::noinline]] static void add_chain(const char* weight, int64_t stride, int64_t lines, const float* x, int64_t rows,
                                        NextWeights next, ChunkSums sums) {
    if (lines < 1) __builtin_unreachable();
    constexpr int64_t BYTES = LINE<Products> * Products::ITEM, SPANS = LINE<Products> / SPAN;
    const int64_t pitch = rows * Products::FLOATS;
    const int64_t next_row = next.stride ? next.stride : BYTES, next_line = next.stride ? BYTES : WEIGHTS * BYTES;
    vec acc[WEIGHTS][ROWS] = {};
    for (int64_t line = 0; line < lines; ++line, next.at += next_line) {
        for_weights<WEIGHTS>(next.at, next_row, [](int, const char* at) { prefetch(at, BYTES); });
        for (int64_t span = 0; span < SPANS; ++span, weight += BYTES / SPANS, x += pitch)
            Products::add(weight, stride, x, acc);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < WEIGHTS; ++i) {
            vec& sum = sums.first[r * sums.row + i];
            sum = sums.is_new ? acc[i][r] : sum + acc[i][r];
        }
}

// The rows of x in groups that fit the registers beside their weights: `large` groups of ROWS, the others of one less.
template <int ROWS>
struct RowGroups {
    int64_t rows, large;

    explicit RowGroups(int64_t rows) : rows(rows), large(rows - (rows + ROWS - 1) / ROWS * (ROWS - 1)) {}
};

// The same for `count` rows of the weight and all rows of x.
template <class Products, int ROWS, int WEIGHTS = few_rows_weights(REGISTERS, ROWS)>
static void add_weights(const char* weight, int64_t stride, int64_t lines, int64_t count, const float* x,
                        RowGroups<ROWS> groups, NextWeights next, ChunkSums sums) {
    constexpr int64_t FLOATS = Products::FLOATS;
    const int64_t rows = groups.rows;
    const int64_t row_bytes = lines * LINE<Products> * Products::ITEM;
    for (; count >= WEIGHTS; count -= WEIGHTS, weight += WEIGHTS * stride, sums = sums.from(0, WEIGHTS)) {
        int64_t r = 0;
        for (; r < groups.large * ROWS; r += ROWS)
            add_chain<Products, WEIGHTS, ROWS>(weight, stride, lines, x + r * FLOATS, rows, next, sums.from(r, 0));
        if constexpr (ROWS > 1)
            for (; r < rows; r += ROWS - 1)
                add_chain<Products, WEIGHTS, ROWS - 1>(weight, stride, lines, x + r * FLOATS, rows, next,
                                                       sums.from(r, 0));
        next = next.after(WEIGHTS, row_bytes);
    }
    if constexpr (WEIGHTS > 1)
        if (count > 0) add_weights<Products, ROWS, WEIGHTS / 2>(weight, stride, lines, count, x, groups, next, sums);
}

// Lane i is the sum over the lanes of sums[i], for the first COUNT, which are LANES or half as many.
template <int COUNT>
static inline vec sum_first(const vec* sums) {
    vec each[COUNT];
    std::copy(sums, sums + COUNT, each);
    const vec sum = sum_each<1, COUNT>(each);
    return COUNT == LANES ? sum : sum + shuffle(sum, sum, Across<COUNT>());
}

// Writes columns [first, first + count) of out, at most FEW_ROWS_CHUNK, from their sums (row, column), which have room
// for LANES more.
static inline void write_sums(const Projection& p, int64_t first, int64_t count, vec* sums) {
    alignas(64) float rows[MOST_ROWS * FEW_ROWS_CHUNK + LANES];
    const int64_t numbers = count * p.rows;
    std::fill(sums + numbers, sums + (numbers + LANES / 2 - 1) / (LANES / 2) * (LANES / 2), vec{});
    int64_t n = 0;
    for (; n + LANES / 2 < numbers; n += LANES) store(rows + n, sum_first<LANES>(sums + n));
    if (n < numbers) store(rows + n, sum_first<LANES / 2>(sums + n));
    for (int64_t n = 0; n < count; n += LANES) {
        const int64_t here = first + n, part = std::min<int64_t>(LANES, count - n);
        vec bias = {};
        if (p.bias) bias = load_part(p.dtype, (const char*)p.bias + here * size_of(p.dtype), part);
        for (int64_t r = 0; r < p.rows; ++r) {
            char* const to = (char*)p.out + (r * p.out_row + here) * size_of(p.out_dtype);
            store_part(p.out_dtype, to, load(rows + r * count + n) + bias, part);
        }
    }
}

// What is read after the chain of columns that starts at byte `begin` of rows of `bytes` bytes: the same columns of the
// next chunk or, in long rows, columns further on.
static NextWeights next_weights(const char* weight, int64_t stride, int64_t begin, int64_t bytes, int64_t count) {
    const char* const chunk = weight + FEW_ROWS_CHUNK * stride;
    if (bytes <= FEW_ROWS_SHORT && bytes == stride) return {chunk - begin + begin * count, 0};
    const int64_t ahead = std::min(bytes, FEW_ROWS_AHEAD);
    return {begin + ahead < bytes ? weight + ahead : chunk + ahead - bytes, stride};
}

// Columns of out [first, first + count), at most FEW_ROWS_CHUNK.
template <class Products, int ROWS>
static void project_chunk(const Projection& p, const float* x, int64_t first, int64_t count) {
    constexpr int64_t ITEM = Products::ITEM, COLUMNS = LINE<Products>;
    const int64_t stride = p.weight_row * ITEM, pitch = p.rows * Products::FLOATS;
    const RowGroups<ROWS> groups(p.rows);
    const char* const weight = (const char*)p.weight + first * stride;
    vec sums[FEW_ROWS_CHUNK * MOST_ROWS + LANES];
    ChunkSums chunk = {sums, count, true};
    for (int64_t d = 0, columns; d < p.in_features; d += columns, x += columns / SPAN * pitch) {
        columns = std::min(FEW_ROWS_CHAIN, p.in_features - d);
        const char* const from = weight + d * ITEM;
        const NextWeights next = next_weights(from, stride, d * ITEM, p.in_features * ITEM, count);
        const int64_t lines = columns / COLUMNS, left = columns % COLUMNS;
        if (lines > 0) add_weights<Products, ROWS>(from, stride, lines, count, x, groups, next, chunk);
        chunk.is_new &= lines == 0;
        if (left > 0) {
            alignas(64) char padded[FEW_ROWS_CHUNK][COLUMNS * ITEM] = {};
            for (int64_t i = 0; i < count; ++i)
                std::memcpy(padded[i], from + i * stride + lines * COLUMNS * ITEM, left * ITEM);
            add_weights<Products, ROWS>(padded[0], COLUMNS * ITEM, 1, count, x + lines * COLUMNS / SPAN * pitch, groups,
                                        next, chunk);
            chunk.is_new = false;
        }
    }
    write_sums(p, first, count, sums);
}

// Calls run with how many rows of x are multiplied at a time: as few groups as possible, all of about this size.
template <class Run>
static void for_group_size(int64_t rows, Run run) {
    const int64_t groups = (rows + FEW_ROWS_AT_ONCE - 1) / FEW_ROWS_AT_ONCE;
    switch ((rows + groups - 1) / groups) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        default: return run(std::integral_constant<int, 4>());
    }
}

// Whether product i has the rows of x of the one before.
static bool shares_rows(const Projection* products, int i) {
    if (i == 0) return false;
    const Projection &a = products[i - 1], &b = products[i];
    return a.x == b.x && a.x_row == b.x_row && a.rows == b.rows && a.in_features == b.in_features && a.dtype == b.dtype;
}

static int64_t packed_floats(const Projection& p) {
    int64_t floats = 0;
    for_products(p.dtype, [&](auto kind) { floats = packed_floats<decltype(kind)>(p.rows, p.in_features); });
    return floats;
}

// Memory of this thread, kept from call to call.
static float* thread_memory(int64_t floats) {
    static thread_local std::vector<float> kept;
    if ((int64_t)kept.size() < floats + 16) {
        kept = std::vector<float>();  // or resize would copy it
        kept.resize(floats + 16);
    }
    return (float*)(((uintptr_t)kept.data() + 63) / 64 * 64);
}

FewRows::FewRows(const Projection* products, int count) : products(products), count(count) {
    int64_t floats = 0;
    for (int i = 0; i < count; ++i) floats += shares_rows(products, i) ? 0 : packed_floats(products[i]);
    float* to = thread_memory(floats);
    first[0] = 0;
    for (int i = 0; i < count; ++i) {
        const Projection& p = products[i];
        first[i + 1] = first[i] + (p.out_features + FEW_ROWS_CHUNK - 1) / FEW_ROWS_CHUNK;
        if (shares_rows(products, i)) {
            packed[i] = packed[i - 1];
            continue;
        }
        packed[i] = to;
        for_products(p.dtype, [&](auto kind) { pack_rows<decltype(kind)>(p, to); });
        to += packed_floats(p);
    }
}

void FewRows::operator()(int64_t item) const {
    int i = 0;
    while (item >= first[i + 1]) ++i;
    const Projection& p = products[i];
    const int64_t at = (item - first[i]) * FEW_ROWS_CHUNK, features = std::min(FEW_ROWS_CHUNK, p.out_features - at);
    for_products(p.dtype, [&](auto kind) {
        for_group_size(p.rows, [&](auto rows) {
            project_chunk<decltype(kind), decltype(rows)::value>(p, packed[i], at, features);
        });
    });
}

void project(const Projection* products, int count, int threads) {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i)
        bytes += products[i].out_features * products[i].in_features * size_of(products[i].dtype);
    const FewRows work(products, count);
    threads = (int)std::min<int64_t>(threads, 1 + bytes / FEW_ROWS_THREAD_BYTES);
    parallel_for(work.items(), threads, work, Sharing::blocks);
}

}  // namespace QKV_ISA
}  // namespace qkv
