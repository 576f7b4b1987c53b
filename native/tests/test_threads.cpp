// The same bits on any number of threads, with queries cut anywhere, and in calls at the same time.
#include <thread>

#include "call.h"
#include "library.h"

namespace qkv {

static std::string results(const Case& c) {
    const Call call(c);
    call.forward();
    call.backward();
    return call.bits();
}

static std::vector<Case> cases() {
    std::vector<Case> all;
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 300}) {
            Case c;
            c.dtype = dtype;
            c.batch = 2;
            c.group = 3;
            c.lq = lq;
            c.lk = 1000;
            c.alibi = true;
            c.bias = Broadcast{true, true, false, false};
            c.dropout = 0.1f;
            all.push_back(c);
            all.push_back(c.causal(300));
        }
    return all;
}

TEST(bits_depend_on_no_number_of_threads) {
    for (Case c : cases()) {
        const std::string want = results(c);
        for (int threads : {2, 3, 8}) {
            c.threads = threads;
            require(results(c) == want, c.describe() + ": other bits than with one thread");
        }
    }
}

// A thread that has many heads to do takes them whole, of two batches here; 3 threads leave two of them to all, and 8
// share every one.
TEST(bits_depend_on_no_sharing_of_heads) {
    for (Dtype dtype : DTYPES)
        for (int64_t width : {20, 64}) {
            Case c;
            c.dtype = dtype;
            c.batch = 2;
            c.kv_heads = 13;
            c.lq = 100;
            c.lk = 490;
            c.width = width;
            c.value_width = 33;
            c.keys.tokens_first = true;
            c.keys.gap = 40;
            if (width == 20) check(c);
            const std::string want = results(c);
            for (int threads : {2, 8}) {
                c.threads = threads;
                require(results(c) == want, c.describe() + ": other bits than with one thread");
            }
        }
}

// Whether queries [start, start + count) alone have the bits that they have among all.
static bool is_the_same_alone(const Call& all, int64_t start, int64_t count) {
    const Case& c = all.c;
    const Tensor out(c.dtype, 1, all.heads, count, c.value_width, {}), lse(Dtype::f32, 1, all.heads, count, 1, {});
    Problem alone = all.problem;
    alone.lq = count;
    alone.offset += start;
    alone.q.data = all.q.at(0, 0, start);
    alone.bias.data = (const float*)alone.bias.data + start * alone.bias.row;
    alone.out = out.view;
    alone.lse = (float*)lse.view.data;
    require(qkv_forward(&alone) == 0, c.describe() + ": no memory");
    for (int64_t h = 0; h < all.heads; ++h)
        for (int64_t i = 0; i < count; ++i) {
            if (std::memcmp(lse.at(0, h, i), all.lse.at(0, h, start + i), sizeof(float))) return false;
            for (int64_t d = 0; d < c.value_width; ++d)
                if (out.get(0, h, i, d) != all.out.get(0, h, start + i, d)) return false;
        }
    return true;
}

// A single query goes by other sums.
TEST(bits_depend_on_no_chunking) {
    const std::pair<int64_t, int64_t> widths[] = {{64, 64}, {40, 24}, {5, 37}};
    for (Dtype dtype : DTYPES)
        for (const auto& [width, value_width] : widths)
            for (int64_t window : {(int64_t)29, (int64_t)130, UNBOUNDED}) {
                Case c;
                c.dtype = dtype;
                c.kv_heads = c.group = 2;
                c.lq = 90;
                c.offset = 30;
                c.lk = 120;
                c.width = width;
                c.value_width = value_width;
                c.alibi = true;
                c.bias = Broadcast{true, true, false, false};
                const Call all(c.causal(window));
                all.forward();
                for (int64_t count : {2, 3, 4, 5, 8, 9, 33})
                    for (int64_t start = 0; start + count <= c.lq; start += 19)
                        require(is_the_same_alone(all, start, count), c.describe() + ": other bits for " +
                                                                          std::to_string(count) + " queries from " +
                                                                          std::to_string(start) + " on alone");
            }
}

TEST(calls_at_the_same_time) {
    const std::vector<Case> all = cases();
    std::vector<std::string> want, got(all.size());
    for (const Case& c : all) want.push_back(results(c));
    std::vector<std::thread> callers;
    for (size_t n = 0; n < all.size(); ++n)
        callers.emplace_back([&, n] {
            Case c = all[n];
            c.threads = 1 + n % 3;
            got[n] = results(c);
        });
    for (std::thread& caller : callers) caller.join();
    for (size_t n = 0; n < all.size(); ++n)
        require(got[n] == want[n], all[n].describe() + ": other bits than when called alone");
}

}  // namespace qkv
