// Keys and values in int8, and how rows are rounded to it.
#include "call.h"
#include "library.h"

namespace qkv {

static void check_groups(Case c) {
    c.int8 = true;
    for (Dtype dtype : DTYPES)
        for (int64_t group = 1; group <= 9; ++group) {
            c.dtype = dtype;
            c.group = group;
            check(c);
            check(c.causal());
        }
}

TEST(int8_lengths) {
    for (int64_t lk : {1, 2, 15, 17, 95, 96, 97, 481}) {
        Case c;
        c.lk = lk;
        check_groups(c);
    }
}

TEST(int8_widths) {
    const std::pair<int64_t, int64_t> widths[] = {{1, 65}, {15, 33}, {31, 1}, {33, 17}, {63, 96}, {65, 31}, {96, 64}};
    for (const auto& [width, value_width] : widths) {
        Case c;
        c.lk = 35;
        c.width = width;
        c.value_width = value_width;
        check_groups(c);
    }
}

TEST(int8_layouts) {
    Case c;
    c.batch = c.kv_heads = 2;
    c.lk = 19;
    c.width = 33;
    c.value_width = 17;
    for (const Layout& layout :
         {Layout{true, false, false, 3, 1}, {false, true, false, 1, 0}, {true, false, true, 0, 5}}) {
        c.queries = c.keys = c.results = layout;
        check_groups(c);
    }
}

TEST(int8_many_queries) {
    Case c;
    c.batch = c.kv_heads = 2;
    c.lq = 7;
    c.lk = 53;
    c.width = 19;
    c.keys.gap = 3;
    c.keys.tokens_first = true;
    check_groups(c);
}

TEST(int8_masks_and_scores) {
    Case c;
    c.batch = c.kv_heads = 2;
    c.lk = 230;
    c.width = c.value_width = 21;
    c.offset = c.lk - 1;
    c.left = 120;
    c.sink_tokens = 3;
    check_groups(c);
    c.lengths = {230, 101};
    c.keep = true;
    check_groups(c);
    c.allow = Broadcast{true, false, false, false};
    c.bias = Broadcast{false, true, false, false};
    c.alibi = c.sink_logits = true;
    c.softcap = 2;
    check_groups(c);
}

// The widest rows that are multiplied in fixed point have the largest sums, which must fit 32 bits.
TEST(int8_sums_do_not_overflow) {
    for (Dtype dtype : DTYPES)
        for (int64_t width : {2048, 2056, 8192, 8193})  // the widest ones and others, in both fixed points
            for (double sign : {1, -1}) {
                Case c;
                c.int8 = true;
                c.dtype = dtype;
                c.group = 2;
                c.lk = 97;
                c.width = c.value_width = width;
                c.scale = 0x1p-20f;
                const Call call(c);
                call.q.fill([&] { return sign; });
                for (const Tensor* codes : {&call.k, &call.v}) codes->fill([] { return -128; });
                call.forward();
                call.check();
            }
}

// Whose scales are not normal numbers, or whose products overflow unless they are scaled first.
TEST(int8_of_the_smallest_and_the_largest_numbers) {
    for (Dtype dtype : DTYPES)
        for (int64_t group : {1, 3})
            for (double value : {0x1p-7, 0x1p-105, 0x1p-120}) {
                Case c;
                c.int8 = true;
                c.dtype = dtype;
                c.group = group;
                c.lk = 20;
                const Call call(c);
                const double query = dtype == Dtype::f16 ? 0x1p-24 : 0x1p-111;
                int i = 0;
                call.q.fill([&] { return query * (i++ % 3 - 1); });
                call.k_scale.fill([&] { return 0x1p-5 / query; });
                call.v_scale.fill([&] { return i++ % 3 ? value : 0x1p-126; });
                call.forward();
                call.check();
                call.q.fill([] { return 0.0; });
                call.forward();
                call.check();
            }
}

// NaN or inf in a query or the scale of a key or a value shows in the rows that see it, and in these alone.
TEST(int8_nonfinite) {
    for (Dtype dtype : DTYPES)
        for (int64_t group = 1; group <= 9; ++group)
            for (int64_t j : {0, 1, 2, 7, 15, 16, 96, 99}) {
                Case c;
                c.int8 = true;
                c.dtype = dtype;
                c.group = group;
                c.lk = 100;
                c.allow = Broadcast{false, false, false, false};
                for (int what = 0; what < 3; ++what)
                    for (double number : {(double)NAN, (double)INFINITY}) {
                        const Call call(c);
                        const Tensor* const to[] = {&call.q, &call.k_scale, &call.v_scale};
                        for (int64_t h = 0; h < group; ++h) {
                            for (int64_t d = 0; d < c.width; ++d) call.k.set(0, 0, j, d, 0), call.v.set(0, 0, j, d, 0);
                            call.allow.set(0, h, 0, j, h % 2 == 0);
                        }
                        // Infinities meet numbers of 0, as where a row that holds one is rounded.
                        for (int64_t i = 0; what == 0 && i < c.lk; ++i) call.k.set(0, 0, i, 3, 0);
                        to[what]->set(0, 0, 0, what == 0 ? 3 : j, number);
                        call.forward();
                        for (int64_t h = 0; h < group; ++h)
                            for (int64_t d = 0; d < c.value_width; ++d)
                                require(std::isnan(call.out.get(0, h, 0, d)) == (what == 0 ? h == 0 : h % 2 == 0),
                                        c.describe() + ": NaN at " + std::to_string(j) + " is not where it should be");
                    }
            }
}

TEST(a_visible_scale_without_a_number_shows_whatever_its_weight) {
    for (Dtype dtype : DTYPES)
        for (int64_t group : {1, 2, 3, 8}) {
            Case c;
            c.int8 = true;
            c.dtype = dtype;
            c.group = group;
            c.lk = 40;
            c.bias = Broadcast{true, true, true, false};
            const Call call(c);
            call.bias.set(0, 0, 0, 21, -1e4);
            call.v_scale.set(0, 0, 0, 21, NAN);
            call.forward();
            for (int64_t h = 0; h < group; ++h)
                require(std::isnan(call.out.get(0, h, 0, 0)), c.describe() + ": a visible NaN does not show");
        }
}

TEST(rows_are_rounded_to_a_127th_of_their_largest) {
    for (Dtype dtype : DTYPES)
        for (const Layout& layout : {Layout{}, {false, false, false, 3, 1}, {true, false, false, 1, 0}})
            for (int64_t width : {1, 2, 7, 15, 16, 17, 31, 33, 64, 127}) {
                const int64_t batch = 2, heads = 3, rows = 5;
                const Tensor from(dtype, batch, heads, rows, width, layout),
                    to(Dtype::i8, batch, heads, rows, width, layout);
                const Tensor scale(Dtype::f32, batch, heads, 1, rows, layout);
                std::mt19937 random(1);
                from.fill([&] { return std::ldexp((double)random() / 0x1p31 - 1, (int)(random() % 9) - 4); });
                for (int64_t d = 0; d < width; ++d) from.set(0, 1, 2, d, 0);
                from.set(1, 2, 4, width - 1, NAN);
                from.set(1, 0, 0, width / 2, -INFINITY);
                const Quantization quantization{
                    dtype, batch,     heads,   rows,
                    width, from.view, to.view, {(float*)scale.view.data, scale.view.batch, scale.view.head},
                    2};
                qkv_quantize(&quantization);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t h = 0; h < heads; ++h)
                        for (int64_t row = 0; row < rows; ++row) {
                            double most = 0;
                            for (int64_t d = 0; d < width; ++d) {
                                const double x = std::fabs(from.get(b, h, row, d));
                                most = x > most || std::isnan(x) ? x : most;
                            }
                            const double step = scale.get(b, h, 0, row), roundoff = format_of(Dtype::f32).roundoff;
                            const std::string where =
                                std::string(format_of(dtype).name) + " of width " + std::to_string(width);
                            require(std::isfinite(most) ? std::fabs(step - most / 127) <= roundoff * step
                                                        : step == most || (std::isnan(step) && std::isnan(most)),
                                    where + ": a scale is not a 127th of the largest");
                            for (int64_t d = 0; std::isfinite(most) && d < width; ++d) {
                                const double error = to.get(b, h, row, d) * step - from.get(b, h, row, d);
                                require(std::fabs(error) <= step * (0.5 + 4 * 127 * roundoff),
                                        where + ": off by more than half a step");
                            }
                        }
                for (const Tensor* tensor : {&from, &to, &scale})
                    require(tensor->is_intact(), "something was written between the rows");
            }
}

}  // namespace qkv
