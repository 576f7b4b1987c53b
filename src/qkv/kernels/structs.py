"""The structs of native/src/abi. `Call` is the table of arguments that struct and operator schema are made from."""

import functools
import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int8: 4}
"""Their numbers in the kernel, as in native/src/abi/problem.h."""

UNBOUNDED = 1 << 40
"""The value of left or right for no bound."""


LARGEST_STEP = (1 << 31) - 1
"""Largest dilation. No two positions are that far apart."""


class Kind(NamedTuple):
    """How arguments of one kind are passed to the kernel."""

    schema: str
    """the type in the schema of an operator"""
    layout: str
    """the members of the C struct, as a format of `struct`"""
    absent: tuple[float, ...]
    """the values of the members for None"""
    pack: Callable[[Any], tuple[float, ...]] | None = None
    """the values of the members for an argument; without it, the argument itself is the value"""
    prepare: Callable[[Any], Any] | None = None
    """the argument in the dtype and layout that the kernel reads; applied before ``pack``"""


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a tensor ``(B, heads, L, width)``.

    Raises:
        RuntimeError: for a tensor without memory, for instance because its storage was freed.
    """
    batch, head, row, _ = tensor.stride()
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise RuntimeError(
            f"qkv's kernel: a tensor of shape {tuple(tensor.shape)} has no memory. Was its storage freed?"
        )
    return address, batch, head, row


def scales(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides of scales ``(B, heads, L)`` of int8 rows."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def bounded(keys: int | None) -> int:
    """The number of keys, at most `UNBOUNDED`, as is None."""
    return UNBOUNDED if keys is None else min(keys, UNBOUNDED)


def _per_batch(tensor: Tensor) -> tuple[int, int]:
    """Address and batch stride of ``(B or 1, ...)``."""
    return tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    """Address, strides (0 for broadcast dimensions) and dtype of ``(B, H, Lq, Lk)``."""
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), *strides, DTYPES[tensor.dtype]


def _without_negation(tensor: Tensor) -> Tensor:
    """The tensor, with a lazy negation applied."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _scales_in_rows(tensor: Tensor) -> Tensor:
    tensor = _without_negation(tensor)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _int64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64).contiguous()


def _matrix_of_floats(tensor: Tensor) -> Tensor:
    tensor = _without_negation(tensor)
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()


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
TABLE_OF_PAGES = Kind("Tensor?", "", (), lambda _: ())
"""in ``Problem.pages``, as is the number of keys"""
KEY_COUNT = Kind("SymInt", "", (), lambda _: ())
POSITION = Kind("SymInt", "q", ())
BOUND = Kind("SymInt?", "q", (UNBOUNDED,), prepare=bounded)
COUNT = Kind("SymInt", "q", (), prepare=bounded)
STEP = Kind("SymInt", "q", (), prepare=lambda keys: min(keys, LARGEST_STEP))
SIZE = Kind("SymInt?", "q", (0,), prepare=bounded)
NUMBER = Kind("float", "f", ())
OPTIONAL_NUMBER = Kind("float?", "f", (0.0,))
SEED = Kind("Tensor?", "Q", (0,), lambda seed: (int(seed.item()),))


class Call(NamedTuple):
    """The arguments of one call of the kernel.

    The fields are the arguments of the operators and the last members of ``Problem`` in native/src/abi/problem.h, in
    this order. The fields of `Mask` and of `Scores` are in the order of their classes.
    """

    q: Annotated[Tensor, HEADS]
    """(B, H, Lq, D), the last dimension contiguous, as in k and v"""
    k: Annotated[Tensor, HEADS]
    v: Annotated[Tensor, HEADS]
    k_scale: Annotated[Tensor | None, SCALES]
    """float32 (B, Hkv, Lk), as v_scale; None unless k and v are int8"""
    v_scale: Annotated[Tensor | None, SCALES]
    block_table: Annotated[Tensor | None, TABLE_OF_PAGES]
    """integer (B, entries), the pages of each row of the batch in order; k, v and their scales are (pages, Hkv,
    page_size, ...) then"""
    key_count: Annotated[int, KEY_COUNT]
    """Lk, if keys are in pages, else 0"""
    offset: Annotated[int, POSITION]
    offsets: Annotated[Tensor | None, INTEGERS]
    """integer (B,), added to ``offset``"""

    left: Annotated[int | None, BOUND]
    right: Annotated[int | None, BOUND]
    sink_tokens: Annotated[int, COUNT]
    prefix_tokens: Annotated[int, COUNT]
    dilation: Annotated[int, STEP]
    chunk: Annotated[int | None, SIZE]
    chunk_start: Annotated[int, COUNT]
    keep: Annotated[Tensor | None, FLAGS_OF_KEYS]
    """boolean (B or 1, Lk)"""
    lengths: Annotated[Tensor | None, INTEGERS]
    """integer (B or 1,)"""
    document_ids: Annotated[Tensor | None, INTEGERS]
    """integer (B or 1, Lk)"""
    prefix_lengths: Annotated[Tensor | None, INTEGERS]
    """integer (B or 1,)"""
    is_global: Annotated[Tensor | None, FLAGS_OF_KEYS]
    """boolean (B or 1, Lk)"""
    allow: Annotated[Tensor | None, FLAGS_OF_PAIRS]
    """boolean, broadcastable to (B, H, Lq, Lk), as bias"""

    scale: Annotated[float, NUMBER]
    softcap: Annotated[float | None, OPTIONAL_NUMBER]
    bias: Annotated[Tensor | None, SCORES_OF_PAIRS]
    alibi: Annotated[Tensor | None, PER_HEAD]
    """(H,), as sink_logits"""
    sink_logits: Annotated[Tensor | None, PER_HEAD]
    dropout: Annotated[float, NUMBER]

    seed: Annotated[Tensor | None, SEED]
    """integer (1,), seed of dropout"""
    first_head: Annotated[int, POSITION]
    """what dropout counts heads from, as first_key keys and queries"""
    first_key: Annotated[int, POSITION]


_HINTS = get_type_hints(Call, include_extras=True)
_FIELDS: list[tuple[str, Kind]] = [(name, hint.__metadata__[0]) for name, hint in _HINTS.items()]


SCHEMA = ", ".join(f"{kind.schema} {name}" for name, kind in _FIELDS)


def schema_of(defaults: Mapping[str, object]) -> str:
    """Some fields of a `Call`, in its order, as arguments with defaults in the schema of an operator."""
    return ", ".join(f"{kind.schema} {name}={defaults[name]}" for name, kind in _FIELDS if name in defaults)


PROBLEM = struct.Struct(
    "@2i"  # dtype, kv_dtype
    "7q"  # batch, heads, kv_heads, lq, lk, width, value_width
    "i0P"  # threads
    f"{_VIEW}P"  # out, lse
    "P4q" + "".join(kind.layout for _, kind in _FIELDS) + "0P"  # pages: table, batch, size, first, count
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
PROJECTION = struct.Struct(
    "@2i"  # dtype, out_dtype
    "3q"  # rows, in_features, out_features
    "PqPq"  # x, x_row, weight, weight_row
    "PPq"  # bias, out, out_row
)
QUANTIZATION = struct.Struct(
    "@i"  # dtype
    "4q"  # batch, heads, rows, width
    f"{_VIEW * 2}"  # from, to
    "P2q"  # scale
    "i0P"  # threads
)
ROTATION = struct.Struct(
    "@2i"  # dtype, out_dtype
    "4q"  # batch, tokens, width, pairs
    "2q"  # heads of q and of k
    f"{_VIEW * 4}"  # from, to
    "2i"  # interleaved, inverse
    "i0P"  # threads
    "P4q"  # positions, axis_count
    "PqPq"  # axes, offset, offsets
    "P2q"  # frequencies
    "2f"  # position_scale, attention_factor
    "i0P"  # table_dtype
    "2P4q"  # cos, sin
    "q"  # second
)


class StepTensors(NamedTuple):
    """The tensors of `layer_step`, in the order of native/src/abi/fast_layer_step.cpp.

    All must satisfy `can_bypass_dispatcher`.
    """

    x: Tensor
    """(B, L, in_features)"""
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor | None
    """None, as v_weight, for the keys of a context, to which nothing is appended"""
    k_bias: Tensor | None
    v_weight: Tensor | None
    v_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    q_norm: Tensor | None
    """(D,), gains of queries in the dtype of x, as k_norm of keys"""
    k_norm: Tensor | None
    frequencies: Tensor | None
    """float32 (pairs,), by which pairs of channels rotate per position"""
    cos: Tensor | None
    """(B or 1, L, 2 pairs), instead of frequencies and positions, as sin: columns of first channels, then of second"""
    sin: Tensor | None
    keys: Tensor
    """(B, Hkv, Lk, D), into which the keys of x are written, as into values (B, Hkv, Lk, Dv); or in pages"""
    values: Tensor
    k_scale: Tensor | None
    """float32 (B, Hkv, Lk), if keys and values are int8, as v_scale"""
    v_scale: Tensor | None
    block_table: Tensor | None
    """int64 (B, entries), the pages of each row in order; keys, values and their scales are (pages, Hkv, page_size,
    ...) then"""
    offsets: Tensor | None
    """int64 (B,), added to ``offset``"""
    positions: Tensor | None
    """int64 (B,), added to ``position``; or (B or 1, L), those of the tokens"""
    keep: Tensor | None
    """boolean (B or 1, Lk)"""
    lengths: Tensor | None
    """int64 (B or 1,), number of keys of each row, new ones included; all if None"""
    prefix_lengths: Tensor | None
    """int64 (B or 1,)"""
    alibi: Tensor | None
    """float32 (H,), as sink_logits"""
    sink_logits: Tensor | None
    out: Tensor
    """(B, L, out_features), written"""


class StepNumbers(NamedTuple):
    """The numbers of `layer_step`."""

    key_count: int
    """Lk, if keys are in pages or have slots to spare; else 0"""
    offset: int
    """slot of the first new key"""
    position: int
    """by which the first token is rotated"""
    left: int | None
    right: int | None
    sink_tokens: int
    prefix_tokens: int
    dilation: int
    chunk: int
    """0 for none"""
    chunk_start: int
    interleaved: bool
    position_scale: float
    attention_factor: float
    norm_gain: int
    """what gains of norms do, a `Gain`"""
    norm_eps: float
    scale: float
    softcap: float
    """0 for none"""


STEP_NUMBERS = struct.Struct("=10q i 2f i 3f i")
"""`StepNumbers`, with the threads last, for C."""


def pack_step(numbers: StepNumbers) -> bytes:
    """The `STEP_NUMBERS` of a step on torch's threads."""
    return STEP_NUMBERS.pack(*numbers[:3], *_bounded_band(*numbers[3:10]), *numbers[10:], torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _bounded_band(
    left: int | None, right: int | None, sinks: int, prefix: int, dilation: int, chunk: int, chunk_start: int
) -> tuple[int, ...]:
    """These numbers of a mask for C; cached, since all steps of a layer have the same."""
    return (
        *(bounded(left), bounded(right), bounded(sinks), bounded(prefix)),
        *(min(dilation, LARGEST_STEP), bounded(chunk), bounded(chunk_start)),
    )


class BlockTensors(NamedTuple):
    """The tensors around the attention of a decoder layer, in the order of native/src/abi/fast_decoder_layer.cpp.

    All must satisfy `can_bypass_dispatcher`.
    """

    before_attention: Tensor | None
    """(width,), gains of a norm in the dtype of x, as of the three others; None for no norm"""
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    gate_weight: Tensor
    gate_bias: Tensor | None
    up_weight: Tensor | None
    """None if its rows are the second half of those of gate_weight"""
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


BLOCK_NUMBERS = struct.Struct("=2i f")
"""The activation, what gains of norms do, and their eps, for C."""


_STEPS = [(kind.absent, kind.prepare, kind.pack) for _, kind in _FIELDS]


def pack(call: Call, out: Tensor, lse: Tensor | None) -> tuple[bytes, list[Any]]:
    """The `PROBLEM` struct of a call, and the arguments that it points to, to be kept alive."""
    batch, heads, lq, width = call.q.shape
    _, kv_heads, lk, value_width = call.v.shape
    alive: list[Any] = []
    pages = (0, 0, 0, 0, 0)
    if call.block_table is not None:
        alive.append(table := _int64(call.block_table))
        pages = (table.data_ptr(), table.shape[1], lk, 0, call.k.shape[0])
        lk = call.key_count
    values: list[Any] = [
        *(DTYPES[call.q.dtype], DTYPES[call.k.dtype], batch, heads, kv_heads, lq, lk, width, value_width),
        torch.get_num_threads(),
        *(*view(out), address(lse)),
        *pages,
    ]
    for value, (absent, prepare, pack) in zip(call, _STEPS, strict=True):
        if value is None:
            values += absent
            continue
        if prepare is not None:
            value = prepare(value)
            alive.append(value)
        if pack is None:
            values.append(value)
        else:
            values += pack(value)
    return PROBLEM.pack(*values), alive
