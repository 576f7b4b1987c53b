"""torch's ``scaled_dot_product_attention``."""

import torch
from torch import Tensor

from harness.case import Case
from qkv.bench.attention_call import PreparedCall, torch_call

NAME = "torch"

MAX_SCORES = 8192**2
"""Of one head. Windows do not save work: torch computes and masks all scores."""


def why_not(case: Case, dtype: torch.dtype) -> str | None:
    """See `Peer`."""
    if case.window is not None and case.lq * case.lk > MAX_SCORES:
        return f"computes all scores of {case.lq} queries despite the window, which takes too long"
    return None


def prepare(case: Case, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
    """See `Peer`."""
    return torch_call(q, k, v, case.as_mask(), case.offset)
