"""`align_outputs`: a conversion whose heads are aligned before they are pooled, a layer at a time."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.layout import LayerParts, Layout, find_layers
from qkv.convert.families.transformers_schema import rotary_dim
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.alignment import Alignment, KeySymmetry, align_heads


def align_outputs(
    where: str,
    family: Family,
    layout: Layout,
    known: Any,
    tensors: Mapping[str, TensorSpec],
    outputs: Mapping[str, Output],
    pooling: Pooling,
) -> dict[str, Output]:
    """The same outputs, made from projections that are aligned before."""
    normed = any("norm" in rest for _, rest in filter(None, map(family.part, tensors)))
    freedom = KeySymmetry(rotary_dim(where, known), normed=normed)
    aligner = _Aligner(where, layout, freedom, pooling)
    owners = {name: layer for layer in find_layers(layout, family.part, tensors) for name in layer.parts.values()}
    aligned = dict(outputs)
    for name, output in outputs.items():
        layer = next((owners[source] for source in output.sources if source in owners), None)
        if layer is not None:
            aligned[name] = aligner.wrap(output, layer)
    return aligned


class _Aligner:
    """Aligns layers as their tensors are asked for.

    Each tensor is made from all of its layer. How these are turned is kept until another layer is asked for, so that it
    is found once for all of a layer's tensors.
    """

    def __init__(self, where: str, layout: Layout, freedom: KeySymmetry, pooling: Pooling) -> None:
        self._where = where
        self._layout = layout
        self._freedom = freedom
        self._pooling = pooling
        self._last: tuple[str, Alignment] | None = None

    def wrap(self, output: Output, layer: LayerParts) -> Output:
        """The output, made from the aligned projections of its layer."""
        norm = f"{layer.before}{self._layout.norm}.weight"
        names = tuple(dict.fromkeys((*output.sources, *layer.parts.values(), norm)))

        def compute(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            parts = {part: given[name] for part, name in layer.parts.items()}
            for part, value in self._align(layer.prefix, parts, given[norm] + self._layout.norm_offset).items():
                given[layer.parts[part]] = value
            made = [given[source] for source in output.sources]
            return (made[0] if output.compute is None else output.compute(*made)).to(values[0].dtype)

        return output._replace(sources=names, compute=compute)

    def _align(self, layer: str, parts: Mapping[str, Tensor], gain: Tensor) -> dict[str, Tensor]:
        heads = self._pooling.heads
        projections = self._layout.read(parts, heads)
        if self._last is None or self._last[0] != layer:
            groups = self._pooling.num_kv_heads
            try:
                found = align_heads(projections, heads.num_kv_heads, groups, self._freedom, gain=gain)
            except ValueError as error:
                raise CheckpointError(f"{self._where}: {layer.removesuffix('.')} cannot be aligned: {error}") from error
            self._last = layer, found
        return self._layout.replace(parts, self._last[1].apply(projections), heads)
