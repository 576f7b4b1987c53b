"""`loaded`: the native library, bound by the layout of its struct. `absence`: why there is none."""

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).parent / "native.so"

# `Problem` in native/src/problem.h, field by field, with C's own alignment.
PROBLEM = struct.Struct(
    "@i"  # dtype
    "7q"  # batch, heads, kv_heads, lq, lk, width, value_width
    "P3qP3qP3qP3q"  # q, k, v, out: data and strides
    "P"  # lse
    "4q"  # offset, left, right, sink_tokens
    "PqPq"  # keep, keep_batch, lengths, lengths_batch
    "2f"  # scale, softcap
    "2P"  # alibi, sink_logits
    "i0P"  # threads, and the padding of the struct
)

UNBOUNDED = 1 << 40
"""Left or right of an interval without a bound."""


class Library(NamedTuple):
    """The library, and the instruction set that it has chosen."""

    isa: str
    forward: Callable[[bytes], None]
    """Takes a `PROBLEM`; releases the interpreter's lock while it runs."""


@functools.cache
def _load() -> Library | str:
    """The library, or why there is none."""
    if not PATH.exists():
        return "this installation of qkv has no compiled kernel (it found no C++ compiler when it was built)"
    try:
        native = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"the compiled kernel does not load: {error}"
    if native.qkv_problem_size() != PROBLEM.size:
        return f"{PATH} is of another version of qkv and needs to be built anew"
    native.qkv_isa.restype = ctypes.c_char_p
    isa = native.qkv_isa()
    if isa is None:
        return f"QKV_ISA={os.environ.get('QKV_ISA')!r} is no instruction set that this machine and the kernel have"
    native.qkv_forward.argtypes = [ctypes.c_char_p]
    native.qkv_forward.restype = None
    return Library(isa.decode(), native.qkv_forward)


def loaded() -> Library:
    """The native library.

    Raises:
        RuntimeError: where there is none; `absence` tells beforehand.
    """
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def absence() -> str | None:
    """Why there is no native library, or None where there is one."""
    found = _load()
    return found if isinstance(found, str) else None
