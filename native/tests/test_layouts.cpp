// Tensors of any layout: gaps, transposed and expanded dimensions, shared memory, odd alignment, distant rows.
#include "call.h"

namespace qkv {

static void check_all(Case c) {
    const std::pair<int64_t, int64_t> widths[] = {{16, 16}, {13, 21}, {40, 64}};
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 2, 70})
            for (const auto& [width, value_width] : widths) {
                c.dtype = dtype;
                c.batch = c.kv_heads = c.group = 2;
                c.lq = lq;
                c.lk = 100;
                c.width = width;
                c.value_width = value_width;
                check(c.causal());
            }
}

// Every tensor of these tests ends at the end of its memory; here its rows also lie apart, and what is between is NaN.
TEST(gaps_between_rows) {
    for (int64_t gap : {1, 2, 7, 64}) {
        Case c;
        c.queries.gap = c.keys.gap = c.results.gap = gap;
        check_all(c);
    }
}

TEST(alignment_to_an_element) {
    for (int64_t slack : {1, 3}) {
        Case c;
        c.queries.slack = c.keys.slack = c.results.slack = slack;
        check_all(c);
    }
}

TEST(tokens_outside_of_heads) {
    Case c;
    c.queries.tokens_first = c.keys.tokens_first = c.results.tokens_first = true;
    check_all(c);
    c.queries.gap = c.keys.gap = c.results.gap = 3;
    check_all(c);
}

TEST(expanded_batches_and_heads) {
    Case c;
    c.keys.one_batch = true;
    check_all(c);
    c.keys.one_head = c.queries.one_batch = true;
    check_all(c);
}

TEST(values_in_the_memory_of_keys) {
    Case c;
    c.values_are_keys = true;
    c.batch = c.group = 2;
    c.lk = 150;
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 20})
            for (int64_t value_width : {1, 19, 40}) {
                c.dtype = dtype;
                c.lq = lq;
                c.width = 40;
                c.value_width = value_width;
                check(c.causal());
            }
}

// The last row begins more than 2^32 elements after the first.
TEST(distant_rows) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 3}) {
            Case c;
            c.dtype = dtype;
            c.lq = lq;
            c.lk = 4;
            c.queries.gap = c.keys.gap = c.results.gap = ((int64_t)1 << 32) / 3 + 1;
            check(c);
        }
}

}  // namespace qkv
