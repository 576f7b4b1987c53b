// One micro-kernel for both products of attention: C[m][lane] (+)= sum_k A[m][k] * B[k][lane].
//
// Lanes are query rows. A is read in place and broadcast, element by element: keys for Q K^T, values for P V. So
// neither keys nor values are packed or transposed, and any head width is as good as another. B is packed in
// scratch, and C stays in registers while k runs.
#pragma once

#include <limits>
#include <type_traits>

#include "mask/key_block.h"

namespace qkv {
namespace QKV_ISA {

constexpr int NV = micro_vecs(REGISTERS);

// A kind of product, the template parameter `Kind` of all code that multiplies:
//
//     Element             what A is read in: a number, or a pair of neighbours along k
//     Registers           per-thread register state, RAII (AMX tile config)
//     GRAIN               keys and vectors of rows that segments of a block are cut to
//     CHAIN               steps along the width that are added one after the other; such sums are then added, for the
//                         error of a long sum grows with its length. Micro-kernel only
//     madd(c, a, b)       c plus one step, of an element and a vector. Micro-kernel only
//     of(low, high)       weights of two keys as the pairs that a step takes. Only where `OperandPacking` PACKS
//     keep_amx_warm()     called now and then between two products
//
// and has an `OperandPacking` (matmul/operands.h) and three products by overloads that take a `Kind` first:
// `multiply_rows`, `sum_over_keys`, `sum_over_rows`. They are
//
//     F32                       here: a multiply-add of fp32; bf16 and fp16 are widened first
//     Bf16Dot                   here: two neighbours of bf16 in a dot product
//     Amx                       matmul/amx.h: tiles of bf16
//     ShortQuery<Kind, DTYPE>   attention/short_query.h: F32 or Bf16Dot with the operands exchanged; forward only

// No register state: only AMX has any.
struct NoRegisterState {};

// fp32: one multiply-add a step.
struct F32 {
    using Element = float;
    using Registers = NoRegisterState;
    static constexpr Grain GRAIN = {SUBBLOCK, 1};
    static constexpr int64_t CHAIN = F32_CHAIN;
    static inline vec madd(vec c, float a, vec b) { return c + a * b; }
    static inline void keep_amx_warm() {}
};

#if defined(QKV_DOT_BF16)
// bf16: a step takes two neighbours along k; an element is the pair.
struct Bf16Dot {
    using Element = uint32_t;
    using Registers = NoRegisterState;
    static constexpr Grain GRAIN = {SUBBLOCK, 1};
    static constexpr int64_t CHAIN = std::numeric_limits<int64_t>::max() / 4;  // bf16 rounds more than any sum
    static inline vec madd(vec c, uint32_t a, vec b) { return dot_bf16(c, repeat_pair(a), b); }
    static inline void keep_amx_warm() {}

    static inline vec of(vec low, vec high) { return pair_bf16(low, high); }
};
#endif

// How A lies: rows of keys are contiguous along k, columns of values are contiguous along m. The other stride counts
// elements; those of B and C count floats.
enum class Along { k, m };

struct Strides {
    int64_t a, b, c;
};

// Calls work(m, address) for the rows of C. Without the barrier compilers keep 24 addresses, in vector registers and on
// the stack.
template <int ROWS, class Work>
static inline void for_rows(float* c, int64_t stride, Work work) {
    for (int m = 0; m < ROWS; ++m, c += stride) {
        asm volatile("" : "+r"(c));
        work(m, c);
    }
}

template <class Kind, Along ALONG, int ROWS, int VECS, bool ADD>
static inline void micro(int64_t steps, const typename Kind::Element* a, const float* b, float* c, Strides s,
                         bool sum_first) {
    using Element = typename Kind::Element;
    if (steps < 1) __builtin_unreachable();  // else compilers keep a second C in memory for that
    // Keys and values of the next block are prefetched: memory is slower than the product.
    if (ALONG == Along::k && !ADD)
        for (int m = 0; m < ROWS; ++m) prefetch((const char*)(a + (m + PREFETCH_ROWS) * s.a), steps * sizeof(Element));
    const bool starts_from_c = ADD && !sum_first;
    for (int64_t k = 0, end; k < steps; k = end) {
        const bool first = k == 0;
        end = ADD ? steps : std::min(k + Kind::CHAIN, steps);
        vec acc[ROWS][VECS] = {};
        if (starts_from_c)
            for_rows<ROWS>(c, s.c, [&](int m, const float* at) {
                for (int n = 0; n < VECS; ++n) acc[m][n] = load(at + n * LANES);
            });
        for (; k < end; ++k) {
            if (ALONG == Along::m) prefetch((const char*)(a + (k + PREFETCH_ROWS) * s.a), 1);
            vec row[VECS];
            for (int n = 0; n < VECS; ++n) row[n] = load(b + k * s.b + n * LANES);
            // One address reaches three rows of A. Without the barrier compilers keep twelve distances in registers,
            // more than there are.
            const Element* at = ALONG == Along::k ? a + k : a + k * s.a;
            for (int m = 0; m < ROWS; ++m) {
                Element x;
                std::memcpy(&x, ALONG == Along::k ? at + m % 3 * s.a : at + m, sizeof x);
                for (int n = 0; n < VECS; ++n) acc[m][n] = Kind::madd(acc[m][n], x, row[n]);
                if (ALONG == Along::k && m % 3 == 2) {
                    at += 3 * s.a;
                    asm("" : "+r"(at));
                }
            }
        }
        if (ADD ? sum_first : !first)
            for_rows<ROWS>(c, s.c, [&](int m, const float* at) {
                for (int n = 0; n < VECS; ++n) acc[m][n] = load(at + n * LANES) + acc[m][n];
            });
        for_rows<ROWS>(c, s.c, [&](int m, float* at) {
            for (int n = 0; n < VECS; ++n) store(at + n * LANES, acc[m][n]);
        });
    }
}

template <class Kind, Along ALONG, int VECS, bool ADD>
static inline void rows(int64_t count, int64_t steps, const typename Kind::Element* a, const float* b, float* c,
                        Strides s, bool sum_first) {
    constexpr int FULL = micro_rows(REGISTERS, LANES, VECS);
    int64_t m = 0;
    const auto run = [&](auto rows) {
        constexpr int ROWS = decltype(rows)::value;
        micro<Kind, ALONG, ROWS, VECS, ADD>(steps, ALONG == Along::k ? a + m * s.a : a + m, b, c + m * s.c, s,
                                            sum_first);
        m += ROWS;
    };
    while (m + FULL <= count) run(std::integral_constant<int, FULL>());
    if (FULL > 8 && m + 8 <= count) run(std::integral_constant<int, 8>());
    if (m + 4 <= count) run(std::integral_constant<int, 4>());
    if (m + 2 <= count) run(std::integral_constant<int, 2>());
    if (m + 1 <= count) run(std::integral_constant<int, 1>());
}

// C of `count` rows and `vecs` vectors. With ADD, sums continue from C; or, if `sum_first`, start from 0 and are added
// to C in the end.
template <class Kind, Along ALONG, bool ADD>
static void product(int64_t count, int vecs, int64_t steps, const typename Kind::Element* a, const float* b, float* c,
                    Strides s, bool sum_first = false) {
    int n = 0;
    for (; n + NV <= vecs; n += NV)
        rows<Kind, ALONG, NV, ADD>(count, steps, a, b + n * LANES, c + n * LANES, s, sum_first);
    switch (vecs - n) {
        case 3:
            rows<Kind, ALONG, (NV > 3 ? 3 : 1), ADD>(count, steps, a, b + n * LANES, c + n * LANES, s, sum_first);
            break;
        case 2:
            rows<Kind, ALONG, (NV > 2 ? 2 : 1), ADD>(count, steps, a, b + n * LANES, c + n * LANES, s, sum_first);
            break;
        case 1: rows<Kind, ALONG, 1, ADD>(count, steps, a, b + n * LANES, c + n * LANES, s, sum_first); break;
        default: break;
    }
}

}  // namespace QKV_ISA
}  // namespace qkv
