// What is not finite makes rows NaN that see it, whatever its sign and the options of scores, and nothing else: forward
// and backward, keys, queries and gradients from above.
#include "call.h"

namespace qkv {

static std::vector<Case> options() {
    std::vector<Case> all(1);
    Case softcap, negative, bias, rest;
    softcap.softcap = 3;
    negative.scale = -0.3f;
    bias.bias = Broadcast{};
    rest.alibi = rest.sink_logits = true;
    rest.dropout = 0.2f;
    for (const Case& c : {softcap, negative, bias, rest}) all.push_back(c);
    return all;
}

// Masks that hide some keys from some rows of a tile, and several rows and heads.
static std::vector<Case> masked(Case c) {
    std::vector<Case> all;
    for (const auto& [lq, group] :
         std::initializer_list<std::pair<int64_t, int64_t>>{{1, 3}, {5, 2}, {70, 1}, {23, 3}}) {
        c.lq = lq;
        c.lk = 130;
        c.group = group;
        c.offset = 60;
        Case documents = c, runs = c, dense = c, ends = c;
        documents.documents = runs.documents = runs.in_runs = true;
        dense.allow = Broadcast{true, true, false, false};
        ends.lengths = {100};
        ends.keep = true;
        for (const Case& one : {documents, runs, dense, ends}) all.push_back(one);
        Case window = c;
        window.right = 0;
        window.left = 40;
        window.sink_tokens = 2;
        all.push_back(window);
    }
    return all;
}

static bool is_nan(const Tensor& tensor, int64_t h, int64_t row) {
    for (int64_t d = 0; d < tensor.width; ++d)
        if (!std::isnan(tensor.get(0, h, row, d))) return false;
    return true;
}

static bool is_nonfinite(const Tensor& tensor, int64_t h, int64_t row) {
    for (int64_t d = 0; d < tensor.width; ++d)
        if (std::isfinite(tensor.get(0, h, row, d))) return false;
    return true;
}

static std::string bits(const Tensor& tensor, int64_t h, int64_t row) {
    return std::string(tensor.at(0, h, row), tensor.width * format_of(tensor.dtype).item);
}

static bool sees(const Call& call, int64_t h, int64_t i, int64_t j) { return is_visible(call.problem, 0, h, i, j); }

static bool sees_any(const Call& call, int64_t h, int64_t i) {
    for (int64_t j = 0; j < call.c.lk; ++j)
        if (sees(call, h, i, j)) return true;
    return false;
}

static void run(const Call& call) {
    call.forward();
    call.backward();
}

static void check_key(const Case& c, double number) {
    constexpr int64_t KEY = 77;
    const Call clean(c), call(c);
    for (int64_t d = 0; d < c.width; ++d) clean.k.set(0, 0, KEY, d, d == 3 ? 1.0 : 0.0);
    for (int64_t d = 0; d < c.width; ++d) call.k.set(0, 0, KEY, d, d == 3 ? number : 0.0);
    run(clean);
    run(call);
    const std::string prefix = c.describe() + ": " + std::to_string(number) + " in a key: ";
    std::vector<bool> touched(c.lk, false);
    for (int64_t h = 0; h < call.heads; ++h)
        for (int64_t i = 0; i < c.lq; ++i) {
            const bool sees_key = sees(call, h, i, KEY);
            for (const auto& [got, want] :
                 {std::pair(&call.out, &clean.out), {&call.lse, &clean.lse}, {&call.dq, &clean.dq}})
                require(sees_key ? is_nan(*got, h, i) : bits(*got, h, i) == bits(*want, h, i),
                        prefix +
                            (sees_key ? "a row that sees it is not NaN" : "a row that does not see it is another"));
            for (int64_t j = 0; sees_key && j < c.lk; ++j) touched[j] = touched[j] || sees(call, h, i, j);
        }
    for (int64_t j = 0; j < c.lk; ++j)
        for (const auto& [got, want] : {std::pair(&call.dk, &clean.dk), {&call.dv, &clean.dv}}) {
            if (touched[j] && got == &call.dv && c.dropout > 0)
                continue;  // a weight that is dropped is 0, or NaN times 0
            require(touched[j] ? is_nan(*got, 0, j) : bits(*got, 0, j) == bits(*want, 0, j),
                    prefix + (touched[j] ? "a gradient is not NaN"
                                         : "a gradient of a key that it does not reach is another"));
        }
}

TEST(a_key_that_is_not_finite_makes_rows_nan_that_see_it_and_nothing_else) {
    for (const Case& option : options())
        for (Case c : masked(option))
            for (Dtype dtype : DTYPES) {
                c.dtype = dtype;
                for (double number : {(double)NAN, (double)INFINITY, -(double)INFINITY}) check_key(c, number);
            }
}

// A row of which one number is not finite, of the query or of the gradient from above.
static void check_row(const Case& c, bool in_query, double number) {
    const int64_t HEAD = c.group - 1, ROW = c.lq / 2;
    const Call zero_grad(c), call(c);
    for (int64_t d = 0; d < c.value_width; ++d) zero_grad.d_out.set(0, HEAD, ROW, d, 0);
    zero_grad.d_lse.set(0, HEAD, ROW, 0, 0);
    (in_query ? call.q : call.d_out).set(0, HEAD, ROW, 3, number);
    run(zero_grad);
    run(call);
    const std::string prefix =
        c.describe() + ": " + std::to_string(number) + (in_query ? " in a query: " : " in a gradient from above: ");
    const bool any = sees_any(call, HEAD, ROW);
    for (int64_t h = 0; h < call.heads; ++h)
        for (int64_t i = 0; i < c.lq; ++i) {
            const bool other = h != HEAD || i != ROW;
            if (other || !in_query) {
                require(bits(call.out, h, i) == bits(zero_grad.out, h, i), prefix + "an output is another");
                require(bits(call.lse, h, i) == bits(zero_grad.lse, h, i), prefix + "an lse is another");
            } else if (any) {
                require(is_nan(call.out, h, i) && is_nan(call.lse, h, i), prefix + "its row is not NaN");
            } else {
                const double lse = c.sink_logits ? call.sink_logits[h] : -INFINITY;
                require(call.out.get(0, h, i, 0) == 0 && call.lse.get(0, h, i, 0) == (float)lse,
                        prefix + "it saw something");
            }
            if (other)
                require(bits(call.dq, h, i) == bits(zero_grad.dq, h, i), prefix + "dq of another row is another");
            else if (any)
                require(is_nonfinite(call.dq, h, i), prefix + "its dq is finite");
            else
                require(call.dq.get(0, h, i, 0) == 0, prefix + "its dq is not 0");
        }
    for (int64_t j = 0; j < c.lk; ++j) {
        const bool seen = sees(call, HEAD, ROW, j);
        if (!seen) {
            require(bits(call.dk, 0, j) == bits(zero_grad.dk, 0, j),
                    prefix + "dk of a key that it does not see is another");
            require(bits(call.dv, 0, j) == bits(zero_grad.dv, 0, j),
                    prefix + "dv of a key that it does not see is another");
        } else {
            require(is_nonfinite(call.dk, 0, j), prefix + "dk of a key that it sees is finite");
            const double x = call.dv.get(0, 0, j, 3);
            require(!std::isfinite(x) || c.dropout > 0, prefix + "dv of a key that it sees is finite");
        }
    }
}

TEST(a_row_that_is_not_finite_reaches_the_keys_that_it_sees_and_nothing_else) {
    for (const Case& option : options())
        for (Case c : masked(option))
            for (Dtype dtype : DTYPES) {
                c.dtype = dtype;
                for (const bool in_query : {true, false})
                    for (double number : {(double)NAN, -(double)INFINITY}) check_row(c, in_query, number);
            }
}

// int8 is not finite where its scale is not.
TEST(a_scale_that_is_not_finite_makes_rows_nan_that_see_its_key) {
    for (const Case& option : options())
        for (Case c : masked(option))
            for (double number : {(double)NAN, (double)INFINITY}) {
                c.int8 = true;
                const Call call(c);
                call.k_scale.set(0, 0, 0, 77, number);
                call.forward();
                for (int64_t h = 0; h < call.heads; ++h)
                    for (int64_t i = 0; i < c.lq; ++i)
                        require(is_nan(call.out, h, i) == sees(call, h, i, 77),
                                c.describe() + ": NaN is where it should not be, or is not where it should be");
            }
}

TEST(a_bias_of_minus_infinity_is_a_weight_of_0) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 70}) {
            Case c;
            c.dtype = dtype;
            c.lq = lq;
            c.lk = 130;
            c.bias = Broadcast{};
            const Call call(c);
            for (int64_t i = 0; i < lq; ++i)
                for (int64_t j = 0; j < c.lk; ++j)
                    if (i % 3 == 0 || j % 2 == 0) call.bias.set(0, 0, i, j, -INFINITY);
            run(call);
            call.check();
            require(call.out.get(0, 0, 0, 0) == 0 && call.lse.get(0, 0, 0, 0) == -INFINITY,
                    c.describe() + ": a row of nothing but -inf is not 0");
            call.v.set(0, 0, 4, 2, NAN);
            call.forward();
            for (int64_t i = 1; i < lq; ++i)
                if (i % 3 != 0)
                    require(std::isnan(call.out.get(0, 0, i, 2)) && !std::isnan(call.out.get(0, 0, i, 1)),
                            c.describe() + ": a value of weight 0 that is NaN does not show in its channel");
        }
}

TEST(a_sink_logit_of_minus_infinity_is_none) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 70})
            for (int64_t length : {0, 130}) {
                Case c;
                c.dtype = dtype;
                c.group = 2;
                c.lq = lq;
                c.lk = 130;
                c.lengths = {length};
                const Call want(c);
                c.sink_logits = true;
                Call call(c);
                call.sink_logits.assign(2, -INFINITY);
                call.problem.sink_logits = call.sink_logits.data();
                run(want);
                run(call);
                require(call.bits() == want.bits(), c.describe() + ": a sink logit of -inf shows");
            }
}

}  // namespace qkv
