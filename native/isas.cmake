# Reads native/src/abi/isas.def. Sets QKV_ISAS, the names of the instruction sets of this processor, each after the one
# that it extends, QKV_ISA_BASE_<name>, which one that is, and QKV_ISA_FLAGS_<name>, all flags of each.
set(QKV_ISA_LIST ${CMAKE_CURRENT_LIST_DIR}/src/abi/isas.def)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${QKV_ISA_LIST})

if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(QKV_ISA_MACROS ISA_ARM)
else()
  set(QKV_ISA_MACROS ISA_NOT_ARM)
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(QKV_X86 TRUE)
  list(APPEND QKV_ISA_MACROS ISA_X86)
endif()

set(QKV_ISAS)
file(STRINGS ${QKV_ISA_LIST} QKV_ISA_LINES REGEX "^ISA")
foreach(line IN LISTS QKV_ISA_LINES)
  if(NOT line MATCHES "^(ISA[A-Z0-9_]*)\\(([a-z0-9_]+), ([a-z0-9_]+), \"([^\"]*)\"")
    message(FATAL_ERROR "${QKV_ISA_LIST}: not of the form ISA_...(name, base, \"flags\", present): ${line}")
  endif()
  if(NOT CMAKE_MATCH_1 IN_LIST QKV_ISA_MACROS)
    continue()
  endif()
  set(isa ${CMAKE_MATCH_2}) # the next match, of which list(TRANSFORM) is one in some releases, forgets this one
  set(base ${CMAKE_MATCH_3})
  separate_arguments(flags UNIX_COMMAND "${CMAKE_MATCH_4}")
  if(QKV_ZIG) # as native/zig.cmake sets it; zig has names of its own
    list(TRANSFORM flags REPLACE "^-march=armv8.2-a" "-mcpu=generic+v8_2a+neon")
  endif()
  list(APPEND QKV_ISAS ${isa})
  set(QKV_ISA_BASE_${isa} ${base})
  set(QKV_ISA_FLAGS_${isa} ${QKV_ISA_FLAGS_${base}} ${flags})
endforeach()
