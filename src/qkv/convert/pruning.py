"""`prune_heads` and `prune_state_dict`: remove query heads, with all groups of equal size afterwards."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.layout import find_layers
from qkv.convert.families.registry import find_family
from qkv.convert.families.transformers_schema import Heads
from qkv.convert.heads.alignment import Projections
from qkv.convert.layer import LAYOUT, check_layer, projections_of, rebuild, state_of
from qkv.convert.state import ConvertedModel, specs_of
from qkv.layers import Attention


class _KeptHeads(NamedTuple):
    """Indices of the heads that remain."""

    query_heads: Tensor
    kv_heads: Tensor

    def counts(self, heads: Heads) -> Heads:
        """The head counts after pruning, from those before."""
        return heads._replace(num_heads=len(self.query_heads), num_kv_heads=len(self.kv_heads))

    def select(self, projections: Projections, heads: Heads) -> Projections:
        """The rows of q, k and v and the columns of ``out`` that belong to these heads."""

        def rows(weight: Tensor, count: int, kept: Tensor) -> Tensor:
            return weight.reshape(count, -1, weight.shape[1])[kept].flatten(0, 1)

        q, k, v, out = projections
        return Projections(
            rows(q, heads.num_heads, self.query_heads),
            rows(k, heads.num_kv_heads, self.kv_heads),
            rows(v, heads.num_kv_heads, self.kv_heads),
            rows(out.T, heads.num_heads, self.query_heads).T,
        )


def prune_heads(layer: Attention, heads: Iterable[int]) -> Attention:
    """A copy of ``layer`` without some query heads, and without the KV heads that no remaining query head reads.

    Equivalent to ``layer`` with the columns of ``out_proj`` for these heads set to 0.

    Args:
        layer: not modified; the copy shares no parameter with it.
        heads: query heads to remove: the same number from each group, whole groups, or both.

    Raises:
        TypeError: as `convert_layer`, and for an int instead of a list.
        ValueError: for heads out of range, all heads, and choices that leave groups of unequal size; the message names
            the nearest valid choices.

    Example:
        >>> import qkv
        >>> from qkv.convert import prune_heads
        >>> pruned = prune_heads(qkv.GroupedQueryAttention(64, 8, 2), [0, 5])
        >>> pruned.num_heads, pruned.num_kv_heads
        (6, 2)

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", and ``prune_heads`` of transformers 4.
    Choosing the heads is up to the caller.
    """
    projections, old = projections_of(check_layer("prune_heads", layer))
    kept = _remove_heads("prune_heads", heads, old)
    state = state_of(layer)
    state |= LAYOUT.replace(state, kept.select(projections, old), kept.counts(old))
    return rebuild(layer, state, kept.query_heads, len(kept.kv_heads))


def prune_state_dict(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], heads: Mapping[int, Iterable[int]]
) -> ConvertedModel:
    """Removes query heads from a transformers model, as `prune_heads` does in each layer.

    Args:
        state_dict, config: as in `convert_state_dict`.
        heads: the query heads to remove, by layer. All layers must keep the same number of heads, since the
            configuration has only one.

    Returns:
        State dict and configuration for ``AutoConfig.for_model(**config)``.

    Raises:
        CheckpointError: as `convert_state_dict`, where `prune_heads` raises a ValueError, where layers keep different
            numbers of heads, and where the configuration cannot express the result.

    Example:
        >>> from qkv.convert import prune_state_dict
        >>> pruned = prune_state_dict(model.state_dict(), model.config.to_dict(), {0: [1], 1: [3]})  # doctest: +SKIP
    """
    where, tensors = "config", specs_of(state_dict)
    family = find_family(where, config)
    hf_config = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, hf_config, tensors)
    if family.layout is None:
        raise CheckpointError(f"{where}: heads of {hf_config.model_type} models cannot be pruned.")
    old = transformers_schema.heads(where, hf_config)
    layers = find_layers(family.layout, family.split_name, tensors)
    unknown = sorted(set(heads) - {layer.number for layer in layers})
    if unknown:
        raise CheckpointError(f"{where}: the model has {len(layers)} layers; got heads to remove from {unknown}.")
    values, counts = dict(state_dict), {}
    for layer in layers:
        try:
            kept = _remove_heads(f"layer {layer.number}", heads.get(layer.number, ()), old)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        counts[layer.number] = kept.counts(old)
        parts = {part: state_dict[name] for part, name in layer.parts.items()}
        projections = kept.select(family.layout.read(parts, old), old)
        for part, value in family.layout.replace(parts, projections, kept.counts(old)).items():
            values[layer.parts[part]] = value
    if len(set(counts.values())) > 1:
        got = ", ".join(f"layer {n}: {after.num_heads} on {after.num_kv_heads}" for n, after in counts.items())
        raise CheckpointError(
            f"{where}: all layers must keep the same number of query and KV heads, since the configuration has one of "
            f"each; got {got}."
        )
    after = counts[0]
    new = {
        **config,
        "num_attention_heads": after.num_heads,
        "num_key_value_heads": after.num_kv_heads,
        "head_dim": after.head_dim,
    }
    result = f"the result of pruning {where}"
    try:
        pruned = transformers_schema.read_config(result, new, len(tensors))
        transformers_schema.check_tensors(result, pruned, specs_of(values))
    except CheckpointError as error:
        raise CheckpointError(
            f"{where}: the configuration of a {hf_config.model_type} model cannot express {after.num_heads} query "
            f"heads on {after.num_kv_heads} KV heads of width {after.head_dim}: {error}"
        ) from error
    if transformers_schema.heads(result, pruned) != after:
        raise AssertionError(f"{result}: transformers reads {transformers_schema.heads(result, pruned)} from it")
    return ConvertedModel(values, new)


def _remove_heads(caller: str, heads: Iterable[int], old: Heads) -> _KeptHeads:
    """The heads that remain when ``heads`` are removed; raises where groups would differ in size."""
    if not isinstance(heads, Iterable):
        raise TypeError(f"{caller}: heads must be a list such as [{heads!r}]; got {heads!r}.")
    removed = set(heads)
    every = range(old.num_heads)
    if not removed < set(every):
        raise ValueError(
            f"{caller}: heads must be query heads from 0 to {old.num_heads - 1}, but not all of them; "
            f"got {sorted(removed)}."
        )
    size = old.num_heads // old.num_kv_heads
    groups = [every[start : start + size] for start in every[::size]]
    remaining = [[head for head in group if head not in removed] for group in groups]
    sizes = {len(group) for group in remaining if group}
    if len(sizes) > 1:
        raise ValueError(
            f"{caller}: groups that are kept must keep the same number of query heads; got heads {sorted(removed)}, "
            f"which leave {[len(group) for group in remaining]} in the groups of the {old.num_kv_heads} KV heads. "
            f"{_remedies(groups, remaining)}"
        )
    kv_heads = [number for number, group in enumerate(remaining) if group]
    return _KeptHeads(torch.tensor([head for group in remaining for head in group]), torch.tensor(kv_heads))


def _remedies(groups: list[range], remaining: list[list[int]]) -> str:
    """The nearest valid choices: remove more heads, remove fewer, or remove the small groups."""
    sizes = [len(kept) for kept in remaining if kept]
    least, most = min(sizes), max(sizes)
    more = [f"{len(kept) - least} of {kept}" for kept in remaining if len(kept) > least]
    small = [(group, kept) for group, kept in zip(groups, remaining, strict=True) if 0 < len(kept) < most]
    back = [f"{most - len(kept)} of {sorted(set(group) - set(kept))}" for group, kept in small]
    return (
        f"Remove {' and '.join(more)} as well; or keep {' and '.join(back)}; or remove all of "
        f"{' and '.join(str(kept) for _, kept in small)}."
    )
