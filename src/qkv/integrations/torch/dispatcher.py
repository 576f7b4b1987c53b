"""`routed`: torch's own attention operators, answered by our kernel wherever it gives the same answer.

The two operators are ``scaled_dot_product_attention`` and ``_native_multi_head_attention``, the fast path of
``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in inference. They are taken over in torch's dispatcher, on
CPU: there every call arrives, by whatever name the caller has bound the function, from Python, TorchScript or C++, and
no other call of torch pays for it. They stay taken over from the first use on, and pass by what is not to be routed.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from qkv.backends import native, sdpa
from qkv.masks import FULL, Mask
from qkv.problem import make_problem
from qkv.scores import ScoreOptions

Record = Callable[[Tensor, Tensor, str | None], None]
"""Is told of each call: its queries, its keys, and why it was left to torch; None where it was taken."""

_THEIR_ATTENTION = library.get_kernel("aten::scaled_dot_product_attention", "CPU")
_THEIR_FAST_PATH = library.get_kernel("aten::_native_multi_head_attention", "CPU")

_CAUSAL = Mask.causal()


class _Block:
    """A block that routes calls: entered within ``outer``, and open until it is left."""

    def __init__(self, tell: Record, outer: "_Block | None") -> None:
        self.tell, self.outer, self.is_open = tell, outer, True


_innermost: ContextVar[_Block | None] = ContextVar("innermost", default=None)
"""The block entered last in this thread or task, which may have been left since, here or elsewhere."""

_lock = threading.Lock()


@contextmanager
def routed(to: Record) -> Iterator[None]:
    """Routes the calls of this thread, or of this asyncio task, and tells ``to`` of each.

    Blocks may be left in any order and from anywhere: a generator may be closed after its caller's block, or collected
    in another thread, and a task outlives the block in which it was made. So a block that is left is marked, instead of
    putting back what was found on entering, and the innermost one that is still open counts.
    """
    with _lock:
        _take_over()
    block = _Block(to, _open_block())
    _innermost.set(block)
    try:
        yield
    finally:
        block.is_open = False
        _innermost.set(_open_block())


def listener() -> Record | None:
    """Whether, and for whom, calls of this thread or task are routed."""
    block = _open_block()
    return None if block is None else block.tell


def _open_block() -> _Block | None:
    block = _innermost.get()
    while block is not None and not block.is_open:
        block = block.outer
    if block is not None:
        while block.outer is not None and not block.outer.is_open:
            block.outer = block.outer.outer  # or a chain of blocks that overlap would grow without end
    return block


@functools.cache
def _take_over() -> library.Library:
    """Once and for good: giving the operators back while another thread is in one of them would end the process."""
    operators = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a kernel that is replaced
        # Outside of inference mode calls reach AutogradCPU first, and inside of it CPU alone.
        operators.impl("scaled_dot_product_attention", _attend, "AutogradCPU", with_keyset=True)
        operators.impl("scaled_dot_product_attention", _attend, "CPU", with_keyset=True)
        operators.impl("_native_multi_head_attention", _attend_projected, "CPU", with_keyset=True)
    return operators


def _attend(
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
    """In place of ``aten::scaled_dot_product_attention``."""
    tell = listener()
    if tell is not None:
        answer = _answer(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        tell(query, key, answer if isinstance(answer, str) else None)
        if isinstance(answer, Tensor):
            return answer
    plain: Tensor = _THEIR_ATTENTION.call_boxed(
        keys, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return plain


def _answer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | str:
    """What torch would return, from our kernel, or why it is left to torch."""
    reason = _watcher(query, key, value, attn_mask)
    if reason is not None:
        return reason
    if sys._getframe(2).f_globals is vars(sdpa):
        return "qkv's own call of torch's kernel"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "sdpa_kernel rules fused kernels out"
    if not (query.numel() and key.numel() and value.numel()):
        return "empty tensors"
    if scale is not None and not scale > 0:
        return "a scale that is not positive, which torch's kernel also multiplies its mask by"
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
    # The layout is part of the answer: callers view the result in other shapes.
    if query.is_contiguous() or not torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    ):
        out = out.contiguous()
        return out if rank == 4 else out.view(*query.shape[:-1], value.shape[-1])
    like = torch.empty_like(query)
    return out if out.stride() == like.stride() else like.copy_(out)


def _attend_projected(
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
    """In place of ``aten::_native_multi_head_attention``."""
    tell = listener()
    if tell is not None:
        answer: Tensor | str
        if need_weights:
            answer = "the weights are asked for"
        elif not query is key is value:
            answer = "query, key and value are not the same"
        else:
            answer = _answer_projected(query, num_head, qkv_weight, qkv_bias, mask, mask_type)
        tell(query, key, answer if isinstance(answer, str) else None)
        if isinstance(answer, Tensor):
            return F.linear(answer.transpose(1, 2).flatten(2), proj_weight, proj_bias), None
    found: tuple[Tensor, Tensor | None] = _THEIR_FAST_PATH.call_boxed(
        keys,
        *(query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias),
        *(mask, need_weights, average_attn_weights, mask_type),
    )
    return found


def _answer_projected(
    x: Tensor, num_heads: int, weight: Tensor, bias: Tensor, mask: Tensor | None, mask_type: int | None
) -> Tensor | str:
    """Attention over ``x (B, L, E)``, (B, H, L, D), or why it is left to torch.

    ``mask`` has the polarity of ``nn.MultiheadAttention``, and is (B, L) for type 1.
    """
    reason = _watcher(x, mask)
    if reason is not None:
        return reason
    seen = FULL
    if mask is not None:
        hidden = mask.bool()
        if hidden.all(dim=-1).any():
            return "a query sees no key, where torch's fast path gives NaN"
        seen = Mask.padding(~hidden) if mask_type == 1 else Mask.dense(~hidden)
    projected = F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind()
    return solve(q, k, v, seen)


def solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor | str:
    """`attention` where it would choose the native kernel, or why it would not; causal masks align top-left."""
    scores: ScoreOptions = {"scale": scale, "bias": bias, "dropout": dropout}
    out = native.fast_path(q, k, v, None, None, mask, 0, scores)
    if out is not None:
        return out
    try:
        problem = make_problem("attention", q, k, v, mask=mask, offset=0, **scores)
    except (TypeError, ValueError) as error:
        return str(error)
    reasons = native.why_not(problem) + native.why_rather_not(problem)
    return "; ".join(reasons) if reasons else native.run(problem).out


def _watcher(*tensors: Tensor | None) -> str | None:
    """Who watches the call, if anybody: what it records shall be torch's own program."""
    if torch._C._len_torch_dispatch_stack():
        return "a compiler, or another mode of dispatch, watches"
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in given):
        return "tensors of a class of their own"
    if any(tensor.is_neg() or torch._is_zerotensor(tensor) for tensor in given):
        return "tensors whose numbers are not in memory, which the dispatcher writes out"
    if any(tensor.layout is not torch.strided for tensor in given):
        return "sparse tensors"
    return None


def _with_4_dimensions(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4:
        return tensor
    return tensor[(None,) * (4 - tensor.dim())] if tensor.dim() < 4 else tensor.flatten(0, -4)
