#include "call.h"

#include <map>
#include <sstream>

#include "library.h"

namespace qkv {

namespace {

// Whether the instruction set that runs is this one, or extends it.
bool runs(const std::string& wanted) {
#define ISA_NOT_ARM(name, base, ...) {#name, #base},
#define ISA_X86 ISA_NOT_ARM
#define ISA_ARM ISA_NOT_ARM
    static const std::map<std::string, std::string> bases = {
#include "abi/isas.def"
    };
#undef ISA_ARM
#undef ISA_X86
#undef ISA_NOT_ARM
    for (std::string isa = qkv_isa(); bases.count(isa); isa = bases.at(isa))
        if (isa == wanted) return true;
    return false;
}

// A matrix (batch, head, query, key) that is stored but once where it broadcasts.
Tensor matrix(const Case& c, const std::optional<Broadcast>& broadcast, Dtype dtype) {
    if (!broadcast) return Tensor(dtype, 0, 0, 0, 0, {});
    const Broadcast& one = *broadcast;
    return Tensor(dtype, one.batch ? 1 : c.batch, one.head ? 1 : c.kv_heads * c.group, one.row ? 1 : c.lq,
                  one.column ? 1 : c.lk, {});
}

Matrix as_matrix(const Tensor& tensor, const std::optional<Broadcast>& broadcast) {
    if (!broadcast) return Matrix{};
    const Broadcast& one = *broadcast;
    return {tensor.view.data,
            one.batch ? 0 : tensor.view.batch,
            one.head ? 0 : tensor.view.head,
            one.row ? 0 : tensor.view.row,
            one.column ? 0 : 1,
            tensor.dtype};
}

void compare(const std::string& name, const Tensor& got, const Allowed& want) {
    size_t i = 0;
    for (int64_t b = 0; b < got.batch; ++b)
        for (int64_t h = 0; h < got.heads; ++h)
            for (int64_t row = 0; row < got.rows; ++row)
                for (int64_t d = 0; d < got.width; ++d, ++i) {
                    const double x = got.get(b, h, row, d), y = want.value[i], error = want.error[i];
                    if (x == y || std::fabs(x - y) <= error || (std::isnan(x) && std::isnan(y))) continue;
                    std::ostringstream message;
                    message.precision(9);
                    message << name << "[" << b << ", " << h << ", " << row << ", " << d << "] is " << x << ", and not "
                            << y << " +- " << error;
                    throw Failure(message.str());
                }
    require(i == want.value.size(), name + " has another size than expected");
}

}  // namespace

Case Case::causal(int64_t window) const {
    Case c = *this;
    c.offset = lk - lq;
    c.right = 0;
    c.left = window == UNBOUNDED ? UNBOUNDED : window - 1;
    return c;
}

std::string Case::describe() const {
    std::ostringstream text;
    text << format_of(dtype).name << (int8 ? " int8" : "") << " batch=" << batch << " kv_heads=" << kv_heads
         << " group=" << group << " lq=" << lq << " lk=" << lk << " width=" << width << " value_width=" << value_width;
    if (offset) text << " offset=" << offset;
    if (left != UNBOUNDED) text << " left=" << left;
    if (right != UNBOUNDED) text << " right=" << right;
    if (sink_tokens) text << " sink_tokens=" << sink_tokens;
    if (prefix_tokens) text << " prefix_tokens=" << prefix_tokens;
    if (dilation > 1) text << " dilation=" << dilation;
    if (chunk) text << " chunk=" << chunk << " chunk_start=" << chunk_start;
    if (global_every) text << " global_every=" << global_every;
    for (const auto& [is_set, name] : {std::pair(keep, " keep"),
                                       {!offsets.empty(), " offsets"},
                                       {documents, " documents"},
                                       {in_runs, " in_runs"},
                                       {!lengths.empty(), " lengths"},
                                       {!prefix_lengths.empty(), " prefix_lengths"},
                                       {allow.has_value(), " allow"},
                                       {bias.has_value(), " bias"},
                                       {alibi, " alibi"},
                                       {sink_logits, " sink_logits"},
                                       {values_are_keys, " values_are_keys"}})
        if (is_set) text << name;
    if (softcap) text << " softcap=" << softcap;
    if (dropout) text << " dropout=" << dropout;
    text << " threads=" << threads;
    return text.str();
}

Call::Call(const Case& c)
    : c(c), heads(c.kv_heads * c.group), q(c.dtype, c.batch, heads, c.lq, c.width, c.queries),
      k(c.int8 ? Dtype::i8 : c.dtype, c.batch, c.kv_heads, c.lk, c.width, c.keys),
      v(c.values_are_keys ? Tensor(k, c.value_width)
                          : Tensor(k.dtype, c.batch, c.kv_heads, c.lk, c.value_width, c.keys)),
      out(c.dtype, c.batch, heads, c.lq, c.value_width, c.results),
      d_out(c.dtype, c.batch, heads, c.lq, c.value_width, c.queries),
      dq(c.dtype, c.batch, heads, c.lq, c.width, c.results), dk(c.dtype, c.batch, c.kv_heads, c.lk, c.width, c.results),
      dv(c.dtype, c.batch, c.kv_heads, c.lk, c.value_width, c.results),
      k_scale(Dtype::f32, c.batch, c.kv_heads, c.int8, c.lk, c.keys),
      v_scale(Dtype::f32, c.batch, c.kv_heads, c.int8, c.lk, c.keys), lse(Dtype::f32, c.batch, heads, c.lq, 1, {}),
      d_lse(Dtype::f32, c.batch, heads, c.lq, 1, {}), delta(Dtype::f32, c.batch, heads, c.lq, 1, {}),
      d_bias(Dtype::f32, c.batch, heads, c.bias ? c.lq : 0, c.lk, {}),
      d_alibi(Dtype::f32, 1, 1, c.alibi ? 1 : 0, heads, {}), bias(matrix(c, c.bias, c.bias_dtype)),
      allow(matrix(c, c.allow, Dtype::u8)) {
    std::mt19937 random(c.seed);
    const auto number = [&] { return (double)random() / 0x1p31 - 1; };
    for (const Tensor* tensor : {&q, &k, &v, &d_out, &d_lse, &bias})
        tensor->fill([&] { return tensor->dtype == Dtype::i8 ? std::floor(128 * number()) : 2 * number(); });
    for (const Tensor* scale : {&k_scale, &v_scale}) scale->fill([&] { return 0x1p-7 * (1.5 + number()); });
    allow.fill([&] { return random() % 4 > 0; });
    d_bias.fill([] { return 0.0; });
    const int64_t rows = c.shared_rows ? 1 : c.batch;
    for (int64_t i = 0; i < rows * c.lk; ++i) {
        const int64_t batch = i / c.lk, key = i % c.lk;
        if (c.keep && c.in_runs) keep.push_back(batch == 0 && key >= c.lk / 5 && key < c.lk - c.lk / 7);
        if (c.keep && !c.in_runs) keep.push_back(random() % 3 > 0);
        if (c.global_every) is_global.push_back(key % c.global_every == 5);
        if (!c.documents) continue;
        const bool begins = key == 0 || random() % 40 == 0;
        const int64_t name = c.in_runs ? -i : (int64_t)(random() % 3);
        documents.push_back(begins ? name : documents.back());
    }
    for (int64_t h = 0; h < heads; ++h) {
        if (c.alibi) alibi.push_back((float)std::ldexp(1.0, -(int)(h % 8) - 1));
        if (c.sink_logits) sink_logits.push_back((float)(4 * number()));
    }
    const auto data = [](const auto& all) { return all.empty() ? nullptr : all.data(); };
    problem.dtype = c.dtype;
    problem.kv_dtype = k.dtype;
    problem.batch = c.batch;
    problem.heads = heads;
    problem.kv_heads = c.kv_heads;
    problem.lq = c.lq;
    problem.lk = c.lk;
    problem.width = c.width;
    problem.value_width = c.value_width;
    problem.q = q.view;
    problem.k = k.view;
    problem.v = v.view;
    problem.out = out.view;
    problem.lse = (float*)lse.view.data;
    if (c.int8) {
        problem.k_scale = {(float*)k_scale.view.data, k_scale.view.batch, k_scale.view.head};
        problem.v_scale = {(float*)v_scale.view.data, v_scale.view.batch, v_scale.view.head};
    }
    problem.offset = c.offset;
    problem.offsets = data(this->c.offsets);
    problem.offsets_batch = 1;
    problem.left = c.left;
    problem.right = c.right;
    problem.sink_tokens = c.sink_tokens;
    problem.prefix_tokens = c.prefix_tokens;
    problem.dilation = c.dilation;
    problem.chunk = c.chunk;
    problem.chunk_start = c.chunk_start;
    problem.keep = data(keep);
    problem.document_ids = data(documents);
    problem.is_global = data(is_global);
    problem.keep_batch = problem.document_ids_batch = problem.is_global_batch = c.shared_rows ? 0 : c.lk;
    problem.prefix_lengths = data(this->c.prefix_lengths);
    problem.prefix_lengths_batch = c.prefix_lengths.size() > 1;
    problem.lengths = data(this->c.lengths);
    problem.lengths_batch = c.lengths.size() > 1;
    problem.allow = as_matrix(allow, c.allow);
    problem.scale = c.scale;
    problem.softcap = c.softcap;
    problem.bias = as_matrix(bias, c.bias);
    problem.alibi = data(alibi);
    problem.sink_logits = data(sink_logits);
    problem.dropout = c.dropout;
    problem.seed = 0x9e3779b97f4a7c15u * c.seed;
    problem.threads = c.threads;
    gradients.d_out = d_out.view;
    gradients.d_lse = c.d_lse ? (const float*)d_lse.view.data : nullptr;
    gradients.delta = (float*)delta.view.data;
    gradients.dq = dq.view;
    gradients.dk = dk.view;
    gradients.dv = dv.view;
    gradients.d_bias = c.bias ? (float*)d_bias.view.data : nullptr;
    gradients.d_alibi = c.alibi ? (float*)d_alibi.view.data : nullptr;
}

void Call::forward() const { require(qkv_forward(&problem) == 0, c.describe() + ": no memory"); }

void Call::backward() const { require(qkv_backward(&problem, &gradients) == 0, c.describe() + ": no memory"); }

void Call::check(const std::vector<bool>& kept) const {
    // Pairs of bf16 are multiplied as such, and int8 by numbers of 16 bits; for many rows, int8 is rounded to the dtype
    // of queries first. Everything else is in fp32.
    const bool few = c.lq == 1 && c.group <= (runs("avx2") ? 8 : 4);
    const double largest = runs("avx512") ? 32767 : runs("neonbf16") ? 32639 : 0;  // in fixed point
    Roundoff roundoff;
    if (c.int8 && few)
        roundoff.fixed_point = largest && c.dtype != Dtype::f32 ? 0.51 / largest : 0;
    else if (c.int8)
        roundoff.keys = format_of(c.dtype).roundoff;
    if ((runs("avx512bf16") || runs("neonbf16")) && c.dtype == Dtype::bf16 && !(c.int8 && few))
        roundoff.weights = format_of(c.dtype).roundoff;
    const Expected want = expect(problem, c.int8 ? nullptr : &gradients, kept, roundoff);
    try {
        compare("out", out, want.out);
        compare("lse", lse, want.lse);
        if (!c.int8) {
            compare("dq", dq, want.dq);
            compare("dk", dk, want.dk);
            compare("dv", dv, want.dv);
            if (c.bias) compare("d_bias", d_bias, want.d_bias);
            if (c.alibi) compare("d_alibi", d_alibi, want.d_alibi);
        }
        const std::pair<const Tensor*, const char*> all[] = {
            {&q, "q"},   {&k, "k"},   {&v, "v"},     {&d_out, "d_out"}, {&out, "out"},       {&dq, "dq"},
            {&dk, "dk"}, {&dv, "dv"}, {&lse, "lse"}, {&delta, "delta"}, {&d_bias, "d_bias"}, {&d_alibi, "d_alibi"}};
        for (const auto& [tensor, name] : all)
            require((c.values_are_keys && tensor == &v) || tensor->is_intact(),
                    std::string("something was written between the rows of ") + name);
    } catch (const Failure& failure) {
        throw Failure(c.describe() + ": " + failure.what());
    }
}

std::string Call::bits() const {
    std::string all;
    for (const Tensor* tensor : {&out, &lse, &dq, &dk, &dv, &d_bias, &d_alibi}) all += tensor->bits();
    return all;
}

void check(const Case& c) {
    const Call call(c);
    call.forward();
    if (!c.int8) call.backward();
    call.check();
}

}  // namespace qkv
