// Rotary embedding: every pair against its formula, in any layout, and nothing beside it read or written.
#include "abi/rotation.h"
#include "call.h"
#include "library.h"

extern "C" int qkv_rotate(const void* rotation);

namespace qkv {
namespace {

constexpr int64_t BATCH = 2, TOKENS = 19;

struct Case {
    Dtype dtype, out_dtype;
    int64_t pairs, others;
    bool interleaved, inverse, by_tables;
    Layout layout;
};

// Heads of q and of k, and what they are rotated by.
struct Example {
    const Case& of;
    Tensor from[2], to[2];
    std::vector<int64_t> positions, axes;
    std::vector<float> frequencies;
    Tensor cos, sin;

    explicit Example(const Case& c)
        : of(c), from{of_heads(c, c.dtype, 3), of_heads(c, c.dtype, 1)},
          to{of_heads(c, c.out_dtype, 3), of_heads(c, c.out_dtype, 1)},
          cos(Dtype::bf16, BATCH, 1, TOKENS, 2 * c.pairs, {false, false, false, 3, 0}),
          sin(Dtype::bf16, BATCH, 1, TOKENS, 2 * c.pairs, {false, false, false, 3, 0}) {
        std::mt19937 generator(5);
        std::uniform_real_distribution<> numbers(-1, 1);
        for (const Tensor& x : {from[0], from[1], cos, sin}) x.fill([&] { return numbers(generator); });
        for (int64_t i = 0; i < 2 * BATCH * TOKENS; ++i) positions.push_back((int64_t)(1e4 * numbers(generator)));
        for (int64_t n = 0; n < c.pairs; ++n) axes.push_back(n % 2), frequencies.push_back((float)numbers(generator));
    }

    static Tensor of_heads(const Case& c, Dtype dtype, int64_t heads) {
        return Tensor(dtype, BATCH, heads, TOKENS, 2 * c.pairs + c.others, c.layout);
    }

    Rotation rotation() const {
        Rotation r = {};
        r.dtype = of.dtype, r.out_dtype = of.out_dtype;
        r.batch = BATCH, r.tokens = TOKENS, r.width = from[0].width, r.pairs = of.pairs;
        for (int i = 0; i < 2; ++i) r.heads[i] = from[i].heads, r.from[i] = from[i].view, r.to[i] = to[i].view;
        r.interleaved = of.interleaved, r.inverse = of.inverse, r.threads = 2;
        if (of.by_tables) {
            r.table_dtype = Dtype::bf16, r.cos = cos.view.data, r.sin = sin.view.data, r.second = of.pairs;
            r.cos_batch = r.sin_batch = cos.view.batch, r.cos_token = r.sin_token = cos.view.row;
        } else {
            r.positions = positions.data(), r.axis_count = 2;
            r.positions_axis = BATCH * TOKENS, r.positions_batch = TOKENS, r.positions_token = 1;
            r.axes = axes.data(), r.frequencies = frequencies.data();
            r.position_scale = 0.5f, r.attention_factor = 1.25f;
        }
        return r;
    }

    double factor(bool is_cos, int64_t b, int64_t token, int64_t pair, int64_t second) const {
        if (of.by_tables) return (is_cos ? cos : sin).get(b, 0, token, pair + second * of.pairs);
        const float position = (float)positions[(axes[pair] * BATCH + b) * TOKENS + token] * 0.5f;
        const volatile float angle = position * frequencies[pair];
        return (is_cos ? std::cos((double)angle) : std::sin((double)angle)) * 1.25;
    }

    void check(int64_t b, int64_t token, int64_t pair, const Tensor& x, const Tensor& out, int64_t head) const {
        const int64_t one = of.interleaved ? 2 * pair : pair, two = of.interleaved ? one + 1 : pair + of.pairs;
        const double first = x.get(b, head, token, one), second = x.get(b, head, token, two);
        const double cos_1 = factor(true, b, token, pair, 0), cos_2 = factor(true, b, token, pair, 1);
        const double sin_1 = factor(false, b, token, pair, 0), sin_2 = factor(false, b, token, pair, 1);
        const double want[] = {first * cos_1 + second * (of.inverse ? sin_2 : -sin_1),
                               second * cos_2 + first * (of.inverse ? -sin_1 : sin_2)};
        const int64_t columns[] = {one, two};
        const Format& format = format_of(of.out_dtype);
        for (int i = 0; i < 2; ++i) {
            // The sine, its factor, the product and the sum, and the rounding of the result.
            const double bound = 5 * 0x1p-24 * 2 * 1.25 + format.roundoff * std::abs(want[i]) + format.subnormal;
            const double got = out.get(b, head, token, columns[i]);
            if (std::abs(got - want[i]) <= bound) continue;  // a message takes longer to write than a pair to check
            throw Failure(std::string(format.name) + ": pair " + std::to_string(pair) + " is " + std::to_string(got) +
                          ", not " + std::to_string(want[i]));
        }
    }

    void check() const {
        for (int which = 0; which < 2; ++which) {
            const Tensor &x = from[which], &out = to[which];
            require(out.is_intact(), "something was written beside the heads");
            for (int64_t b = 0; b < BATCH; ++b)
                for (int64_t head = 0; head < x.heads; ++head)
                    for (int64_t token = 0; token < TOKENS; ++token) {
                        for (int64_t pair = 0; pair < of.pairs; ++pair) check(b, token, pair, x, out, head);
                        for (int64_t d = 2 * of.pairs; d < x.width; ++d)
                            require(std::abs(out.get(b, head, token, d) - x.get(b, head, token, d)) <=
                                        format_of(of.out_dtype).roundoff,
                                    "another channel has changed");
                    }
        }
    }
};

const std::vector<Layout>& layouts() {
    static const std::vector<Layout> all = {{false, false, false, 0, 0},
                                            {true, false, false, 0, 0},
                                            {false, false, false, 5, 0},
                                            {true, false, false, 1, 3}};
    return all;
}

TEST(every_pair_is_rotated) {
    for (const auto& [dtype, out_dtype] : std::vector<std::pair<Dtype, Dtype>>{{Dtype::f32, Dtype::f32},
                                                                               {Dtype::bf16, Dtype::bf16},
                                                                               {Dtype::f16, Dtype::f16},
                                                                               {Dtype::f32, Dtype::bf16},
                                                                               {Dtype::f32, Dtype::f16}})
        for (const int64_t pairs : {1, 7, 16, 65})
            for (const int64_t others : {0, 3})
                for (const int options : {0, 1, 2, 3, 4, 5, 6, 7})
                    for (const Layout& layout : layouts()) {
                        const Case c = {
                            dtype, out_dtype, pairs, others, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0,
                            layout};
                        const Example example(c);
                        const Rotation r = example.rotation();
                        require(qkv_rotate(&r) == 0, "the rotation was refused");
                        example.check();
                    }
}

TEST(heads_are_rotated_in_place) {
    for (const bool interleaved : {false, true}) {
        const Case c = {Dtype::bf16, Dtype::bf16, 70, 5, interleaved, false, false, {true, false, false, 0, 0}};
        const Example example(c);
        Rotation r = example.rotation();
        qkv_rotate(&r);
        for (int i = 0; i < 2; ++i) r.to[i] = r.from[i];
        qkv_rotate(&r);
        for (int i = 0; i < 2; ++i)
            require(example.from[i].bits() == example.to[i].bits(), "in place, the bits are others");
    }
}

TEST(axes_that_there_are_not_are_refused) {
    for (const int64_t axis : {-1, 2}) {
        const Case c = {Dtype::f32, Dtype::f32, 4, 0, false, false, false, {}};
        Example example(c);
        example.axes[3] = axis;
        const std::string before = example.to[0].bits();
        const Rotation r = example.rotation();
        require(qkv_rotate(&r) == 2, "an axis was not refused");
        require(example.to[0].bits() == before, "something was written");
    }
}

}  // namespace
}  // namespace qkv
