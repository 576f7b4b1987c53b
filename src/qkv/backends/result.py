"""`Result`: what a backend returns."""

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """Attention, and on request the log of its normaliser."""

    out: Tensor
    """(B, H, Lq, Dv) in the dtype of q"""
    lse: Tensor | None
    """(B, H, Lq), log of the softmax normaliser, fp32 (fp64 for fp64); None where the problem did not ask for it"""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax and lse for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
