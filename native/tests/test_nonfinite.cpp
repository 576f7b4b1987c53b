// Hidden NaN and infinities have no influence; visible ones have theirs.
#include "call.h"

namespace qkv {

// The bits of all results, where no query sees the keys [from, to) of the last batch, and these hold `number`.
static std::string results(const Case& c, int64_t from, int64_t to, double number) {
    const Call call(c);
    for (int64_t h = 0; h < c.kv_heads; ++h)
        for (int64_t j = from; j < to; ++j) {
            for (int64_t d = 0; d < c.width; ++d) call.k.set(c.batch - 1, h, j, d, number);
            for (int64_t d = 0; d < c.value_width; ++d) call.v.set(c.batch - 1, h, j, d, number);
        }
    call.forward();
    call.backward();
    call.check();
    return call.bits();
}

static void check_hidden(Case c, int64_t from, int64_t to) {
    for (Dtype dtype : DTYPES)
        for (int64_t group : {1, 4, 9, 17}) {
            c.dtype = dtype;
            c.group = group;
            c.width = 24;
            c.value_width = 19;
            const std::string want = results(c, from, to, 1);
            for (double number : {(double)NAN, (double)INFINITY, -(double)INFINITY})
                require(results(c, from, to, number) == want,
                        c.describe() + ": a hidden " + std::to_string(number) + " shows");
        }
}

TEST(hidden_by_lengths) {
    for (int64_t lq : {1, 5, 33}) {
        Case c;
        c.batch = 2;
        c.lq = lq;
        c.lk = 230;
        c.lengths = {230, 101};
        check_hidden(c, 101, 230);
    }
}

TEST(hidden_by_an_interval) {
    for (int64_t lq : {1, 5, 33}) {
        Case c;
        c.lq = lq;
        c.lk = 230;
        c.offset = 150 - lq;
        c.right = 0;
        check_hidden(c, 150, 230);
        c.left = 30;
        check_hidden(c, 0, 150 - lq - 30);
    }
}

TEST(hidden_by_a_dense_mask_from_all_or_some) {
    for (int64_t lq : {1, 5, 66})
        for (Dtype dtype : DTYPES) {
            Case c;
            c.dtype = dtype;
            c.group = 3;
            c.lq = lq;
            c.lk = 110;
            c.allow = Broadcast{true, true, false, false};
            std::string want;
            for (double number : {1.0, (double)NAN}) {
                const Call call(c);
                for (int64_t d = 0; d < c.width; ++d) {
                    call.k.set(0, 0, 50, d, number);
                    call.v.set(0, 0, 50, d, number);
                    call.v.set(0, 0, 97, d, number);
                }
                for (int64_t i = 0; i < lq; ++i) {
                    call.allow.set(0, 0, i, 50, 0);
                    call.allow.set(0, 0, i, 97, i % 2);
                }
                call.forward();
                std::string rows;  // those that see none of both
                for (int64_t h = 0; h < 3; ++h)
                    for (int64_t i = 0; i < lq; i += 2)
                        rows.append(call.out.at(0, h, i), c.value_width * format_of(dtype).item);
                require(want.empty() || rows == want, c.describe() + ": a hidden NaN shows");
                want = rows;
                for (int64_t i = 1; i < lq && std::isnan(number); i += 2)
                    require(std::isnan(call.out.get(0, 2, i, 0)), c.describe() + ": a visible NaN does not show");
            }
        }
}

TEST(a_visible_nan_in_a_value_is_in_its_channel_and_one_in_a_key_everywhere) {
    for (Dtype dtype : DTYPES)
        for (const auto& [lq, group] :
             std::initializer_list<std::pair<int64_t, int64_t>>{{1, 2}, {1, 4}, {1, 9}, {66, 2}})
            for (const bool in_key : {false, true}) {
                Case c;
                c.dtype = dtype;
                c.group = group;
                c.lq = lq;
                c.lk = 120;
                c = c.causal();
                const Call call(c);
                (in_key ? call.k : call.v).set(0, 0, 54, 3, NAN);
                call.forward();
                for (int64_t h = 0; h < group; ++h)
                    for (int64_t i = 0; i < lq; ++i)
                        for (int64_t d = 0; d < c.value_width; ++d) {
                            const bool sees = i + c.offset >= 54;
                            require(std::isnan(call.out.get(0, h, i, d)) == (sees && (in_key || d == 3)),
                                    c.describe() + ": NaN is where it should not be, or is not where it should be");
                        }
            }
}

}  // namespace qkv
