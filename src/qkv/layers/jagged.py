"""Jagged nested tensors ``(B, j, E)``: B sequences of different lengths, packed in one tensor of values."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks import Mask


class PackedTokens(NamedTuple):
    """The T tokens of B sequences, packed without gaps, and the sequence and position of each."""

    values: Tensor
    """(1, T, E)"""
    rows: Tensor
    """(T,), the sequence of each token"""
    positions: Tensor
    """(T,), the position of each token in its sequence"""
    lengths: Tensor
    """(B,)"""
    longest: int

    @property
    def document_mask(self) -> Mask:
        """The mask under which tokens see their own sequence."""
        return Mask.documents(self.rows[None])

    def pad(self, packed: Tensor) -> Tensor:
        """``(1, heads, T, width)`` to ``(B, heads, longest, width)``."""
        _, heads, _, width = packed.shape
        padded = packed.new_zeros(len(self.lengths), self.longest, heads, width)
        return padded.index_put((self.rows, self.positions), packed[0].transpose(0, 1)).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return padded.transpose(1, 2)[self.rows, self.positions].transpose(0, 1)[None]


def pack_jagged(x: Any) -> PackedTokens:
    """The tokens of a jagged tensor, without the gaps that a slice of another one has."""
    values, lengths, indices = x.values(), x.offsets().diff(), _token_indices(x)
    if indices is not None:
        values, lengths = values[indices], x.lengths()
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(values))
    positions = torch.arange(len(values), device=lengths.device) - (lengths.cumsum(0) - lengths)[rows]
    return PackedTokens(values[None], rows, positions, lengths, int(lengths.max()))


def nested_like(x: Any, packed: Tensor) -> Tensor:
    """A jagged tensor with the offsets of ``x`` and the values ``packed (1, T, E)``."""
    values, indices = packed[0], _token_indices(x)
    if indices is not None:
        values = values.new_zeros(len(x.values()), *values.shape[1:]).index_put((indices,), values)
    nested: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets(), lengths=x.lengths())
    return nested


def _token_indices(x: Any) -> Tensor | None:
    """Indices of the values that belong to a sequence; None if all do."""
    starts, lengths = x.offsets()[:-1], x.lengths()
    if lengths is None:
        return None
    first = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return first + torch.arange(len(first), device=first.device)


def require_jagged(caller: str, name: str, x: object, width: int | None) -> None:
    """Raises unless ``x`` is a jagged tensor ``(B, j, width)``."""
    required = f"{caller}: {name} must be a jagged nested tensor (B, j, {width})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{required}, as the other one is; got {type(x).__name__}.")
    if not x.is_nested:
        raise ValueError(f"{required}, as the other one is; got a plain tensor of shape {tuple(x.shape)}.")
    if x.layout is not torch.jagged:
        raise ValueError(
            f"{required}; got one of layout {x.layout}. "
            "Convert it: torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged)."
        )
    if x.dim() != 3 or not isinstance(x.shape[2], int) or x.shape[2] != width:
        raise ValueError(f"{required}; got shape {tuple(x.shape)}.")
