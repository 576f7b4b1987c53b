"""Several sequences in one call of the kernel: ``qkv::forward_sequences`` and ``qkv::backward_sequences``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from qkv.kernels.binding import loaded
from qkv.kernels.dispatch import can_backward_bypass_dispatcher
from qkv.kernels.operators import (
    check_status,
    gradients_of,
    new_gradient,
    new_results,
    refuse_second_derivative,
    run_backward,
    save_for_backward,
    saved,
    split,
)
from qkv.kernels.structs import SCHEMA, SEQUENCES, Call, address, pack
from qkv.tracing import is_tracing


class Sequences(NamedTuple):
    """The arguments of one call over N sequences, the last query of each aligned with its last key."""

    call: Call
    """q (1, H, T, D), the queries of all sequences, packed; k and v (pages, Hkv, page_size, D); alibi (H,) or (N, H).
    The mask is an interval; no bias, no int8"""
    starts: Tensor
    """integer (N + 1,), the first query of each sequence, then T"""
    firsts: Tensor
    """integer (N,), the first key of each sequence, counted along its pages"""
    key_lengths: Tensor
    """integer (N,), number of keys of each sequence"""
    tables: Tensor | None
    """integer (N, entries), the pages of each sequence in order. None for a single page in which sequences do not
    overlap, as backward requires"""

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the operators, in the order of their schema."""
        return *self.call, *self[1:]


_ARGUMENTS = f"{SCHEMA}, Tensor starts, Tensor firsts, Tensor key_lengths, Tensor? tables"
_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(f"forward_sequences({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"backward_sequences({_ARGUMENTS}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_bias, Tensor d_alibi)"
)


def forward_sequences(sequences: Sequences, *, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Attention ``(1, H, T, Dv)`` and its lse ``(1, H, T)``.

    Raises:
        ValueError: for sequences out of bounds, before anything is read.
        MemoryError: if scratch memory cannot be allocated.
    """
    if is_tracing():
        results: tuple[Tensor, Tensor] = torch.ops.qkv.forward_sequences(*sequences.arguments())
    elif needs_grad:
        results = _Forward.apply(*sequences.arguments())  # type: ignore[no-untyped-call]
    else:
        results = _forward(*sequences.arguments())
    return results


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    sequences, _ = _split(arguments)
    out, lse = new_results(sequences.call, wants_lse=True)
    assert lse is not None
    problem, _alive = pack(sequences.call, out, lse)
    packed, _also_alive = _pack(sequences)
    _check_status(loaded().forward_sequences(problem, packed), sequences)
    return out, lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    sequences, (out, lse, d_out, d_lse) = _split(arguments)
    gradients = _new_gradients(sequences)
    dk, dv, firsts, ends = gradients[1], gradients[2], sequences.firsts, sequences.firsts + sequences.key_lengths
    if firsts[0] > 0 or ends[-1] < dk.shape[2] or not torch.equal(firsts[1:], ends[:-1]):
        dk.zero_(), dv.zero_()  # the kernel writes no gradients for keys outside of all sequences
    packed, _alive = _pack(sequences)

    def run(problem: bytes, packed_gradients: bytes) -> int:
        return loaded().backward_sequences(problem, packed, packed_gradients)

    _check_status(run_backward(sequences.call, (out, lse, d_out, d_lse), gradients, run), sequences)
    return gradients


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = new_results(_split(arguments)[0].call, wants_lse=True)
    assert lse is not None
    return out, lse


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _new_gradients(_split(arguments)[0])


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of ``qkv::forward_sequences``."""
    arguments, out, lse = saved(ctx)
    backward = _backward if can_backward_bypass_dispatcher(d_out) else torch.ops.qkv.backward_sequences
    outputs = backward(*arguments, out, lse, d_out, d_lse)
    (call, others), (wanted, _) = split(tuple(arguments)), split(tuple(ctx.needs_input_grad))
    return *gradients_of(call, wanted, lse, outputs), *[None] * len(others)


class _Forward(torch.autograd.Function):
    """``qkv::forward_sequences`` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        save_for_backward(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


_LIBRARY.impl("forward_sequences", _forward, "CPU")
_LIBRARY.impl("backward_sequences", _backward, "CPU")
library.register_fake("qkv::forward_sequences", _forward_fake, lib=_LIBRARY)
library.register_fake("qkv::backward_sequences", _backward_fake, lib=_LIBRARY)
library.register_autograd("qkv::forward_sequences", _differentiate, setup_context=save_for_backward, lib=_LIBRARY)
library.register_autograd("qkv::backward_sequences", refuse_second_derivative, lib=_LIBRARY)


def _split(arguments: tuple[Any, ...]) -> tuple[Sequences, tuple[Any, ...]]:
    """The `Sequences` that an operator's arguments begin with, and the other arguments."""
    call, (starts, firsts, key_lengths, tables, *others) = split(arguments)
    return Sequences(call, starts, firsts, key_lengths, tables), tuple(others)


def _new_gradients(sequences: Sequences) -> tuple[Tensor, ...]:
    """dq, dk, dv, delta, d_bias (empty) and d_alibi, one row per sequence."""
    call, count = sequences.call, sequences.key_lengths.shape[0]
    delta = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    d_alibi = call.q.new_zeros((0 if call.alibi is None else count, call.q.shape[1]), dtype=torch.float32)
    return *map(new_gradient, (call.q, call.k, call.v)), delta, call.q.new_empty(0, dtype=torch.float32), d_alibi


def _pack(sequences: Sequences) -> tuple[bytes, list[Tensor | None]]:
    """The `SEQUENCES` struct, and the tensors that it points to, to be kept alive."""
    call, *tensors = sequences
    alive = [None if tensor is None else tensor.to("cpu", torch.int64).contiguous() for tensor in tensors]
    starts, firsts, lengths, tables = alive
    packed = SEQUENCES.pack(
        *(sequences.key_lengths.shape[0], address(starts), address(firsts), address(lengths)),
        *(address(tables), 0 if tables is None else tables.shape[1]),
        *(call.k.shape[0], call.k.shape[2]),
        0 if call.alibi is None or call.alibi.dim() == 1 else call.alibi.shape[1],
    )
    return packed, alive


def _check_status(status: int, sequences: Sequences) -> None:
    """Raises ValueError or MemoryError for the status of a kernel that failed."""
    call, starts, firsts, lengths, tables = sequences
    if status == 2:
        pages = "" if tables is None else f" and tables {tables}"
        raise ValueError(
            f"qkv's kernel: sequences must lie within the {call.q.shape[2]} queries and the {call.k.shape[0]} pages of "
            f"{call.k.shape[2]} keys; got starts {starts}, firsts {firsts}, lengths {lengths}{pages}."
        )
    check_status(status, call)
