"""The native library: functions of Python for tensors, and of ctypes for packed structs."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qkv.kernels.structs import (
    BLOCK_NUMBERS,
    GRADIENTS,
    PROBLEM,
    PROJECTION,
    QUANTIZATION,
    ROTATION,
    SEQUENCES,
    STEP_NUMBERS,
    BlockTensors,
    StepTensors,
)


class Library(NamedTuple):
    """The functions of the library, which release the GIL, and the instruction set that it runs."""

    isa: str
    compiler: str
    """What built it, with its version."""
    forward: Callable[[bytes], int]
    """Takes a `PROBLEM`. Returns 0, 1 if memory ran out, or 2 for offsets out of bounds."""
    backward: Callable[[bytes, bytes], int]
    """Takes a `PROBLEM` and its `GRADIENTS`. Returns as `forward`."""
    count_scores: Callable[[bytes], int]
    """Takes a `PROBLEM`. Returns how many scores its forward pass computes, -1 where it cannot run."""
    quantize: Callable[[bytes], None]
    """Takes a `QUANTIZATION`."""
    rotate: Callable[[bytes], int]
    """Takes a `ROTATION`. Returns 0, or 2 for axes out of bounds."""
    forward_sequences: Callable[[bytes, bytes], int]
    """Takes a `PROBLEM` and its `SEQUENCES`. Returns as `forward`, or 2 for sequences out of bounds."""
    backward_sequences: Callable[[bytes, bytes, bytes], int]
    """Takes also the `GRADIENTS`. Returns as `forward_sequences`."""
    project: Callable[[bytes, int, int], int]
    """Takes a `PROJECTION`, or several one after the other, their number, and threads. Returns as `forward`, or 2 for
    rows or products beyond what the kernel takes."""
    fast_forward: Callable[..., int] | None
    """Takes q, k, v, out, then k_scale, v_scale, block_table, offsets, keep and lengths, tensors or None, then
    key_count, offset, left, right, sink_tokens, scale and threads. Returns as `forward`, or 2 for tensors that it does
    not support. None if torch has no DLPack exchange functions."""
    fast_project: Callable[..., int] | None
    """Takes x, weight, bias, a tensor or None, out and threads. Returns as `fast_forward`."""
    fast_gated_mlp: Callable[..., int] | None
    """Takes x, weight and bias of gate, up and down, biases and the weight of up tensors or None, out, the activation
    and threads. Returns as `fast_forward`."""
    fast_rms_norm: Callable[..., int] | None
    """Takes x, gains, a tensor or None, out, eps, how gains are applied, and threads. Returns as `fast_forward`."""
    append: Callable[..., int] | None
    """Takes k, v, the buffers of keys and of values, then k_scale and v_scale, tensors or None, then start and threads.
    Returns as `fast_forward`."""
    append_pages: Callable[..., int] | None
    """Takes k, v, the pages of keys and of values, then k_scale and v_scale, tensors or None, then block_table, starts,
    a tensor or None, start and threads. Returns as `fast_forward`."""
    layer_step: Callable[..., int] | None
    """Takes each of the `StepTensors`, then `STEP_NUMBERS`. Returns as `fast_forward`."""
    decoder_layers: Callable[..., int] | None
    """Takes the `StepTensors` and `BlockTensors` of each layer, then the `STEP_NUMBERS` and `BLOCK_NUMBERS` of each.
    Returns the number of layers that are written, or -1 if memory for scratch is lacking. None as `fast_forward`."""
    fast_rotate: Callable[..., int] | None
    """Takes q, k and results for both; of k, tensors or None, as are positions, offsets, axes, frequencies, cos,
    sin; then offset, position_scale, attention_factor, pairs, second, interleaved, inverse and threads. Returns as
    `fast_forward`."""


_API = {
    "release_lock": "PyEval_SaveThread",
    "take_lock": "PyEval_RestoreThread",
    "forget_exception": "PyErr_Clear",
    "as_integer": "PyLong_AsLongLong",
    "as_real": "PyFloat_AsDouble",
    "as_bytes": "PyBytes_AsString",
    "integer": "PyLong_FromLong",
    "exception": "PyErr_Occurred",
    "refuse_arguments": "PyErr_BadArgument",
}
"""Functions of Python that the library calls, all of its stable ABI."""


class _Interpreter(ctypes.Structure):
    """Functions of torch and Python that the library calls. As in native/src/abi/python_tensor.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("tensors", "none", *_API)]


class _Method(ctypes.Structure):
    """PyMethodDef: https://docs.python.org/3/c-api/structures.html#c.PyMethodDef."""

    _fields_ = [
        *(("name", ctypes.c_char_p), ("call", ctypes.c_void_p)),
        *(("flags", ctypes.c_int), ("doc", ctypes.c_char_p)),
    ]


REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps qkv"


def load(path: Path) -> Library | str:
    """The library at ``path``, or the reason why it cannot be loaded."""
    if not path.exists():
        return (
            "this installation of qkv has no compiled kernel: no suitable C++ compiler was found when it was built. "
            f"Install one, then run {REINSTALL}, since pip's cache keeps the build without a kernel"
        )
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled kernel does not load: {error}"
    sizes = {"problem": PROBLEM.size, "gradients": GRADIENTS.size, "quantization": QUANTIZATION.size}
    sizes |= {"sequences": SEQUENCES.size, "projection": PROJECTION.size, "rotation": ROTATION.size}
    sizes |= {
        "layer_step": len(StepTensors._fields),
        "step_numbers": STEP_NUMBERS.size,
        "block": len(BlockTensors._fields),
        "block_numbers": BLOCK_NUMBERS.size,
        "interpreter": ctypes.sizeof(_Interpreter),
    }
    known = [hasattr(native, f"qkv_{name}_size") and getattr(native, f"qkv_{name}_size")() for name in sizes]
    if known != [*sizes.values()] or not hasattr(native, "qkv_compiler"):
        return f"{path} is from another version of qkv and must be rebuilt"
    native.qkv_isa.restype = ctypes.c_char_p
    isa = native.qkv_isa()
    if isa is None:
        return (
            f"QKV_ISA={os.environ.get('QKV_ISA')!r} is not an instruction set that this machine and the kernel support"
        )
    native.qkv_compiler.restype = ctypes.c_char_p
    # On Linux with aarch64, the OpenMP of torch is no global library: it is found through one that needs it. Without it
    # calls start threads of their own.
    native.qkv_use_threads_of(os.fsencode(torch._C.__file__))
    functions: dict[str, Any] = {}
    for name, (types, result) in _FUNCTIONS.items():
        functions[name] = function = native[f"qkv_{name}"]
        function.argtypes, function.restype = types, result
    return Library(isa.decode(), native.qkv_compiler().decode(), **functions, **_calls_of_tensors(native))


class _Exchange(ctypes.Structure):
    """DLPack's exchange functions. As in native/src/abi/dlpack.h."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)] + [
        (name, ctypes.c_void_p) for name in ("older", "allocate", "take", "give", "look", "stream")
    ]


_STRUCT = ctypes.c_char_p

_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "forward": ([_STRUCT], ctypes.c_int),
    "backward": ([_STRUCT] * 2, ctypes.c_int),
    "count_scores": ([_STRUCT], ctypes.c_int64),
    "quantize": ([_STRUCT], None),
    "forward_sequences": ([_STRUCT] * 2, ctypes.c_int),
    "backward_sequences": ([_STRUCT] * 3, ctypes.c_int),
    "project": ([_STRUCT, ctypes.c_int, ctypes.c_int], ctypes.c_int),
    "rotate": ([_STRUCT], ctypes.c_int),
}
"""Argument and result types of the functions of `Library` that take structs."""

_CALLS_OF_TENSORS = (
    *("fast_forward", "fast_project", "fast_gated_mlp", "fast_rms_norm", "append", "append_pages", "fast_rotate"),
    *("layer_step", "decoder_layers"),
)
"""Functions of `Library` that take Python tensors. They are functions of Python, not of ctypes, which takes 3 us to
convert 17 arguments."""


def _calls_of_tensors(native: ctypes.CDLL) -> dict[str, Any]:
    """The `_CALLS_OF_TENSORS`; None for each if torch has no DLPack exchange functions."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return dict.fromkeys(_CALLS_OF_TENSORS)
    python = ctypes.pythonapi
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    tensors = prototype(("PyCapsule_GetPointer", python))(capsule, b"dlpack_exchange_api")
    exchange = _Exchange.from_address(tensors)
    if exchange.major != 1 or not exchange.look:
        return dict.fromkeys(_CALLS_OF_TENSORS)
    functions = (ctypes.cast(python[name], ctypes.c_void_p) for name in _API.values())
    native.qkv_methods.restype = ctypes.c_void_p
    address = native.qkv_methods(ctypes.byref(_Interpreter(tensors, id(None), *functions)))
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    function = prototype(("PyCFunction_NewEx", python))
    calls: dict[str, Any] = {}
    while name := _Method.from_address(address).name:
        calls[name.decode()] = function(address, None, None)
        address += ctypes.sizeof(_Method)
    return calls


LIBRARY = Path(__file__).parent / ("native.dll" if sys.platform == "win32" else "native.so")
"""Its path in an installation. CMakeLists.txt reads the names from this line."""

# Loaded on import, since compilers cannot trace ctypes. Either the library or the reason for its absence is None.
_found = load(LIBRARY)
_library, _absence = (None, _found) if isinstance(_found, str) else (_found, None)


def loaded() -> Library:
    """The native library.

    Raises:
        RuntimeError: if there is none, for the reason that `absence` returns.
    """
    if _library is None:
        raise RuntimeError(_absence)
    return _library


def supported_isas() -> list[str]:
    """The instruction sets that both the library and this machine support, the best first; none without the library."""
    try:
        supported = ctypes.CDLL(str(LIBRARY)).qkv_supported_isas
    except (OSError, AttributeError):  # none, or one of another version
        return []
    supported.restype = ctypes.c_char_p
    found: bytes = supported()
    return found.decode().split()


def absence() -> str | None:
    """Why there is no native library; None if it is loaded."""
    return _absence


def description() -> str:
    """The instruction set and the build of the library, such as ``amx, built by GCC 12.2.0``; or why there is none."""
    return f"none, {_absence}" if _library is None else f"{_library.isa}, built by {_library.compiler}"


@contextlib.contextmanager
def use(library: Library | str) -> Iterator[None]:
    """Context manager that replaces the library for all calls of the process, for comparisons and tests.

    To have two instruction sets in one process, `load` a copy of the file under another name with ``QKV_ISA`` set.

    Args:
        library: a library, or the reason for its absence, as `load` returns them.
    """
    global _library, _absence
    before = _library, _absence
    _library, _absence = (None, library) if isinstance(library, str) else (library, None)
    try:
        yield
    finally:
        _library, _absence = before
