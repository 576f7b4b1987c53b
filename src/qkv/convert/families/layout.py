"""`Layout`: the names, packing and orientation of a layer's projections."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.families.transformers_schema import Heads
from qkv.convert.heads.alignment import Projections, join


class Layout(NamedTuple):
    """How the attention layers of one ``model_type`` store their projections. Names are relative to the attention."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """The three projections, or the packed one."""
    out: str = "o_proj"
    by_head: bool = False
    """Whether packed rows are ordered by head: query, key and value of the first, then of the second, ..."""
    transposed: bool = False
    """Whether weights are ``(in, out)``."""
    norm: str = "input_layernorm"
    """The norm before the attention, a sibling of it."""
    norm_offset: float = 0.0
    """Added to the norm's weight to get its gain."""

    @property
    def parts(self) -> list[str]:
        """Names of all weights and biases of projections that a model may have."""
        return [f"{self.out}.weight", *(f"{name}.{kind}" for name in self.qkv for kind in ("weight", "bias"))]

    def read(self, parts: Mapping[str, Tensor], heads: Heads) -> Projections:
        """Unpacks the projections of a layer. ``parts``: its tensors, by name within the attention."""
        rows = [join(self._oriented(parts[f"{name}.weight"]), parts.get(f"{name}.bias")) for name in self.qkv]
        q, k, v = self._unpack(rows[0], heads) if len(rows) == 1 else rows
        return Projections(q, k, v, self._oriented(parts[f"{self.out}.weight"]))

    def replace(self, parts: Mapping[str, Tensor], projections: Projections, heads: Heads) -> dict[str, Tensor]:
        """Packs new projections into tensors of the same names; the inverse of `read`."""
        q, k, v, out = projections
        replaced = {f"{self.out}.weight": self._oriented(out)}
        packed = [q, k, v] if len(self.qkv) > 1 else [self._pack([q, k, v], heads)]
        for name, rows in zip(self.qkv, packed, strict=True):
            if f"{name}.bias" in parts:
                replaced[f"{name}.bias"] = rows[:, -1]
                rows = rows[:, :-1]
            replaced[f"{name}.weight"] = self._oriented(rows)
        # safetensors refuses tensors that share memory.
        return {part: value.contiguous() for part, value in replaced.items()}

    def _oriented(self, weight: Tensor) -> Tensor:
        """Converts between the stored orientation and ``(out, in)``."""
        return weight.T if self.transposed else weight

    def _unpack(self, packed: Tensor, heads: Heads) -> Sequence[Tensor]:
        """Splits packed rows into queries, keys and values."""
        if self.by_head:
            return unpack_by_head(packed, heads)
        keys = heads.num_kv_heads * heads.head_dim
        return torch.split(packed, [heads.num_heads * heads.head_dim, keys, keys])

    def _pack(self, rows: list[Tensor], heads: Heads) -> Tensor:
        """The inverse of `_unpack`."""
        if self.by_head:
            return torch.stack([part.unflatten(0, (heads.num_heads, -1)) for part in rows], dim=1).flatten(0, 2)
        return torch.cat(rows)


def unpack_by_head(packed: Tensor, heads: Heads) -> list[Tensor]:
    """Queries, keys and values, from packed rows that are ordered by head."""
    return [part.flatten(0, 1) for part in packed.unflatten(0, (heads.num_heads, 3, heads.head_dim)).unbind(1)]


class LayerParts(NamedTuple):
    """The projection tensors of one layer."""

    number: int
    prefix: str
    """Prefix of all tensor names of the attention, with the dot."""
    parts: dict[str, str]
    """Full names, by name within the attention."""

    @property
    def parent(self) -> str:
        """Prefix of the module that contains the attention and its norm, with the dot."""
        return self.prefix.removesuffix(".").rpartition(".")[0] + "."


def find_layers(
    layout: Layout, split_name: Callable[[str], tuple[int, str] | None], names: Iterable[str]
) -> list[LayerParts]:
    """Groups tensor names by layer. ``split_name`` is `Family.split_name`."""
    layers: dict[int, LayerParts] = {}
    for name in names:
        number, part = split_name(name) or (0, "")
        if part in layout.parts:
            layers.setdefault(number, LayerParts(number, name.removesuffix(part), {})).parts[part] = name
    return list(layers.values())
