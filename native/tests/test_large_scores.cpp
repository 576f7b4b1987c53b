// Scores as large as numbers are: finite results, which are exact where scores are.
#include "call.h"

namespace qkv {

// Keys whose scores are `base` + 0, 1, 2 or 3, all of them exact, for q of (root, 1, 0, ...) and k of (root, 0 to 3, 0,
// ...).
static double step(int64_t j) { return (double)(j * 7 % 4); }

static void lay(const Call& call, double root, double unit) {
    const Case& c = call.c;
    // Dot products of bf16 on ARM round to odd, and tell 2^30 + 1 from 2^30.
    const bool alike = unit == 0 && c.dtype == Dtype::bf16;
    for (int64_t h = 0; h < call.heads; ++h)
        for (int64_t i = 0; i < c.lq; ++i)
            for (int64_t d = 0; d < c.width; ++d) call.q.set(0, h, i, d, d == 0 ? root : d == 1);
    for (int64_t h = 0; h < c.kv_heads; ++h)
        for (int64_t j = 0; j < c.lk; ++j)
            for (int64_t d = 0; d < c.width; ++d)
                call.k.set(0, h, j, d, d == 0 ? root : d == 1 && !alike ? step(j) : 0);
}

// Weights of all keys, from their scores less the largest.
static std::vector<double> weights(const Case& c, double unit) {
    std::vector<double> all;
    double sum = 0;
    for (int64_t j = 0; j < c.lk; ++j) sum += all.emplace_back(std::exp(unit * (step(j) - 3)));
    for (double& weight : all) weight /= sum;
    return all;
}

static void check_exact(const Case& c, double root, double unit) {
    const Call call(c);
    lay(call, root, unit);
    if (c.bias) call.bias.fill([] { return 0.0; });
    call.forward();
    call.backward();
    const std::vector<double> want = weights(c, unit);
    const Format& format = format_of(c.dtype);
    const double steps = (c.lk + c.lq * c.group + 64) * 0x1p-24 + 2 * format.roundoff;  // of sums and results
    // A message is written where it is needed alone: that would take most of the time of the test.
    const auto check_close = [&](double got, double sum, double error, const char* name) {
        if (std::fabs(got - sum) <= error) return;
        throw Failure(c.describe() + ": " + name + " is " + std::to_string(got) + ", and not " + std::to_string(sum));
    };
    const auto rounded = [&](double size) { return steps * size + format.subnormal; };
    const double row_max = c.scale * (root * root + 3);
    // All rows are alike.
    for (int64_t d = 0; d < c.value_width; ++d) {
        double out = 0, out_size = 0, given = 0, given_size = 0;
        for (int64_t j = 0; j < c.lk; ++j) {
            out += want[j] * call.v.get(0, 0, j, d);
            out_size += want[j] * std::fabs(call.v.get(0, 0, j, d));
        }
        for (int64_t h = 0; h < call.heads; ++h)
            for (int64_t i = 0; i < c.lq; ++i) {
                check_close(call.out.get(0, h, i, d), out, rounded(out_size), "out");
                check_close(call.lse.get(0, h, i, 0), row_max, std::log(c.lk) + row_max * 0x1p-23, "lse");
                given += call.d_out.get(0, h, i, d);
                given_size += std::fabs(call.d_out.get(0, h, i, d));
            }
        for (int64_t j = 0; j < c.lk; ++j)
            check_close(call.dv.get(0, 0, j, d), want[j] * given, rounded(want[j] * given_size), "dv");
    }
}

static void check_all(bool bias) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 40, 70})
            for (int64_t group : {1, 3, 9})
                for (int64_t lk : {3, 200, 1100}) {
                    if (lk > 1000 && lq * group > 100) continue;  // as many keys for every layout of rows suffice
                    Case c;
                    c.dtype = dtype;
                    c.group = group;
                    c.lq = lq;
                    c.lk = lk;
                    c.scale = 1;
                    if (bias) c.bias = Broadcast{};
                    check_exact(c, 0x1p10, 1);  // scores of 2^20, which fp32 tells apart
                    check_exact(c, 0x1p15, 0);  // of 2^30, which it does not
                    c.scale = 16;
                    check_exact(c, 0x1p15, 0);  // of 2^34
                }
}

TEST(weights_of_large_scaled_only_scores_are_right) { check_all(false); }
TEST(weights_of_large_scores_with_a_bias_are_right) { check_all(true); }

// A large row, or none, among ordinary ones: these have the same bits.
TEST(ordinary_rows_do_not_depend_on_large_ones) {
    for (Dtype dtype : DTYPES)
        for (const auto& [lq, group] : std::initializer_list<std::pair<int64_t, int64_t>>{{1, 4}, {5, 1}, {40, 2}}) {
            Case c;
            c.dtype = dtype;
            c.group = group;
            c.lq = lq;
            c.lk = 700;
            std::string want;
            for (double size : {1.0, 0x1p14, 0x1p15}) {
                const Call call(c);
                call.k.set(0, 0, 5, 0, 0x1p10);
                for (int64_t d = 0; d < c.width; ++d) call.q.set(0, group - 1, lq - 1, d, size);
                call.forward();
                call.backward();
                std::string rows;
                for (int64_t h = 0; h < group; ++h)
                    for (int64_t i = 0; i < lq; ++i) {
                        if (h == group - 1 && i == lq - 1) continue;
                        rows.append(call.out.at(0, h, i), c.value_width * format_of(dtype).item);
                        rows.append(call.dq.at(0, h, i), c.width * format_of(dtype).item);
                    }
                require(want.empty() || rows == want, c.describe() + ": a large row shows in another");
                want = rows;
            }
        }
}

// Scales whose product with a score is still a number.
TEST(any_scale_is_a_scale) {
    for (float scale : {1e-44f, 1e-38f, 1e-31f, 1e31f, 1e36f})
        for (int64_t lq : {1, 5, 40}) {
            Case c;
            c.lq = lq;
            c.lk = 150;
            c.scale = scale;
            const Call call(c);
            call.forward();
            call.backward();
            for (const Tensor* tensor : {&call.out, &call.lse, &call.dq, &call.dk, &call.dv})
                for (int64_t i = 0; i < tensor->rows; ++i)
                    require(std::isfinite(tensor->get(0, 0, i, 0)), c.describe() + ": a result is not finite");
        }
}

// One key has a weight of 1, whatever its score: its value's gradient is the output's.
TEST(one_key_has_all_the_weight) {
    for (Dtype dtype : DTYPES)
        for (int64_t width : {16, 128, 256})
            for (float scale : {0.1f, 1.0f, 3.0f, 100.0f}) {
                Case c;
                c.dtype = dtype;
                c.lq = c.lk = 1;
                c.width = width;
                c.scale = scale;
                const Call call(c);
                call.forward();
                call.backward();
                for (int64_t d = 0; d < c.value_width; ++d)
                    require(call.dv.get(0, 0, 0, d) == call.d_out.get(0, 0, 0, d),
                            c.describe() + ": dv of the only key is not the gradient of its output");
            }
}

}  // namespace qkv
