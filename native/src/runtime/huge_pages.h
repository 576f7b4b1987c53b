// Large pages for large results.
#pragma once

#include <cstdint>

namespace qkv {

// Asks for huge pages where memory that is about to be written spans many. Results beyond 32 MB come from fresh pages
// at every call, since malloc keeps none that large: first touching them 4 KB at a time took a tenth of a window's
// time.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace qkv
