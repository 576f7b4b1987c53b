"""torch's `varlen_attn` on a CPU: attention over packed sequences. Also the checks shared with flash-attn's functions.

Sequences of different lengths are packed in ``(T, H, D)`` and delimited by cumulative lengths ``(N + 1,)``; keys may
instead be in pages ``(pages, page_size, Hkv, D)``, listed in a table.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.arguments import require_tensors
from qkv.masks import Mask
from qkv.sequences import PagedKeys, make_sequences


class AuxRequest(NamedTuple):
    """What `varlen_attn` returns in addition to its output."""

    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of N packed sequences, the last query of each aligned with its last key.

    Args:
        query: ``(Tq, H, D)``.
        key: ``(Tk, Hkv, D)``; ``(pages, page_size, Hkv, D)`` with a block_table.
        value: ``(Tk, Hkv, Dv)``; ``(pages, page_size, Hkv, Dv)`` with a block_table.
        cu_seq_q, cu_seq_k: ``(N + 1,)``, the first token of each sequence, then T. With a block_table, cu_seq_k has no
            effect and may be None.
        max_q, max_k: have no effect, since cu_seq_q and cu_seq_k determine the lengths.
        return_aux: ``AuxRequest(lse=True)`` returns the lse as well.
        scale: factor of the scores, ``1 / sqrt(D)`` if None.
        window_size: numbers of keys seen before and after the query's own, -1 for all: ``(-1, 0)`` is causal.
        enable_gqa: whether Hkv may be less than H.
        seqused_k: ``(N,)``, number of keys of each sequence that are used, the first ones.
        block_table: ``(N, pages of a sequence)``, the pages with the keys of each sequence, in order. Needs seqused_k.
        num_splits: has no effect, since the bits of a sequence never depend on the other sequences.

    Returns:
        ``(Tq, H, Dv)``, and on request the lse ``(H, Tq)``. A query that sees no key gets 0, and an lse of -inf.

    Raises:
        ValueError: for lengths, pages and shapes that do not fit together, and fewer KV heads without enable_gqa.

    Example:
        >>> import torch
        >>> from qkv.integrations.torch import varlen_attn
        >>> x, starts = torch.randn(7, 2, 8), torch.tensor([0, 3, 7])
        >>> varlen_attn(x, x, x, starts, starts, 4, 4, window_size=(-1, 0)).shape
        torch.Size([7, 2, 8])

    Source: ``torch.nn.attention.varlen`` of torch 2.13, which takes fp16 and bf16 on a GPU. There the lse of a query
    without keys is inf, and no gradient flows through the lse, nor with seqused_k or block_table; here it does. (The
    lse is documented as ``(Tq, H)`` there, and returned as ``(H, Tq)``.)
    """
    caller = "varlen_attn"
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"{caller}: return_aux must be an AuxRequest or None; got {return_aux!r}.")
    require_layout(caller, "(Tq, H, D)", query=query)
    require_keys(caller, "(Tk, Hkv, D)" if block_table is None else "(pages, page_size, Hkv, D)", key=key, value=value)
    if not enable_gqa and query.shape[1] != key.shape[-2]:
        raise ValueError(
            f"{caller}: query and key must have the same number of heads; got {query.shape[1]} and {key.shape[-2]}. "
            "Pass enable_gqa=True if groups of query heads share a key head."
        )
    require_starts(caller, "cu_seq_q", cu_seq_q, query.shape[0])
    if block_table is not None:
        if seqused_k is None:
            raise ValueError(f"{caller}: block_table needs seqused_k, the number of keys of each sequence; got None.")
        require_counts(caller, "seqused_k", seqused_k, len(cu_seq_q) - 1)
        keys = keys_in_pages(caller, key, value, block_table, seqused_k)
    else:
        if cu_seq_k is None:
            raise ValueError(f"{caller}: cu_seq_k must be a tensor unless block_table is given; got None.")
        require_starts(caller, "cu_seq_k", cu_seq_k, key.shape[0])
        if seqused_k is not None:
            lengths = cu_seq_k.diff()
            require_counts(caller, "seqused_k", seqused_k, len(lengths))
            if not torch.compiler.is_compiling() and (seqused_k.to(lengths.device) > lengths).any():
                raise ValueError(
                    f"{caller}: seqused_k must be at most the lengths in cu_seq_k, {lengths.tolist()}; "
                    f"got {seqused_k.tolist()}."
                )
        keys = PagedKeys.packed(key, value, cu_seq_k, seqused_k)
    out, lse = make_sequences(caller, query, cu_seq_q, keys, mask=band(caller, window_size), scale=scale).attend()
    return (out, lse) if return_aux is not None and return_aux.lse else out


def band(caller: str, window_size: Sequence[int], causal: bool = False) -> Mask:
    """The mask of a ``window_size (left, right)`` of flash-attn, -1 for no bound; ``causal`` sets right to 0."""
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise ValueError(f"{caller}: window_size must be (left, right), -1 for no bound; got {window_size!r}.")
    left, right = window_size
    if causal:
        right = 0
    return Mask.band(None if left < 0 else left, None if right < 0 else right)


def require_starts(caller: str, name: str, starts: Tensor, total: int | None = None) -> None:
    """Raises unless ``starts`` are cumulative lengths ``(N + 1,)`` up to ``total`` (any number, if None).

    While compiling, values are not checked here, but by the kernel when it runs; so in all checks below.
    """
    _require_integers(caller, name, starts)
    if torch.compiler.is_compiling():
        return
    bounds = starts.tolist() if starts.dim() == 1 else []
    fits = len(bounds) > 1 and bounds[0] == 0 and total in (None, bounds[-1])
    if not fits or any(start > stop for start, stop in pairwise(bounds)):
        end = "" if total is None else f" and end at {total}, the number of tokens"
        raise ValueError(
            f"{caller}: {name} must be (N + 1,) integers that start at 0, never decrease{end}; got {starts}."
        )


def require_counts(caller: str, name: str, counts: Tensor, batch: int) -> None:
    """Raises unless ``counts`` are numbers of tokens ``(batch,)``, one per sequence."""
    _require_integers(caller, name, counts)
    if counts.shape != (batch,) or (not torch.compiler.is_compiling() and min(counts.tolist(), default=0) < 0):
        raise ValueError(f"{caller}: {name} must be ({batch},) integers, at least 0, one per sequence; got {counts}.")


def _require_integers(caller: str, name: str, value: object) -> None:
    require_tensors(caller, **{name: value})
    assert isinstance(value, Tensor)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
        raise ValueError(f"{caller}: {name} must be integers; got {value.dtype}.")


def require_layout(caller: str, layout: str, **tensors: Tensor) -> None:
    """Raises unless each is a tensor with the dimensions named in ``layout``, such as ``(T, H, D)``."""
    require_tensors(caller, **tensors)
    for name, tensor in tensors.items():
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{caller}: {name} must be {layout}; got shape {tuple(tensor.shape)}.")


def require_keys(caller: str, layout: str, **keys_and_values: Tensor) -> None:
    """Raises unless keys and values have the dimensions of ``layout`` and equal shapes except for the last one."""
    require_layout(caller, layout, **keys_and_values)
    (k_name, k), (v_name, v) = keys_and_values.items()
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{caller}: {k_name} and {v_name} must have the same shape except for the width; "
            f"got {tuple(k.shape)} and {tuple(v.shape)}."
        )


def require_table(caller: str, block_table: Tensor, batch: int) -> None:
    """Raises unless ``block_table`` is integer ``(batch, entries)``."""
    _require_integers(caller, "block_table", block_table)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"{caller}: block_table must be ({batch}, pages of a sequence); got shape {tuple(block_table.shape)}."
        )


def keys_in_pages(
    caller: str, k: Tensor, v: Tensor, block_table: Tensor, stops: Tensor, starts: Tensor | None = None
) -> PagedKeys:
    """Keys ``starts[n]`` (0 if None) to ``stops[n] - 1`` of each sequence, in pools ``(pages, page_size, Hkv, D)``.

    Raises:
        ValueError: for table entries that are missing or no page. Entries that no key needs are ignored.
    """
    require_table(caller, block_table, len(stops))
    starts = torch.zeros_like(stops) if starts is None else starts
    if not torch.compiler.is_compiling():
        _require_pages(caller, k, block_table, starts.tolist(), stops.tolist())
    return PagedKeys(k, v, starts, stops - starts, block_table)


def _require_pages(caller: str, pool: Tensor, block_table: Tensor, starts: Sequence[int], stops: Sequence[int]) -> None:
    """Raises ValueError unless the table has a valid page for each key that a sequence needs."""
    num_pages, page_size = pool.shape[:2]
    if max(stops, default=0) > block_table.shape[1] * page_size:
        raise ValueError(
            f"{caller}: block_table must have pages for {max(stops)} keys; "
            f"got {block_table.shape[1]} of {page_size} keys for each sequence."
        )
    for n, (entries, start, stop) in enumerate(zip(block_table.tolist(), starts, stops, strict=True)):
        if start == stop:
            continue
        first, end = start // page_size, -(-stop // page_size)
        needed = entries[first:end]
        if not 0 <= min(needed) <= max(needed) < num_pages:
            page = next(page for page in needed if not 0 <= page < num_pages)
            raise ValueError(
                f"{caller}: block_table must contain pages 0 to {num_pages - 1}; got {page} at "
                f"[{n}, {entries.index(page, first)}], which sequence {n} of {stop} keys needs."
            )
