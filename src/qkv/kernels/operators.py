"""The kernel as torch operators ``qkv::forward`` and ``qkv::backward``, with shapes for tracing and with gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from qkv.kernels.binding import loaded
from qkv.kernels.dispatch import can_backward_bypass_dispatcher
from qkv.kernels.structs import GRADIENTS, SCHEMA, Call, address, pack, view

_LIBRARY = library.Library("qkv", "DEF")
_LIBRARY.define(f"forward({SCHEMA}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"backward({SCHEMA}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse, bool wants_bias, bool wants_alibi)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_bias, Tensor d_alibi)"
)


def forward(call: Call, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention and, if wanted, its lse, without torch's dispatcher and without gradients."""
    out, lse = new_results(call, wants_lse=wants_lse)
    problem, _alive = pack(call, out, lse)
    check_status(loaded().forward(problem), call)
    return out, lse


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward(Call(*arguments), wants_lse=True)
    assert lse is not None
    return out, lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, (out, lse, d_out, d_lse, wants_bias, wants_alibi) = split(arguments)
    gradients = _new_gradients(call, wants_bias, wants_alibi)
    check_status(run_backward(call, (out, lse, d_out, d_lse), gradients, loaded().backward), call)
    return gradients


def run_backward(
    call: Call,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, ...],
    run: Callable[[bytes, bytes], int],
) -> int:
    """Runs the backward pass of a call and returns its status.

    Args:
        results: out and lse of the forward pass, d_out and d_lse.
        gradients: uninitialised dq, dk, dv, delta, d_bias and d_alibi; the last two are empty if not wanted.
        run: takes a `PROBLEM` and its `GRADIENTS` and returns a status.
    """
    out, lse, d_out, d_lse = results
    dq, dk, dv, delta, d_bias, d_alibi = gradients
    d_lse, d_out = d_lse.resolve_neg().contiguous(), d_out.resolve_neg()
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    packed = GRADIENTS.pack(
        *view(d_out),
        *(d_lse.data_ptr(), delta.data_ptr()),
        *(*view(dq), *view(dk), *view(dv)),
        *(address(d_bias if d_bias.numel() else None), address(d_alibi if d_alibi.numel() else None)),
    )
    problem, _alive = pack(call, out, lse)
    return run(problem, packed)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = new_results(Call(*arguments), wants_lse=True)
    assert lse is not None
    return out, lse


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wants_bias, wants_alibi) = split(arguments)
    return _new_gradients(call, wants_bias, wants_alibi)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves the arguments and results of a forward operator, for `saved`."""
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]


def saved(ctx: Any) -> tuple[list[Any], Tensor, Tensor]:
    """The arguments, out and lse that `save_for_backward` has saved."""
    *tensors, out, lse = ctx.saved_tensors
    pairs = zip(tensors, ctx.constants, strict=True)
    return [constant if tensor is None else tensor for tensor, constant in pairs], out, lse


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of ``qkv::forward``."""
    arguments, out, lse = saved(ctx)
    call, wanted = Call(*arguments), Call(*ctx.needs_input_grad)
    backward = _backward if can_backward_bypass_dispatcher(d_out) else torch.ops.qkv.backward
    outputs = backward(*call, out, lse, d_out, d_lse, wanted.bias, wanted.alibi)
    return gradients_of(call, wanted, lse, outputs)


def gradients_of(call: Call, wanted: Call, lse: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradient of each field of the call, from the outputs of a backward operator."""
    dq, dk, dv, delta, d_bias, d_alibi = outputs
    gradients: dict[str, Tensor | None] = dict.fromkeys(Call._fields)
    gradients |= {"q": dq, "k": dk, "v": dv}
    if call.sink_logits is not None and wanted.sink_logits:
        weights = (call.sink_logits.to(lse.dtype)[:, None] - lse).exp()
        # A logit of -inf means no sink. For rows without keys the lse is -inf as well, and -inf - -inf is NaN.
        terms = (weights * delta).masked_fill(call.sink_logits[:, None] == -torch.inf, 0)
        gradients["sink_logits"] = -terms.sum((0, 2)).to(call.sink_logits.dtype)
    if call.bias is not None and wanted.bias:
        gradients["bias"] = d_bias.sum_to_size(call.bias.shape).to(call.bias.dtype)
    if call.alibi is not None and wanted.alibi:
        gradients["alibi"] = d_alibi.sum_to_size(call.alibi.shape).to(call.alibi.dtype)
    return tuple(gradients.values())


class Forward(torch.autograd.Function):
    """``qkv::forward`` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        save_for_backward(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    """The autograd formula of backward operators: raises NotImplementedError."""
    raise NotImplementedError(
        "qkv's kernel has no second derivative: for create_graph=True, pass attention(..., backend='reference')."
    )


_LIBRARY.impl("forward", _forward, "CPU")
_LIBRARY.impl("backward", _backward, "CPU")
library.register_fake("qkv::forward", _forward_fake, lib=_LIBRARY)
library.register_fake("qkv::backward", _backward_fake, lib=_LIBRARY)
library.register_autograd("qkv::forward", _differentiate, setup_context=save_for_backward, lib=_LIBRARY)
library.register_autograd("qkv::backward", refuse_second_derivative, lib=_LIBRARY)


def split(arguments: tuple[Any, ...]) -> tuple[Call, tuple[Any, ...]]:
    """The `Call` that an operator's arguments begin with, and the other arguments."""
    count = len(Call._fields)
    return Call(*arguments[:count]), arguments[count:]


def new_results(call: Call, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Uninitialised out and, if wanted, lse."""
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32) if wants_lse else None
    return new_out(call.q, call.v), lse


def new_out(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised output (B, H, Lq, Dv)."""
    (batch, heads, lq, _), width = q.shape, v.shape[3]
    # In memory (B, Lq, H, Dv), as from torch's kernels, so that merging heads copies nothing.
    return q.new_empty_strided((batch, heads, lq, width), (lq * heads * width, width, heads * width, 1))


def _new_gradients(call: Call, wants_bias: bool, wants_alibi: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv, delta, d_bias and d_alibi, uninitialised except d_bias."""
    q, k, v = call.q, call.k, call.v
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    delta = q.new_empty((batch, heads, lq), dtype=torch.float32)
    d_bias = q.new_zeros((batch, heads, lq, lk) if wants_bias else (0,), dtype=torch.float32)
    d_alibi = q.new_empty((heads,) if wants_alibi else (0,), dtype=torch.float32)
    return new_gradient(q), new_gradient(k), new_gradient(v), delta, d_bias, d_alibi


def new_gradient(tensor: Tensor) -> Tensor:
    """Uninitialised gradient in the layout of its tensor, or contiguous if rows of that overlap or are strided."""
    gradient = torch.empty_like(tensor)
    return gradient if gradient.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def check_status(status: int, call: Call) -> None:
    """Raises ValueError or MemoryError for the status of a kernel that failed."""
    if status == 2 and call.block_table is not None:
        raise ValueError(
            f"qkv's kernel: the table of pages must name pages 0 to {call.k.shape[0] - 1} for all {call.key_count} "
            f"keys, and offset be between -2**30 and 2**30; got {call.block_table} and offset {call.offsets}."
        )
    if status == 2:
        raise ValueError(
            "qkv's kernel: offset must be between -2**30 and 2**30 in each row, and between 0 and "
            f"{call.k.shape[2] - call.q.shape[2]} with a documents mask, which must cover the queries; "
            f"got {call.offsets}."
        )
    if status:
        raise MemoryError(
            f"qkv's kernel: not enough scratch memory for q {tuple(call.q.shape)} and k {tuple(call.k.shape)}; "
            "call it with fewer batch rows or heads."
        )
