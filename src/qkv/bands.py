"""`Band`: the keys that positions alone show, as a value with an algebra. `Mask` adds tensors to it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """The keys that a query at position p sees: key j, if all of these hold.

    - ``j >= p - left`` and ``dilation`` divides ``p - j``; or ``j < sink_tokens``
    - ``j <= p + right``, or ``j < prefix``
    - p and j are in the same chunk: ``(j - chunk_start) // chunk == (p - chunk_start) // chunk``

    A bound that is None sets no condition. A negative bound ends before the query: ``left=-1`` begins at its next key.
    """

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    prefix: int | Tensor = 0
    """a tensor is (B,), one number for each row of the batch"""
    dilation: int = 1
    chunk: int | None = None
    chunk_start: int = 0

    @property
    def has_prefix(self) -> bool:
        return isinstance(self.prefix, Tensor) or self.prefix > 0

    @property
    def hides_near(self) -> bool:
        """Whether the first condition hides any key."""
        return self.left is not None or self.dilation != 1

    @property
    def is_full(self) -> bool:
        return self.right is None and self.chunk is None and not self.hides_near

    @property
    def is_empty(self) -> bool:
        """Whether no query sees any key, whatever the lengths."""
        bounded = self.left is not None and self.right is not None and self.left + self.right < 0
        return bounded and not self.sink_tokens and not self.has_prefix

    def same(self, other: "Band") -> bool:
        """Whether both have the same fields; a prefix is the same if it is the same tensor."""
        return _same(self.prefix, other.prefix) and self._replace(prefix=0) == other._replace(prefix=0)

    def __str__(self) -> str:
        return " & ".join(written(self)) or "Mask.full()"


FULL = Band()
EMPTY = Band(left=-1, right=-1)


def normalised(band: Band) -> Band:
    """The band with the same visible keys whose fields are the same as those of all equal ones."""
    left, right, step = band.left, band.right, band.dilation
    if left is not None:
        left = left // step * step
    if right is not None and not band.sink_tokens:
        right = right // step * step
    band = band._replace(left=left, right=right)
    if not band.hides_near:  # every earlier key is visible anyway
        band = band._replace(sink_tokens=0)
    if right is None:
        band = band._replace(prefix=0)
    if band.is_empty:
        return EMPTY
    return band._replace(chunk_start=0 if band.chunk is None else band.chunk_start % band.chunk)


def intersection(a: Band, b: Band) -> Band:
    """The band that shows what both show.

    Raises:
        ValueError: if that is not a band.
    """
    left, sink_tokens, dilation = _intersect_near(a, b)
    right, prefix = _intersect_right(a, b)
    chunk, chunk_start = _intersect_chunks(a, b)
    if sink_tokens and chunk is not None:
        raise ValueError(
            f"{a} & {b}: chunks hide sink tokens from later chunks, which is not a band. "
            f"Use Mask.documents(positions // {chunk}) for the chunks."
        )
    return normalised(Band(left, right, sink_tokens, prefix, dilation, chunk, chunk_start))


def union(a: Band, b: Band) -> Band | None:
    """The band that shows what either shows; None if that is not a band."""
    for outer, inner in ((a, b), (b, a)):
        if contains(outer, inner):
            return outer
    if (a.dilation, a.chunk, a.chunk_start) != (b.dilation, b.chunk, b.chunk_start):
        return None
    left = None if a.left is None or b.left is None else max(a.left, b.left)
    right = None if a.right is None or b.right is None else max(a.right, b.right)
    if a.right == b.right and _same(a.prefix, b.prefix):
        return normalised(a._replace(left=left, sink_tokens=max(a.sink_tokens, b.sink_tokens)))
    if a.left == b.left and a.sink_tokens == b.sink_tokens:
        if a.right == b.right:
            return normalised(a._replace(prefix=_larger(a.prefix, b.prefix)))
        if not (a.has_prefix or b.has_prefix):
            return normalised(a._replace(right=right))
    plain = not (a.sink_tokens or b.sink_tokens or a.has_prefix or b.has_prefix)
    if plain and _meets(a, b) and _meets(b, a):
        return normalised(a._replace(left=left, right=right))
    return None


def complement(band: Band) -> Band | None:
    """The band that shows what this one hides; None if that is not a band."""
    if band.is_empty:
        return FULL
    if band.is_full:
        return EMPTY
    if band.has_prefix or band.sink_tokens or band.dilation != 1 or band.chunk is not None:
        return None
    if band.left is None and band.right is not None:
        return Band(left=-band.right - 1)
    if band.right is None and band.left is not None:
        return Band(right=-band.left - 1)
    return None


def contains(outer: Band, inner: Band) -> bool:
    """Whether each condition of ``outer`` follows from those of ``inner``, so that it shows all that ``inner`` does."""
    near = not outer.hides_near or (_is_within(inner, outer) and inner.sink_tokens <= outer.sink_tokens)
    right = outer.right is None or (
        inner.right is not None and inner.right <= outer.right and _is_at_most(inner.prefix, outer.prefix)
    )
    return inner.is_empty or (near and right and _subdivides(inner, outer))


def written(band: Band) -> list[str]:
    """The masks whose ``&`` is the band, as Python."""
    if band.is_empty:
        return ["~Mask.full()"]
    left, right = band.left, band.right
    beyond: list[str] = []
    if left is not None and left < 0:
        beyond.append("~" + _written_window(None, -left - 1, 0, 1))
        left = None
    if right is not None and right < 0:
        beyond.append("~" + _written_window(-right - 1, None, 0, 1))
        right = None
    parts: list[str] = []
    if band.has_prefix:
        parts.append(f"Mask.prefix({shown(band.prefix) if isinstance(band.prefix, Tensor) else band.prefix})")
        right = None
    if left is not None or right is not None or band.dilation != 1:
        parts.append(_written_window(left, right, band.sink_tokens, band.dilation))
    if band.chunk is not None:
        parts.append(f"Mask.chunked({band.chunk}{f', start={band.chunk_start}' if band.chunk_start else ''})")
    return parts + beyond


def shown(tensor: Tensor) -> str:
    """Dtype and shape, in place of a tensor's numbers."""
    return f"<{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}>"


def _written_window(left: int | None, right: int | None, sink_tokens: int, dilation: int) -> str:
    whole = left is None or left % dilation == 0
    if right == 0 and whole:
        name, window = "causal", [] if left is None else [f"window={left // dilation + 1}"]
    elif left is not None and left == right and whole:
        name, window = "sliding", [f"window={2 * left // dilation}"]
    else:
        name, window = "band", [f"left={left}", f"right={right}"]
    options = [f"sink_tokens={sink_tokens}"] * bool(sink_tokens) + [f"dilation={dilation}"] * (dilation != 1)
    return f"Mask.{name}({', '.join(window + options)})"


def _intersect_near(a: Band, b: Band) -> tuple[int | None, int, int]:
    """Left bound, sink tokens and dilation of the intersection: all that hides keys before the right bound.

    Raises:
        ValueError: for different sink tokens, unless the window with fewer is within the other.
    """
    if not (a.hides_near and b.hides_near):
        only = a if a.hides_near else b
        return only.left, only.sink_tokens, only.dilation
    fewer, more = (a, b) if a.sink_tokens <= b.sink_tokens else (b, a)
    if fewer.sink_tokens != more.sink_tokens and not _is_within(fewer, more):
        raise ValueError(
            f"{a} & {b}: the window with {fewer.sink_tokens} sink tokens is not within the one with "
            f"{more.sink_tokens}; their intersection is not a band. Give both the same sink_tokens, or combine dense "
            "masks: Mask.dense(a.visible(...) & b.visible(...))."
        )
    lefts = [band.left for band in (a, b) if band.left is not None]
    return min(lefts, default=None), fewer.sink_tokens, math.lcm(a.dilation, b.dilation)


def _intersect_right(a: Band, b: Band) -> tuple[int | None, int | Tensor]:
    """Right bound and prefix of the intersection."""
    if a.right is None or b.right is None:
        only = b if a.right is None else a
        return only.right, only.prefix
    if a.right == b.right:
        return a.right, _smaller(a.prefix, b.prefix)
    narrow, wide = (a, b) if a.right < b.right else (b, a)
    if narrow.has_prefix:
        raise ValueError(
            f"{a} & {b}: a prefix of which only keys up to the query + {wide.right} are visible is not a band. Combine "
            "dense masks: Mask.dense(a.visible(...) & b.visible(...))."
        )
    return narrow.right, 0


def _intersect_chunks(a: Band, b: Band) -> tuple[int | None, int]:
    """Size and start of the chunks of the intersection."""
    for fine, coarse in ((a, b), (b, a)):
        if _subdivides(fine, coarse):
            return fine.chunk, fine.chunk_start
    raise ValueError(
        f"{a} & {b}: the larger chunks do not end where smaller ones do, so their intersection has no single size. "
        f"Use Mask.documents(positions // {a.chunk}) for one of them."
    )


def _subdivides(fine: Band, coarse: Band) -> bool:
    """Whether each chunk of ``coarse`` is some chunks of ``fine``."""
    if fine.chunk is None or coarse.chunk is None:
        return coarse.chunk is None
    return coarse.chunk % fine.chunk == 0 and (coarse.chunk_start - fine.chunk_start) % fine.chunk == 0


def _is_within(inner: Band, outer: Band) -> bool:
    """Whether the window of ``inner``, sinks apart, is part of that of ``outer``."""
    bounded = outer.left is None or (inner.left is not None and inner.left <= outer.left)
    return bounded and inner.dilation % outer.dilation == 0


def _meets(a: Band, b: Band) -> bool:
    """Whether no key is missing between the right end of ``a`` and the left end of ``b``."""
    return a.right is None or b.left is None or -b.left <= a.right + a.dilation


def _same(a: int | Tensor, b: int | Tensor) -> bool:
    """Whether both are one tensor, or equal numbers."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def _is_at_most(a: int | Tensor, b: int | Tensor) -> bool:
    """Whether ``a <= b`` without reading tensors."""
    return a is b or _same(a, 0) or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a > b)


def _smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor):
        if isinstance(b, Tensor):
            return a if a is b else torch.minimum(a, b)
        return a.clamp(max=b) if b else 0
    return _smaller(b, a) if isinstance(b, Tensor) else min(a, b)


def _larger(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor):
        return a.clamp(min=b) if not isinstance(b, Tensor) else torch.maximum(a, b)
    return _larger(b, a) if isinstance(b, Tensor) else max(a, b)
