// Memory that faults when it is read or written past its end, and tells when it is written between its parts.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "check.h"

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else  // a compiler without sanitizers
#define ASAN_POISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

namespace qkv {

// Bytes of 0xff, which are NaN in any floating dtype, that end `slack` bytes before a page that cannot be accessed. So
// they are aligned to no more than their size and slack happen to be.
class Memory {
   public:
    explicit Memory(int64_t size, int64_t slack = 0) : size(size), page(sysconf(_SC_PAGESIZE)) {
        const int64_t inside = (size + slack + page - 1) / page * page;
        mapped = inside + 2 * page;
        void* const found =
            mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) throw Skipped("no address space of " + std::to_string(mapped) + " bytes");
        base = (char*)found;
        mprotect(base, page, PROT_NONE);
        mprotect(base + page + inside, page, PROT_NONE);
        start = base + page + inside - slack - size;
    }

    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    ~Memory() {
        if (!is_vast()) ASAN_UNPOISON_MEMORY_REGION(base, mapped);
        munmap(base, mapped);
    }

    // Whether it is larger than the machine's memory may be: most of it is never touched.
    bool is_vast() const { return size > (int64_t)1 << 32; }

    // Makes all of it 0xff and, under AddressSanitizer, forbidden until `allow`.
    void poison() {
        if (is_vast()) return;
        std::memset(start, 0xff, size);
        ASAN_POISON_MEMORY_REGION(base + page, start + size - base - page);
    }

    void allow(const void* part, int64_t bytes) const { ASAN_UNPOISON_MEMORY_REGION(part, bytes); }

    template <class T>
    T* as() const {
        return (T*)start;
    }

    const int64_t size;

   private:
    const int64_t page;
    int64_t mapped;
    char *base, *start;
};

}  // namespace qkv
