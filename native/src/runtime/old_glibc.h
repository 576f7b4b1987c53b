// Included first in every file for Linux (CMakeLists.txt). glibc 2.34 took functions of libdl into libc under a new
// version, so what is linked on a newer system does not load on an older one. Their older version is the same function.
#pragma once

#include <climits>  // defines __GLIBC__ where the C library is glibc

#if defined(__GLIBC__)
#if defined(__x86_64__)
#define QKV_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define QKV_OLDEST_GLIBC "GLIBC_2.17"
#endif
#endif

#if defined(QKV_OLDEST_GLIBC)
asm(".symver dlsym, dlsym@" QKV_OLDEST_GLIBC);
asm(".symver dlopen, dlopen@" QKV_OLDEST_GLIBC);
#endif
