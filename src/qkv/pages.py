"""`Pages`: where the keys of a batch lie in a pool of pages."""

from typing import NamedTuple

import torch
from torch import Tensor

from qkv.arguments import require_int, require_tensors
from qkv.tracing import can_read_values


class Pages(NamedTuple):
    """Which pages of a pool ``(pages, Hkv, page_size, width)`` hold the keys of each row of a batch.

    Key j of row b is in row ``j % page_size`` of page ``table[b, j // page_size]``. Rows may share pages.
    """

    table: Tensor
    """integer (B, entries); the first ``ceil(length / page_size)`` of each row name pages of the pool"""
    length: int
    """Lk, number of keys of each row; of the longest one, if rows differ and a mask hides the rest"""

    def gather(self, pool: Tensor) -> Tensor:
        """The keys or values ``(B, Hkv, length, width)``: a copy, with gradients.

        Raises:
            ValueError: for a table that names other pages; where its numbers cannot be read, torch raises.
        """
        table = self.table[:, : -(-self.length // pool.shape[2])].to(pool.device, torch.int64)
        if table.is_cpu and can_read_values(table) and ((table < 0) | (table >= pool.shape[0])).any():
            raise ValueError(
                f"attention: the table of pages must name pages 0 to {pool.shape[0] - 1} for all {self.length} keys; "
                f"got {table}."
            )
        table = table.where(table >= 0, pool.shape[0])  # -1 would be the last page
        return pool[table].transpose(1, 2).flatten(2, 3)[:, :, : self.length]

    def stand_in(self, pool: Tensor) -> Tensor:
        """A tensor of the shape that `gather` returns, without its numbers or a copy."""
        return pool[:1, :, :1].expand(self.table.shape[0], -1, self.length, -1)

    def require_fit(self, caller: str, k: Tensor, v: Tensor) -> None:
        """Raises unless these are pages of ``k`` and ``v``. Entries of the table are checked where they are read."""
        require_tensors(caller, k=k, v=v, block_table=self.table)
        require_int(caller, "the number of keys in pages", self.length)
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or 0 in (k.shape[0], k.shape[2]):
            raise ValueError(
                f"{caller}: with pages, k and v must be (pages, Hkv, page_size, width), at least one page of one key; "
                f"got {tuple(k.shape)} and {tuple(v.shape)}."
            )
        table = self.table
        if table.dim() != 2 or table.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{caller}: the table of pages must be integer (B, entries); got {table.dtype} of shape "
                f"{tuple(table.shape)}."
            )
        if not 0 <= self.length <= table.shape[1] * k.shape[2]:
            raise ValueError(
                f"{caller}: the number of keys in pages must be between 0 and {table.shape[1] * k.shape[2]}, those of "
                f"{table.shape[1]} pages of {k.shape[2]}; got {self.length}."
            )
