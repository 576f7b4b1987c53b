# Toolchain: Clang as PyPI has it (`pip install ziglang`), for the system that QKV_TARGET names, on any:
#   cmake -DCMAKE_TOOLCHAIN_FILE=native/zig.cmake -DQKV_TARGET=x86_64-windows-gnu
# Without it, Clang would compile for the processor that it runs on.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES QKV_TARGET)
if(NOT QKV_TARGET MATCHES "^(x86_64|aarch64)-(windows|macos|linux)")
  message(FATAL_ERROR "QKV_TARGET must be such as x86_64-windows-gnu or aarch64-macos; got '${QKV_TARGET}'")
endif()
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(QKV_SYSTEM_windows Windows)
set(QKV_SYSTEM_macos Darwin)
set(QKV_SYSTEM_linux Linux)
set(CMAKE_SYSTEM_NAME ${QKV_SYSTEM_${CMAKE_MATCH_2}})

find_program(QKV_ZIG python-zig REQUIRED)
set(CMAKE_CXX_COMPILER ${QKV_ZIG} c++)
set(CMAKE_CXX_COMPILER_TARGET ${QKV_TARGET})
set(CMAKE_CXX_FLAGS_INIT "-fno-sanitize=undefined") # on by default
set(CMAKE_INSTALL_NAME_TOOL ${QKV_ZIG}) # CMake wants one for macOS, but uses it in installations alone

# Programs for Windows run elsewhere by Wine.
find_program(QKV_WINE NAMES wine64 wine PATHS /usr/lib/wine)
if(CMAKE_SYSTEM_NAME STREQUAL "Windows" AND NOT CMAKE_HOST_WIN32 AND QKV_WINE)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${QKV_WINE})
endif()
