"""`CrossLayerAttention`: keys and values of another layer."""

from typing import NoReturn

from torch import Tensor, nn
from typing_extensions import Unpack

from qkv.cache import Cache, Caches, CrossKVCache
from qkv.layers.attention import Attention
from qkv.layers.cached_call import CallOptions, Inputs, cached_inputs
from qkv.layers.options import ConversionOptions, LayerOptions
from qkv.masks import Mask


class CrossLayerAttention(Attention):
    """`Attention` without k_proj and v_proj: it reads the keys and values that another layer has put into its cache.

    ``softmax(q(x) @ k.mT / sqrt(head_dim)) @ v``, with k ``(B, Hkv, Lk, D)`` and v of the cache, from x ``(B, L,
    embed_dim)`` to the same shape. A call passes the cache of that layer, whose call with the same tokens comes first.
    In training, the cache is a new `KVCache`, through which gradients reach the other layer.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        **options: as in `Attention`; num_kv_heads, head_dim and value_dim are those of the other layer, qk_norm is of
            queries alone.

    Raises:
        TypeError: as `Attention`.
        ValueError: as `Attention`, and for a context_dim.

    Example:
        >>> import torch, qkv
        >>> first = qkv.CausalAttention(64, 8, num_kv_heads=2)
        >>> second = qkv.CrossLayerAttention(64, 8, num_kv_heads=2, mask=qkv.Mask.causal())
        >>> x, cache = torch.randn(1, 5, 64), qkv.KVCache()
        >>> second(first(x, cache=cache), cache=cache).shape, cache.length
        (torch.Size([1, 5, 64]), 5)

    Source: Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention"; Sun et al.
    2024, "You Only Cache Once"; the layers of Gemma 3n that reuse keys.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[LayerOptions]) -> None:
        if options.get("context_dim") is not None:
            raise ValueError(
                f"{type(self).__name__}: context_dim must be None, since keys come from another layer's cache; "
                f"got {options['context_dim']}. To share an encoded context, pass it to each CrossAttention."
            )
        super().__init__(embed_dim, num_heads, **options)
        self.k_proj = self.v_proj = self.k_norm = None  # type: ignore[assignment]

    def _self_inputs(self, x: Tensor, q: Tensor, options: CallOptions) -> Inputs:
        caller, (mask, bias, positions, _, length) = type(self).__name__, options
        cache = self._require_cache(options.cache)
        count = x.shape[1]
        if cache.columns < count:
            raise ValueError(
                f"{caller}: cache must contain the keys of the {count} tokens of x; got one of {cache.columns}. Call "
                "the layer that they belong to first, with this cache."
            )
        cache.require_visible(mask, cache.columns - count)
        mask, _ = cache.split_padding(mask, *x.shape[:2], is_appended=True)
        keys = cache.latest(count)
        kv_heads, *widths = keys.k.shape[1], keys.k.shape[3], keys.v.shape[3]
        # With heads over ranks, both are those of one rank, which has a KV head at least.
        own = -(-q.shape[1] * self.num_kv_heads // self.num_heads)
        if kv_heads != own or widths != [self.head_dim, self.value_dim]:
            raise ValueError(
                f"{caller}: the keys in cache must be of {self.num_kv_heads} KV heads, head_dim={self.head_dim} and "
                f"value_dim={self.value_dim}, as the layer's; got {kv_heads}, {widths[0]} and {widths[1]}."
            )
        if self.rotary is not None:
            where = {"offset": cache.offset_of_latest(count)} if positions is None else {"positions": positions}
            q = self.rotary(q, **where if length is None else {**where, "length": length})
        return cached_inputs(q, keys, mask, bias, cache)

    make_cache = None  # type: ignore[assignment]  # it has no keys of its own

    def _forward_jagged(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, cache: Cache | Caches | None
    ) -> Tensor:
        return super()._forward_jagged(x, context, mask, self._require_cache(cache))

    def _require_cache(self, cache: object) -> Cache:
        """The cache. Raises TypeError unless it is one of self-attention."""
        if not isinstance(cache, Cache) or isinstance(cache, CrossKVCache):
            raise TypeError(
                f"{type(self).__name__}: cache must be the KVCache, PagedKVCache, Int8KVCache or SlidingKVCache of the "
                f"layer whose keys are read; got {type(cache).__name__}."
            )
        return cache

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Unpack[ConversionOptions]) -> NoReturn:
        """Raises ValueError: ``nn.MultiheadAttention`` has keys of its own."""
        raise ValueError("from_torch: nn.MultiheadAttention has keys of its own; got a CrossLayerAttention.")

    @classmethod
    def from_transformers(cls, module: nn.Module, **options: Unpack[ConversionOptions]) -> NoReturn:
        """Raises ValueError: the modules that it reads have keys of their own."""
        raise ValueError(
            "from_transformers: the modules that it reads have keys of their own; got CrossLayerAttention."
        )

    def to_torch(self) -> NoReturn:
        """Raises ValueError: ``nn.MultiheadAttention`` has keys of its own."""
        raise ValueError("to_torch: nn.MultiheadAttention has keys of its own; got a CrossLayerAttention.")
