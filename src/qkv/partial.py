"""`Partial`: attention over some of the keys, and the merge of several into attention over all."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.torch_internals import tracing_state


class Partial(NamedTuple):
    """Attention over some keys and the log of its softmax normaliser."""

    out: Tensor
    """(B, H, Lq, Dv)"""
    lse: Tensor
    """(B, H, Lq)"""


def merge_stacked(outs: Tensor, lses: Tensor) -> Partial:
    """Attention over all keys from n pieces, ``outs (n, B, H, Lq, Dv)`` and ``lses (n, B, H, Lq)``. Differentiable."""
    wants_grad = torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)
    if not wants_grad or tracing_state():  # which cannot record an autograd.Function
        return _merge(outs, lses)
    function = _Merge if torch.compiler.is_compiling() else _MergeWithJvp
    return Partial(*function.apply(outs, lses))  # type: ignore[no-untyped-call]


def _merge(outs: Tensor, lses: Tensor) -> Partial:
    row_max = lses.detach().amax(dim=0)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    terms = (lses - row_max).exp()
    row_sum = terms.sum(dim=0)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1)
    out = ((terms / row_sum)[..., None] * outs).sum(dim=0).to(outs.dtype)
    return Partial(out, (row_max + row_sum.log()).masked_fill(empty, -torch.inf))


def _shares(lses: Tensor, lse: Tensor) -> Tensor:
    """The share of each piece in the normaliser of a row, (n, B, H, Lq, 1)."""
    return (lses - lse).exp().masked_fill(lse == -torch.inf, 0)[..., None]


class _Merge(torch.autograd.Function):
    """`_merge`, with a backward in which a row whose incoming gradient is 0 contributes 0, even if it contains NaN.

    Autograd would multiply that 0 by NaN, and so pass NaN to all keys of the pieces.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _merge(outs, lses)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses, out, lse = ctx.saved_tensors
        d_out, d_lse = d_out.to(lse.dtype), d_lse[..., None]
        shares = _shares(lses, lse)
        d_lses = shares * (d_lse + (d_out * (outs.to(lse.dtype) - out)).sum(dim=-1, keepdim=True))
        zero_grad = ((d_out == 0).all(dim=-1, keepdim=True) & (d_lse == 0)).expand_as(d_lses)
        d_outs = (shares * d_out).to(outs.dtype)
        return d_outs.masked_fill(zero_grad, 0), d_lses.masked_fill(zero_grad, 0).squeeze(-1)


class _MergeWithJvp(_Merge):
    """`_Merge` with forward-mode derivatives, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx: Any, d_outs: Tensor, d_lses: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses, out, lse = ctx.saved_tensors
        shares, d_lses = _shares(lses, lse), d_lses[..., None]
        d_out = (shares * (d_outs + d_lses * (outs.to(lse.dtype) - out))).sum(dim=0)
        return d_out.to(outs.dtype), (shares * d_lses).sum(dim=0).squeeze(-1)
