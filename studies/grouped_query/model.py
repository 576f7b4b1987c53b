"""A small causal language model of `qkv` layers, and its conversion to fewer key/value heads."""

from copy import deepcopy

import torch.nn.functional as F
from settings import Settings
from torch import Tensor, nn

import qkv
from qkv.convert import convert_layer
from qkv.convert.heads.pooling import ConversionMethod


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, settings: Settings, rotary: qkv.RotaryEmbedding) -> None:
        super().__init__()
        width = settings.width
        self.attention_norm = nn.RMSNorm(width)
        self.attention: qkv.Attention = qkv.MultiHeadAttention(
            width, settings.num_heads, mask=qkv.Mask.causal(), rotary=rotary, bias=False
        )
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class LanguageModel(nn.Module):
    """A decoder with tied input and output embeddings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        rotary = qkv.RotaryEmbedding(settings.head_dim)
        self.embedding = nn.Embedding(settings.vocabulary, settings.width)
        self.blocks = nn.Sequential(*(Block(settings, rotary) for _ in range(settings.num_layers)))
        self.norm = nn.RMSNorm(settings.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits ``(B, L, vocabulary)``."""
        return F.linear(self.norm(self.blocks(self.embedding(tokens))), self.embedding.weight)

    @property
    def attentions(self) -> list[qkv.Attention]:
        """The attention layers."""
        return [block.attention for block in self.blocks if isinstance(block, Block)]


def converted(model: LanguageModel, num_kv_heads: int, how: ConversionMethod, seed: int) -> LanguageModel:
    """A copy of the model with ``num_kv_heads`` in every layer."""
    model = deepcopy(model)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        # Seeds differ by 10 between layers, since convert_layer uses consecutive ones.
        own_seed, gain = 1000 * seed + 10 * number, block.attention_norm.weight.detach()
        block.attention = convert_layer(block.attention, num_kv_heads, how=how, seed=own_seed, gain=gain)
    return model
