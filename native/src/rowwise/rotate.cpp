// Rotary embedding of whole tensors on several threads, compiled once for each instruction set.
#include "rowwise/rotate.h"

#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

void rotate(const Rotation& r) {
    const int64_t blocks = (r.tokens + ROTARY_TOKENS - 1) / ROTARY_TOKENS;
    parallel_for(r.batch * blocks, r.threads, [&](int64_t item) {
        const int64_t begin = item % blocks * ROTARY_TOKENS;
        rotate_tokens(r, item / blocks, begin, std::min(begin + ROTARY_TOKENS, r.tokens));
    });
}

}  // namespace QKV_ISA
}  // namespace qkv
