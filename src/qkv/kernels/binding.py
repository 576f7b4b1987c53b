"""`loaded`: the native library, bound by the layout of its structs. `absence`: why there is none. `use`: another."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from qkv.kernels.structs import GRADIENTS, PROBLEM, QUANTIZATION, SEQUENCES


class Library(NamedTuple):
    """The library, and the instruction set that it has chosen. Its calls release the interpreter's lock."""

    isa: str
    forward: Callable[[bytes], int]
    """Takes a `PROBLEM`. Returns 0, or 1 where memory does not suffice."""
    backward: Callable[[bytes, bytes], int]
    """Takes a `PROBLEM` and its `GRADIENTS`. Returns as `forward`."""
    count_scores: Callable[[bytes], int]
    """Takes a `PROBLEM`: how many scores its forward pass computes, for tests of what masks spare."""
    quantize: Callable[[bytes], None]
    """Takes a `QUANTIZATION`."""
    forward_sequences: Callable[[bytes, bytes], int]
    """Takes a `PROBLEM` and its `SEQUENCES`. Returns as `forward`, or 2 for sequences that leave their tensors."""
    backward_sequences: Callable[[bytes, bytes, bytes], int]
    """Takes also the `GRADIENTS`. Returns as `forward_sequences`."""
    fast_forward: Callable[..., int] | None
    """Takes q, k, v, out, then k_scale, v_scale, keep and lengths, tensors or None, then offset, left, right,
    sink_tokens, scale and threads. Returns as `forward`, or 2 for tensors that it does not take. None where torch has
    no DLPack exchange functions."""
    append: Callable[..., int] | None
    """Takes k, v, the memory of keys and of values, then k_scale and v_scale, tensors or None, then start and threads.
    Returns as `fast_forward`."""


class _Interpreter(ctypes.Structure):
    """What the library calls of Python and torch. As in native/src/abi/fast_forward.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("tensors", "none", "release_lock", "take_lock", "forget_exception")
    ]


def load(path: Path) -> Library | str:
    """The library at ``path``, or why there is none."""
    if not path.exists():
        return "this installation of qkv has no compiled kernel (it found no suitable C++ compiler when it was built)"
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernel does not load: {error}"
    sizes = {"problem": PROBLEM.size, "gradients": GRADIENTS.size, "quantization": QUANTIZATION.size}
    sizes |= {"sequences": SEQUENCES.size, "interpreter": ctypes.sizeof(_Interpreter)}
    known = [hasattr(native, f"qkv_{name}_size") and getattr(native, f"qkv_{name}_size")() for name in sizes]
    if known != [*sizes.values()]:
        return f"{path} is of another version of qkv and needs to be built anew"
    native.qkv_isa.restype = ctypes.c_char_p
    isa = native.qkv_isa()
    if isa is None:
        return f"QKV_ISA={os.environ.get('QKV_ISA')!r} is no instruction set that this machine and the kernel have"
    native.qkv_forward.argtypes = native.qkv_count_scores.argtypes = [ctypes.c_char_p]
    native.qkv_quantize.argtypes, native.qkv_quantize.restype = [ctypes.c_char_p], None
    native.qkv_backward.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    native.qkv_forward.restype = native.qkv_backward.restype = ctypes.c_int
    native.qkv_count_scores.restype = ctypes.c_int64
    native.qkv_forward_sequences.argtypes = [ctypes.c_char_p] * 2
    native.qkv_backward_sequences.argtypes = [ctypes.c_char_p] * 3
    functions = (native.qkv_forward, native.qkv_backward, native.qkv_count_scores, native.qkv_quantize)
    of_sequences = (native.qkv_forward_sequences, native.qkv_backward_sequences)
    return Library(isa.decode(), *functions, *of_sequences, *_load_calls_of_tensors(path))


class _Exchange(ctypes.Structure):
    """DLPack's exchange functions. As in native/src/dlpack.h."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)] + [
        (name, ctypes.c_void_p) for name in ("older", "allocate", "take", "give", "look", "stream")
    ]


def _load_calls_of_tensors(path: Path) -> tuple[Callable[..., int] | None, Callable[..., int] | None]:
    """`Library.fast_forward` and `Library.append`."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None, None
    python = ctypes.pythonapi
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    tensors = prototype(("PyCapsule_GetPointer", python))(capsule, b"dlpack_exchange_api")
    exchange = _Exchange.from_address(tensors)
    if exchange.major != 1 or not exchange.look:
        return None, None
    functions = (python.PyEval_SaveThread, python.PyEval_RestoreThread, python.PyErr_Clear)
    interpreter = _Interpreter(tensors, id(None), *(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    native = ctypes.PyDLL(str(path))  # called with the interpreter's lock
    tensor, number = ctypes.py_object, ctypes.c_int64
    native.qkv_fast_forward.argtypes = [ctypes.c_void_p, *[tensor] * 8, *[number] * 4, ctypes.c_float, ctypes.c_int]
    native.qkv_append.argtypes = [ctypes.c_void_p, *[tensor] * 6, number, ctypes.c_int]
    there = ctypes.byref(interpreter)
    return functools.partial(native.qkv_fast_forward, there), functools.partial(native.qkv_append, there)


LIBRARY = Path(__file__).parent / "native.so"
"""Where an installation has it."""

# Loaded with the module: a compiler can trace a constant, not the loading. One of the two is None.
_found = load(LIBRARY)
_library, _absence = (None, _found) if isinstance(_found, str) else (_found, None)


def loaded() -> Library:
    """The native library.

    Raises:
        RuntimeError: where there is none; `absence` tells beforehand.
    """
    if _library is None:
        raise RuntimeError(_absence)
    return _library


def absence() -> str | None:
    """Why there is no native library, or None where there is one."""
    return _absence


@contextlib.contextmanager
def use(library: Library | str) -> Iterator[None]:
    """Within it, all calls of the process go to another build or instruction set, or to none, for a reason.

    For comparisons and tests. A copy of the file under another name is another library: `load` it with ``QKV_ISA`` set,
    and two instruction sets stand in one process.

    Args:
        library: what `load` gives for a path: a library, or why there is none.
    """
    global _library, _absence
    before = _library, _absence
    _library, _absence = (None, library) if isinstance(library, str) else (library, None)
    try:
        yield
    finally:
        _library, _absence = before
