// A parallel loop on the threads that torch already has.
#pragma once

#include <cstdint>
#include <functional>

namespace qkv {

// Whether threads take the items of a loop one by one, or in runs that become shorter: for items of like cost, whose
// memory lies behind that of the one before, so that a thread has asked for it already.
enum class Sharing { single, runs };

// Calls work(i) once for each i in [0, count), on up to `threads` threads, starting them in increasing order.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& work,
                  Sharing sharing = Sharing::single);

}  // namespace qkv
