# Reads native/src/abi/isas.def. Sets QKV_ISAS, the names of the instruction sets of this processor, each after the one
# that it extends, and QKV_ISA_FLAGS_<name>, all flags of each.
set(QKV_ISA_LIST ${CMAKE_CURRENT_LIST_DIR}/src/abi/isas.def)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${QKV_ISA_LIST})

set(QKV_ISA_MACROS ISA)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(QKV_X86 TRUE)
  list(APPEND QKV_ISA_MACROS ISA_X86)
endif()

set(QKV_ISAS)
file(STRINGS ${QKV_ISA_LIST} QKV_ISA_LINES REGEX "^ISA")
foreach(line IN LISTS QKV_ISA_LINES)
  if(NOT line MATCHES "^(ISA[A-Z0-9_]*)\\(([a-z0-9_]+), ([a-z0-9_]+), \"([^\"]*)\"")
    message(FATAL_ERROR "${QKV_ISA_LIST}: not of the form ISA(name, base, \"flags\", present): ${line}")
  endif()
  if(NOT CMAKE_MATCH_1 IN_LIST QKV_ISA_MACROS)
    continue()
  endif()
  list(APPEND QKV_ISAS ${CMAKE_MATCH_2})
  separate_arguments(flags UNIX_COMMAND "${CMAKE_MATCH_4}")
  set(QKV_ISA_FLAGS_${CMAKE_MATCH_2} ${QKV_ISA_FLAGS_${CMAKE_MATCH_3}} ${flags})
endforeach()
