// A layer's call with few tokens, wherever its keys are: the bits of its parts called one after the other, and nothing
// written where it is refused.
#include <cmath>
#include <functional>

#include "abi/layer_step.h"
#include "call.h"
#include "library.h"
#include "objects.h"

extern "C" {
int qkv_project(const void* projections, int count, int threads);
int qkv_rotate(const void* rotation);
int qkv_layer_step_size();
int qkv_layer_step(const void* interpreter, void* const* tensors, const void* numbers);
}

namespace qkv {
namespace {

constexpr int64_t BATCH = 2, EMBED = 21, HEADS = 4, KV_HEADS = 2, WIDTH = 10, VALUE_WIDTH = 7, PAIRS = 4;
constexpr int64_t PAGE = 3, ENTRIES = 4, EARLIER = 5, CAPACITY = PAGE * ENTRIES;

struct Kind {
    Dtype dtype = Dtype::f32;
    int64_t count = 1;     // of new tokens
    bool paged = false;    // keys are
    bool context = false;  // keys are those of a context, and none are appended
    bool gate = false;
    bool positions = false;  // each token has its own
    int threads = 1;
};

struct Layer {
    Tensor q, k, v, gate, out, q_bias, out_bias;

    explicit Layer(Dtype dtype)
        : q(matrix(dtype, HEADS * WIDTH, EMBED)), k(matrix(dtype, KV_HEADS * WIDTH, EMBED)),
          v(matrix(dtype, KV_HEADS * VALUE_WIDTH, EMBED)), gate(matrix(dtype, HEADS * VALUE_WIDTH, EMBED)),
          out(matrix(dtype, EMBED, HEADS * VALUE_WIDTH)), q_bias(matrix(dtype, 1, HEADS * WIDTH)),
          out_bias(matrix(dtype, 1, EMBED)) {}

    static Tensor matrix(Dtype dtype, int64_t rows, int64_t columns) {
        return Tensor(dtype, 1, 1, rows, columns, {false, false, false, 3, 0});
    }
};

// Keys and values, of a row of memory for each batch or in pages of a pool. Beside their tokens, they are NaN.
struct Keys {
    Tensor k, v;
    std::vector<int64_t> table = {5, 2, 7, 0, 1, 6, 3, 4};

    explicit Keys(const Kind& c) : k(memory(c, WIDTH)), v(memory(c, VALUE_WIDTH)) {}

    static Tensor memory(const Kind& c, int64_t width) {
        return Tensor(c.dtype, c.paged ? BATCH * ENTRIES : BATCH, KV_HEADS, c.paged ? PAGE : CAPACITY, width, {});
    }

    // The page, or the batch, of a key and its row there.
    std::pair<int64_t, int64_t> place(const Kind& c, int64_t b, int64_t key) const {
        if (!c.paged) return {b, key};
        return {table[b * ENTRIES + key / PAGE], key % PAGE};
    }

    void fill(const Kind& c, const std::function<double()>& number) const {
        for (const Tensor* x : {&k, &v}) {
            x->fill([] { return std::nan(""); });
            for (int64_t b = 0; b < BATCH; ++b)
                for (int64_t h = 0; h < KV_HEADS; ++h)
                    for (int64_t key = 0; key < EARLIER; ++key)
                        for (int64_t d = 0; d < x->width; ++d)
                            x->set(place(c, b, key).first, h, place(c, b, key).second, d, number());
        }
    }
};

struct Example {
    const Kind c;
    const Layer layer;
    const Keys keys;
    const Tensor x, out;
    const Tensor frequencies;
    std::vector<int64_t> positions;

    explicit Example(const Kind& c)
        : c(c), layer(c.dtype), keys(c), x(c.dtype, BATCH, 1, c.count, EMBED, {}),
          out(c.dtype, BATCH, 1, c.count, EMBED, {}), frequencies(Dtype::f32, 1, 1, 1, PAIRS, {}) {
        std::mt19937 generator(3);
        std::uniform_real_distribution<> numbers(-1, 1);
        const auto number = [&] { return numbers(generator); };
        for (const Tensor* each :
             {&layer.q, &layer.k, &layer.v, &layer.gate, &layer.out, &layer.q_bias, &layer.out_bias, &x})
            each->fill(number);
        keys.fill(c, number);
        frequencies.fill(number);
        for (int64_t i = 0; i < BATCH * c.count; ++i) positions.push_back((int64_t)(1000 * number()));
    }

    int64_t key_count() const { return c.context ? EARLIER : EARLIER + c.count; }

    // Integers (batch, columns).
    Object of_integers(const std::vector<int64_t>& numbers, int64_t columns) const {
        Object object = Object::of_rows(x, 2);
        object.data = (void*)numbers.data(), object.code = dlpack::INT, object.bits = 64;
        object.own_shape[0] = BATCH, object.own_shape[1] = object.own_strides[0] = columns;
        return object;
    }

    // Keys without spare slots, as caches give them.
    Object of_keys(const Tensor& memory) const {
        Object object(memory);
        if (!c.paged) object.own_shape[2] = key_count();
        return object;
    }

    int run(const std::function<void(std::vector<Object>&)>& change = [](std::vector<Object>&) {}) const {
        const auto weight = [](const Tensor& of) { return Object::of_rows(of, 2); };
        std::vector<Object> given = {Object::of_rows(x, 3),
                                     weight(layer.q),
                                     Object::of_rows(layer.q_bias, 1),
                                     weight(layer.k),
                                     weight(layer.v),
                                     weight(layer.gate),
                                     weight(layer.out),
                                     Object::of_rows(layer.out_bias, 1),
                                     Object::of_rows(frequencies, 1),
                                     of_keys(keys.k),
                                     of_keys(keys.v),
                                     of_integers(keys.table, ENTRIES),
                                     of_integers(positions, c.count),
                                     Object::of_rows(out, 3)};
        change(given);
        const auto maybe = [](bool is_given, Object& object) { return is_given ? (void*)&object : (void*)&none; };
        void* const tensors[] = {&given[0],
                                 &given[1],
                                 &given[2],
                                 maybe(!c.context, given[3]),
                                 &none,
                                 maybe(!c.context, given[4]),
                                 &none,
                                 maybe(c.gate, given[5]),
                                 &none,
                                 &given[6],
                                 &given[7],
                                 &none,
                                 &none,
                                 maybe(!c.context, given[8]),
                                 &none,
                                 &none,
                                 &given[9],
                                 &given[10],
                                 &none,
                                 &none,
                                 maybe(c.paged, given[11]),
                                 &none,
                                 maybe(c.positions, given[12]),
                                 &none,
                                 &none,
                                 &none,
                                 &none,
                                 &none,
                                 &given[13]};
        require(qkv_layer_step_size() == sizeof tensors / sizeof *tensors, "another number of tensors");
        StepNumbers n = {};
        n.key_count = c.paged ? key_count() : 0, n.offset = c.context ? 0 : EARLIER, n.position = 40;
        n.left = UNBOUNDED, n.right = c.context ? UNBOUNDED : 0, n.dilation = 1;
        n.position_scale = n.attention_factor = 1, n.scale = 0.3f, n.threads = c.threads;
        return qkv_layer_step(&python, tensors, &n);
    }

    // The same by parts, from keys of its own. Returns the heads that out_proj takes.
    Tensor compose() const {
        const Tensor q(c.dtype, BATCH, HEADS, c.count, WIDTH, {true}),
            k(c.dtype, BATCH, KV_HEADS, c.count, WIDTH, {true});
        const Tensor v(c.dtype, BATCH, KV_HEADS, c.count, VALUE_WIDTH, {true});
        const Tensor gates(c.dtype, BATCH, HEADS, c.count, VALUE_WIDTH, {true});
        const Tensor heads(c.dtype, BATCH, HEADS, c.count, VALUE_WIDTH, {true});
        project(x, layer.q, &layer.q_bias, q);
        if (!c.context) project(x, layer.k, nullptr, k), project(x, layer.v, nullptr, v);
        if (!c.context) {
            rotate(q, k);
            for (int64_t b = 0; b < BATCH; ++b)
                for (int64_t h = 0; h < KV_HEADS; ++h)
                    for (int64_t i = 0; i < c.count; ++i) {
                        const auto [page, row] = keys.place(c, b, EARLIER + i);
                        keys.k.copy_row(page, h, row, k.at(b, h, i));
                        keys.v.copy_row(page, h, row, v.at(b, h, i));
                    }
        }
        attend(q, heads);
        if (c.gate) {
            project(x, layer.gate, nullptr, gates);
            for (int64_t b = 0; b < BATCH; ++b)
                for (int64_t h = 0; h < HEADS; ++h)
                    for (int64_t i = 0; i < c.count; ++i)
                        for (int64_t d = 0; d < VALUE_WIDTH; ++d)
                            heads.set(b, h, i, d, heads.get(b, h, i, d) / (1 + std::exp(-gates.get(b, h, i, d))));
        }
        project(heads, layer.out, &layer.out_bias, out);
        return heads;
    }

   private:
    // Rows of all heads of each token.
    void project(const Tensor& from, const Tensor& weight, const Tensor* bias, const Tensor& to) const {
        const Projection p = {
            c.dtype,        c.dtype,      BATCH * c.count,  weight.width,    weight.rows,
            from.view.data, weight.width, weight.view.data, weight.view.row, bias ? bias->view.data : nullptr,
            to.view.data,   weight.rows};
        require(qkv_project(&p, 1, 1) == 0, "not a product that the kernel takes");
    }

    void rotate(const Tensor& q, const Tensor& k) const {
        Rotation r = {};
        r.dtype = r.out_dtype = c.dtype;
        r.batch = BATCH, r.tokens = c.count, r.width = WIDTH, r.pairs = PAIRS, r.threads = 1;
        r.heads[0] = HEADS, r.heads[1] = KV_HEADS;
        r.from[0] = r.to[0] = q.view, r.from[1] = r.to[1] = k.view;
        r.frequencies = (const float*)frequencies.view.data, r.position_scale = r.attention_factor = 1;
        if (c.positions)
            r.positions = positions.data(), r.positions_batch = c.count, r.positions_token = 1, r.axis_count = 1;
        else
            r.offset = 40;
        require(qkv_rotate(&r) == 0, "not a rotation");
    }

    void attend(const Tensor& q, const Tensor& heads) const {
        Problem p = {};
        p.dtype = p.kv_dtype = c.dtype;
        p.batch = BATCH, p.heads = HEADS, p.kv_heads = KV_HEADS, p.lq = c.count, p.lk = key_count();
        p.width = WIDTH, p.value_width = VALUE_WIDTH, p.threads = 1;
        p.q = q.view, p.k = keys.k.view, p.v = keys.v.view, p.out = heads.view;
        if (c.paged) p.pages = {keys.table.data(), ENTRIES, PAGE, 0, BATCH * ENTRIES};
        p.offset = c.context ? 0 : EARLIER, p.left = UNBOUNDED, p.right = c.context ? UNBOUNDED : 0;
        p.dilation = 1, p.scale = 0.3f;
        require(qkv_forward(&p) == 0, "not a problem");
    }
};

void check(const Kind& c) {
    const Example whole(c), parts(c);
    taken = 0;
    require(whole.run() == 0 && taken == 1, "not computed");
    const Tensor heads = parts.compose();
    require(whole.keys.k.bits() == parts.keys.k.bits() && whole.keys.v.bits() == parts.keys.v.bits(), "other keys");
    require(whole.keys.k.is_intact() && whole.keys.v.is_intact() && whole.out.is_intact(), "written beside a tensor");
    if (!c.gate) return require(whole.out.bits() == parts.out.bits(), "other bits than those of the parts");
    // The sigmoid is rounded to the dtype in a step alone, heads and results in both; sums of products to f32.
    const double roundoff = 4 * format_of(c.dtype).roundoff + 2 * HEADS * VALUE_WIDTH * format_of(Dtype::f32).roundoff;
    for (int64_t b = 0; b < BATCH; ++b)
        for (int64_t i = 0; i < c.count; ++i)
            for (int64_t n = 0; n < EMBED; ++n) {
                double sum = std::abs(parts.layer.out_bias.get(0, 0, 0, n));
                for (int64_t h = 0; h < HEADS; ++h)
                    for (int64_t d = 0; d < VALUE_WIDTH; ++d)
                        sum += std::abs(heads.get(b, h, i, d) * parts.layer.out.get(0, 0, n, h * VALUE_WIDTH + d));
                require(std::abs(whole.out.get(b, 0, i, n) - parts.out.get(b, 0, i, n)) <= roundoff * sum,
                        "other heads");
            }
}

TEST(a_step_has_the_bits_of_its_parts) {
    for (const Dtype dtype : DTYPES)
        for (const int64_t count : {1, 3, 6})
            for (const bool paged : {false, true})
                for (const bool gate : {false, true})
                    for (const int threads : {1, 3}) {
                        check({dtype, count, paged, false, gate, count == 3, threads});
                        check({dtype, count, paged, true, gate, false, threads});
                    }
}

TEST(a_step_refuses_what_does_not_fit) {
    using Objects = std::vector<Object>;
    const std::function<void(Objects&)> changes[] = {
        [](Objects& o) { o[0].own_shape[2] = EMBED - 1; },
        [](Objects& o) { o[1].own_strides[1] = 2; },
        [](Objects& o) { o[2].own_shape[0] = 3; },
        [](Objects& o) { o[3].own_shape[0] = WIDTH; },
        [](Objects& o) { o[4].code = dlpack::INT; },
        [](Objects& o) { o[5].own_shape[0] = HEADS * WIDTH; },
        [](Objects& o) { o[6].own_shape[1] = 1; },
        [](Objects& o) { o[6].dimensions = -1; },
        [](Objects& o) { o[8].own_shape[0] = WIDTH; },
        [](Objects& o) { o[9].own_shape[0] = 1; },
        [](Objects& o) { o[10].own_shape[1] = 1; },
        [](Objects& o) { o[11].own_shape[1] = 2; },
        [](Objects& o) { o[11].own_shape[0] = 1; },
        [](Objects& o) { o[11].own_strides[1] = 2; },
        [](Objects& o) { o[11].bits = 32; },
        [](Objects& o) { ((int64_t*)o[11].data)[1] = BATCH * ENTRIES; },
        [](Objects& o) { ((int64_t*)o[11].data)[5] = -1; },
        [](Objects& o) { o[12].own_shape[1] = 1; },
        [](Objects& o) { o[13].own_shape[1] = 1; },
    };
    for (const auto& change : changes) {
        const Example example({Dtype::f32, 3, true, false, true, true, 1});
        const std::string k = example.keys.k.bits(), v = example.keys.v.bits(), out = example.out.bits();
        require(example.run(change) == 2, "computed what does not fit");
        require(example.keys.k.bits() == k && example.keys.v.bits() == v, "appended before it was refused");
        require(example.out.bits() == out, "written before it was refused");
    }
}

}  // namespace
}  // namespace qkv
