// A parallel loop on the threads that torch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace qkv {

// Calls work(i) once for each i in [0, count), on up to `threads` threads, starting them in increasing order.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work);

}  // namespace qkv
