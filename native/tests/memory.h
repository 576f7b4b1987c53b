// Memory that faults when it is read or written past its end, and tells when it is written between its parts.
#pragma once

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

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

// Pages of the system's: what of it is used, and what faults. Memory counts where it is touched, if the system can.
#if defined(_WIN32)
inline int64_t page_size() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}
inline char* map_pages(int64_t bytes) {
    return (char*)VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}
inline void forbid_page(char* at, int64_t page) {
    DWORD before;
    VirtualProtect(at, page, PAGE_NOACCESS, &before);
}
inline void unmap_pages(char* base, int64_t) { VirtualFree(base, 0, MEM_RELEASE); }
#else
inline int64_t page_size() { return sysconf(_SC_PAGESIZE); }
inline char* map_pages(int64_t bytes) {
    void* const found =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : (char*)found;
}
inline void forbid_page(char* at, int64_t page) { mprotect(at, page, PROT_NONE); }
inline void unmap_pages(char* base, int64_t bytes) { munmap(base, bytes); }
#endif

// Bytes of 0xff, which are NaN in any floating dtype, that end `slack` bytes before a page that cannot be accessed. So
// they are aligned to no more than their size and slack happen to be.
class Memory {
   public:
    explicit Memory(int64_t size, int64_t slack = 0) : size(size), page(page_size()) {
        const int64_t inside = (size + slack + page - 1) / page * page;
        mapped = inside + 2 * page;
        base = map_pages(mapped);
        if (!base) throw Skipped("no address space of " + std::to_string(mapped) + " bytes");
        forbid_page(base, page);
        forbid_page(base + page + inside, page);
        start = base + page + inside - slack - size;
    }

    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    ~Memory() {
        if (!is_vast()) ASAN_UNPOISON_MEMORY_REGION(base, mapped);
        unmap_pages(base, mapped);
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
