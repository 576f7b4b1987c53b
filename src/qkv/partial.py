"""`Partial`: attention over some of the keys, and what several of them make over all."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some keys, and the log of its normaliser."""

    out: Tensor
    """(B, H, Lq, Dv)"""
    lse: Tensor
    """(B, H, Lq)"""


def joined(outs: Tensor, lses: Tensor) -> Partial:
    """The pieces ``outs (n, B, H, Lq, Dv)`` and ``lses (n, B, H, Lq)`` as one. Differentiable."""
    wants_grad = torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)
    if not wants_grad or torch._C._get_tracing_state():  # a trace cannot hold a function of Python's
        return _joined(outs, lses)
    function = _Joined if torch.compiler.is_compiling() else _JoinedWithTangents
    return Partial(*function.apply(outs, lses))  # type: ignore[no-untyped-call]


def _joined(outs: Tensor, lses: Tensor) -> Partial:
    top = lses.detach().amax(dim=0)
    top = top.masked_fill(top == -torch.inf, 0)
    shares = (lses - top).exp()
    total = shares.sum(dim=0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = ((shares / total)[..., None] * outs).sum(dim=0).to(outs.dtype)
    return Partial(out, (top + total.log()).masked_fill(empty, -torch.inf))


def _shares(lses: Tensor, lse: Tensor) -> Tensor:
    """What each piece has of a row's weights, (n, B, H, Lq, 1)."""
    return (lses - lse).exp().masked_fill(lse == -torch.inf, 0)[..., None]


class _Joined(torch.autograd.Function):
    """`_joined`, in whose backward a row without a gradient from above adds nothing, whatever it holds.

    Left to autograd, a row that is NaN would multiply the 0 from above with it, and give NaN to all keys of its pieces.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _joined(outs, lses)
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
        silent = ((d_out == 0).all(dim=-1, keepdim=True) & (d_lse == 0)).expand_as(d_lses)
        d_outs = (shares * d_out).to(outs.dtype)
        return d_outs.masked_fill(silent, 0), d_lses.masked_fill(silent, 0).squeeze(-1)


class _JoinedWithTangents(_Joined):
    """Forward mode as well, which torch's compiler does not take."""

    @staticmethod
    def jvp(ctx: Any, d_outs: Tensor, d_lses: Tensor) -> tuple[Tensor, Tensor]:
        outs, lses, out, lse = ctx.saved_tensors
        shares, d_lses = _shares(lses, lse), d_lses[..., None]
        d_out = (shares * (d_outs + d_lses * (outs.to(lse.dtype) - out))).sum(dim=0)
        return d_out.to(outs.dtype), (shares * d_lses).sum(dim=0).squeeze(-1)
