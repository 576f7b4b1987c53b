"""`Rows`: which of the columns that a layer was given are tokens, in a batch whose rows differ in length."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.arguments import require_tensors


class Rows(NamedTuple):
    """The tokens of each row of a batch. Columns are those of the inputs of a layer, padding included.

    A cache stores the tokens of a row without gaps, whatever their columns.
    """

    lengths: Tensor
    """(B,), number of tokens of each row"""
    is_token: Tensor
    """boolean (B, n), whether each of the first n columns is a token"""
    later: int = 0
    """number of columns after these, all tokens"""
    dropped: Tensor | None = None
    """(B,), how many tokens of each row a sliding cache has dropped; None for caches that keep all"""

    @classmethod
    def of_equal_length(cls, batch: int, length: int, device: torch.device) -> "Rows":
        """Rows of equal length, without padding."""
        lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
        return cls(lengths, torch.ones(batch, length, dtype=torch.bool, device=device))

    def clone(self) -> "Rows":
        """A copy, in tensors of the current mode."""
        dropped = None if self.dropped is None else self.dropped.clone()
        return Rows(self.lengths.clone(), self.is_token.clone(), self.later, dropped)

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.is_token.shape[1] + self.later

    @property
    def stored(self) -> Tensor:
        """``(B,)``, number of tokens of each row that a cache has in memory."""
        return self.lengths if self.dropped is None else self.lengths - self.dropped

    def all_columns(self) -> Tensor:
        """Boolean ``(B, columns)``, whether each column is a token."""
        later = self.is_token.new_ones(self.is_token.shape[0], self.later)
        return torch.cat([self.is_token, later], dim=1) if self.later else self.is_token

    def column_of_tokens(self) -> Tensor:
        """``(B, columns)``, the column of each token of a row, followed by the columns of padding."""
        return self.all_columns().to(torch.int8).argsort(dim=1, descending=True, stable=True)

    def append(self, count: int, is_token: Tensor | None) -> "Rows":
        """The rows with ``count`` more columns, of which ``is_token (B, count)`` are tokens, or all."""
        if is_token is None:
            return self._replace(lengths=self.lengths + count, later=self.later + count)
        lengths, columns = self.lengths + is_token.sum(1), torch.cat([self.all_columns(), is_token], dim=1)
        return Rows(lengths, columns, dropped=self.dropped)

    def column_of_keys(self, count: int, lengths: Tensor, sink_tokens: int) -> Tensor:
        """``(B, count)``, the column of each key that a cache returned.

        Args:
            count: number of keys returned.
            lengths: ``(B,)``, how many of them are tokens of each row: the first ``sink_tokens``, and the last ones.
            sink_tokens: as in `SlidingKVCache`.
        """
        slot = torch.arange(count, device=lengths.device)
        token = torch.where(slot < sink_tokens, slot, slot + (self.lengths - lengths)[:, None])
        return self.column_of_tokens().gather(1, token.clamp(max=self.columns - 1))

    def crop(self, lengths: Tensor) -> "Rows":
        """The rows with their first ``lengths (B,)`` tokens, without last columns that then have none."""
        columns = self.all_columns()
        columns = columns & (columns.cumsum(1) <= lengths[:, None])
        last = torch.arange(1, self.columns + 1, device=columns.device) * columns.any(0)
        return Rows(lengths, columns[:, : int(last.max()) if self.columns else 0], dropped=self.dropped)

    def select(self, index: Tensor) -> "Rows":
        """The rows with these indices."""
        dropped = None if self.dropped is None else self.dropped[index]
        return Rows(self.lengths[index], self.is_token[index], self.later, dropped)

    def join(self, other: "Rows") -> "Rows":
        """These rows and then the others, as if all had been given without padding."""
        lengths = torch.cat([self.lengths, other.lengths])
        is_token = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        dropped = None
        if self.dropped is not None and other.dropped is not None:
            dropped = torch.cat([self.dropped, other.dropped])
        return Rows(lengths, is_token, dropped=dropped)


def require_is_token(caller: str, is_token: Tensor | None, k: Tensor) -> None:
    """Raises unless ``is_token`` is boolean ``(B, L)``, as keys ``(B, Hkv, L, D)`` have tokens, or None."""
    if is_token is None:
        return
    require_tensors(caller, is_token=is_token)
    want = (k.shape[0], k.shape[2]) if k.dim() == 4 else ()
    if is_token.dtype is not torch.bool or is_token.shape != want or is_token.device != k.device:
        raise ValueError(
            f"{caller}: is_token must be boolean {want} on {k.device}, True for tokens; got {is_token.dtype} of shape "
            f"{tuple(is_token.shape)} on {is_token.device}."
        )


def require_padding_at_the_ends(caller: str, is_token: Tensor) -> None:
    """Raises ValueError unless the tokens of each row ``(B, L)`` follow each other."""
    if torch.compiler.is_compiling():
        return
    if ((is_token[:, 1:] > is_token[:, :-1]).sum(1) + is_token[:, 0] > 1).any():
        raise ValueError(
            f"{caller}: with a cache, the new tokens of a row must follow each other, with padding before or after "
            "them; the mask hides some in between. Pass them in calls of their own, or hide them by Mask.dense."
        )


def padding_before(is_token: Tensor) -> Tensor:
    """``(B,)``, number of columns before the first token of each row of ``(B, L)``."""
    return (~is_token & (is_token.cumsum(1) == 0)).sum(1)


class Placement(NamedTuple):
    """Where new tokens are written: token ``columns[n]`` of row ``rows[n]`` to slot ``slots[n]``."""

    rows: Tensor
    columns: Tensor | None
    """None for all, in order; then rows are (B, 1) and slots (B, L)"""
    slots: Tensor

    def of(self, new: Tensor) -> Tensor:
        """The tokens of ``new (B, heads, L, ...)`` in order of the slots, ``(..., heads, ...)``."""
        new = new.transpose(1, 2)
        return new if self.columns is None else new[self.rows, self.columns]


def place(
    lengths: Tensor, count: int, is_token: Tensor | None, *, keeps_padding: bool = False
) -> tuple[Placement, int]:
    """The slots of ``count`` new columns in rows of these ``lengths (B,)``, and by how much the longest length grows.

    ``keeps_padding`` gives padding the slots after the tokens: then no size depends on values, as compilers need, and
    the growth is ``count``.
    """
    device = lengths.device
    rows = torch.arange(lengths.shape[0], device=device)[:, None]
    if is_token is None:
        return Placement(rows, None, lengths[:, None] + torch.arange(count, device=device)), count
    if keeps_padding:
        columns = is_token.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return Placement(rows, columns, lengths[:, None] + torch.arange(count, device=device)), count
    of_token, columns = is_token.nonzero(as_tuple=True)
    slots = (lengths[:, None] + is_token.cumsum(1) - 1)[of_token, columns]
    grown = lengths + is_token.sum(1)
    longest = [int(x.max()) if len(x) else 0 for x in (lengths, grown)]
    return Placement(of_token, columns, slots), longest[1] - longest[0]


def recent_tokens(stored: Tensor, is_full: Tensor, window: int, sink_tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    """What the next query of a window may see besides its own key, of full rows; all tokens of the others.

    Args:
        stored: ``(B,)``, number of tokens of each row, in ``slots`` slots.
        is_full: ``(B,)``, from which rows tokens are dropped.

    Returns:
        ``(B, n)``, the tokens of each row: the sinks, then the last ones; and ``(B,)``, how many a row has.
    """
    sinks = stored.clamp(max=sink_tokens)
    first = torch.where(is_full, torch.maximum(sinks, stored - (window - 1)), sinks)
    kept = sinks + stored - first
    slot = torch.arange(slots if torch.compiler.is_compiling() else int(kept.max()), device=stored.device)
    tokens = torch.where(slot < sinks[:, None], slot, slot + (first - sinks)[:, None])
    return tokens.clamp(max=slots - 1), kept


def gather_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index (B, n)`` of each row of a tensor ``(B, heads, L, ...)``."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return tensor.transpose(1, 2)[rows, index].transpose(1, 2)
