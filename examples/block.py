"""A small decoder of `qkv` layers: norms, attention, a gated MLP and residuals, as in Llama.

from block import Decoder
logits = Decoder(vocabulary=256)(tokens)
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv.cache import Cache


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        width: of x.
        attention: a layer, or another module that is called as one.
    """

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache=cache)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Decoder(nn.Module):
    """A causal language model with tied input and output embeddings.

    Args:
        vocabulary: number of tokens.
        width: of the hidden states.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        window: keys that a token sees, its own included; all before it if None.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        window: int | None = None,
    ) -> None:
        super().__init__()
        rotary = qkv.RotaryEmbedding(width // num_heads)
        options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "rotary": rotary, "bias": False}

        def attention() -> qkv.Attention:
            return qkv.CausalAttention(width, num_heads, mask=qkv.Mask.causal(window), **options)

        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width, attention()) for _ in range(num_layers)])
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Logits ``(B, L, vocabulary)`` of tokens ``(B, L)``, which follow those in the caches, one for each block."""
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[number])
        return F.linear(self.norm(x), self.embedding.weight)

    def make_caches(self) -> list[Cache]:
        """An empty cache for each block."""
        return [layer.make_cache() for layer in self.modules() if isinstance(layer, qkv.Attention)]
