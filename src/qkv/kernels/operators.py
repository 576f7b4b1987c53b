"""The kernel as operators of torch, ``qkv::forward`` and ``qkv::backward``: with shapes for tracing, and gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from qkv.kernels.binding import GRADIENTS, PROBLEM, QUANTIZATION, UNBOUNDED, absence, loaded

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int8: 4}
"""As the kernel numbers them."""


class Call(NamedTuple):
    """One call of the kernel: the arguments that both operators share, in the order of their schema."""

    q: Tensor
    """(B, H, Lq, D), the last dimension contiguous, as in k and v"""
    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    """float32 (B, Hkv, Lk), where k and v are int8, as is v_scale"""
    v_scale: Tensor | None
    keep: Tensor | None
    """boolean (B or 1, Lk)"""
    lengths: Tensor | None
    """integer (B or 1,)"""
    document_ids: Tensor | None
    """integer (B or 1, Lk)"""
    allow: Tensor | None
    """boolean, broadcastable to (B, H, Lq, Lk), as is bias"""
    bias: Tensor | None
    alibi: Tensor | None
    """(H,), as is sink_logits"""
    sink_logits: Tensor | None
    seed: Tensor | None
    """one integer, which says what dropout drops"""
    left: int | None
    right: int | None
    sink_tokens: int
    offset: int
    scale: float
    softcap: float
    """0 for none"""
    dropout: float


_WORTH_THREADS = 1 << 14
"""Numbers to be copied or rounded, from which on several threads are sooner done than one."""

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? keep, Tensor? lengths, "
    "Tensor? document_ids, Tensor? allow, Tensor? bias, Tensor? alibi, Tensor? sink_logits, Tensor? seed, "
    "SymInt? left, SymInt? right, SymInt sink_tokens, SymInt offset, float scale, float softcap, float dropout"
)
_LIBRARY = library.Library("qkv", "DEF")
_LIBRARY.define(f"forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"backward({_ARGUMENTS}, Tensor out, Tensor lse, Tensor d_out, Tensor d_lse, bool wants_bias, bool wants_alibi)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_bias, Tensor d_alibi)"
)


def forward(call: Call, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention and its lse, past the dispatcher of torch: for plain tensors, without gradients.

    Raises:
        MemoryError: where the kernel's own sums do not fit, as in both operators.
    """
    out, lse = _new_results(call, wants_lse=wants_lse)
    call = prepared(call)
    check(loaded().forward(pack(call, out, lse)), call.q, call.k)
    return out, lse


def fast_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    keep: Tensor | None,
    lengths: Tensor | None,
    left: int | None,
    right: int | None,
    sink_tokens: int,
    offset: int,
    scale: float,
) -> Tensor | None:
    """`forward` for a call of an interval and padding alone, by the shortest way; None for one that does not fit."""
    plain = loaded().plain
    if plain is None:
        return None
    out = _new_out(q, v)
    tensors = (q, k, v, out, k_scale, v_scale, keep, lengths)
    numbers = (offset, _bounded(left), _bounded(right), _bounded(sink_tokens), scale)
    return None if plain(*tensors, *numbers, torch.get_num_threads()) else out


def forward_with_gradients(call: Call) -> tuple[Tensor, Tensor]:
    """The operator ``qkv::forward`` past the dispatcher of torch, which costs 100 us: for plain tensors."""
    found: tuple[Tensor, Tensor] = _Recorded.apply(*call)  # type: ignore[no-untyped-call]
    return found


def quantize(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Writes rows of ``x (B, heads, L, width)`` in int8, and the scale ``(B, heads, L)`` of each: for plain tensors."""
    packed = QUANTIZATION.pack(DTYPES[x.dtype], *x.shape, *view(x), *view(codes), *_scales(scale), _threads_for(x))
    loaded().quantize(packed)


def append(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, start: int
) -> bool:
    """Writes new tokens at ``start`` in their buffers, for tensors that `can_bypass_dispatcher`.

    Args:
        k, v: ``(B, Hkv, L, width)``.
        keys, values: ``(B, Hkv, room, width)``, in the dtype of the tokens or in int8.
        k_scale, v_scale: float32 ``(B, Hkv, room)``, where keys and values are int8.

    Returns:
        False, with nothing written, where they do not fit together or need a longer way.
    """
    write = loaded().append
    return write is not None and write(k, v, keys, values, k_scale, v_scale, start, _threads_for(k)) == 0


def _threads_for(x: Tensor) -> int:
    """Threads that copy or round its numbers."""
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1


def can_bypass_dispatcher(*tensors: Tensor) -> bool:
    """Whether there is a kernel, and tensors may go to it past the dispatcher of torch.

    No tracer, functorch transform or autograd is active, and every argument is exactly a Tensor or Parameter, on
    whatever device, whose memory holds its numbers: those of a lazy negation, such as ``z.conj().imag``, are negated
    by the dispatcher.
    """
    if (
        is_tracing()
        or absence() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    if not all(is_plain(tensor) and tensor.layout is torch.strided and not tensor.is_neg() for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor and no more than its numbers, as subclasses may be."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def is_tracing() -> bool:
    """Whether somebody records operators: a compiler, a tracer, a mode of dispatch."""
    return bool(
        torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack() > 0
    )


def count_scores(call: Call) -> int:
    """How many scores the kernel computes for a call: those that the mask shows, and a little around its edges."""
    call = prepared(call)
    return loaded().count_scores(pack(call, call.q, None))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward(Call(*arguments), wants_lse=True)
    assert lse is not None
    return out, lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, (out, lse, d_out, d_lse, wants_bias, wants_alibi) = _split(arguments)
    found = _new_gradients(call, wants_bias, wants_alibi)
    dq, dk, dv, delta, d_bias, d_alibi = found
    call, d_lse, d_out = prepared(call), d_lse.resolve_neg().contiguous(), d_out.resolve_neg()
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    gradients = GRADIENTS.pack(
        *view(d_out),
        *(d_lse.data_ptr(), delta.data_ptr()),
        *(*view(dq), *view(dk), *view(dv)),
        *(d_bias.data_ptr() if wants_bias else 0, d_alibi.data_ptr() if wants_alibi else 0),
    )
    check(loaded().backward(pack(call, out, lse), gradients), call.q, call.k)
    return found


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _new_results(Call(*arguments), wants_lse=True)
    assert lse is not None
    return out, lse


def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    call, (*_, wants_bias, wants_alibi) = _split(arguments)
    return _new_gradients(call, wants_bias, wants_alibi)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the arguments and the results of an operator of the forward pass."""
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]


def saved(ctx: Any) -> tuple[list[Any], Tensor, Tensor]:
    """The arguments, and the two results."""
    *tensors, out, lse = ctx.saved_tensors
    pairs = zip(tensors, ctx.constants, strict=True)
    return [constant if tensor is None else tensor for tensor, constant in pairs], out, lse


def goes_past_dispatcher(d_out: Tensor) -> bool:
    """Whether the backward pass may. Whoever wants gradients of gradients must find an operator, which refuses.

    Raises:
        NotImplementedError: for several gradients at once.
    """
    if torch._C._functorch.is_legacy_batchedtensor(d_out):
        raise NotImplementedError(
            "qkv's kernel has no batched gradients (is_grads_batched=True, vectorize=True): "
            "take them one by one, or give attention(..., backend='sdpa')."
        )
    watched = torch.is_grad_enabled() or is_tracing() or torch._C._are_functorch_transforms_active()
    return not watched and type(d_out) is Tensor


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    arguments, out, lse = saved(ctx)
    call = Call(*arguments)
    backward = _backward if goes_past_dispatcher(d_out) else torch.ops.qkv.backward
    wanted = Call(*ctx.needs_input_grad)
    dq, dk, dv, delta, d_bias, d_alibi = backward(*call, out, lse, d_out, d_lse, wanted.bias, wanted.alibi)
    d_sinks = None
    if call.sink_logits is not None and wanted.sink_logits:
        shares = (call.sink_logits.to(lse.dtype)[:, None] - lse).exp()
        # A logit of -inf is none; rows that see nothing else have an lse of -inf as well.
        shared = (shares * delta).masked_fill(call.sink_logits[:, None] == -torch.inf, 0)
        d_sinks = -shared.sum((0, 2)).to(call.sink_logits.dtype)
    found: dict[str, Tensor | None] = dict.fromkeys(Call._fields)
    found |= {"q": dq, "k": dk, "v": dv, "sink_logits": d_sinks}
    if call.bias is not None and wanted.bias:
        found["bias"] = d_bias.sum_to_size(call.bias.shape).to(call.bias.dtype)
    if call.alibi is not None and wanted.alibi:
        found["alibi"] = d_alibi.to(call.alibi.dtype)
    return tuple(found.values())


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*arguments)
        save(ctx, arguments, output)
        return output

    backward = staticmethod(_differentiate)


def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    """The gradient of an operator of the backward pass."""
    raise NotImplementedError(
        "qkv's kernel has no second derivative: create_graph=True needs attention(..., backend='reference')."
    )


_LIBRARY.impl("forward", _forward, "CPU")
_LIBRARY.impl("backward", _backward, "CPU")
library.register_fake("qkv::forward", _forward_shapes, lib=_LIBRARY)
library.register_fake("qkv::backward", _backward_shapes, lib=_LIBRARY)
library.register_autograd("qkv::forward", _differentiate, setup_context=save, lib=_LIBRARY)
library.register_autograd("qkv::backward", refuse_second_derivative, lib=_LIBRARY)


def _split(arguments: tuple[Any, ...]) -> tuple[Call, tuple[Any, ...]]:
    count = len(Call._fields)
    return Call(*arguments[:count]), arguments[count:]


def _new_results(call: Call, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32) if wants_lse else None
    return _new_out(call.q, call.v), lse


def _new_out(q: Tensor, v: Tensor) -> Tensor:
    (batch, heads, lq, _), width = q.shape, v.shape[3]
    # Tokens outside of heads, as torch's kernels lay it out: joining the heads again copies nothing.
    return q.new_empty_strided((batch, heads, lq, width), (lq * heads * width, width, heads * width, 1))


def _new_gradients(call: Call, wants_bias: bool, wants_alibi: bool) -> tuple[Tensor, ...]:
    q, k, v = call.q, call.k, call.v
    (batch, heads, lq, _), lk = q.shape, k.shape[2]
    delta = q.new_empty((batch, heads, lq), dtype=torch.float32)
    d_bias = q.new_zeros((batch, heads, lq, lk) if wants_bias else (0,), dtype=torch.float32)
    d_alibi = q.new_empty((heads,) if wants_alibi else (0,), dtype=torch.float32)
    return new_gradient(q), new_gradient(k), new_gradient(v), delta, d_bias, d_alibi


def new_gradient(tensor: Tensor) -> Tensor:
    """Memory for its gradient: laid out alike, but with whole rows, which those of a tensor may lie over each other."""
    found = torch.empty_like(tensor)
    return found if found.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def prepared(call: Call) -> Call:
    """The call with numbers where they belong in memory, and small tensors in the dtypes and layouts of the kernel."""
    changes: dict[str, Any] = {
        name: tensor.resolve_neg()
        for name in ("q", "k", "v", "k_scale", "v_scale", "bias", "alibi", "sink_logits")
        if (tensor := getattr(call, name)) is not None and tensor.is_neg()
    }
    call = call._replace(**changes) if changes else call
    if call.k_scale is not None and call.k_scale.stride(2) != 1:
        changes["k_scale"] = call.k_scale.contiguous()
    if call.v_scale is not None and call.v_scale.stride(2) != 1:
        changes["v_scale"] = call.v_scale.contiguous()
    if call.keep is not None:
        changes["keep"] = call.keep.contiguous()
    if call.lengths is not None and not (call.lengths.dtype is torch.int64 and call.lengths.is_contiguous()):
        changes["lengths"] = call.lengths.to(torch.int64).contiguous()
    if call.document_ids is not None:
        changes["document_ids"] = call.document_ids.to(torch.int64).contiguous()
    if call.allow is not None:
        changes["allow"] = call.allow.view(torch.uint8)
    if call.bias is not None and call.bias.dtype not in DTYPES:
        changes["bias"] = call.bias.float()
    if call.alibi is not None:
        changes["alibi"] = call.alibi.float().contiguous()
    if call.sink_logits is not None:
        changes["sink_logits"] = call.sink_logits.float().contiguous()
    return call._replace(**changes) if changes else call


def pack(call: Call, out: Tensor, lse: Tensor | None) -> bytes:
    """The struct of a prepared call, which must outlive it."""
    q, k, v, k_scale, v_scale, keep, lengths, document_ids, allow, bias, alibi, sink_logits, seed, *numbers = call
    *_, offset, scale, softcap, dropout = numbers
    batch, heads, lq, width = q.shape
    _, kv_heads, lk, value_width = v.shape
    return PROBLEM.pack(
        *(DTYPES[q.dtype], DTYPES[k.dtype], batch, heads, kv_heads, lq, lk, width, value_width),
        *(*view(q), *view(k), *view(v), *view(out), _address(lse), *_scales(k_scale), *_scales(v_scale)),
        *(0, 0, 0),  # pages
        *(offset, _bounded(call.left), _bounded(call.right), _bounded(call.sink_tokens)),
        *(_address(keep), _batch_stride(keep), _address(lengths), _batch_stride(lengths)),
        *(_address(document_ids), _batch_stride(document_ids)),
        *(_NO_MATRIX if allow is None else _matrix(allow)),
        *(scale, softcap),
        *(_NO_MATRIX if bias is None else _matrix(bias)),
        *(_address(alibi), _address(sink_logits)),
        *(dropout, 0 if seed is None else int(seed.item())),
        torch.get_num_threads(),
    )


def _bounded(keys: int | None) -> int:
    return UNBOUNDED if keys is None else min(keys, UNBOUNDED)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check(status: int, q: Tensor, k: Tensor) -> None:
    """Raises MemoryError if the kernel had not enough."""
    if status:
        raise MemoryError(
            f"qkv's kernel: there is not enough memory for its sums over q {tuple(q.shape)} and "
            f"k {tuple(k.shape)}; give fewer batches or heads at once."
        )


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """The struct of a tensor of heads.

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


def _scales(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _batch_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


_NO_MATRIX = (0, 0, 0, 0, 0, 0)


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), *strides, DTYPES[tensor.dtype]
