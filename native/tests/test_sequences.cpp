// Several sequences in a call: each has the bits that it has alone, wherever its keys lie, and anything outside it is
// not read.
#include <algorithm>
#include <sstream>

#include "call.h"
#include "library.h"

namespace qkv {

namespace {

constexpr int64_t GARBAGE = (int64_t)1 << 60;  // an address far from everything

struct Sequence {
    int64_t lq, lk, first = 0;  // of its keys, in its pages
};

struct Batch {
    Dtype dtype = Dtype::f32;
    std::vector<Sequence> sequences;
    int64_t page_size = 0;    // 0: packed one after the other
    bool in_order = false;    // pages of a sequence follow each other
    bool one_prefix = false;  // all sequences begin with the same pages
    int64_t kv_heads = 2, group = 2, width = 24, value_width = 40;
    int64_t left = UNBOUNDED, right = UNBOUNDED;
    float softcap = 0;
    bool alibi = false, sink_logits = false;
    int threads = 1;
};

// The numbers of a call, and of each sequence alone.
class Together {
   public:
    explicit Together(const Batch& b)
        : b(b), heads(b.kv_heads * b.group), random(b.sequences.size() + b.page_size), starts(1, 0) {
        for (const Sequence& one : b.sequences) {
            starts.push_back(starts.back() + one.lq);
            lengths.push_back(one.lk);
        }
        place();
        const Layout tokens{true};
        q = tensor(1, heads, starts.back(), b.width, tokens);
        out = tensor(1, heads, starts.back(), b.value_width, tokens);
        k = tensor(pages, b.kv_heads, page_size, b.width, tokens);
        v = tensor(pages, b.kv_heads, page_size, b.value_width, tokens);
        lse = std::make_unique<Tensor>(Dtype::f32, 1, heads, starts.back(), 1, Layout{});
        q->fill([&] { return number(); });
        // Keys of no sequence stay NaN.
        for (size_t n = 0; n < b.sequences.size(); ++n)
            for (int64_t j = 0; j < lengths[n]; ++j)
                for (int64_t h = 0; h < b.kv_heads; ++h) {
                    for (int64_t d = 0; d < b.width; ++d) k->set(page(n, j), h, row(n, j), d, number());
                    for (int64_t d = 0; d < b.value_width; ++d) v->set(page(n, j), h, row(n, j), d, number());
                }
        for (size_t i = 0; i < b.sequences.size() * heads; ++i) slopes.push_back((float)std::abs(number()));
        for (int64_t h = 0; h < heads; ++h) sinks.push_back((float)number());
        problem = shared();
        problem.q = q->view, problem.k = k->view, problem.v = v->view, problem.out = out->view;
        problem.lse = (float*)lse->view.data;
        problem.lq = starts.back();
        problem.alibi = b.alibi ? slopes.data() : nullptr;
        sequences = {(int64_t)b.sequences.size(),
                     starts.data(),
                     firsts.data(),
                     lengths.data(),
                     b.page_size ? tables.data() : nullptr,
                     entries,
                     pages,
                     page_size,
                     heads};
    }

    // Sequence n as a problem of its own, with the keys side by side.
    struct Alone {
        std::unique_ptr<Tensor> q, k, v, out, lse;
        Problem problem;
    };
    Alone alone(size_t n) const {
        const auto [lq, lk, first] = b.sequences[n];
        Alone one = {tensor(1, heads, lq, b.width, {}),
                     tensor(1, b.kv_heads, lk, b.width, {}),
                     tensor(1, b.kv_heads, lk, b.value_width, {}),
                     tensor(1, heads, lq, b.value_width, {}),
                     std::make_unique<Tensor>(Dtype::f32, 1, heads, lq, 1, Layout{}),
                     shared()};
        copy(*q, *one.q, n);
        for (int64_t j = 0; j < lk; ++j)
            for (int64_t h = 0; h < b.kv_heads; ++h) {
                one.k->copy_row(0, h, j, k->at(page(n, j), h, row(n, j)));
                one.v->copy_row(0, h, j, v->at(page(n, j), h, row(n, j)));
            }
        one.problem.q = one.q->view, one.problem.k = one.k->view, one.problem.v = one.v->view;
        one.problem.out = one.out->view;
        one.problem.lse = (float*)one.lse->view.data;
        one.problem.lq = lq, one.problem.lk = lk, one.problem.offset = lk - lq;
        one.problem.alibi = b.alibi ? slopes.data() + n * heads : nullptr;
        return one;
    }

    // The rows of sequence n of a packed tensor.
    void copy(const Tensor& from, const Tensor& to, size_t n) const {
        for (int64_t h = 0; h < to.heads; ++h)
            for (int64_t i = 0; i < to.rows; ++i) to.copy_row(0, h, i, from.at(0, h, starts[n] + i));
    }

    void require_same(const Tensor& got, const Tensor& want, int64_t first, size_t n, const char* name) const {
        for (int64_t h = 0; h < want.heads; ++h)
            for (int64_t i = 0; i < want.rows; ++i)
                if (std::memcmp(got.at(0, h, first + i), want.at(0, h, i), want.width * size_of(want.dtype)) != 0)
                    throw Failure(describe() + ": sequence " + std::to_string(n) + " has other bits of " + name +
                                  " in row " + std::to_string(i) + " than alone");
    }

    std::string describe() const {
        std::ostringstream text;
        text << format_of(b.dtype).name << " sequences";
        for (const Sequence& one : b.sequences) text << " " << one.lq << "x" << one.lk << "+" << one.first;
        text << " page_size=" << b.page_size << " in_order=" << b.in_order << " one_prefix=" << b.one_prefix
             << " kv_heads=" << b.kv_heads << " group=" << b.group << " width=" << b.width << " left=" << b.left
             << " right=" << b.right << " threads=" << b.threads;
        return text.str();
    }

    std::unique_ptr<Tensor> tensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, Layout layout) const {
        return std::make_unique<Tensor>(b.dtype, batch, heads, rows, width, layout);
    }

    double number() const { return (double)random() / 0x1p30 - 2; }

    const Batch b;
    const int64_t heads;
    mutable std::mt19937 random;
    std::unique_ptr<Tensor> q, k, v, out, lse;
    std::vector<int64_t> starts, firsts, lengths, tables;
    std::vector<float> slopes, sinks;
    int64_t entries = 0, pages = 1, page_size = 0;
    Problem problem;
    Sequences sequences;

   private:
    // Gives each sequence its pages, in no order, some unused; tables end with garbage.
    void place() {
        if (b.page_size == 0) {
            int64_t first = 0;
            for (const Sequence& one : b.sequences) {
                first += one.first;  // a gap
                firsts.push_back(first);
                first += one.lk;
            }
            page_size = first + 1;
            return;
        }
        page_size = b.page_size;
        std::vector<std::vector<int64_t>> all;
        int64_t next = 1;
        for (const Sequence& one : b.sequences) {
            firsts.push_back(one.first);
            all.emplace_back();
            for (int64_t i = 0; i < (one.first + one.lk + page_size - 1) / page_size; ++i)
                all.back().push_back(i < one.first / page_size ? GARBAGE : next++);
            entries = std::max(entries, (int64_t)all.back().size() + 1);
        }
        pages = next + 1;
        std::vector<int64_t> names(pages);
        for (int64_t i = 0; i < pages; ++i) names[i] = i;
        if (!b.in_order) std::shuffle(names.begin(), names.end(), random);
        for (auto& table : all) {
            for (int64_t& page : table) page = page == GARBAGE ? GARBAGE : names[page];
            if (b.one_prefix && !all[0].empty() && !table.empty()) table[0] = all[0][0];
            table.resize(entries, &table == &all[0] ? -1 : GARBAGE);
            tables.insert(tables.end(), table.begin(), table.end());
        }
    }

    int64_t page(size_t n, int64_t j) const {
        return b.page_size ? tables[n * entries + (firsts[n] + j) / page_size] : 0;
    }
    int64_t row(size_t n, int64_t j) const { return (firsts[n] + j) % page_size; }

    Problem shared() const {
        Problem p{};
        p.dtype = p.kv_dtype = b.dtype;
        p.batch = 1;
        p.heads = heads, p.kv_heads = b.kv_heads;
        p.width = b.width, p.value_width = b.value_width;
        p.left = b.left, p.right = b.right;
        p.scale = 0.3f;
        p.softcap = b.softcap;
        p.sink_logits = b.sink_logits ? sinks.data() : nullptr;
        p.threads = b.threads;
        return p;
    }
};

void check_forward(const Batch& b) {
    const Together all(b);
    require(qkv_forward_sequences(&all.problem, &all.sequences) == 0, all.describe() + ": refused");
    for (size_t n = 0; n < b.sequences.size(); ++n) {
        const auto one = all.alone(n);
        require(qkv_forward(&one.problem) == 0, "no memory");
        all.require_same(*all.out, *one.out, all.starts[n], n, "out");
        all.require_same(*all.lse, *one.lse, all.starts[n], n, "lse");
    }
    require(all.out->is_intact() && all.lse->is_intact(), all.describe() + ": something was written between rows");
    for (int64_t i = 0; i < all.starts.back(); ++i)
        for (int64_t h = 0; h < all.heads; ++h)
            require(std::isfinite(all.out->get(0, h, i, 0)), all.describe() + ": memory outside the keys was read");
}

const std::vector<std::vector<Sequence>> MIXED = {
    {{1, 1}, {1, 7}, {1, 100}, {1, 0}, {1, 97}, {1, 481}, {1, 1000}},  // decoding
    {{3, 5}, {0, 4}, {1, 1}, {9, 2}, {4, 0}, {2, 131}, {17, 500}},     // chunks, more queries than keys
    {{70, 70}, {1, 300}, {130, 700}, {16, 16}, {5, 961}},              // several tiles
};

}  // namespace

TEST(packed_sequences_have_the_bits_that_they_have_alone) {
    for (Dtype dtype : DTYPES)
        for (const auto& sequences : MIXED)
            for (int threads : {1, 3}) {
                Batch b;
                b.dtype = dtype;
                b.sequences = sequences;
                b.threads = threads;
                check_forward(b);
                b.right = 0;
                b.left = 40;
                b.alibi = b.sink_logits = true;
                b.softcap = 2;
                check_forward(b);
            }
}

TEST(keys_in_pages_give_the_bits_of_keys_side_by_side) {
    for (Dtype dtype : DTYPES)
        for (auto sequences : MIXED)
            for (int64_t page_size : {1, 16, 17, 256, 1024}) {
                Batch b;
                b.dtype = dtype;
                b.page_size = page_size;
                b.threads = page_size % 2 + 1;
                for (int64_t first : {0, 300}) {
                    for (Sequence& one : sequences) one.first = first;
                    b.sequences = sequences;
                    b.right = UNBOUNDED;
                    check_forward(b);
                    b.right = 0;
                    check_forward(b);
                }
                b.in_order = true;
                check_forward(b);
                b.in_order = false;
                b.left = 130;
                b.alibi = b.sink_logits = true;
                check_forward(b);
            }
}

TEST(pages_of_several_sequences) {
    for (Dtype dtype : DTYPES) {
        Batch b;
        b.dtype = dtype;
        b.page_size = 16;
        b.one_prefix = true;
        b.sequences = {{1, 40}, {1, 33}, {3, 16}, {1, 500}};
        check_forward(b);
    }
}

TEST(groups_and_widths_in_pages) {
    for (Dtype dtype : DTYPES)
        for (int64_t group : {1, 3, 8, 12, 40})
            for (int64_t width : {13, 32, 64, 128}) {
                Batch b;
                b.dtype = dtype;
                b.page_size = 16;
                b.kv_heads = group == 1 ? 5 : 2;
                b.group = group;
                b.width = width;
                b.value_width = width + (width == 13);
                b.sequences = {{1, 600}, {2, 90}, {1, 31}};
                b.threads = 4;
                check_forward(b);
            }
}

TEST(backward_of_packed_sequences_has_the_bits_that_each_has_alone) {
    for (Dtype dtype : DTYPES)
        for (const auto& sequences : MIXED)
            for (int threads : {1, 3}) {
                Batch b;
                b.dtype = dtype;
                b.sequences = sequences;
                b.threads = threads;
                b.right = 0;
                b.alibi = b.sink_logits = true;
                b.softcap = threads;
                const Together all(b);
                const Layout tokens{true};
                const auto d_out = all.tensor(1, all.heads, all.starts.back(), b.value_width, tokens);
                const auto dq = all.tensor(1, all.heads, all.starts.back(), b.width, tokens);
                const auto dk = all.tensor(1, b.kv_heads, all.page_size, b.width, tokens);
                const auto dv = all.tensor(1, b.kv_heads, all.page_size, b.value_width, tokens);
                const Tensor d_lse(Dtype::f32, 1, all.heads, all.starts.back(), 1, {});
                const Tensor delta(Dtype::f32, 1, all.heads, all.starts.back(), 1, {});
                const Tensor d_alibi(Dtype::f32, 1, 1, (int64_t)b.sequences.size(), all.heads, {});
                d_out->fill([&] { return all.number(); });
                d_lse.fill([&] { return all.number(); });
                d_alibi.fill([] { return 0.0; });
                Gradients g{
                    d_out->view, (float*)d_lse.view.data,  (float*)delta.view.data, dq->view, dk->view, dv->view,
                    nullptr,     (float*)d_alibi.view.data};
                require(qkv_forward_sequences(&all.problem, &all.sequences) == 0, "forward was refused");
                require(qkv_backward_sequences(&all.problem, &all.sequences, &g) == 0, "backward was refused");
                for (size_t n = 0; n < b.sequences.size(); ++n) {
                    const auto one = all.alone(n);
                    const int64_t lq = b.sequences[n].lq, lk = b.sequences[n].lk;
                    if (lq == 0 && lk == 0) continue;
                    const auto d_out_1 = all.tensor(1, all.heads, lq, b.value_width, {});
                    const auto dq_1 = all.tensor(1, all.heads, lq, b.width, {});
                    const auto dk_1 = all.tensor(1, b.kv_heads, lk, b.width, {});
                    const auto dv_1 = all.tensor(1, b.kv_heads, lk, b.value_width, {});
                    const Tensor d_lse_1(Dtype::f32, 1, all.heads, lq, 1, {});
                    const Tensor delta_1(Dtype::f32, 1, all.heads, lq, 1, {});
                    const Tensor d_alibi_1(Dtype::f32, 1, 1, 1, all.heads, {});
                    all.copy(*d_out, *d_out_1, n);
                    all.copy(d_lse, d_lse_1, n);
                    Gradients alone{d_out_1->view,
                                    (float*)d_lse_1.view.data,
                                    (float*)delta_1.view.data,
                                    dq_1->view,
                                    dk_1->view,
                                    dv_1->view,
                                    nullptr,
                                    (float*)d_alibi_1.view.data};
                    require(qkv_forward(&one.problem) == 0, "no memory");
                    require(qkv_backward(&one.problem, &alone) == 0, "no memory");
                    all.require_same(*dq, *dq_1, all.starts[n], n, "dq");
                    all.require_same(*dk, *dk_1, all.firsts[n], n, "dk");
                    all.require_same(*dv, *dv_1, all.firsts[n], n, "dv");
                    all.require_same(delta, delta_1, all.starts[n], n, "delta");
                    all.require_same(d_alibi, d_alibi_1, (int64_t)n, n, "d_alibi");
                }
            }
}

TEST(sequences_outside_of_their_tensors_are_refused_before_anything_is_read) {
    Batch b;
    b.page_size = 4;
    b.sequences = {{2, 9}, {1, 0}, {3, 6}};
    const auto require_refused = [&](const char* what, const auto& spoil) {
        Together all(b);
        spoil(all);
        require(qkv_forward_sequences(&all.problem, &all.sequences) == 2, std::string("not refused: ") + what);
        for (const char bit : all.out->bits()) require(bit == '\xff', std::string("was written: ") + what);
    };
    require_refused("a first page below 0", [](auto& all) { all.tables[0] = -1; });
    require_refused("a last page beyond the pool", [](auto& all) { all.tables[2] = all.pages; });
    require_refused("starts that begin later", [](auto& all) { all.starts[0] = 1; });
    require_refused("starts that fall", [](auto& all) { all.starts[1] = 4; });
    require_refused("starts that end early", [](auto& all) { all.starts[3] = 5; });
    require_refused("starts that end late", [](auto& all) { all.starts[3] = 7; });
    require_refused("a length below 0", [](auto& all) { all.lengths[1] = -1; });
    require_refused("a length beyond the table", [](auto& all) { all.lengths[2] = all.entries * 4 + 1; });
    require_refused("a length that overflows", [](auto& all) { all.lengths[2] = INT64_MAX; });
    require_refused("a first key below 0", [](auto& all) { all.firsts[0] = -1; });
    require_refused("a first key that overflows", [](auto& all) { all.firsts[0] = INT64_MAX; });
    require_refused("no sequence", [](auto& all) { all.sequences.count = 0; });
    b.page_size = 0;
    require_refused("keys beyond the only page", [](auto& all) { all.lengths[2] += 2; });
}

}  // namespace qkv
