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

void* take_or_none(std::size_t bytes) { return is_refused() ? nullptr : std::malloc(bytes ? bytes : 1); }

void* take(std::size_t bytes) {
    if (void* const found = take_or_none(bytes)) return found;
    throw std::bad_alloc();
}

}  // namespace

// The library's requests come here too; of every form, or a sanitizer would answer some of them.
void* operator new(std::size_t bytes) { return take(bytes); }
void* operator new[](std::size_t bytes) { return take(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return take_or_none(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return take_or_none(bytes); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t) noexcept { std::free(data); }

namespace qkv {

// The status of work in a thread of its own, whose scratch is empty, with the n-th request refused, or all from there
// on.
template <class Work>
static int refuse(int64_t n, bool all_from_there, const Work& work) {
    int status = 0;
    std::thread([&] {
        forever = all_from_there;
        left = n;
        refusing = true;
        status = work();
        refusing = false;
    }).join();
    return status;
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
            c.keys.gap = 160;  // rows of three heads lie so far apart that they are copied
            all.push_back(c);
            c.int8 = true;
            all.push_back(c);
        }
    return all;
}

static void check_refusals(bool backward) {
#if defined(_WIN32)
    throw Skipped("a library of Windows has an operator new of its own");
#endif
    for (Case c : cases()) {
        if (backward && (c.int8 || c.dtype == Dtype::f16)) continue;
        for (int threads : {1, 3})
            for (const bool all_from_there : {false, true}) {
                c.threads = threads;
                const Call call(c);
                call.forward();
                if (backward) call.backward();
                const std::string want = call.bits();
                const auto pass = [&] {
                    return backward ? qkv_backward(&call.problem, &call.gradients) : qkv_forward(&call.problem);
                };
                const auto results = backward ? std::vector<const Tensor*>{&call.dq, &call.dk, &call.dv}
                                              : std::vector<const Tensor*>{&call.out, &call.lse};
                int64_t errors = 0;
                for (int64_t n = 0; n == 0 || left < 0; ++n) {
                    for (const Tensor* result : results) result->fill([] { return NAN; });
                    const int status = refuse(n, all_from_there, pass);
                    errors += status == 1;
                    // A thread that could not be started is not an error: others do its work.
                    require(status == 1 || (status == 0 && call.bits() == want),
                            c.describe() + ": without the request " + std::to_string(n) + " of memory, the status is " +
                                std::to_string(status));
                }
                require(errors > 0, c.describe() + ": nothing asked for memory");
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
