"""`qkv_call` and `torch_call`: the same attention in each library, as a call to measure."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.masks import Mask
from qkv.problem import Problem, make_problem, trim

PreparedCall = Callable[[], tuple[Tensor, ...]]
"""Returns the output, or the gradients of q, k and v if they require grad."""


def qkv_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> PreparedCall:
    """`qkv.attention` with the backend that ``auto`` chooses."""
    return _with_backward(lambda: qkv.attention(q, k, v, mask=mask, offset=offset), q, k, v)


def torch_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> PreparedCall:
    """``scaled_dot_product_attention`` of torch with the fastest arguments for the mask.

    Keys that no query sees are cut off. The mask is ``is_causal`` or None where possible, else a dense additive mask,
    computed beforehand.
    """
    problem = trim(make_problem("torch_call", q, k, v, mask=mask, offset=offset))
    is_causal = _is_top_left_causal(problem)
    attn_mask = None if is_causal or problem.mask.is_full else _additive(problem)
    enable_gqa, (start, stop) = problem.group > 1, mask.key_range(problem.lq, k.shape[2], offset)

    def attend() -> Tensor:
        # A window moves with each decoding step, so slicing it out of k and v is part of the call.
        kv = (k, v) if problem.lk == k.shape[2] else (k[:, :, start:stop], v[:, :, start:stop])
        return F.scaled_dot_product_attention(q, *kv, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    return _with_backward(attend, q, k, v)


def _is_top_left_causal(problem: Problem) -> bool:
    """Whether the mask equals torch's ``is_causal``, which is aligned top-left."""
    mask, offset = problem.mask, problem.offset
    return mask.left is None and mask.right == 0 and isinstance(offset, int) and offset == 0 and not mask.has_tensors


def _additive(problem: Problem) -> Tensor:
    """The mask as a tensor of 0 and -inf that is added to the scores."""
    visible = problem.visible()
    return torch.zeros_like(visible, dtype=problem.q.dtype).masked_fill_(~visible, -torch.inf)


def _with_backward(attend: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
    """The call with its backward pass, if the inputs require grad."""
    if not q.requires_grad:
        return lambda: (attend(),)
    d_out = torch.randn(q.shape[:3] + v.shape[3:], generator=torch.Generator().manual_seed(0)).to(q.dtype)
    return lambda: torch.autograd.grad(attend(), (q, k, v), d_out)
