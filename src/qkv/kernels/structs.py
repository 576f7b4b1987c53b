"""The structs of native/src/abi. `Call` is the one table of the arguments of a call: its struct and schema follow."""

import struct
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int8: 4}
"""As the kernel numbers them."""

UNBOUNDED = 1 << 40
"""Left or right of an interval without a bound."""


class Kind(NamedTuple):
    """How arguments of one kind reach the kernel."""

    schema: str
    """their type in the schema of an operator"""
    layout: str
    """their members of the C struct, in the language of `struct`"""
    absent: tuple[float, ...]
    """the values of these members for None"""
    pack: Callable[[Any], tuple[float, ...]] | None = None
    """the same for others; the argument itself is the value if there is no function"""
    prepare: Callable[[Any], Any] | None = None
    """the argument as the kernel reads it, in a dtype and layout of its own"""


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """The members of a tensor of heads.

    Raises:
        RuntimeError: for a tensor without memory, as when its storage was freed.
    """
    batch, head, row, _ = tensor.stride()
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise RuntimeError(
            f"qkv's kernel: a tensor of shape {tuple(tensor.shape)} has no memory. Was its storage freed?"
        )
    return address, batch, head, row


def scales(tensor: Tensor) -> tuple[int, int, int]:
    """The members of the scales of int8 rows."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def address(tensor: Tensor | None) -> int:
    """Where its numbers are in memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def bounded(keys: int | None) -> int:
    """A number of keys as the kernel counts them."""
    return UNBOUNDED if keys is None else min(keys, UNBOUNDED)


def _per_batch(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), *strides, DTYPES[tensor.dtype]


def _without_negation(tensor: Tensor) -> Tensor:
    """The tensor with its own numbers in memory, where they are those of a lazy negation."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _scales_in_rows(tensor: Tensor) -> Tensor:
    tensor = _without_negation(tensor)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _int64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64).contiguous()


def _matrix_of_floats(tensor: Tensor) -> Tensor:
    tensor = _without_negation(tensor)
    return tensor if tensor.dtype in DTYPES else tensor.float()


def _floats(tensor: Tensor) -> Tensor:
    return _without_negation(tensor).float().contiguous()


_VIEW, _MATRIX = "P3q", "P4qi0P"
HEADS = Kind("Tensor", _VIEW, (), view, _without_negation)
SCALES = Kind("Tensor?", "P2q", (0, 0, 0), scales, _scales_in_rows)
FLAGS_OF_KEYS = Kind("Tensor?", "Pq", (0, 0), _per_batch, Tensor.contiguous)
INTEGERS = Kind("Tensor?", "Pq", (0, 0), _per_batch, _int64)
FLAGS_OF_PAIRS = Kind("Tensor?", _MATRIX, (0,) * 6, _matrix, lambda tensor: tensor.view(torch.uint8))
SCORES_OF_PAIRS = Kind("Tensor?", _MATRIX, (0,) * 6, _matrix, _matrix_of_floats)
PER_HEAD = Kind("Tensor?", "P", (0,), lambda tensor: (tensor.data_ptr(),), _floats)
POSITION = Kind("SymInt", "q", ())
BOUND = Kind("SymInt?", "q", (UNBOUNDED,), prepare=bounded)
COUNT = Kind("SymInt", "q", (), prepare=bounded)
NUMBER = Kind("float", "f", ())
OPTIONAL_NUMBER = Kind("float?", "f", (0.0,))
SEED = Kind("Tensor?", "Q", (0,), lambda seed: (int(seed.item()),))


class Call(NamedTuple):
    """One call of the kernel.

    The fields are the arguments of the operators, and the last members of ``Problem`` in native/src/abi/problem.h, in
    this order. Those of `Mask` and of `Scores` are in the order of their classes.
    """

    q: Annotated[Tensor, HEADS]
    """(B, H, Lq, D), the last dimension contiguous, as in k and v"""
    k: Annotated[Tensor, HEADS]
    v: Annotated[Tensor, HEADS]
    k_scale: Annotated[Tensor | None, SCALES]
    """float32 (B, Hkv, Lk), where k and v are int8, as is v_scale"""
    v_scale: Annotated[Tensor | None, SCALES]
    offset: Annotated[int, POSITION]

    left: Annotated[int | None, BOUND]
    right: Annotated[int | None, BOUND]
    sink_tokens: Annotated[int, COUNT]
    keep: Annotated[Tensor | None, FLAGS_OF_KEYS]
    """boolean (B or 1, Lk)"""
    lengths: Annotated[Tensor | None, INTEGERS]
    """integer (B or 1,)"""
    document_ids: Annotated[Tensor | None, INTEGERS]
    """integer (B or 1, Lk)"""
    allow: Annotated[Tensor | None, FLAGS_OF_PAIRS]
    """boolean, broadcastable to (B, H, Lq, Lk), as is bias"""

    scale: Annotated[float, NUMBER]
    softcap: Annotated[float | None, OPTIONAL_NUMBER]
    bias: Annotated[Tensor | None, SCORES_OF_PAIRS]
    alibi: Annotated[Tensor | None, PER_HEAD]
    """(H,), as is sink_logits"""
    sink_logits: Annotated[Tensor | None, PER_HEAD]
    dropout: Annotated[float, NUMBER]

    seed: Annotated[Tensor | None, SEED]
    """one integer, which determines what dropout drops"""


_HINTS = get_type_hints(Call, include_extras=True)
_FIELDS: list[tuple[str, Kind]] = [(name, hint.__metadata__[0]) for name, hint in _HINTS.items()]

SCHEMA = ", ".join(f"{kind.schema} {name}" for name, kind in _FIELDS)

PROBLEM = struct.Struct(
    "@2i"  # dtype, kv_dtype
    "7q"  # batch, heads, kv_heads, lq, lk, width, value_width
    "i0P"  # threads
    f"{_VIEW}P"  # out, lse
    "P2q" + "".join(kind.layout for _, kind in _FIELDS) + "0P"  # pages: table, size, first
)
GRADIENTS = struct.Struct(
    f"@{_VIEW}"  # d_out
    "2P"  # d_lse, delta
    f"{_VIEW * 3}"  # dq, dk, dv
    "2P"  # d_bias, d_alibi
)
SEQUENCES = struct.Struct(
    "@q"  # count
    "3P"  # starts, firsts, lengths
    "Pq"  # tables, entries
    "2q"  # pages, page_size
    "q"  # alibi
)
QUANTIZATION = struct.Struct(
    "@i"  # dtype
    "4q"  # batch, heads, rows, width
    f"{_VIEW * 2}"  # from, to
    "P2q"  # scale
    "i0P"  # threads
)


_STEPS = [(kind.absent, kind.prepare, kind.pack) for _, kind in _FIELDS]


def pack(call: Call, out: Tensor, lse: Tensor | None) -> tuple[bytes, list[Any]]:
    """The struct of a call, and what must outlive it: the arguments as the kernel reads them."""
    batch, heads, lq, width = call.q.shape
    _, kv_heads, lk, value_width = call.v.shape
    values: list[Any] = [
        *(DTYPES[call.q.dtype], DTYPES[call.k.dtype], batch, heads, kv_heads, lq, lk, width, value_width),
        torch.get_num_threads(),
        *(*view(out), address(lse)),
        *(0, 0, 0),  # pages
    ]
    kept: list[Any] = []
    for value, (absent, prepare, pack) in zip(call, _STEPS, strict=True):
        if value is None:
            values += absent
            continue
        if prepare is not None:
            value = prepare(value)
            kept.append(value)
        if pack is None:
            values.append(value)
        else:
            values += pack(value)
    return PROBLEM.pack(*values), kept
