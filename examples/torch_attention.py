"""The attention of `block.py` in torch alone, for comparison: the same parameters, rotary embedding by tables."""

import torch
import torch.nn.functional as F
from block import Block, Decoder
from torch import Tensor, nn

import qkv


class TorchAttention(nn.Module):
    """Grouped-query attention with rotary embedding on ``scaled_dot_product_attention``.

    A causal mask is torch's ``is_causal``; a window is a tensor, since torch has no other way to say it.

    Args:
        layer: whose projections it takes.
        length: the most tokens of a sequence.
    """

    cos: Tensor
    sin: Tensor
    window: Tensor | None

    def __init__(self, layer: qkv.Attention, length: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layer.q_proj, layer.k_proj, layer.v_proj
        self.out_proj, self.head_dim = layer.out_proj, layer.head_dim
        frequencies = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        window = None if layer.mask == qkv.Mask.causal() else layer.mask.visible(length, length)
        self.register_buffer("window", window, persistent=False)

    def forward(self, x: Tensor, cache: None = None) -> Tensor:
        """``(B, L, width)``; without caches."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if self.window is None else self.window[..., : x.shape[1], : x.shape[1]]
        out = F.scaled_dot_product_attention(
            self._rotated(q), self._rotated(k), v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def _rotated(self, heads: Tensor) -> Tensor:
        length = heads.shape[2]
        first, second = heads.chunk(2, dim=-1)
        rotated = heads * self.cos[:length] + torch.cat([-second, first], dim=-1) * self.sin[:length]
        return rotated.to(heads.dtype)


def use_torch(model: Decoder, length: int) -> None:
    """Replaces the attention of every block, with its parameters, which keep their names."""
    for block in model.blocks:
        assert isinstance(block, Block)
        assert isinstance(block.attention, qkv.Attention)
        block.attention = TorchAttention(block.attention, length)
