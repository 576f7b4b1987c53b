"""`align_outputs`: aligns the heads of each layer before a conversion pools them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.layout import LayerParts, Layout, find_layers
from qkv.convert.families.transformers_schema import rotary_dim
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.alignment import Alignment, KeySymmetry, align_heads

OTHER_METHODS = "Choose another method: mean, first or random."
"""For heads that cannot be aligned."""


def align_outputs(
    where: str,
    family: Family,
    layout: Layout,
    hf_config: Any,
    tensors: Mapping[str, TensorSpec],
    outputs: Mapping[str, Output],
    pooling: Pooling,
) -> dict[str, Output]:
    """The same outputs, computed from aligned projections."""
    normed = any("norm" in part for _, part in filter(None, map(family.split_name, tensors)))
    symmetry = KeySymmetry(rotary_dim(where, hf_config), normed=normed)
    aligner = _Aligner(where, layout, symmetry, pooling)
    owners = {name: layer for layer in find_layers(layout, family.split_name, tensors) for name in layer.parts.values()}
    aligned = dict(outputs)
    for name, output in outputs.items():
        layer = next((owners[source] for source in output.sources if source in owners), None)
        if layer is not None:
            aligned[name] = aligner.wrap(output, layer)
    return aligned


class _Aligner:
    """Aligns a layer when one of its tensors is computed.

    The last alignment is cached, so that it is computed once for all tensors of a layer.
    """

    def __init__(self, where: str, layout: Layout, symmetry: KeySymmetry, pooling: Pooling) -> None:
        self._where = where
        self._layout = layout
        self._freedom = symmetry
        self._pooling = pooling
        self._last: tuple[str, Alignment] | None = None

    def wrap(self, output: Output, layer: LayerParts) -> Output:
        """The output, computed from the aligned projections of its layer."""
        norm = f"{layer.parent}{self._layout.norm}.weight"
        names = tuple(dict.fromkeys((*output.sources, *layer.parts.values(), norm)))

        def compute(*values: Tensor) -> Tensor:
            tensors = dict(zip(names, values, strict=True))
            parts = {part: tensors[name] for part, name in layer.parts.items()}
            for part, value in self._align(layer.prefix, parts, tensors[norm] + self._layout.norm_offset).items():
                tensors[layer.parts[part]] = value
            sources = [tensors[source] for source in output.sources]
            return (sources[0] if output.compute is None else output.compute(*sources)).to(values[0].dtype)

        return output._replace(sources=names, compute=compute)

    def _align(self, layer: str, parts: Mapping[str, Tensor], gain: Tensor) -> dict[str, Tensor]:
        """The tensors of a layer's projections after alignment, by name within the attention."""
        heads = self._pooling.heads
        projections = self._layout.read(parts, heads)
        if self._last is None or self._last[0] != layer:
            groups = self._pooling.num_kv_heads
            try:
                alignment = align_heads(projections, heads.num_kv_heads, groups, self._freedom, gain=gain)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._where}: {layer.removesuffix('.')} cannot be aligned: {error} {OTHER_METHODS}"
                ) from error
            self._last = layer, alignment
        return self._layout.replace(parts, self._last[1].apply(projections), heads)
