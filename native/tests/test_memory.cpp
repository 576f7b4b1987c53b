// Memory that runs out anywhere, in any thread, is an error of the call and of nothing else.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "call.h"
#include "library.h"

namespace {

std::atomic<bool> refusing{false}, forever{false};
std::atomic<int64_t> left{0};  // requests that are granted before one is refused, or all from there on

bool is_refused() {
    if (!refusing) return false;
    const int64_t before = left--;
    return forever ? before <= 0 : before == 0;
}

void* take(std::size_t bytes) {
    if (is_refused()) throw std::bad_alloc();
    if (void* const found = std::malloc(bytes ? bytes : 1)) return found;
    throw std::bad_alloc();
}

}  // namespace

// The library's requests come here too.
void* operator new(std::size_t bytes) { return take(bytes); }
void* operator new[](std::size_t bytes) { return take(bytes); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t) noexcept { std::free(data); }

namespace qkv {

// Calls work in a thread of its own, whose scratch is empty, with the n-th request refused, for n = 0, 1, ... until
// none is. Returns how many were.
template <class Make>
static int64_t refuse_each(bool all_from_there, Make make) {
    for (int64_t n = 0;; ++n) {
        int status = 0;
        const auto work = make();
        std::thread([&] {
            forever = all_from_there;
            left = n;
            refusing = true;
            status = work();
            refusing = false;
        }).join();
        if (left >= 0) return n;
        require(status == 0 || status == 1, "the status is " + std::to_string(status));
        if (n > 2000) throw Failure("requests of memory have no end");
    }
}

static std::vector<Case> cases() {
    std::vector<Case> all;
    for (Dtype dtype : DTYPES)
        for (int64_t lq : {1, 5, 130}) {
            Case c;
            c.dtype = dtype;
            c.batch = 2;
            c.kv_heads = 3;
            c.lq = lq;
            c.lk = 1000;
            c.documents = true;
            c.offset = c.lk - lq;
            c.keys.tokens_first = true;
            c.keys.gap = 600;
            all.push_back(c);
            c.int8 = true;
            all.push_back(c);
        }
    return all;
}

static void check_refusals(bool backward) {
    for (Case c : cases()) {
        if (backward && (c.int8 || c.dtype == Dtype::f16)) continue;
        for (int threads : {1, 2, 4})
            for (const bool all_from_there : {false, true}) {
                c.threads = threads;
                const Call call(c);
                call.forward();
                if (backward) call.backward();
                const std::string want = call.bits();
                int64_t errors = 0;
                const int64_t count = refuse_each(all_from_there, [&] {
                    return [&] {
                        const int status =
                            backward ? qkv_backward(&call.problem, &call.gradients) : qkv_forward(&call.problem);
                        errors += status;
                        return status;
                    };
                });
                require(count > 0 && errors > 0, c.describe() + ": nothing asked for memory");
                call.forward();
                if (backward) call.backward();
                require(call.bits() == want, c.describe() + ": other bits after memory ran out");
            }
    }
}

TEST(memory_runs_out_in_a_forward_pass) { check_refusals(false); }
TEST(memory_runs_out_in_a_backward_pass) { check_refusals(true); }

TEST(rounding_to_int8_needs_no_memory) {
    const Tensor from(Dtype::f32, 2, 3, 50, 40, {}), to(Dtype::i8, 2, 3, 50, 40, {}),
        scale(Dtype::f32, 2, 3, 1, 50, {});
    from.fill([] { return 1.0; });
    for (int threads : {1, 2, 4}) {
        Quantization q{Dtype::f32, 2, 3, 50, 40, from.view, to.view, {(float*)scale.view.data, 150, 50}, threads};
        forever = refusing = true;
        left = 0;
        qkv_quantize(&q);
        refusing = false;
        require(to.get(1, 2, 49, 39) == 127, "a number was not rounded");
    }
}

}  // namespace qkv
