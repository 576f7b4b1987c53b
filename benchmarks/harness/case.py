"""`Case`: one call to measure, with its minimal arithmetic and memory traffic."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkv import Mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call. The last query is at the position of the last key."""

    name: str
    lq: int
    lk: int
    mask: Literal["full", "causal", "padding", "packed"] = "full"
    window: int | None = None
    """Window of a causal mask, the query's own key included."""
    text: int = 1
    """Tokens of each sequence of a packed mask."""
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    backward: bool = False
    heads_inside: bool = False
    """Memory order: (B, L, H, D) as in layers, instead of (B, H, L, D)."""

    @property
    def offset(self) -> int:
        return self.lk - self.lq

    @property
    def is_decoding(self) -> bool:
        """Whether there is a single query per sequence."""
        return self.lq == 1

    @property
    def lengths(self) -> list[int]:
        """Unpadded keys of each batch row; with padding, fewer in each row after the first."""
        padded = self.lk if self.mask == "padding" else 0
        return [self.lk - padded * row // (2 * self.batch) for row in range(self.batch)]

    def as_mask(self) -> Mask:
        """The `Mask` of the case."""
        if self.mask == "padding":
            return Mask.padding(torch.tensor(self.lengths))
        if self.mask == "packed":
            return Mask.documents(torch.arange(self.lk)[None] // self.text)
        return Mask.causal(self.window) if self.mask == "causal" else Mask.full()

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.heads, self.lq), (self.kv_heads, self.lk), (self.kv_heads, self.lk)]
        q, k, v = (torch.randn(self.batch, *shape, self.head_dim, generator=generator).to(dtype) for shape in shapes)
        if self.heads_inside:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return q.requires_grad_(self.backward), k.requires_grad_(self.backward), v.requires_grad_(self.backward)

    def scores(self) -> int:
        """Visible scores of one head, over the whole batch."""
        if self.mask == "packed":
            return self.batch * self.lk * self.text
        if self.mask != "causal":
            return self.lq * sum(self.lengths)
        window = self.lk if self.window is None else self.window
        return self.batch * sum(min(window, position + 1) for position in range(self.offset, self.lk))

    def operations(self) -> int:
        """Multiplications and additions: two matrix products forward, seven with backward."""
        products = 7 if self.backward else 2
        return products * 2 * self.head_dim * self.heads * self.scores()

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values that are visible to any query."""
        seen = sum(self.lengths)
        if self.window is not None:
            seen = self.batch * min(self.lk, self.lq - 1 + self.window)
        return 2 * self.kv_heads * self.head_dim * seen * dtype.itemsize
