"""`mechanisms`: the seven attention mechanisms as calls on random inputs of given sizes."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.bench.attention_call import PreparedCall, qkv_call, torch_call
from qkv.masks import FULL, Mask
from qkv.models.kv_cache_size import LayerShape, cache_bytes

OURS, TORCH = "qkv", "torch"
LIBRARIES = {OURS: qkv_call, TORCH: torch_call}


class Sizes(NamedTuple):
    """The sizes of a benchmark: the options of `qkv bench`."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    """KV heads of grouped-query attention."""
    head_dim: int
    window: int
    """Of sliding-window attention; includes the query's own key."""
    dtype: torch.dtype
    decode: bool
    """One query at the end of the sequence instead of one for each token."""
    backward: bool


class Mechanism(NamedTuple):
    """One attention mechanism with its sizes."""

    name: str
    sizes: Sizes
    num_heads: int
    num_kv_heads: int
    num_keys: int
    mask: Mask

    @property
    def num_queries(self) -> int:
        return 1 if self.sizes.decode else self.sizes.length

    @property
    def window(self) -> int | None:
        """Sliding window, the query's own key included; None without."""
        return None if self.mask.left is None else self.mask.left + 1

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values from a fixed seed."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(0)
        heads = [(self.num_heads, self.num_queries), (self.num_kv_heads, self.num_keys)]
        shapes = [(sizes.batch, *shape, sizes.head_dim) for shape in (heads[0], heads[1], heads[1])]
        # In place: a conversion from another dtype would raise the baseline of the memory measurement.
        q, k, v = (torch.empty(shape, dtype=sizes.dtype).normal_(generator=generator) for shape in shapes)
        return q.requires_grad_(sizes.backward), k.requires_grad_(sizes.backward), v.requires_grad_(sizes.backward)

    @property
    def offset(self) -> int:
        """Position of the first query among the keys."""
        return max(0, self.num_keys - self.num_queries)

    def prepare(self, library: str, inputs: tuple[Tensor, Tensor, Tensor]) -> PreparedCall:
        """The call to measure; ``library`` is `OURS` or `TORCH`."""
        return LIBRARIES[library](*inputs, self.mask, self.offset)

    def on_few_tokens(self) -> "Mechanism":
        """The same mechanism on at most 16 tokens, whose memory is negligible."""
        few = min(16, self.sizes.length)
        return self._replace(sizes=self.sizes._replace(length=few), num_keys=min(few, self.num_keys))

    def kv_bytes(self) -> int:
        """Bytes of a KV cache for the whole batch."""
        shape = LayerShape(self.num_heads, self.num_kv_heads, self.sizes.head_dim, self.sizes.head_dim, self.window)
        return self.sizes.batch * cache_bytes((shape,), self.num_keys, self.sizes.dtype.itemsize)


def mechanisms(sizes: Sizes) -> list[Mechanism]:
    """The seven mechanisms in the order of the README. Cross-attention reads a context of half the length."""
    heads, length, causal = sizes.num_heads, sizes.length, Mask.causal()
    return [
        Mechanism("scaled dot-product", sizes, 1, 1, length, FULL),
        Mechanism("multi-head", sizes, heads, heads, length, FULL),
        Mechanism("cross", sizes, heads, heads, max(1, length // 2), FULL),
        Mechanism("causal", sizes, heads, heads, length, causal),
        Mechanism("sliding-window", sizes, heads, heads, length, Mask.causal(sizes.window)),
        Mechanism("multi-query", sizes, heads, 1, length, causal),
        Mechanism("grouped-query", sizes, heads, sizes.num_kv_heads, length, causal),
    ]
