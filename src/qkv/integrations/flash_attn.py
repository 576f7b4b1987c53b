"""The functions of flash-attn 2 on a CPU, with the same names and signatures.

Replace ``from flash_attn import flash_attn_func`` by ``from qkv.integrations.flash_attn import flash_attn_func``.
Tensors are ``(batch, length, heads, width)``, as in flash-attn.
"""

from typing import Any

import torch
from torch import Tensor

from qkv import kernels
from qkv.arguments import require_finite, require_int, require_probability, require_tensors
from qkv.functional import attend
from qkv.integrations.torch.varlen import (
    band,
    keys_in_pages,
    require_counts,
    require_keys,
    require_layout,
    require_starts,
    require_table,
)
from qkv.partial import Partial
from qkv.rotation import Rotation
from qkv.sequences import PagedKeys, make_sequences

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]

DENSE = "(batch, length, heads, width)"
PACKED = "(T, heads, width)"
PAGES = "(pages, page_size, heads, width)"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention with the last query aligned with the last key: query i is at position ``p = i + Lk - Lq``, key j at j.

    Args:
        q: ``(B, Lq, H, D)``.
        k: ``(B, Lk, Hkv, D)``, where Hkv divides H.
        v: ``(B, Lk, Hkv, Dv)``.
        dropout_p: probability with which a weight is zeroed; the others are scaled by ``1 / (1 - dropout_p)``.
        softmax_scale: factor of the scores, ``1 / sqrt(D)`` if None.
        causal: whether to hide keys after p, regardless of the window.
        window_size: ``(left, right)``; keys ``p - left`` to ``p + right`` are seen, -1 for no bound.
        softcap: replaces a score s by ``softcap * tanh(s / softcap)``, if greater than 0.
        alibi_slopes: ``(H,)`` or ``(B, H)``; adds ``-slope * |p - j|``.
        deterministic: has no effect, since gradients always have the same bits.
        return_attn_probs: whether to return the lse as well.

    Returns:
        ``(B, Lq, H, Dv)``. With return_attn_probs also the lse ``(B, H, Lq)`` and, in place of ``S_dmask``, the empty
        tensor that flash-attn returns without dropout. A query that sees no key gets 0, and an lse of -inf.

    Raises:
        ValueError: for shapes, dtypes and numbers that do not fit together.
        NotImplementedError: for return_attn_probs with dropout, since the dropout pattern is not stored.

    Example:
        >>> import torch
        >>> from qkv.integrations.flash_attn import flash_attn_func
        >>> q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
        >>> flash_attn_func(q, k, k, causal=True).shape
        torch.Size([1, 3, 4, 8])

    Source: the documentation of flash-attn 2.8, ``flash_attn_interface.py``. Its kernel differs from that: the lse is
    inf for queries without keys and larger by ``slope * p`` for causal ALiBi; a bound of Lk or more is dropped, which
    shows more keys if Lq > Lk; only fp16 and bf16 are supported, and no softcap with dropout.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attend_dense("flash_attn_func", q, k, v, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of queries, keys and values in one tensor ``(B, L, 3, H, D)``: ``q, k, v = qkv.unbind(2)``.

    Raises:
        As `flash_attn_func`, and for another shape.

    Example:
        >>> import torch
        >>> from qkv.integrations.flash_attn import flash_attn_qkvpacked_func
        >>> flash_attn_qkvpacked_func(torch.randn(1, 5, 3, 2, 8), causal=True).shape
        torch.Size([1, 5, 2, 8])

    Source: ``flash_attn.flash_attn_qkvpacked_func``, version 2.
    """
    require_tensors("flash_attn_qkvpacked_func", qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"flash_attn_qkvpacked_func: qkv must be (batch, length, 3, heads, width); got shape {tuple(qkv.shape)}."
        )
    q, k, v = qkv.unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attend_dense("flash_attn_qkvpacked_func", q, k, v, *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of keys and values in one tensor ``(B, Lk, 2, Hkv, D)``: ``k, v = kv.unbind(2)``.

    Raises:
        As `flash_attn_func`, and for another shape.

    Example:
        >>> import torch
        >>> from qkv.integrations.flash_attn import flash_attn_kvpacked_func
        >>> flash_attn_kvpacked_func(torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 2, 8)).shape
        torch.Size([1, 3, 4, 8])

    Source: ``flash_attn.flash_attn_kvpacked_func``, version 2.
    """
    require_tensors("flash_attn_kvpacked_func", kv=kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"flash_attn_kvpacked_func: kv must be (batch, length, 2, heads, width); got shape {tuple(kv.shape)}."
        )
    k, v = kv.unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attend_dense("flash_attn_kvpacked_func", q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` within each of N packed sequences.

    Args:
        q: ``(Tq, H, D)``.
        k: ``(Tk, Hkv, D)``; ``(pages, page_size, Hkv, D)`` with a block_table.
        v: ``(Tk, Hkv, Dv)``; ``(pages, page_size, Hkv, Dv)`` with a block_table.
        cu_seqlens_q, cu_seqlens_k: ``(N + 1,)``, the first token of each sequence, then T.
        max_seqlen_q, max_seqlen_k: have no effect, since cu_seqlens_q and cu_seqlens_k determine the lengths.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in `flash_attn_func`.
        alibi_slopes: ``(H,)`` or ``(N, H)``.
        return_attn_probs: as in `flash_attn_func`; the lse is ``(H, Tq)``.
        block_table: ``(N, pages of a sequence)``, the pages with the keys of each sequence, in order. Pages may have
            any size.

    Returns:
        ``(Tq, H, Dv)``, or what `flash_attn_func` returns with return_attn_probs.

    Raises:
        ValueError: for lengths, pages and shapes that do not fit together.
        NotImplementedError: as `flash_attn_func`.

    Example:
        >>> import torch
        >>> from qkv.integrations.flash_attn import flash_attn_varlen_func
        >>> x, starts = torch.randn(7, 2, 8), torch.tensor([0, 3, 7])
        >>> flash_attn_varlen_func(x, x, x, starts, starts, 4, 4, causal=True).shape
        torch.Size([7, 2, 8])

    Source: as `flash_attn_func`.
    """
    caller = "flash_attn_varlen_func"
    require_layout(caller, PACKED, q=q)
    require_keys(caller, PACKED if block_table is None else PAGES, k=k, v=v)
    options = _options(caller, softmax_scale, causal, window_size, softcap, dropout_p)
    _refuse_dropout_pattern(caller, return_attn_probs, dropout_p)
    require_starts(caller, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    require_starts(caller, "cu_seqlens_k", cu_seqlens_k, k.shape[0] if block_table is None else None)
    if block_table is None:
        keys = PagedKeys.packed(k, v, cu_seqlens_k)
    else:
        keys = keys_in_pages(caller, k, v, block_table, cu_seqlens_k.diff())
    partial = make_sequences(caller, q, cu_seqlens_q, keys, alibi=alibi_slopes, **options).attend()
    return (*partial, q.new_empty(0)) if return_attn_probs else partial.out


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, in place, and attends to all keys in it.

    The last query is aligned with the last key. Without gradients, as in flash-attn.

    Args:
        q: ``(B, Lq, H, D)``.
        k_cache: ``(rows, capacity, Hkv, D)``; ``(pages, page_size, Hkv, D)`` with a block_table.
        v_cache: ``(rows, capacity, Hkv, Dv)``; ``(pages, page_size, Hkv, Dv)`` with a block_table.
        k: ``(B, new, Hkv, D)``, written after the keys in the cache; nothing is written if None.
        v: ``(B, new, Hkv, Dv)``, as k.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)``; rotate k and q by the positions of their tokens in the
            cache, padding included. Without causal and window_size, all of q is rotated by the first of its positions.
        cache_seqlens: number of tokens in the cache before the call, one for all rows or ``(B,)``; all slots if None.
        cache_batch_idx: ``(B,)``, the cache row of each batch row; the first B if None.
        cache_leftpad: ``(B,)``, number of leading padding tokens in each row of the cache.
        block_table: ``(B, pages of a sequence)``, the pages with the keys of each sequence, in order. Pages may have
            any size.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: as ``interleaved`` of `qkv.RotaryEmbedding`.
        num_splits: has no effect, since the bits of a batch row never depend on the other rows.
        return_softmax_lse: whether to return the lse as well.

    Returns:
        ``(B, Lq, H, Dv)``, and on request the lse ``(B, H, Lq)``.

    Raises:
        ValueError: for lengths, rows, pages and shapes that do not fit together.

    Example:
        >>> import torch
        >>> from qkv.integrations.flash_attn import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
        >>> q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 2, 8)
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, k, cache_seqlens=5, causal=True).shape
        torch.Size([1, 1, 4, 8])
        >>> torch.equal(k_cache[:, 5:6], k)
        True

    Source: as `flash_attn_func`.
    """
    caller = "flash_attn_with_kvcache"
    require_layout(caller, DENSE, q=q)
    require_keys(caller, DENSE if block_table is None else PAGES, k_cache=k_cache, v_cache=v_cache)
    options = _options(caller, softmax_scale, causal, window_size, softcap)
    batch, lq = q.shape[:2]
    page_size = k_cache.shape[1]
    if block_table is not None:
        require_table(caller, block_table, batch)
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    new = 0 if k is None and v is None else _count_new(caller, batch, k, v, k_cache, v_cache)
    if isinstance(cache_seqlens, Tensor):
        require_counts(caller, "cache_seqlens", cache_seqlens, batch)
        lengths = cache_seqlens.tolist()
    else:
        if cache_seqlens is not None:
            require_int(caller, "cache_seqlens", cache_seqlens, ", or a tensor with one per sequence")
        lengths = [capacity if cache_seqlens is None else cache_seqlens] * batch
    stops = [length + new for length in lengths]
    if not all(new <= stop <= capacity for stop in stops):
        raise ValueError(
            f"{caller}: cache_seqlens plus {new} new tokens must be at most the capacity of {capacity}; "
            f"got {cache_seqlens}."
        )
    if cache_leftpad is not None:
        require_counts(caller, "cache_leftpad", cache_leftpad, batch)
        padding = cache_leftpad.tolist()
        if any(pad > length for pad, length in zip(padding, lengths, strict=True)):
            raise ValueError(f"{caller}: cache_leftpad must be at most cache_seqlens, {lengths}; got {padding}.")

    if rotary_cos is not None or rotary_sin is not None:
        if rotary_cos is None or rotary_sin is None or k is None:
            raise ValueError(
                f"{caller}: rotary_cos, rotary_sin and k must be given together; got None for one of them."
            )
        start = torch.tensor(lengths, dtype=torch.int64, device=q.device)[:, None]
        ahead = torch.arange(lq, device=q.device) * options["mask"].is_positional
        q = _rotate(caller, q, start + ahead, rotary_cos, rotary_sin, rotary_interleaved)
        ahead = torch.arange(new, device=q.device)
        k = _rotate(caller, k, start + ahead, rotary_cos, rotary_sin, rotary_interleaved)
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError(f"{caller}: cache_batch_idx has no meaning with a block_table; pass one of them.")
    # A cache without pages is one with a page per sequence.
    table = _rows(caller, cache_batch_idx, batch, k_cache) if block_table is None else block_table
    keys = keys_in_pages(caller, k_cache, v_cache, table, torch.tensor(stops, dtype=torch.int64), cache_leftpad)
    sequences = make_sequences(caller, *_packed(q), keys, alibi=alibi_slopes, **options)
    if k is not None and v is not None:
        positions = torch.tensor(stops, dtype=torch.int64, device=q.device)[:, None] + torch.arange(
            -new, 0, device=q.device
        )
        slots = table.long().gather(1, positions // page_size), positions % page_size
        k_cache[slots], v_cache[slots] = k, v
    out, lse = _unpacked(sequences.attend(), batch)
    return (out, lse) if return_softmax_lse else out


def _attend_dense(
    caller: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` with ``caller`` in error messages."""
    require_layout(caller, DENSE, q=q, k=k, v=v)
    options = _options(caller, softmax_scale, causal, window_size, softcap, dropout_p)
    _refuse_dropout_pattern(caller, return_attn_probs, dropout_p)
    if alibi_slopes is not None:
        require_tensors(caller, alibi_slopes=alibi_slopes)
    if alibi_slopes is not None and q.shape[0] == 0 and alibi_slopes.shape == (0, q.shape[2]):
        alibi_slopes = alibi_slopes.new_zeros(q.shape[2])  # without rows, any slopes will do
    if alibi_slopes is None or alibi_slopes.shape == (q.shape[2],):
        transposed = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = attend(caller, *transposed, offset=k.shape[1] - q.shape[1], alibi=alibi_slopes, **options)
        out = out.transpose(1, 2)
    else:
        (queries, starts), (keys, k_starts), (values, _) = map(_packed, (q, k, v))
        packed = PagedKeys.packed(keys, values, k_starts)
        sequences = make_sequences(caller, queries, starts, packed, alibi=alibi_slopes, **options)
        out, lse = _unpacked(sequences.attend(), q.shape[0])
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def _options(
    caller: str,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """The options that all functions share, as keywords of `qkv.attention`."""
    require_finite(caller, "softcap", softcap)
    require_probability(caller, "dropout_p", dropout_p)
    return {
        "mask": band(caller, window_size, causal),
        "scale": softmax_scale,
        "softcap": softcap if softcap > 0 else None,
        "dropout": dropout_p,
    }


def _refuse_dropout_pattern(caller: str, return_attn_probs: bool, dropout_p: float) -> None:
    """Raises NotImplementedError for return_attn_probs with dropout."""
    if return_attn_probs and dropout_p > 0:
        raise NotImplementedError(
            f"{caller}: return_attn_probs must be False with dropout, since its pattern is not stored; "
            f"got dropout_p={dropout_p}. For the lse, which dropout does not change, pass dropout_p=0."
        )


def _packed(batch: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, L, H, D)`` as packed sequences ``(B * L, H, D)``, and their cumulative lengths."""
    return batch.flatten(0, 1), torch.arange(batch.shape[0] + 1) * batch.shape[1]


def _unpacked(packed: Partial, batch: int) -> Partial:
    """``(B, Lq, H, Dv)`` and the lse ``(B, H, Lq)`` of packed sequences of equal lengths."""
    shape = (batch, packed.out.shape[0] // batch)
    return Partial(packed.out.unflatten(0, shape), packed.lse.unflatten(1, shape).transpose(0, 1))


def _count_new(caller: str, batch: int, k: Tensor | None, v: Tensor | None, k_cache: Tensor, v_cache: Tensor) -> int:
    """The number of new tokens, after a check that they match the cache."""
    if k is None or v is None:
        raise ValueError(f"{caller}: k and v must be given together; got None for {'k' if k is None else 'v'}.")
    require_keys(caller, DENSE, k=k, v=v)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.shape[0] != batch or x.shape[2:] != cache.shape[2:] or x.dtype != cache.dtype:
            heads, width = cache.shape[2:]
            raise ValueError(
                f"{caller}: {name} must be ({batch}, new tokens, {heads}, {width}) of {cache.dtype}, as the cache; "
                f"got {tuple(x.shape)} of {x.dtype}."
            )
    return k.shape[1]


def _rows(caller: str, cache_batch_idx: Tensor | None, batch: int, cache: Tensor) -> Tensor:
    """The cache row of each batch row, ``(B, 1)``."""
    if cache_batch_idx is None:
        rows = list(range(batch))
    else:
        require_counts(caller, "cache_batch_idx", cache_batch_idx, batch)
        rows = cache_batch_idx.tolist()
    if max(rows, default=0) >= cache.shape[0]:
        raise ValueError(
            f"{caller}: cache_batch_idx must be less than the {cache.shape[0]} rows of the cache; got {rows}."
        )
    return torch.tensor(rows, dtype=torch.int64, device=cache.device)[:, None]


def _rotate(caller: str, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates ``x (B, L, heads, D)`` by the rows ``positions (B, L)`` of tables ``(positions, rotary_dim / 2)``."""
    require_tensors(caller, rotary_cos=cos, rotary_sin=sin)
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(
            f"{caller}: rotary_cos and rotary_sin must be (positions, rotary_dim / 2), with rotary_dim at most "
            f"{x.shape[3]}; got shapes {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if (positions >= cos.shape[0]).any():
        raise ValueError(
            f"{caller}: rotary_cos and rotary_sin must have position {positions.max()}; got {cos.shape[0]} positions."
        )
    cos, sin = (table.to(torch.promote_types(x.dtype, torch.float32))[positions] for table in (cos, sin))
    (rotated,) = kernels.rotate([x.transpose(1, 2)], Rotation(cos=cos, sin=sin, interleaved=interleaved))
    return rotated.transpose(1, 2)
