"""Learned sink logits, for kernels that know nothing of them but return the lse."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose normaliser holds one more term, ``exp(sink_logits[h])``, from attention without.

    Args:
        out: ``(B, H, Lq, Dv)``.
        lse: ``(B, H, Lq)``.
        sink_logits: ``(H,)``.
    """
    sinks = sink_logits.to(lse.dtype)[:, None].expand_as(lse)
    # No key and no sink: inf - inf would be NaN.
    nothing = (lse == -torch.inf) & (sinks == -torch.inf)
    # A sigmoid whose gradient stays exact near 1, where 1 - sigmoid is nothing but rounding.
    share = F.logsigmoid((lse - sinks).masked_fill(nothing, 0)).exp()
    total = torch.logaddexp(lse.masked_fill(nothing, 0), sinks).masked_fill(nothing, -torch.inf)
    return (out * share[..., None]).to(out.dtype), total
