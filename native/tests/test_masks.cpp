// What masks show, alone and together; and that hidden blocks are not computed.
#include <limits>

#include "call.h"
#include "library.h"

namespace qkv {

// Each mask meets one query, a few, and more than a tile, in every dtype.
static void check_all(Case c) {
    const std::pair<int64_t, int64_t> lengths[] = {{1, 210}, {6, 210}, {70, 210}, {130, 130}};
    for (Dtype dtype : DTYPES)
        for (const auto& [lq, lk] : lengths) {
            c.dtype = dtype;
            c.batch = 2;
            c.group = 2;
            c.lq = lq;
            c.lk = lk;
            c.offset = lk - lq;
            check(c);
        }
}

TEST(intervals) {
    for (int64_t left : {(int64_t)0, (int64_t)12, (int64_t)100, UNBOUNDED})
        for (int64_t right : {(int64_t)0, (int64_t)3, UNBOUNDED}) {
            Case c;
            c.left = left;
            c.right = right;
            check_all(c);
        }
}

TEST(sink_tokens) {
    for (int64_t sink_tokens : {1, 12, 13, 97}) {
        Case c;
        c.left = 20;
        c.right = 0;
        c.sink_tokens = sink_tokens;
        check_all(c);
    }
}

TEST(queries_outside_of_the_keys) {
    for (int64_t offset : {-70, -3, 40, 1000})
        for (int64_t left : {(int64_t)10, UNBOUNDED}) {
            Case c;
            c.lq = 66;
            c.lk = 50;
            c.offset = offset;
            c.left = left;
            c.right = 0;
            check(c);
        }
}

TEST(offsets_by_batch) {
    Case c;
    c.alibi = true;
    for (const std::vector<int64_t>& offsets : {std::vector<int64_t>{0, -130}, {-300, 40}})
        for (int64_t left : {(int64_t)30, UNBOUNDED}) {
            c.offsets = offsets;
            c.left = left;
            c.right = 0;
            check_all(c);
        }
    c.documents = true;
    c.batch = 2;
    c.lk = 210;
    c.offset = 3;
    for (bool in_runs : {false, true})
        for (int64_t lq : {1, 6, 70}) {
            c.in_runs = in_runs;
            c.lq = lq;
            c.offsets = {c.lk - lq - 3, -3};
            check(c);
        }
}

TEST(offsets_that_do_not_fit_are_refused) {
    Case c;
    c.batch = 2;
    c.lq = 5;
    c.lk = 50;
    const auto refuses = [&](const std::vector<int64_t>& offsets) {
        c.offsets = offsets;
        const Call call(c);
        const bool refused = qkv_forward(&call.problem) == 2;
        require((qkv_backward(&call.problem, &call.gradients) == 2) == refused, "backward takes what forward refuses");
        require((qkv_count_scores(&call.problem) == -1) == refused, "scores of a refused problem are counted");
        return refused;
    };
    const int64_t largest = (int64_t)1 << 30;
    require(!refuses({1 - largest, largest - 1}), "positions of 32 bits are refused");
    for (int64_t offset : {largest, -largest, std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()})
        require(refuses({3, offset}), "a position of more than 32 bits is taken");
    c.documents = true;
    require(!refuses({0, 45}), "positions of documents are refused");
    require(refuses({46, 0}) && refuses({0, -1}), "documents are read out of bounds");
}

// Alone, and within a window, shared by all batches.
static void check_in_both_forms(Case c) {
    for (bool in_runs : {false, true}) {
        c.in_runs = in_runs;
        c.shared_rows = false;
        c.left = c.right = UNBOUNDED;
        check_all(c);
        c.shared_rows = true;
        c.left = 50;
        c.right = 0;
        check_all(c);
    }
}

TEST(keep) {
    Case c;
    c.keep = true;
    check_in_both_forms(c);
}

TEST(lengths) {
    Case c;
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{0, 1}, {97, 96}, {500, 13}, {150}}) {
        c.lengths = lengths;
        check_all(c);
        check_all(c.causal());
    }
}

TEST(documents) {
    Case c;
    c.documents = true;
    check_in_both_forms(c);
    c.keep = true;
    check_in_both_forms(c);
}

TEST(chunks) {
    for (const auto& [chunk, start] : {std::pair<int64_t, int64_t>{1, 0}, {7, 3}, {96, 0}, {100, 40}, {1000, 0}}) {
        Case c;
        c.chunk = chunk;
        c.chunk_start = start;
        check_all(c);
        c.right = 0;
        c.left = 60;
        c.documents = c.in_runs = true;
        check_all(c);
    }
    Case c;
    c.lq = 66;
    c.lk = 50;
    c.offset = -30;
    c.chunk = 20;
    c.chunk_start = 7;
    check(c);
}

TEST(prefixes) {
    for (int64_t prefix : {1, 12, 97, 500}) {
        Case c;
        c.right = 0;
        c.prefix_tokens = prefix;
        check_all(c);
        c.prefix_tokens = 0;
        c.prefix_lengths = {prefix, 150};
        c.left = 40;
        c.sink_tokens = 3;
        check_all(c);
        c.prefix_lengths = {prefix};
        c.keep = true;
        check_all(c);
    }
}

TEST(dilation) {
    for (int64_t dilation : {2, 13, 100, 2147483647}) {
        Case c;
        c.dilation = dilation;
        check_all(c);
        c.left = 120;
        c.right = 0;
        c.sink_tokens = dilation == 13 ? 5 : 0;
        check_all(c);
    }
    Case c;
    c.lq = 66;
    c.lk = 50;
    c.offset = -30;
    c.dilation = 3;
    check(c);
}

TEST(global_tokens) {
    for (int64_t every : {7, 90, 1000}) {
        Case c;
        c.global_every = every;
        c.left = c.right = -1;  // nothing but global tokens
        check_all(c);
        c.left = 20;
        c.right = 8;
        check_in_both_forms(c);
        c.keep = c.documents = true;
        c.lengths = {190, 101};
        check_in_both_forms(c);
        c.sink_tokens = 3;
        c.dilation = 4;
        check_in_both_forms(c);
    }
}

TEST(dense) {
    for (const Broadcast& broadcast : {Broadcast{},
                                       {true, false, false, false},
                                       {false, true, false, false},
                                       {true, true, true, false},
                                       {false, false, false, true}}) {
        Case c;
        c.allow = broadcast;
        check_all(c);
    }
}

TEST(all_together) {
    Case c;
    c.left = 90;
    c.right = 5;
    c.sink_tokens = 3;
    c.dilation = 3;
    c.prefix_tokens = 40;
    c.global_every = 60;
    c.keep = c.documents = true;
    c.lengths = {200, 101};
    c.in_runs = true;  // first keys are seen from far away, which no interval tells
    c.allow = Broadcast{false, true, false, false};
    c.bias = Broadcast{true, false, false, false};
    c.alibi = c.sink_logits = true;
    c.softcap = 2;
    check_all(c);
}

static int64_t count_scores(const Case& c) {
    const Call call(c);
    return qkv_count_scores(&call.problem);
}

TEST(hidden_blocks_are_not_computed) {
    Case c;
    c.lq = c.lk = 1920;
    c.width = c.value_width = 1;
    const double all = 1920.0 * 1920.0;
    require(count_scores(c) == all, "a full problem computes each score once");
    require(count_scores(c.causal()) < 0.51 * all, "a causal mask computes more than half of all scores");
    require(count_scores(c.causal(240)) < 0.14 * all, "a window of an eighth computes more than that");
    Case chunks = c.causal();
    chunks.chunk = 240;
    require(count_scores(chunks) < 0.08 * all, "chunks of an eighth compute more than half of each");
    Case prefix = c.causal();
    prefix.prefix_tokens = 960;
    require(count_scores(prefix) < 0.64 * all, "a prefix of a half computes more than half of the rest");
    Case global = c;
    global.left = global.right = 60;
    global.global_every = 1920;  // one
    require(count_scores(global) < 0.17 * all, "a global token computes more than its row and its column");
    c.lengths = {960};
    require(count_scores(c) == all / 2, "padding is computed");
}

}  // namespace qkv
