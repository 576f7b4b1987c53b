"""`qkv_call` and `torch_call`: the same attention as one call of each library, ready to be measured."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import qkv
from qkv.masks import Mask
from qkv.problem import Problem, make_problem, trim

Call = Callable[[], tuple[Tensor, ...]]
"""Returns the output; or the gradients of q, k and v where these want gradients."""


def qkv_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> Call:
    """`qkv.attention` with the backend that ``auto`` chooses."""
    return _passes(lambda: qkv.attention(q, k, v, mask=mask, offset=offset), q, k, v)


def torch_call(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> Call:
    """The ``scaled_dot_product_attention`` of torch with the best arguments that there are for the mask.

    It is given the keys that any query sees and no others, ``is_causal`` where that says it all, no mask where nothing
    is hidden, and otherwise the mask as it computes with it: added to the scores, written out beforehand.
    """
    problem = trim(make_problem("torch_call", q, k, v, mask=mask, offset=offset))
    is_causal = _is_top_left_causal(problem)
    attn_mask = None if is_causal or problem.mask.is_full else _additive(problem)
    enable_gqa, (start, stop) = problem.group > 1, mask.key_range(problem.lq, k.shape[2], offset)

    def attend() -> Tensor:
        # Which keys a window shows changes with each decoding step, so that cutting them out is part of the call.
        seen = (k, v) if problem.lk == k.shape[2] else (k[:, :, start:stop], v[:, :, start:stop])
        return F.scaled_dot_product_attention(q, *seen, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    return _passes(attend, q, k, v)


def _is_top_left_causal(problem: Problem) -> bool:
    """Whether the mask is what torch calls ``is_causal``."""
    mask = problem.mask
    return mask.left is None and mask.right == 0 and problem.offset == 0 and not mask.has_tensors


def _additive(problem: Problem) -> Tensor:
    visible = problem.visible()
    return torch.zeros_like(visible, dtype=problem.q.dtype).masked_fill_(~visible, -torch.inf)


def _passes(attend: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Call:
    if not q.requires_grad:
        return lambda: (attend(),)
    towards = torch.randn(q.shape[:3] + v.shape[3:], generator=torch.Generator().manual_seed(0)).to(q.dtype)
    return lambda: torch.autograd.grad(attend(), (q, k, v), towards)
