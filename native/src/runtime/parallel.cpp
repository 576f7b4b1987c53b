#include "runtime/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace qkv {

namespace {

struct Loop {
    const int64_t count;
    const int threads;
    const Sharing sharing;
    const Work& work;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    // Takes the next items [begin, end): one, or a run that shrinks with what is left. False if none are left.
    bool take(int64_t& begin, int64_t& end) {
        begin = next.load(std::memory_order_relaxed);
        do {
            if (begin >= count) return false;
            const int64_t length = sharing == Sharing::runs ? (count - begin) / (2 * threads) : 1;
            end = begin + std::max<int64_t>(1, length);
        } while (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

    // An exception that left a thread would end the process. All there are say that memory is lacking.
    void run() {
        try {
            for (int64_t begin, end; take(begin, end);)
                for (; begin < end; ++begin) work(begin);
        } catch (const std::exception&) {
            failed = true;
            next = count;
        }
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> known{nullptr};

// torch's OpenMP workers spin for a while after each parallel region; a second pool would fight them for the cores.
// Unless we know which library is torch's, a global one will do: on x86-64 it is.
GompParallel gomp_parallel() {
    static const GompParallel global = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    const GompParallel entry = known.load(std::memory_order_relaxed);
    return entry ? entry : global;
}

// How many of `threads` threads, this one included, can be started. libgomp ends the process if it fails to start one,
// so they are tried when this thread wants more than before; their stacks stay cached.
int startable(int threads) {
    static thread_local int most = 1;
    if (threads <= most) return threads;
    std::atomic<bool> all{false};
    std::vector<std::thread> tried;
    try {
        tried.reserve(threads - 1);
        while ((int)tried.size() < threads - 1)
            tried.emplace_back([&all] {
                while (!all) std::this_thread::yield();
            });
    } catch (const std::exception&) {  // no more can be started
    }
    all = true;
    for (std::thread& thread : tried) thread.join();
    return most = std::max(most, (int)tried.size() + 1);
}

}  // namespace

bool use_threads_of(const char* library) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) return false;
    // What compilers call for a parallel region, in the library or in those that it needs.
    const auto entry = (GompParallel)dlsym(loaded, "GOMP_parallel");
    dlclose(loaded);  // which only undoes dlopen
    if (entry) known.store(entry, std::memory_order_relaxed);
    return entry;
}

void parallel_for(int64_t count, int threads, const Work& work, Sharing sharing) {
    if (threads > count) threads = (int)count;
    const GompParallel parallel = gomp_parallel();
    if (parallel) threads = startable(threads);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    Loop loop{count, threads, sharing, work};
    if (parallel) {
        parallel([](void* data) { ((Loop*)data)->run(); }, &loop, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> helpers;
        try {
            helpers.reserve(threads - 1);
            for (int i = 1; i < threads; ++i) helpers.emplace_back([&loop] { loop.run(); });
        } catch (const std::exception&) {  // the others do all of the work
        }
        loop.run();
        for (std::thread& helper : helpers) helper.join();
    }
    if (loop.failed) throw std::bad_alloc();
}

}  // namespace qkv
