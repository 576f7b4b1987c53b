// Lengths, groups and widths at and around the edges of vectors, segments, blocks, pieces and tiles.
#include "call.h"

namespace qkv {

static const Dtype DTYPES[] = {Dtype::f32, Dtype::bf16, Dtype::f16};

TEST(lengths_around_the_edges_of_tiles_and_blocks) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 2, 63, 64, 65})
            for (int64_t lk : {1, 11, 12, 13, 95, 96, 97}) {
                Case c;
                c.dtype = dtype;
                c.lq = lq;
                c.lk = lk;
                check(c);
                check(c.causal());
            }
}

TEST(lengths_around_the_edges_of_chunks_and_pieces) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 9})
            for (int64_t lk : {191, 192, 193, 479, 480, 481, 961}) {
                Case c;
                c.dtype = dtype;
                c.group = 2;
                c.lq = lq;
                c.lk = lk;
                check(c);
                check(c.causal());
            }
}

// Widths are at least 1.
TEST(nothing_at_all) {
    for (Dtype dtype : DTYPES)
        for (int64_t batch : {0, 2})
            for (int64_t lq : {0, 1, 3})
                for (int64_t lk : {0, 5})
                    for (int threads : {1, 2}) {
                        Case c;
                        c.dtype = dtype;
                        c.batch = batch;
                        c.lq = lq;
                        c.lk = lk;
                        c.threads = threads;
                        check(c);
                    }
}

TEST(groups) {
    for (Dtype dtype : DTYPES)
        for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 9})
            for (int64_t lq : {1, 15}) {
                Case c;
                c.dtype = dtype;
                c.batch = c.kv_heads = 2;
                c.group = group;
                c.lq = lq;
                c.lk = 100;
                check(c.causal());
            }
}

TEST(widths) {
    const std::pair<int64_t, int64_t> widths[] = {{1, 1},   {1, 80},  {2, 3},   {13, 64}, {15, 16}, {16, 17}, {17, 15},
                                                  {31, 32}, {33, 31}, {64, 13}, {64, 64}, {80, 80}, {80, 1},  {129, 7}};
    for (Dtype dtype : DTYPES)
        for (const auto& [width, value_width] : widths)
            for (int64_t lq : {1, 20})
                for (int64_t group : {1, 3, 5}) {
                    Case c;
                    c.dtype = dtype;
                    c.group = group;
                    c.lq = lq;
                    c.lk = 50;
                    c.width = width;
                    c.value_width = value_width;
                    check(c.causal());
                }
}

}  // namespace qkv
