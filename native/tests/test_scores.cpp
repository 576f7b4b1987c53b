// What changes scores and weights: scale, softcap, bias, ALiBi, sink logits and dropout.
#include "call.h"

namespace qkv {

static void check_all(Case c) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 40})
            for (int64_t group : {1, 3, 9}) {
                c.dtype = dtype;
                c.batch = 2;
                c.group = group;
                c.lq = lq;
                c.lk = 110;
                check(c);
                check(c.causal());
            }
}

TEST(scales) {
    for (float scale : {1.5f, 0.0f, -0.5f}) {
        Case c;
        c.scale = scale;
        check_all(c);
    }
}

TEST(softcap) {
    for (float softcap : {0.25f, 3.0f, 50.0f}) {
        Case c;
        c.softcap = softcap;
        check_all(c);
    }
}

TEST(bias_with_any_strides) {
    for (int i = 0; i < 16; ++i)
        for (Dtype dtype : DTYPES)
            for (int64_t lq : {1, 40}) {
                Case c;
                c.dtype = dtype;
                c.bias_dtype = DTYPES[i % 3];
                c.bias = Broadcast{(i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0};
                c.batch = c.kv_heads = 2;
                c.group = 3;
                c.lq = lq;
                c.lk = 110;
                check(c.causal());
            }
}

TEST(alibi) {
    Case c;
    c.alibi = true;
    check_all(c);
    c.bias = Broadcast{};
    c.softcap = 1;
    check_all(c);
}

TEST(sink_logits) {
    Case c;
    c.sink_logits = true;
    check_all(c);
    c.lengths = {0, 60};
    check_all(c);
}

TEST(gradients_without_one_of_the_lse) {
    Case c;
    c.d_lse = false;
    check_all(c);
}

TEST(large_scores) {
    Case c;
    c.scale = 40;
    check_all(c);
}

// Which weights dropout keeps: with equal scores, and values of one each, outputs are the weights themselves.
static std::vector<bool> kept(Case c) {
    c.dtype = Dtype::f32;
    c.int8 = false;
    c.left = c.right = UNBOUNDED;
    c.bias.reset();
    c.value_width = c.lk;
    const Call call(c);
    call.q.fill([] { return 0.0; });
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t h = 0; h < c.kv_heads; ++h)
            for (int64_t j = 0; j < c.lk; ++j)
                for (int64_t d = 0; d < c.lk; ++d) call.v.set(b, h, j, d, j == d);
    call.forward();
    std::vector<bool> all;
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t h = 0; h < call.heads; ++h)
            for (int64_t i = 0; i < c.lq; ++i)
                for (int64_t j = 0; j < c.lk; ++j) all.push_back(call.out.get(b, h, i, j) != 0);
    return all;
}

TEST(dropout_drops_the_same_weights_forward_and_backward) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 70})
            for (int64_t group : {1, 3, 9})
                for (const bool int8 : {false, true}) {
                    Case c;
                    c.dtype = dtype;
                    c.int8 = int8;
                    c.batch = c.kv_heads = 2;
                    c.group = group;
                    c.lq = lq;
                    c.lk = 200;
                    c.dropout = 0.3f;
                    c = c.causal();
                    const Call call(c);
                    call.forward();
                    if (!int8) call.backward();
                    call.check(kept(c));
                }
}

TEST(dropout_drops_its_share_independently_for_each_seed_batch_head_and_query) {
    Case c;
    c.batch = c.kv_heads = 2;
    c.lq = c.lk = 250;
    c.dropout = 0.2f;
    const std::vector<bool> first = kept(c);
    c.seed = 2;
    const std::vector<bool> second = kept(c);
    // The share that both drop, of `first` and of `other` from `shift` on, and how far chance lets it be from `want`.
    const auto check_share = [&](const std::vector<bool>& other, size_t shift, double want, const std::string& what) {
        const size_t count = first.size() - shift;
        double both = 0;
        for (size_t i = 0; i < count; ++i) both += !first[i] && !other[i + shift];
        const double found = both / count, tolerance = 5 * std::sqrt(want * (1 - want) / count);  // five deviations
        require(std::fabs(found - want) < tolerance, what + " of " + std::to_string(found));
    };
    const size_t query = c.lk, head = c.lq * query, batch = c.kv_heads * head;
    check_share(first, 0, 0.2, "dropout of 0.2 drops a share");
    check_share(second, 0, 0.04, "two seeds have a common share");
    check_share(first, query, 0.04, "neighbouring queries have a common share");
    check_share(first, head, 0.04, "neighbouring heads have a common share");
    check_share(first, batch, 0.04, "neighbouring batches have a common share");
}

}  // namespace qkv
