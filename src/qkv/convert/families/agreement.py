"""`agreement_by_layer`: how alike the KV heads of each layer of a model are, and which of them would be pooled."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.layout import find_layers
from qkv.convert.families.registry import find_family
from qkv.convert.heads.alignment import KeySymmetry, align_heads, head_agreement
from qkv.convert.heads.pooling import ConversionMethod, divisors


class LayerAgreement(NamedTuple):
    """How alike the KV heads of a layer are, as `head_agreement` has it, and the groups of a conversion."""

    layer: int
    keys: Tensor
    """``(Hkv, Hkv)``"""
    values: Tensor
    """``(Hkv, Hkv)``"""
    groups: tuple[tuple[int, ...], ...]
    """KV heads that are pooled to one: neighbours, or those that `align_heads` chooses"""


def agreement_by_layer(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], num_kv_heads: int, *, how: ConversionMethod = "mean"
) -> list[LayerAgreement]:
    """`head_agreement` for each layer of a model of transformers, with the groups that its conversion would pool.

    Args:
        state_dict, config, num_kv_heads, how: as in `convert_state_dict`.

    Raises:
        CheckpointError: for a family whose heads cannot be aligned, a number that does not divide the model's KV heads,
            and weights that are not finite.
        ValueError: for another ``how``.

    Example:
        >>> from qkv.convert import agreement_by_layer
        >>> agreement_by_layer(model.state_dict(), model.config.to_dict(), 1)[0].keys  # doctest: +SKIP
    """
    if how not in get_args(ConversionMethod):
        raise ValueError(
            f"agreement_by_layer: how must be one of {', '.join(get_args(ConversionMethod))}; got {how!r}."
        )
    family = find_family("config", config)
    if family.layout is None:
        raise CheckpointError(f"config: heads of {config['model_type']} models cannot be aligned.")
    hf_config = transformers_schema.read_config("config", config, len(state_dict))
    heads = transformers_schema.heads("config", hf_config)
    count = heads.num_kv_heads
    if num_kv_heads < 1 or count % num_kv_heads:
        possible = ", ".join(map(str, divisors(count)))
        raise CheckpointError(
            f"config: num_kv_heads must divide the model's {count} KV heads ({possible}); got {num_kv_heads}."
        )
    normed = any("norm" in part for _, part in filter(None, map(family.split_name, state_dict)))
    symmetry = KeySymmetry(transformers_schema.rotary_dim("config", hf_config), normed=normed)
    found = []
    for layer in find_layers(family.layout, family.split_name, state_dict):
        projections = family.layout.read({part: state_dict[name] for part, name in layer.parts.items()}, heads)
        gain = state_dict[f"{layer.parent}{family.layout.norm}.weight"] + family.layout.norm_offset
        try:
            agreement = head_agreement(projections, count, symmetry, gain=gain)
            order = list(range(count))
            if how == "aligned":
                order = align_heads(projections, count, num_kv_heads, symmetry, gain=gain).order.tolist()
        except ValueError as error:
            raise CheckpointError(f"config: layer {layer.number}: {error}") from error
        size = count // num_kv_heads
        groups = tuple(tuple(order[start : start + size]) for start in range(0, count, size))
        found.append(LayerAgreement(layer.number, *agreement, groups))
    return sorted(found, key=lambda one: one.layer)
