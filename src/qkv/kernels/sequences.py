"""Several sequences in one call of the kernel: ``qkv::forward_sequences`` and ``qkv::backward_sequences``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from qkv.kernels.binding import GRADIENTS, SEQUENCES, loaded
from qkv.kernels.operators import (
    Call,
    check,
    goes_past_dispatcher,
    new_gradient,
    pack,
    prepared,
    refuse_second_derivative,
    save,
    saved,
    view,
)


class Sequences(NamedTuple):
    """One call over N sequences: the arguments that both operators share, in the order of their schema.

    The last query of each sequence stands at its last key.
    """

    q: Tensor
    """(T, H, D), the queries of one sequence after those of the one before; the last dimension is contiguous, as in
    k and v"""
    k: Tensor
    """(pages, page_size, Hkv, D)"""
    v: Tensor
    starts: Tensor
    """integer (N + 1,), where the queries of each sequence begin, and the end"""
    firsts: Tensor
    """integer (N,), where in its pages the first key of each stands"""
    lengths: Tensor
    """integer (N,), keys of each"""
    tables: Tensor | None
    """integer (N, entries), the pages of each in order; None where there is but one page, of which each has its own
    keys. Backward knows no tables"""
    alibi: Tensor | None
    """(H,), or (N, H)"""
    sink_logits: Tensor | None
    """(H,)"""
    seed: Tensor | None
    """one integer, which says what dropout drops"""
    left: int | None
    right: int | None
    sink_tokens: int
    scale: float
    softcap: float
    """0 for none"""
    dropout: float


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor starts, Tensor firsts, Tensor lengths, Tensor? tables, Tensor? alibi, "
    "Tensor? sink_logits, Tensor? seed, SymInt? left, SymInt? right, SymInt sink_tokens, float scale, "
    "float softcap, float dropout"
)
_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(f"forward_sequences({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"backward_sequences({_ARGUMENTS}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_alibi)"
)


def forward_sequences(call: Sequences) -> tuple[Tensor, Tensor]:
    """Attention ``(T, H, Dv)`` and its lse ``(H, T)``, past the dispatcher of torch: for plain tensors, no gradients.

    Raises:
        ValueError: for sequences that leave their tensors, as in both operators; nothing is read then.
        MemoryError: where the kernel's own sums do not fit.
    """
    out, lse = _new_results(call)
    call, problem, sequences = _packed(call, out, lse)
    _check(loaded().forward_sequences(problem, sequences), call)
    return out, lse


def forward_sequences_with_gradients(call: Sequences) -> tuple[Tensor, Tensor]:
    """The operator ``qkv::forward_sequences`` past the dispatcher of torch: for plain tensors."""
    found: tuple[Tensor, Tensor] = _Recorded.apply(*call)  # type: ignore[no-untyped-call]
    return found


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return forward_sequences(Sequences(*arguments))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, (out, lse, d_out, d_lse) = _split(arguments)
    found = _new_gradients(call)
    dq, dk, dv, delta, d_alibi = found
    ends = call.firsts + call.lengths
    if call.firsts[0] > 0 or ends[-1] < dk.shape[1] or not torch.equal(call.firsts[1:], ends[:-1]):
        dk.zero_(), dv.zero_()  # there are keys of no sequence, whose gradients are not written
    d_out, d_lse = d_out.resolve_neg(), d_lse.resolve_neg().contiguous()
    d_out = d_out if d_out.stride(2) == 1 else d_out.contiguous()
    call, problem, sequences = _packed(call, out, lse)
    gradients = GRADIENTS.pack(
        *view(_as_heads(d_out)),
        *(d_lse.data_ptr(), delta.data_ptr()),
        *(*view(_as_heads(dq)), *view(dk.transpose(1, 2)), *view(dv.transpose(1, 2))),
        *(0, 0 if call.alibi is None else d_alibi.data_ptr()),
    )
    _check(loaded().backward_sequences(problem, sequences, gradients), call)
    return found


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _new_results(Sequences(*arguments))


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    call, _ = _split(arguments)
    return _new_gradients(call)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    arguments, out, lse = saved(ctx)
    call = Sequences(*arguments)
    backward = _backward if goes_past_dispatcher(d_out) else torch.ops.qkv.backward_sequences
    dq, dk, dv, delta, d_alibi = backward(*call, out, lse, d_out, d_lse)
    found: dict[str, Tensor | None] = dict.fromkeys(Sequences._fields)
    found |= {"q": dq, "k": dk, "v": dv}
    wanted = Sequences(*ctx.needs_input_grad)
    if call.sink_logits is not None and wanted.sink_logits:
        shares = (call.sink_logits.to(lse.dtype)[:, None] - lse).exp()
        found["sink_logits"] = -(shares * delta).sum(1).to(call.sink_logits.dtype)
    if call.alibi is not None and wanted.alibi:
        found["alibi"] = d_alibi.sum_to_size(call.alibi.shape).to(call.alibi.dtype)
    return tuple(found.values())


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
    count = len(Sequences._fields)
    return Sequences(*arguments[:count]), arguments[count:]


def _new_results(call: Sequences) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = call.q.shape
    out = call.q.new_empty((tokens, heads, call.v.shape[3]))
    return out, call.q.new_empty((heads, tokens), dtype=torch.float32)


def _new_gradients(call: Sequences) -> tuple[Tensor, ...]:
    tokens, heads, _ = call.q.shape
    delta = call.q.new_empty((heads, tokens), dtype=torch.float32)
    count = 0 if call.alibi is None else call.lengths.shape[0]
    d_alibi = call.q.new_zeros((count, heads), dtype=torch.float32)
    return new_gradient(call.q), new_gradient(call.k), new_gradient(call.v), delta, d_alibi


def _as_heads(packed: Tensor) -> Tensor:
    return packed.transpose(0, 1).unsqueeze(0)


def _packed(call: Sequences, out: Tensor, lse: Tensor) -> tuple[Sequences, bytes, bytes]:
    """The call with its tensors as the kernel reads them, and its structs, which it must outlive."""
    call = call._replace(q=call.q.resolve_neg(), k=call.k.resolve_neg(), v=call.v.resolve_neg())
    kept = prepared(
        Call(
            _as_heads(call.q),
            *(call.k.transpose(1, 2), call.v.transpose(1, 2)),
            *(None, None, None, None, None, None, None),
            *(call.alibi, call.sink_logits, call.seed),
            call.left,
            call.right,
            call.sink_tokens,
            0,
            *(call.scale, call.softcap, call.dropout),
        )
    )
    call = call._replace(
        starts=_integers(call.starts),
        firsts=_integers(call.firsts),
        lengths=_integers(call.lengths),
        tables=None if call.tables is None else _integers(call.tables),
        alibi=kept.alibi,
        sink_logits=kept.sink_logits,
    )
    sequences = SEQUENCES.pack(
        *(call.lengths.shape[0], call.starts.data_ptr(), call.firsts.data_ptr(), call.lengths.data_ptr()),
        *((0, 0) if call.tables is None else (call.tables.data_ptr(), call.tables.shape[1])),
        *call.k.shape[:2],
        0 if call.alibi is None or call.alibi.dim() == 1 else call.alibi.shape[1],
    )
    return call, pack(kept, _as_heads(out), lse), sequences


def _integers(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.int64 and tensor.is_cpu and tensor.is_contiguous():
        return tensor
    return tensor.to("cpu", torch.int64).contiguous()


def _check(status: int, call: Sequences) -> None:
    if status == 2:
        pages = "" if call.tables is None else f" and tables {call.tables}"
        raise ValueError(
            f"qkv's kernel: sequences must lie within the {call.q.shape[0]} queries and the {call.k.shape[0]} pages of "
            f"{call.k.shape[1]} keys; got starts {call.starts}, firsts {call.firsts}, lengths {call.lengths}{pages}."
        )
    check(status, call.q, call.k)
