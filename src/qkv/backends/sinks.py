"""Learned sink logits, for kernels that know nothing of them but return the lse."""

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose normaliser holds one more term, ``exp(sink_logits[h])``, from attention without.

    Args:
        out: ``(B, H, Lq, Dv)``.
        lse: ``(B, H, Lq)``.
        sink_logits: ``(H,)``.
    """
    sinks = sink_logits.to(lse.dtype)[:, None]
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype), torch.logaddexp(lse, sinks)
