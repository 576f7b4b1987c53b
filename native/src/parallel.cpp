#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace qkv {

namespace {

struct Loop {
    std::atomic<int64_t> next{0};
    int64_t count;
    const std::function<void(int64_t)>* work;

    void run() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*work)(i);
    }
};

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);

// torch's OpenMP workers spin for a while after each parallel region; a second pool would fight them for the cores.
// Where torch brings libgomp, its symbols are global, and this is the entry that compilers call.
GompParallel gomp_parallel() {
    static const GompParallel found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    Loop loop;
    loop.count = count;
    loop.work = &work;
    if (const GompParallel parallel = gomp_parallel()) {
        parallel([](void* data) { ((Loop*)data)->run(); }, &loop, (unsigned)threads, 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&loop] { loop.run(); });
    loop.run();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace qkv
