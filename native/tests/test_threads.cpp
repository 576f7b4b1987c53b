// The same bits on any number of threads, in any batch, and in calls at the same time.
#include <thread>

#include "call.h"

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
