"""Jagged nested tensors ``(B, j, E)``: sequences of different lengths, one after the other in one tensor of values."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks import Mask


class Sequences(NamedTuple):
    """Tokens of B sequences packed without anything between them, and where each of the T stands."""

    values: Tensor
    """(1, T, E)"""
    rows: Tensor
    """(T,), the sequence of each token"""
    positions: Tensor
    """(T,), counted from the beginning of its sequence"""
    lengths: Tensor
    """(B,)"""
    longest: int

    @property
    def own(self) -> Mask:
        """Tokens see those of their own sequence."""
        return Mask.documents(self.rows[None])

    @property
    def offset(self) -> Tensor:
        """(T,), what each token's place among all is to be moved by to give its position."""
        return self.positions - torch.arange(len(self.rows), device=self.rows.device)

    def pad(self, packed: Tensor) -> Tensor:
        """``(1, heads, T, width)`` to ``(B, heads, longest, width)``."""
        _, heads, _, width = packed.shape
        padded = packed.new_zeros(len(self.lengths), self.longest, heads, width)
        return padded.index_put((self.rows, self.positions), packed[0].transpose(0, 1)).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """The way back."""
        return padded.transpose(1, 2)[self.rows, self.positions].transpose(0, 1)[None]


def sequences_of(x: Any) -> Sequences:
    """Of a jagged tensor, without the holes that it may have where it is a part of another."""
    values, lengths, real = x.values(), x.offsets().diff(), _real(x)
    if real is not None:
        values, lengths = values[real], x.lengths()
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(values))
    positions = torch.arange(len(values), device=lengths.device) - (lengths.cumsum(0) - lengths)[rows]
    return Sequences(values[None], rows, positions, lengths, int(lengths.max()))


def nested_like(x: Any, packed: Tensor) -> Tensor:
    """A jagged tensor of the same offsets as x, with other values ``(1, T, E)``."""
    values, real = packed[0], _real(x)
    if real is not None:
        values = values.new_zeros(len(x.values()), *values.shape[1:]).index_put((real,), values)
    nested: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets(), lengths=x.lengths())
    return nested


def _real(x: Any) -> Tensor | None:
    """Which of its values belong to a sequence; None where all do."""
    starts, lengths = x.offsets()[:-1], x.lengths()
    if lengths is None:
        return None
    first = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return first + torch.arange(len(first), device=first.device)


def require_jagged(caller: str, name: str, x: object, width: int | None) -> None:
    """Raises unless it is a jagged tensor ``(B, j, width)``."""
    required = f"{caller}: {name} must be a jagged nested tensor (B, j, {width})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{required}, as the other one is; got {type(x).__name__}.")
    if not x.is_nested:
        raise ValueError(f"{required}, as the other one is; got a plain tensor of shape {tuple(x.shape)}.")
    if x.layout is not torch.jagged:
        raise ValueError(
            f"{required}; got one of layout {x.layout}. "
            "Make it so: torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)."
        )
    if x.dim() != 3 or not isinstance(x.shape[2], int) or x.shape[2] != width:
        raise ValueError(f"{required}; got shape {tuple(x.shape)}.")
