// Lengths, groups and widths at and around the edges of vectors, segments, blocks, splits and tiles.
#include "call.h"

namespace qkv {

static void check_lengths(Case c, const std::vector<int64_t>& queries, const std::vector<int64_t>& keys) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : queries)
            for (int64_t lk : keys) {
                c.dtype = dtype;
                c.lq = lq;
                c.lk = lk;
                check(c);
                check(c.causal());
            }
}

TEST(lengths_around_the_edges_of_tiles_segments_and_blocks) {
    check_lengths({}, {1, 2, 63, 64, 65}, {1, 11, 12, 13, 31, 32, 33, 95, 96, 97});
}

TEST(lengths_around_the_edges_of_chunks_and_splits) {
    Case c;
    c.group = 2;
    check_lengths(c, {1, 9}, {287, 288, 289, 479, 480, 481, 577, 961});
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
        for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17})
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
    const std::pair<int64_t, int64_t> widths[] = {{1, 1},   {1, 80},  {2, 3},   {13, 64}, {15, 16},
                                                  {16, 17}, {17, 15}, {31, 32}, {33, 31}, {64, 13},
                                                  {64, 64}, {80, 80}, {80, 1},  {96, 96}, {129, 7}};
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
