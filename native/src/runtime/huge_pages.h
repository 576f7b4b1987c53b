// Large pages for large results.
#pragma once

#include <cstdint>

namespace qkv {

constexpr int64_t HUGE_RESULT = 32 << 20;  // bytes: docs/log.md, step 23; 8 to 32 MB gained nothing

// Asks for huge pages for memory that is about to be written, from HUGE_RESULT on. malloc returns such memory to the
// system at every call, and touching fresh pages of 4 KB took a tenth of the time of a long-window call.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace qkv
