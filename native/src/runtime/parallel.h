// A parallel loop on the threads that torch already has.
#pragma once

#include <cstdint>

namespace qkv {

// How threads share the items of a loop: one by one, in increasing order; or, for items of similar cost, in blocks of
// neighbours, each of which one thread begins and others help to finish. In later loops of the same items a thread then
// finds in its caches what it has read and written, and an item may prefetch the memory of the next.
enum class Sharing { single, blocks };

// A non-owning reference to the loop body (no std::function: a loop allocates nothing).
class Work {
   public:
    template <class Body>
    Work(const Body& body) : body(&body), call([](const void* body, int64_t i) { (*(const Body*)body)(i); }) {}

    void operator()(int64_t i) const { call(body, i); }

   private:
    const void* body;
    void (*call)(const void*, int64_t);
};

// Makes loops run on the OpenMP threads of a library that the process has loaded, or of those that it needs. Returns
// false, and changes nothing, if there are none. Their symbols need not be global: on aarch64, torch's are not.
bool use_threads_of(const char* library);

// Calls work(i) once for each i in [0, count), on up to `threads` threads. If one throws, starts no others and throws
// std::bad_alloc in the end. A thread that cannot be started leaves its share to
// the others.
void parallel_for(int64_t count, int threads, const Work& work, Sharing sharing = Sharing::single);

}  // namespace qkv
