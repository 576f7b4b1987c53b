// Attention of several sequences in one call, each a problem of its own with the bits that it has alone.
//
// A thread takes whole sequences. One that makes up much of the work is shared by all threads, as any problem is.
#include "abi/sequences.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "abi/c_api.h"
#include "runtime/huge_pages.h"
#include "runtime/parallel.h"
#include "sizes.h"

namespace qkv {
namespace {

class Packed {
   public:
    Packed(const void* problem, const void* sequences) {
        std::memcpy(&p, problem, sizeof p);
        std::memcpy(&s, sequences, sizeof s);
    }

    // Whether the queries, keys and pages of all sequences lie within their tensors.
    bool fits() const {
        if (s.count < 1 || s.starts[0] != 0 || s.starts[s.count] != p.lq) return false;
        for (int64_t n = 0; n < s.count; ++n)
            if (s.starts[n] > s.starts[n + 1] || !fits(n)) return false;
        return true;
    }

    bool has_pages() const { return s.tables; }

    // Calls work(problem, n) for each sequence n, where work returns a `Status`. Returns the worst.
    template <class Work>
    int for_each(Work work) const {
        double total = 0;
        for (int64_t n = 0; n < s.count; ++n) total += cost(n);
        std::atomic<int> worst{DONE};
        const auto run = [&](int64_t n, int threads) {
            if (queries(n) == 0 && s.lengths[n] == 0) return;
            const int status = work(alone(n, threads), n);
            if (status != DONE) worst = status;
        };
        const auto is_much = [&](int64_t n) { return p.threads > 1 && 2 * p.threads * cost(n) > total; };
        for (int64_t n = 0; n < s.count; ++n)
            if (is_much(n)) run(n, p.threads);
        parallel_for(s.count, p.threads, [&](int64_t n) {
            if (!is_much(n)) run(n, 1);
        });
        return worst;
    }

    // Copies a sequence's numbers between (heads, all queries) and contiguous memory (heads, its queries).
    void gather(int64_t n, const float* from, float* to) const {
        for (int64_t h = 0; h < p.heads; ++h)
            std::copy_n(from + h * p.lq + s.starts[n], queries(n), to + h * queries(n));
    }
    void scatter(int64_t n, const float* from, float* to) const {
        for (int64_t h = 0; h < p.heads; ++h)
            std::copy_n(from + h * queries(n), queries(n), to + h * p.lq + s.starts[n]);
    }

    // Contiguous numbers of each sequence, one sequence after the other; null if there is no memory.
    std::unique_ptr<float[]> numbers() const {
        return std::unique_ptr<float[]>(new (std::nothrow) float[std::max<int64_t>(1, p.heads * p.lq)]);
    }

    // Those of sequence n.
    float* of(int64_t n, const std::unique_ptr<float[]>& numbers) const {
        return numbers ? numbers.get() + p.heads * s.starts[n] : nullptr;
    }

    // Asks for huge pages for a result of all sequences.
    void expect_writing(const View& view, int64_t numbers) const {
        prefer_huge_pages(view.data, numbers * size_of(p.dtype));
    }

    // The rows of a sequence.
    View at_queries(View view, int64_t n) const { return shifted(view, 0, s.starts[n]); }
    View at_keys(View view, int64_t n) const { return shifted(view, 0, s.firsts[n]); }

    Problem p;
    Sequences s;

   private:
    int64_t queries(int64_t n) const { return s.starts[n + 1] - s.starts[n]; }

    // Whether its keys lie in the pages; for those of a table, `fits` of its problem says whether there are such pages.
    bool fits(int64_t n) const {
        const int64_t first = s.firsts[n], length = s.lengths[n];
        if (first < 0 || length < 0 || length > LARGEST_POSITION) return false;
        if (length == 0) return true;
        if (first > (s.tables ? s.entries : 1) * s.page_size - length) return false;
        return !s.tables || qkv::fits(alone(n, 1));
    }

    // About how long a sequence takes: its scores, plus a cost for each key and query.
    double cost(int64_t n) const {
        const int64_t lq = queries(n);
        const int64_t seen =
            std::min(s.lengths[n], lq + std::min(p.left, LARGEST_POSITION) + std::min(p.right, LARGEST_POSITION));
        return (double)(lq + SEQUENCE_OVERHEAD) * (double)(seen + SEQUENCE_OVERHEAD);
    }

    View shifted(View view, int64_t batch, int64_t row) const {
        view.data = row_of(p.dtype, view, batch, 0, row);
        return view;
    }

    Problem alone(int64_t n, int threads) const {
        Problem one = p;
        one.batch = 1;
        one.threads = threads;
        one.lq = queries(n);
        one.lk = s.lengths[n];
        one.offset = one.lk - one.lq;
        one.offsets = nullptr;
        one.q = at_queries(p.q, n);
        one.out = at_queries(p.out, n);
        if (p.alibi) one.alibi = p.alibi + n * s.alibi;
        // Each sequence drops different weights.
        one.seed = p.seed + (uint64_t)n * 0x9e3779b97f4a7c15u;
        if (one.lk == 0) return one;
        if (s.tables) {
            one.pages = {s.tables + n * s.entries, 0, s.page_size, s.firsts[n], s.pages};
        } else {
            one.k = at_keys(p.k, n);
            one.v = at_keys(p.v, n);
        }
        return one;
    }
};

}  // namespace
}  // namespace qkv

QKV_EXPORT int qkv_sequences_size() { return (int)sizeof(qkv::Sequences); }

// Takes a Problem and its Sequences. Returns as qkv_forward; or OTHER, and has done nothing, where they do not lie
// within their tensors.
QKV_EXPORT int qkv_forward_sequences(const void* problem, const void* sequences) {
    const qkv::Packed packed(problem, sequences);
    if (!packed.fits()) return qkv::OTHER;
    const auto lse = packed.p.lse ? packed.numbers() : nullptr;
    if (packed.p.lse && !lse) return qkv::OUT_OF_MEMORY;
    packed.expect_writing(packed.p.out, packed.p.lq * packed.p.heads * packed.p.value_width);
    return packed.for_each([&](qkv::Problem one, int64_t n) {
        one.lse = packed.of(n, lse);
        const int status = qkv_forward(&one);
        if (lse) packed.scatter(n, one.lse, packed.p.lse);
        return status;
    });
}

// Takes also the Gradients, of which d_alibi is (count, heads), and returns as qkv_forward_sequences. Keys lie in one
// page. Gradients of keys outside of all sequences are not written.
QKV_EXPORT int qkv_backward_sequences(const void* problem, const void* sequences, const void* gradients) {
    const qkv::Packed packed(problem, sequences);
    if (packed.has_pages() || !packed.fits()) return qkv::OTHER;
    qkv::Gradients all;
    std::memcpy(&all, gradients, sizeof all);
    const auto lse = packed.numbers(), delta = packed.numbers(), d_lse = all.d_lse ? packed.numbers() : nullptr;
    if (!lse || !delta || (all.d_lse && !d_lse)) return qkv::OUT_OF_MEMORY;
    const int64_t keys = packed.s.page_size * packed.p.kv_heads;
    packed.expect_writing(all.dq, packed.p.lq * packed.p.heads * packed.p.width);
    packed.expect_writing(all.dk, keys * packed.p.width);
    packed.expect_writing(all.dv, keys * packed.p.value_width);
    return packed.for_each([&](qkv::Problem one, int64_t n) {
        qkv::Gradients g = all;
        one.lse = packed.of(n, lse);
        packed.gather(n, packed.p.lse, one.lse);
        if (d_lse) packed.gather(n, all.d_lse, packed.of(n, d_lse));
        g.d_lse = packed.of(n, d_lse);
        g.delta = packed.of(n, delta);
        g.d_out = packed.at_queries(all.d_out, n);
        g.dq = packed.at_queries(all.dq, n);
        g.dk = packed.at_keys(all.dk, n);
        g.dv = packed.at_keys(all.dv, n);
        if (all.d_alibi) g.d_alibi = all.d_alibi + n * packed.p.heads;
        const int status = qkv_backward(&one, &g);
        packed.scatter(n, g.delta, all.delta);
        return status;
    });
}
