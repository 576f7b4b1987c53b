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
            const int64_t length = sharing == Sharing::runs ? (count - begin) / threads : 1;
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

// Calls work(data) on as many threads, this one included, and waits for all.
using RunOnThreads = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// torch's OpenMP workers spin for a while after each parallel region; a second pool would fight them for the cores.
#if defined(_WIN32)
// torch brings Intel's OpenMP there. These entries are the ones that Clang calls.
struct Location {
    int32_t unused_1 = 0, flags = 2, unused_2 = 0, unused_3 = 0;  // KMP_IDENT_KMPC
    const char* source = ";qkv;parallel_for;0;0;;";
};
struct Kmpc {
    int32_t (*thread)(Location*);
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

RunOnThreads torch_threads() {
    const Kmpc& entries = kmpc();
    return entries.thread && entries.push_threads && entries.fork ? run_on_kmpc : nullptr;
}
#else
std::atomic<RunOnThreads> known{nullptr};

// What compilers call for a parallel region: libgomp's, or that of Clang's libomp, which torch brings on macOS. Unless
// we know which library is torch's, a global one will do: on Linux with x86-64 it is.
RunOnThreads torch_threads() {
    static const RunOnThreads global = (RunOnThreads)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    const RunOnThreads entry = known.load(std::memory_order_relaxed);
    return entry ? entry : global;
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
bool use_threads_of(const char*) { return torch_threads(); }  // there is but one of that name
#else
bool use_threads_of(const char* library) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!loaded) return false;
    // In the library or in those that it needs.
    const auto entry = (RunOnThreads)dlsym(loaded, "GOMP_parallel");
    dlclose(loaded);  // which only undoes dlopen
    if (entry) known.store(entry, std::memory_order_relaxed);
    return entry;
}
#endif

void parallel_for(int64_t count, int threads, const Work& work, Sharing sharing) {
    if (threads > count) threads = (int)count;
    const RunOnThreads parallel = torch_threads();
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
