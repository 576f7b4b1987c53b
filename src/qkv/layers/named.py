"""The seven mechanisms by name. Each fixes arguments of `Attention` and adds no forward logic."""

from typing_extensions import Unpack

from qkv.arguments import require_flag
from qkv.layers.arguments import require_mask
from qkv.layers.attention import Attention
from qkv.layers.options import HeadOptions, LayerOptions
from qkv.masks import Mask


class ScaledDotProductAttention(Attention):
    """`Attention` with a single head: ``softmax(q @ k.mT / sqrt(head_dim)) @ v`` between learned projections.

    From x ``(B, L, embed_dim)`` to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        **options: as in `Attention`, head counts apart. For the bare function, see `qkv.attention`.

    Raises:
        As `Attention`, and TypeError for head counts.

    Example:
        >>> import qkv
        >>> qkv.ScaledDotProductAttention(64, head_dim=16, value_dim=32).num_heads
        1

    Source: Vaswani et al. 2017, section 3.2.1.
    """

    _fixed = ("num_heads", "num_kv_heads")

    def __init__(self, embed_dim: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(embed_dim, 1, num_kv_heads=1, **options)


class MultiHeadAttention(Attention):
    """`Attention` in which every query head has keys and values of its own.

    Head h of H computes ``o_h = softmax(q_h @ k_h.mT / sqrt(head_dim)) @ v_h``; the output is
    ``concat(o_1, ..., o_H) @ out_proj``. From x ``(B, L, embed_dim)`` to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads of queries, keys and values.
        **options: as in `Attention`, num_kv_heads apart.

    Raises:
        As `Attention`, and TypeError for num_kv_heads.

    Example:
        >>> import qkv
        >>> qkv.MultiHeadAttention(64, 8).num_kv_heads
        8

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    _fixed = ("num_kv_heads",)

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads=num_heads, **options)


class CrossAttention(Attention):
    """`Attention` with queries from one sequence, keys and values from another.

    ``softmax(q(x) @ k(context).mT / sqrt(head_dim)) @ v(context)`` in each head, from x ``(B, Lq, embed_dim)`` and
    context ``(B, Lk, context_dim)`` to ``(B, Lq, embed_dim)``.

    Args:
        embed_dim: width of the queries' sequence and of the output.
        num_heads: query heads.
        **options: as in `Attention`; context_dim, the width of the second sequence, is embed_dim if None.

    Raises:
        As `Attention`.

    Example:
        >>> import torch, qkv
        >>> layer = qkv.CrossAttention(64, 8, context_dim=48)
        >>> layer(torch.randn(1, 3, 64), torch.randn(1, 7, 48)).shape
        torch.Size([1, 3, 64])

    Source: Vaswani et al. 2017, section 3.2.3, "encoder-decoder attention"; the width of its own is ours.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[LayerOptions]) -> None:
        context_dim = options.get("context_dim")
        options["context_dim"] = embed_dim if context_dim is None else context_dim
        super().__init__(embed_dim, num_heads, **options)


class CausalAttention(Attention):
    """`Attention` in which a token sees itself and those before it.

    Token i sees token j if ``i - j >= 0``, positions counted over all tokens of a cache. From x ``(B, L, embed_dim)``
    to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        **options: as in `Attention`; a mask given is combined with the causal one.

    Raises:
        As `Attention`, and TypeError for a mask that is not a `Mask`.

    Example:
        >>> import qkv
        >>> qkv.CausalAttention(64, 8).mask
        Mask.causal()

    Source: Vaswani et al. 2017, section 3.2.3, on the decoder.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[LayerOptions]) -> None:
        options["mask"] = Mask.causal() & require_mask(type(self).__name__, options.get("mask"))
        super().__init__(embed_dim, num_heads, **options)


class SlidingWindowAttention(Attention):
    """`Attention` in which a token sees a window of the keys around it; time and memory are linear in the length.

    Token i sees token j if ``abs(i - j) <= window / 2``; with ``causal=True`` if ``0 <= i - j < window``. From x
    ``(B, L, embed_dim)`` to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        window: with ``causal=False`` the keys on both sides, half on each, besides the token's own
            (``Mask.sliding``, Longformer); with ``causal=True`` the keys up to the token, its own included
            (``Mask.causal``, Mistral).
        causal: which of the two.
        sink_tokens: number of first keys that stay visible.
        dilation: distance between the keys of the window, as many as without.
        **options: as in `Attention`; a mask given is combined with the window.

    Raises:
        As `Attention`, and for windows as `Mask.causal` and `Mask.sliding`.

    Example:
        >>> import qkv
        >>> qkv.SlidingWindowAttention(64, 8, 512).mask, qkv.SlidingWindowAttention(64, 8, 512, causal=True).mask
        (Mask.sliding(window=512), Mask.causal(window=512))
        >>> qkv.SlidingWindowAttention(64, 8, 16, causal=True, dilation=4).mask
        Mask.causal(window=16, dilation=4)

    Source: Longformer, section 3.1; Mistral 7B, section 2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int,
        *,
        causal: bool = False,
        sink_tokens: int = 0,
        dilation: int = 1,
        **options: Unpack[LayerOptions],
    ) -> None:
        require_flag(type(self).__name__, "causal", causal)
        make = Mask.causal if causal else Mask.sliding
        windowed = make(window, sink_tokens, dilation=dilation)
        options["mask"] = windowed & require_mask(type(self).__name__, options.get("mask"))
        super().__init__(embed_dim, num_heads, **options)


class MultiQueryAttention(Attention):
    """`Attention` in which all query heads share one key head and one value head.

    Head h computes ``o_h = softmax(q_h @ k.mT / sqrt(head_dim)) @ v``. From x ``(B, L, embed_dim)`` to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        **options: as in `Attention`, num_kv_heads apart.

    Raises:
        As `Attention`, and TypeError for num_kv_heads.

    Example:
        >>> import qkv
        >>> qkv.MultiQueryAttention(64, 8).num_kv_heads
        1

    Source: Shazeer 2019, "Fast Transformer Decoding: One Write-Head is All You Need".
    """

    _fixed = ("num_kv_heads",)

    def __init__(self, embed_dim: int, num_heads: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads=1, **options)


class GroupedQueryAttention(Attention):
    """`Attention` in which groups of query heads share a key head and a value head.

    Query head h of H reads KV head ``h // (H / num_kv_heads)``. From x ``(B, L, embed_dim)`` to the same shape.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        num_kv_heads: groups, a divisor of num_heads; num_heads gives multi-head and 1 multi-query attention.
        **options: as in `Attention`.

    Raises:
        As `Attention`.

    Example:
        >>> import qkv
        >>> qkv.GroupedQueryAttention(64, 8, num_kv_heads=2).num_kv_heads
        2

    Source: Ainslie et al. 2023, section 2.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(embed_dim, num_heads, num_kv_heads=num_kv_heads, **options)
