#include "runtime/parallel.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace qkv {

namespace {

// Items of a loop [next, end), in a cache line of its own.
struct alignas(64) Block {
    std::atomic<int64_t> next;
    int64_t end;

    // Takes the next items [first, last): a quarter of those left, or one. False if none are left.
    bool take(int64_t& first, int64_t& last, bool in_runs) {
        first = next.load(std::memory_order_relaxed);
        do {
            if (first >= end) return false;
            last = first + (in_runs ? std::max<int64_t>(1, (end - first) / 4) : 1);
        } while (!next.compare_exchange_weak(first, last, std::memory_order_relaxed));
        return true;
    }
};

constexpr int MOST_BLOCKS = 64;

struct Loop {
    const Work& work;
    const int blocks;
    Block block[MOST_BLOCKS];
    std::atomic<bool> failed{false};

    Loop(const Work& work, int64_t count, int blocks) : work(work), blocks(blocks) {
        for (int i = 0; i < blocks; ++i) {
            block[i].next.store(count * i / blocks, std::memory_order_relaxed);
            block[i].end = count * (i + 1) / blocks;
        }
    }

    // A thread's own block, then the others. An exception that left a thread would end the process. All there are say
    // that memory is lacking.
    void run(int thread) {
        try {
            for (int i = 0; i < blocks; ++i)
                for (int64_t item, last; block[(thread + i) % blocks].take(item, last, blocks > 1);)
                    for (; item < last; ++item) work(item);
        } catch (const std::exception&) {
            failed = true;
            for (int i = 0; i < blocks; ++i) block[i].next = block[i].end;
        }
    }
};

// Calls work(data) on as many threads, this one included, and waits for all.
using RunOnThreads = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The number of the thread that calls it, among those.
using ThreadNumber = int (*)();

struct OpenMp {
    RunOnThreads run = nullptr;
    ThreadNumber thread = nullptr;

    explicit operator bool() const { return run && thread; }
};

// torch's OpenMP workers spin for a while after each parallel region; a second pool would fight them for the cores.
#if defined(_WIN32)
// torch brings Intel's OpenMP there. These entries are the ones that Clang calls.
struct Location {
    int32_t unused_1 = 0, flags = 2, unused_2 = 0, unused_3 = 0;  // KMP_IDENT_KMPC
    const char* source = ";qkv;parallel_for;0;0;;";
};
struct Kmpc {
    int32_t (*thread)(Location*);
    ThreadNumber number;
    void (*push_threads)(Location*, int32_t thread, int32_t threads);
    void (*fork)(Location*, int32_t arguments, void (*)(int32_t*, int32_t*, void (*)(void*), void*), ...);
};

template <class Function>
void find(HMODULE library, const char* name, Function& function) {
    function = (Function)(void*)GetProcAddress(library, name);
}

const Kmpc& kmpc() {
    static const Kmpc entries = [] {
        Kmpc found{};
        if (const HMODULE library = GetModuleHandleA("libiomp5md.dll")) {
            find(library, "__kmpc_global_thread_num", found.thread);
            find(library, "omp_get_thread_num", found.number);
            find(library, "__kmpc_push_num_threads", found.push_threads);
            find(library, "__kmpc_fork_call", found.fork);
        }
        return found;
    }();
    return entries;
}

void run_on_kmpc(void (*work)(void*), void* data, unsigned threads, unsigned) {
    static Location here;
    kmpc().push_threads(&here, kmpc().thread(&here), (int32_t)threads);
    kmpc().fork(&here, 2, [](int32_t*, int32_t*, void (*work)(void*), void* data) { work(data); }, work, data);
}

OpenMp openmp() {
    const Kmpc& entries = kmpc();
    if (!entries.thread || !entries.push_threads || !entries.fork) return {};
    return {run_on_kmpc, entries.number};
}
#else
OpenMp openmp_of(void* library) {
    return {(RunOnThreads)dlsym(library, "GOMP_parallel"), (ThreadNumber)dlsym(library, "omp_get_thread_num")};
}

std::atomic<RunOnThreads> known_run{nullptr};
std::atomic<ThreadNumber> known_thread{nullptr};

// What compilers call for a parallel region: libgomp's, or that of Clang's libomp, which torch brings on macOS. Unless
// we know which library is torch's, a global one will do: on Linux with x86-64 it is.
OpenMp openmp() {
    static const OpenMp global = openmp_of(RTLD_DEFAULT);
    const OpenMp known = {known_run.load(std::memory_order_acquire), known_thread.load(std::memory_order_relaxed)};
    return known ? known : global;
}
#endif

// How many of `threads` threads, this one included, can be started. OpenMP ends the process if it fails to start one,
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

#if defined(_WIN32)
bool use_threads_of(const char*) { return (bool)openmp(); }  // there is but one of that name
#else
bool use_threads_of(const char* library) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) return false;
    // In the library or in those that it needs.
    const OpenMp found = openmp_of(loaded);
    dlclose(loaded);  // which only undoes dlopen
    if (!found) return false;
    known_thread.store(found.thread, std::memory_order_relaxed);
    known_run.store(found.run, std::memory_order_release);
    return true;
}
#endif

void parallel_for(int64_t count, int threads, const Work& work, Sharing sharing) {
    if (threads > count) threads = (int)count;
    const OpenMp parallel = openmp();
    if (parallel) threads = startable(threads);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    Loop loop(work, count, sharing == Sharing::blocks ? std::min(threads, MOST_BLOCKS) : 1);
    if (parallel) {
        struct Data {
            Loop& loop;
            ThreadNumber thread;
        } data = {loop, parallel.thread};
        parallel.run([](void* data) { ((Data*)data)->loop.run(((Data*)data)->thread()); }, &data, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> helpers;
        try {
            helpers.reserve(threads - 1);
            for (int i = 1; i < threads; ++i) helpers.emplace_back([&loop, i] { loop.run(i); });
        } catch (const std::exception&) {  // the others do all of the work
        }
        loop.run(0);
        for (std::thread& helper : helpers) helper.join();
    }
    if (loop.failed) throw std::bad_alloc();
}

}  // namespace qkv
