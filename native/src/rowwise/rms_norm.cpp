// Norms of whole tensors on several threads, compiled once for each instruction set.
#include "rowwise/rms_norm.h"

#include "runtime/parallel.h"

namespace qkv {
namespace QKV_ISA {

void rms_norm(const RmsNorm& n) {
    const int64_t item = size_of(n.dtype), at_once = std::max<int64_t>(1, NORM_NUMBERS / n.width);
    parallel_for((n.rows + at_once - 1) / at_once, n.threads, [&](int64_t part) {
        for (int64_t r = part * at_once; r < std::min(n.rows, (part + 1) * at_once); ++r)
            rms_norm_row(n, (const char*)n.x + r * n.x_row * item, (char*)n.out + r * n.out_row * item);
    });
}

}  // namespace QKV_ISA
}  // namespace qkv
