// What compiled the library, for `qkv --version` and `explain`.
#include "abi/c_api.h"

#define QKV_TEXT_OF(number) #number
#define QKV_TEXT(number) QKV_TEXT_OF(number)

QKV_EXPORT const char* qkv_compiler() {
#if defined(__clang__)
    return "Clang " QKV_TEXT(__clang_major__) "." QKV_TEXT(__clang_minor__) "." QKV_TEXT(__clang_patchlevel__);
#else
    return "GCC " QKV_TEXT(__GNUC__) "." QKV_TEXT(__GNUC_MINOR__) "." QKV_TEXT(__GNUC_PATCHLEVEL__);
#endif
}
