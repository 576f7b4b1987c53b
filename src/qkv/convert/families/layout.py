"""`Layout`: which tensors of a layer are its projections, and how they are packed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.families.transformers_schema import Heads
from qkv.convert.heads.alignment import Projections, join


class Layout(NamedTuple):
    """Of the attention in the layers of one ``model_type``. Names count from that of the attention."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three projections, or the one that they are packed into."""
    out: str = "o_proj"
    by_head: bool = False
    """Whether packed rows are those of head after head: its query, key and value."""
    transposed: bool = False
    """Whether weights are ``(in, out)``."""
    norm: str = "input_layernorm"
    """Beside the attention: the norm that its input comes through."""
    norm_offset: float = 0.0
    """The gain of the norm is its weight and this."""

    @property
    def parts(self) -> list[str]:
        """The tensors that hold projections, as far as a model has them."""
        return [f"{self.out}.weight", *(f"{name}.{kind}" for name in self.qkv for kind in ("weight", "bias"))]

    def read(self, parts: Mapping[str, Tensor], heads: Heads) -> Projections:
        """The projections in the tensors of a layer."""
        rows = [join(self._facing(parts[f"{name}.weight"]), parts.get(f"{name}.bias")) for name in self.qkv]
        q, k, v = self._unpack(rows[0], heads) if len(rows) == 1 else rows
        return Projections(q, k, v, self._facing(parts[f"{self.out}.weight"]))

    def replace(self, parts: Mapping[str, Tensor], projections: Projections, heads: Heads) -> dict[str, Tensor]:
        """The same tensors with other projections in them."""
        q, k, v, out = projections
        replaced = {f"{self.out}.weight": self._facing(out)}
        held = [q, k, v] if len(self.qkv) > 1 else [self._pack([q, k, v], heads)]
        for name, rows in zip(self.qkv, held, strict=True):
            if f"{name}.bias" in parts:
                replaced[f"{name}.bias"] = rows[:, -1]
                rows = rows[:, :-1]
            replaced[f"{name}.weight"] = self._facing(rows)
        # Apart in memory, which files of safetensors ask for.
        return {part: value.contiguous() for part, value in replaced.items()}

    def _facing(self, weight: Tensor) -> Tensor:
        """As ``(out, in)``, or back."""
        return weight.T if self.transposed else weight

    def _unpack(self, packed: Tensor, heads: Heads) -> Sequence[Tensor]:
        if self.by_head:
            return unpack_by_head(packed, heads)
        keys = heads.num_kv_heads * heads.head_dim
        return torch.split(packed, [heads.num_heads * heads.head_dim, keys, keys])

    def _pack(self, rows: list[Tensor], heads: Heads) -> Tensor:
        if self.by_head:
            return torch.stack([part.unflatten(0, (heads.num_heads, -1)) for part in rows], dim=1).flatten(0, 2)
        return torch.cat(rows)


def unpack_by_head(packed: Tensor, heads: Heads) -> list[Tensor]:
    """Queries, keys and values, from rows that are head after head."""
    return [part.flatten(0, 1) for part in packed.unflatten(0, (heads.num_heads, 3, heads.head_dim)).unbind(1)]


class LayerParts(NamedTuple):
    """The tensors of a layer that hold its projections."""

    number: int
    prefix: str
    """Of the names of all tensors of its attention."""
    parts: dict[str, str]
    """Their names, by what follows the prefix."""

    @property
    def before(self) -> str:
        """The prefix of what stands beside the attention."""
        return self.prefix.removesuffix(".").rpartition(".")[0] + "."


def find_layers(
    layout: Layout, split: Callable[[str], tuple[int, str] | None], names: Iterable[str]
) -> list[LayerParts]:
    """All layers; ``split`` tells of the tensors of attentions the number of the layer and the rest of the name."""
    layers: dict[int, LayerParts] = {}
    for name in names:
        number, part = split(name) or (0, "")
        if part in layout.parts:
            layers.setdefault(number, LayerParts(number, name.removesuffix(part), {})).parts[part] = name
    return list(layers.values())
