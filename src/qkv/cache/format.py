"""`Format`: in which form a cache stores keys and values."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qkv.cache.buffer import AppendBuffer


class Format:
    """Keys and values as they are given; base class of other forms.

    A cache says which tokens it keeps and where, its format what is stored of each.
    """

    __slots__ = ()

    parts: ClassVar[tuple[str, ...]] = ("keys", "values")
    """names of the tensors that are stored, ``(B, heads, L, ...)``"""
    dtype: ClassVar[torch.dtype | None] = None
    """of stored keys and values; None for that in which they are given"""

    def require(self, caller: str, k: Tensor, v: Tensor) -> None:
        """Raises ValueError for tokens that it cannot represent."""

    def shapes(self, k: Sequence[int], v: Sequence[int], dtype: torch.dtype) -> list[tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of each part, for tokens of these shapes and this dtype."""
        return [(k, dtype), (v, dtype)]

    def encode(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """New tokens, as each part stores them."""
        return k, v

    def extend(self, parts: Sequence[AppendBuffer], k: Tensor, v: Tensor, capacity: int) -> list[Tensor]:
        """Appends new tokens to each part, as `AppendBuffer.extend`; returns all tokens of each."""
        return [part.extend(x, capacity) for part, x in zip(parts, self.encode(k, v), strict=True)]


PLAIN = Format()
