"""`routed`: torch's attention operators, computed by qkv's kernel where the result is the same.

The operators are ``scaled_dot_product_attention`` and ``_native_multi_head_attention``, the fused inference of
``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``. They are overridden in torch's dispatcher, on CPU, which
sees every call, under any name, from Python, TorchScript or C++, at no cost to other operators. The override is never
removed; calls that are not routed go to torch's kernel.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from qkv.backends import native, sdpa
from qkv.integrations.calls import Callback, block, current_callback
from qkv.masks import FULL, Mask
from qkv.problem import make_problem
from qkv.scores import ScoreOptions, only_scale
from qkv.torch_internals import choice_of_kernel, dispatch_modes, is_zero_tensor

_TORCH_SDPA = library.get_kernel("aten::scaled_dot_product_attention", "CPU")
_TORCH_MHA = library.get_kernel("aten::_native_multi_head_attention", "CPU")

_CAUSAL = Mask.causal()


_lock = threading.Lock()


@contextmanager
def routed(notify: Callback) -> Iterator[None]:
    """Context manager that routes the calls of this thread or asyncio task, and calls ``notify`` for each."""
    with _lock:
        _override_operators()
    with block(notify):
        yield


@functools.cache
def _override_operators() -> library.Library:
    """Registers our kernels, permanently: removing them while another thread runs one would crash the process."""
    operators = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of overridden kernels
        # Calls reach AutogradCPU first; in inference mode, CPU only.
        operators.impl("scaled_dot_product_attention", _sdpa, "AutogradCPU", with_keyset=True)
        operators.impl("scaled_dot_product_attention", _sdpa, "CPU", with_keyset=True)
        operators.impl("_native_multi_head_attention", _mha, "CPU", with_keyset=True)
    return operators


def _sdpa(
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Override of ``aten::scaled_dot_product_attention``."""
    notify = current_callback()
    if notify is not None:
        out = _solve_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        notify(sys._getframe(1), query.shape, key.shape, out if isinstance(out, str) else None)
        if isinstance(out, Tensor):
            return out
    fallback: Tensor = _TORCH_SDPA.call_boxed(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return fallback


def _solve_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | str:
    """The result of ``scaled_dot_product_attention`` by qkv's kernel, or the reason why torch must compute it."""
    reason = _why_not(query, key, value, attn_mask)
    if reason is not None:
        return reason
    if sys._getframe(2).f_globals is vars(sdpa):
        return "qkv's own call of torch's kernel"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "sdpa_kernel excludes fused kernels"
    if not (query.numel() and key.numel() and value.numel()):
        return "empty tensors"
    if scale is not None and not scale > 0:
        return "a scale that is not positive, by which torch's kernel multiplies the mask as well"
    rank, shared = query.dim(), -3 if enable_gqa else -2
    if rank + shared < 0:
        return f"{rank} dimensions"
    if not (rank == key.dim() == value.dim() and query.shape[:shared] == key.shape[:shared] == value.shape[:shared]):
        return f"query, key and value differ in their batch{'' if enable_gqa else ' or heads, without enable_gqa'}"
    mask, bias = _CAUSAL if is_causal else FULL, None
    if attn_mask is not None:
        if is_causal:
            return "is_causal beside attn_mask, which torch leaves undefined"
        if not 2 <= attn_mask.dim() <= rank or (rank > 4 and attn_mask.dim() > 3):
            return f"attn_mask with {attn_mask.dim()} dimensions beside {rank} of query"
        if attn_mask.dtype is torch.bool:
            mask = Mask.dense(attn_mask)
        elif attn_mask.dtype not in (torch.float32, query.dtype):
            return f"attn_mask of {attn_mask.dtype} beside {query.dtype}"
        else:
            bias = attn_mask
    q, k, v = query, key, value
    if rank != 4:
        q, k, v = _with_4_dimensions(q), _with_4_dimensions(k), _with_4_dimensions(v)
    out = solve(q, k, v, mask, bias, scale, dropout_p)
    if isinstance(out, str):
        return out
    if rank != 4:
        out = out.reshape(*query.shape[:-1], value.shape[-1])
    # Keep torch's layout, since callers view the result in other shapes. Which calls are fused differs by release.
    if query.is_contiguous() or not choice_of_kernel(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    ):
        return out.contiguous()
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)


def _mha(
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Override of ``aten::_native_multi_head_attention``."""
    notify = current_callback()
    if notify is not None:
        out: Tensor | str
        if need_weights:
            out = "need_weights=True"
        elif not query is key is value:
            out = "query, key and value are not the same tensor"
        else:
            out = _solve_mha(query, num_head, qkv_weight, qkv_bias, mask, mask_type)
        notify(sys._getframe(1), query.shape, key.shape, out if isinstance(out, str) else None)
        if isinstance(out, Tensor):
            return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), None
    fallback: tuple[Tensor, Tensor | None] = _TORCH_MHA.call_boxed(
        keys,
        *(query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias),
        *(mask, need_weights, average_attn_weights, mask_type),
    )
    return fallback


def _solve_mha(
    x: Tensor, num_heads: int, weight: Tensor, bias: Tensor, mask: Tensor | None, mask_type: int | None
) -> Tensor | str:
    """Self-attention ``(B, H, L, D)`` of ``x (B, L, E)`` by qkv's kernel, or the reason why torch must compute it.

    ``mask`` is True for hidden keys, as in ``nn.MultiheadAttention``; of shape (B, L) for type 1.
    """
    reason = _why_not(x, mask)
    if reason is not None:
        return reason
    visible = FULL
    if mask is not None:
        hidden = mask.bool()
        if hidden.all(dim=-1).any():
            return "a query sees no key, for which torch's fast path returns NaN"
        visible = Mask.padding(~hidden) if mask_type == 1 else Mask.dense(~hidden)
    projected = F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind()
    return solve(q, k, v, visible)


def solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor | str:
    """`attention` by the native kernel, with offset 0, or the reasons why `attention` would not choose it."""
    scores: ScoreOptions = {"scale": scale, "bias": bias, "dropout": dropout}
    if only_scale(None, bias, None, None, dropout, None):
        out = native.fast_path(q, k, v, None, None, mask, 0, scale)
        if out is not None:
            return out
    try:
        problem = make_problem("attention", q, k, v, mask=mask, offset=0, **scores)
    except (TypeError, ValueError) as error:
        return str(error)
    reasons = native.why_not(problem) + native.why_rather_not(problem)
    return "; ".join(reasons) if reasons else native.run(problem).out


def _why_not(*tensors: Tensor | None) -> str | None:
    """The reason why a call cannot be routed because of modes and tensor types; None if there is none."""
    if dispatch_modes():
        return "a compiler or another dispatch mode is active"
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given):
        return "tensor subclasses"
    if any(tensor.is_neg() or is_zero_tensor(tensor) for tensor in given):
        return "lazily negated or zero tensors, which the dispatcher materialises"
    if any(tensor.layout is not torch.strided for tensor in given):
        return "sparse tensors"
    return None


def _with_4_dimensions(tensor: Tensor) -> Tensor:
    """The tensor with leading dimensions added or flattened to 4 dimensions."""
    if tensor.dim() == 4:
        return tensor
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor.flatten(0, -4)
