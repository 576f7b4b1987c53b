"""Several sequences in one call of the kernel: ``qkv::forward_sequences`` and ``qkv::backward_sequences``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from qkv.kernels.binding import loaded
from qkv.kernels.dispatch import can_backward_bypass_dispatcher, is_tracing
from qkv.kernels.operators import (
    check,
    gradients_of,
    new_gradient,
    new_results,
    refuse_second_derivative,
    run_backward,
    save,
    saved,
    split,
)
from qkv.kernels.structs import SCHEMA, SEQUENCES, Call, address, pack


class Sequences(NamedTuple):
    """One call over N sequences of T queries in all. The last query of each is at the position of its last key."""

    call: Call
    """q (1, H, T, D), the queries of each sequence behind those of the sequence before; k and v (pages, Hkv, page_size,
    D); alibi (H,) or (N, H). No mask beside an interval, no bias, no int8"""
    starts: Tensor
    """integer (N + 1,), where the queries of each sequence begin, and the end"""
    firsts: Tensor
    """integer (N,), the first key of each, counted in the rows of its pages"""
    key_lengths: Tensor
    """integer (N,), keys of each"""
    tables: Tensor | None
    """integer (N, entries), the pages of each in order; None where there is but one page, of which each has its own
    keys. Not in backward"""

    def arguments(self) -> tuple[Any, ...]:
        """Those of the operators, in the order of their schema."""
        return *self.call, *self[1:]


_ARGUMENTS = f"{SCHEMA}, Tensor starts, Tensor firsts, Tensor key_lengths, Tensor? tables"
_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(f"forward_sequences({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"backward_sequences({_ARGUMENTS}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_bias, Tensor d_alibi)"
)


def forward_sequences(sequences: Sequences, *, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Attention ``(1, H, T, Dv)`` and its lse ``(1, H, T)``, by the ways of `qkv.kernels.forward`.

    Raises:
        ValueError: for sequences outside of their tensors; nothing is read then.
        MemoryError: where the kernel's scratch memory cannot be allocated.
    """
    if is_tracing():
        found: tuple[Tensor, Tensor] = torch.ops.qkv.forward_sequences(*sequences.arguments())
    elif needs_grad:
        found = _Recorded.apply(*sequences.arguments())  # type: ignore[no-untyped-call]
    else:
        found = _forward(*sequences.arguments())
    return found


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    sequences, _ = _split(arguments)
    out, lse = new_results(sequences.call, wants_lse=True)
    assert lse is not None
    problem, _kept = pack(sequences.call, out, lse)
    packed, _also_kept = _pack(sequences)
    _check(loaded().forward_sequences(problem, packed), sequences)
    return out, lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    sequences, (out, lse, d_out, d_lse) = _split(arguments)
    found = _new_gradients(sequences)
    dk, dv, firsts, ends = found[1], found[2], sequences.firsts, sequences.firsts + sequences.key_lengths
    if firsts[0] > 0 or ends[-1] < dk.shape[2] or not torch.equal(firsts[1:], ends[:-1]):
        dk.zero_(), dv.zero_()  # some keys belong to no sequence, so the kernel does not write their gradients
    packed, _kept = _pack(sequences)

    def run(problem: bytes, gradients: bytes) -> int:
        return loaded().backward_sequences(problem, packed, gradients)

    _check(run_backward(sequences.call, (out, lse, d_out, d_lse), found, run), sequences)
    return found


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = new_results(_split(arguments)[0].call, wants_lse=True)
    assert lse is not None
    return out, lse


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return _new_gradients(_split(arguments)[0])


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    arguments, out, lse = saved(ctx)
    backward = _backward if can_backward_bypass_dispatcher(d_out) else torch.ops.qkv.backward_sequences
    found = backward(*arguments, out, lse, d_out, d_lse)
    (call, others), (wanted, _) = split(tuple(arguments)), split(tuple(ctx.needs_input_grad))
    return *gradients_of(call, wanted, lse, found), *[None] * len(others)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        save(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


_LIBRARY.impl("forward_sequences", _forward, "CPU")
_LIBRARY.impl("backward_sequences", _backward, "CPU")
library.register_fake("qkv::forward_sequences", _forward_shapes, lib=_LIBRARY)
library.register_fake("qkv::backward_sequences", _backward_shapes, lib=_LIBRARY)
library.register_autograd("qkv::forward_sequences", _differentiate, setup_context=save, lib=_LIBRARY)
library.register_autograd("qkv::backward_sequences", refuse_second_derivative, lib=_LIBRARY)


def _split(arguments: tuple[Any, ...]) -> tuple[Sequences, tuple[Any, ...]]:
    call, (starts, firsts, key_lengths, tables, *others) = split(arguments)
    return Sequences(call, starts, firsts, key_lengths, tables), tuple(others)


def _new_gradients(sequences: Sequences) -> tuple[Tensor, ...]:
    call, count = sequences.call, sequences.key_lengths.shape[0]
    delta = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    d_alibi = call.q.new_zeros((0 if call.alibi is None else count, call.q.shape[1]), dtype=torch.float32)
    return *map(new_gradient, (call.q, call.k, call.v)), delta, call.q.new_empty(0, dtype=torch.float32), d_alibi


def _pack(sequences: Sequences) -> tuple[bytes, list[Tensor | None]]:
    """The struct of the sequences, and what must outlive it: their tensors as the kernel reads them."""
    call, *tensors = sequences
    kept = [None if tensor is None else tensor.to("cpu", torch.int64).contiguous() for tensor in tensors]
    starts, firsts, lengths, tables = kept
    packed = SEQUENCES.pack(
        *(sequences.key_lengths.shape[0], address(starts), address(firsts), address(lengths)),
        *(address(tables), 0 if tables is None else tables.shape[1]),
        *(call.k.shape[0], call.k.shape[2]),
        0 if call.alibi is None or call.alibi.dim() == 1 else call.alibi.shape[1],
    )
    return packed, kept


def _check(status: int, sequences: Sequences) -> None:
    call, starts, firsts, lengths, tables = sequences
    if status == 2:
        pages = "" if tables is None else f" and tables {tables}"
        raise ValueError(
            f"qkv's kernel: sequences must lie within the {call.q.shape[2]} queries and the {call.k.shape[0]} pages of "
            f"{call.k.shape[2]} keys; got starts {starts}, firsts {firsts}, lengths {lengths}{pages}."
        )
    check(status, call)
