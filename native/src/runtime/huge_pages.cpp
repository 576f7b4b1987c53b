#include "runtime/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qkv {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t HUGE = 1 << 21;
    const uintptr_t begin = ((uintptr_t)data + HUGE - 1) / HUGE * HUGE, end = ((uintptr_t)data + bytes) / HUGE * HUGE;
    if (bytes >= HUGE_RESULT && begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace qkv
