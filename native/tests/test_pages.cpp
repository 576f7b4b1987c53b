// Keys of a batch in pages, which a table names for each: the bits of keys side by side, whatever the table, and
// anything outside of the keys is not read.
#include <algorithm>
#include <numeric>

#include "call.h"
#include "library.h"

namespace qkv {

namespace {

constexpr int64_t GARBAGE = (int64_t)1 << 60;  // a page far from everything

struct Paging {
    int64_t size, first = 0;  // of the keys of each batch, in its pages
    bool in_order = false;    // pages of a batch follow each other
    bool shared = false;      // all batches have the same pages, for keys that are the same
};

// The call of a case with its keys in pages. Pages that no key is in are NaN, as are keys behind the lengths.
class PagedCall {
   public:
    PagedCall(const Call& plain, const Paging& paging)
        : c(plain.c), paging(paging), entries((paging.first + c.lk + paging.size - 1) / paging.size + 1),
          count(c.batch * entries + 1), k(plain.k.dtype, count, c.kv_heads, paging.size, c.width, {}),
          v(plain.k.dtype, count, c.kv_heads, paging.size, c.value_width, {}),
          k_scale(Dtype::f32, count, c.kv_heads, c.int8, paging.size, {}),
          v_scale(Dtype::f32, count, c.kv_heads, c.int8, paging.size, {}),
          out(c.dtype, c.batch, plain.heads, c.lq, c.value_width, c.results),
          lse(Dtype::f32, c.batch, plain.heads, c.lq, 1, {}), table(c.batch * entries, GARBAGE),
          problem(plain.problem) {
        std::vector<int64_t> names(count);
        std::iota(names.begin(), names.end(), 0);
        if (!paging.in_order) std::shuffle(names.begin(), names.end(), std::mt19937(paging.size));
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t i = paging.first / paging.size; i + 1 < entries; ++i)
                table[b * entries + i] = names[(paging.shared ? 0 : b * entries) + i];
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t j = 0; j < (c.lengths.empty() ? c.lk : std::min(c.lk, c.lengths[b])); ++j)
                for (int64_t h = 0; h < c.kv_heads; ++h) {
                    const int64_t place = paging.first + j, page = table[b * entries + place / paging.size];
                    k.copy_row(page, h, place % paging.size, plain.k.at(b, h, j));
                    v.copy_row(page, h, place % paging.size, plain.v.at(b, h, j));
                    if (!c.int8) continue;
                    k_scale.set(page, h, 0, place % paging.size, plain.k_scale.get(b, h, 0, j));
                    v_scale.set(page, h, 0, place % paging.size, plain.v_scale.get(b, h, 0, j));
                }
        problem.pages = {table.data(), entries, paging.size, paging.first, count};
        problem.k = k.view, problem.v = v.view, problem.out = out.view;
        if (c.int8) {
            problem.k_scale = {(float*)k_scale.view.data, k_scale.view.batch, k_scale.view.head};
            problem.v_scale = {(float*)v_scale.view.data, v_scale.view.batch, v_scale.view.head};
        }
        problem.lse = (float*)lse.view.data;
    }
    PagedCall(const PagedCall&) = delete;

    std::string describe() const {
        return c.describe() + " in pages of " + std::to_string(paging.size) + " from row " +
               std::to_string(paging.first) + (paging.in_order ? ", in order" : "") + (paging.shared ? ", shared" : "");
    }

    const Case c;
    const Paging paging;
    const int64_t entries, count;  // table entries of a batch, and pages there are
    Tensor k, v, k_scale, v_scale, out, lse;
    std::vector<int64_t> table;
    Problem problem;
};

void check_pages(const Case& c, const std::vector<Paging>& all) {
    const Call plain(c);
    plain.forward();
    for (const Paging& paging : all) {
        const PagedCall paged(plain, paging);
        require(qkv_forward(&paged.problem) == 0, paged.describe() + ": refused");
        require(paged.out.bits() == plain.out.bits(), paged.describe() + ": other bits than side by side");
        require(paged.lse.bits() == plain.lse.bits(), paged.describe() + ": other bits of the lse than side by side");
        require(paged.out.is_intact() && paged.lse.is_intact(), paged.describe() + ": written outside of the rows");
    }
}

Case rows_of_a_cache(Dtype dtype, int64_t lq, int64_t lk) {
    Case c;
    c.dtype = dtype;
    c.batch = 3;
    c.kv_heads = 2;
    c.group = 3;
    c.lq = lq;
    c.lk = lk;
    c.width = 24;
    c.value_width = 40;
    c.lengths = {lk, lk / 2 + lq, lq};
    for (int64_t length : c.lengths) c.offsets.push_back(length - lq);
    c.right = 0;
    return c;
}

}  // namespace

TEST(batches_in_pages_have_the_bits_of_keys_side_by_side) {
    const std::vector<Paging> all = {{1}, {16}, {16, 5}, {17, 40}, {480}, {2000}, {16, 0, true}, {16, 7, true}};
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 40})
            for (int64_t lk : {100, 1100})
                for (int threads : {1, 3}) {
                    Case c = rows_of_a_cache(dtype, lq, lk);
                    c.threads = threads;
                    check_pages(c, all);
                }
}

TEST(every_mask_and_score_reads_pages) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 40}) {
            Case c = rows_of_a_cache(dtype, lq, 600);
            c.left = 130;
            c.sink_tokens = 2;
            c.keep = true;
            c.bias = Broadcast{true, false, false, false};
            c.alibi = c.sink_logits = true;
            c.softcap = 2;
            c.dropout = 0.1f;
            check_pages(c, {{16}, {16, 3, true}});
            c = rows_of_a_cache(dtype, lq, 600);
            c.lengths.clear();
            c.offsets.assign(3, 600 - lq);
            c.documents = true;
            c.allow = Broadcast{false, true, false, false};
            check_pages(c, {{16}, {16, 3, true}});
        }
}

TEST(int8_in_pages_has_the_bits_of_keys_side_by_side) {
    const std::vector<Paging> all = {{1}, {16}, {16, 5}, {17, 40}, {480}, {2000}, {16, 0, true}, {16, 7, true}};
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 40})
            for (int64_t group : {1, 3, 9})
                for (int64_t lk : {100, 1100}) {
                    Case c = rows_of_a_cache(dtype, lq, lk);
                    c.int8 = true;
                    c.group = group;
                    c.kv_heads = group == 3 ? 1 : 2;  // with one, pages in order are read in place
                    check_pages(c, all);
                    c.left = 130;
                    c.sink_tokens = 2;
                    c.softcap = 2;
                    c.bias = Broadcast{true, false, false, false};
                    check_pages(c, {{16}, {16, 3, true}});
                }
}

TEST(batches_share_pages) {
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 40}) {
            Case c = rows_of_a_cache(dtype, lq, 600);
            c.lengths.clear();
            c.keys.one_batch = true;
            check_pages(c, {{16, 0, false, true}, {16, 9, true, true}, {1000, 0, false, true}});
        }
}

TEST(pages_of_no_batch_and_of_no_keys) {
    for (int64_t batch : {0, 2}) {
        Case c = rows_of_a_cache(Dtype::f32, 3, 0);
        c.batch = batch;
        c.lengths.clear(), c.offsets.clear();
        check_pages(c, {{16}});
    }
}

// A table is read before anything is written, as far as keys reach; what follows may be anything.
TEST(tables_that_name_other_pages_are_refused) {
    const Call plain(rows_of_a_cache(Dtype::f32, 1, 40));
    for (const int64_t entry : {0, 2, 4, 10})
        for (const bool is_beyond : {false, true}) {
            PagedCall paged(plain, {16});
            require(paged.entries == 4, "another number of entries than these indices are for");
            paged.table[entry] = is_beyond ? paged.count : -1;
            require(qkv_forward(&paged.problem) == 2, "entry " + std::to_string(entry) + " was not refused");
            for (const char bit : paged.out.bits()) require(bit == '\xff', "results were written");
        }
}

}  // namespace qkv
