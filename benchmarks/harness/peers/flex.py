"""torch's FlexAttention, compiled."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from harness.case import Case
from qkv.bench.attention_call import PreparedCall

NAME = "flex"


def why_not(case: Case, dtype: torch.dtype) -> str | None:
    """See `Peer`."""
    return "has no backward on CPU" if case.backward else None


def prepare(case: Case, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
    """See `Peer`."""
    # Without this, torch.compile falls back to eager at the ninth shape, with all scores in memory.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = _block_mask(case)
    enable_gqa = case.heads != case.kv_heads
    return lambda: (compiled(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa),)


def _block_mask(case: Case) -> BlockMask | None:
    """A causal, windowed or packed mask; None where all keys are visible, as in a decoding step."""
    if case.mask == "full" or case.is_decoding:
        return None
    offset, window = case.offset, case.lk if case.window is None else case.window

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if case.mask == "packed":
            return i // case.text == j // case.text
        distance = i + offset - j
        return (distance >= 0) & (distance < window)

    return create_block_mask(visible, None, None, case.lq, case.lk, device="cpu")
