"""Sink logits for kernels without them that return the lse."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the term ``exp(sink_logits[h])`` to the softmax normaliser of a result.

    Args:
        out: ``(B, H, Lq, Dv)``.
        lse: ``(B, H, Lq)``.
        sink_logits: ``(H,)``.

    Returns:
        The new out and lse.
    """
    sinks = sink_logits.to(lse.dtype)[:, None].expand_as(lse)
    # Neither keys nor a sink: inf - inf would be NaN.
    empty = (lse == -torch.inf) & (sinks == -torch.inf)
    # sigmoid(lse - sink). Its own gradient would lose all digits near 1, where 1 - sigmoid is rounded.
    share = F.logsigmoid((lse - sinks).masked_fill(empty, 0)).exp()
    total = torch.logaddexp(lse.masked_fill(empty, 0), sinks).masked_fill(empty, -torch.inf)
    return (out * share[..., None]).to(out.dtype), total
