"""`prune_heads` and `prune_state_dict`: query heads are removed so that groups stay groups of equal size."""

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


class _Kept(NamedTuple):
    """The heads that stay."""

    query_heads: Tensor
    kv_heads: Tensor

    def of(self, heads: Heads) -> Heads:
        return heads._replace(num_heads=len(self.query_heads), num_kv_heads=len(self.kv_heads))

    def select(self, projections: Projections, heads: Heads) -> Projections:
        """Their rows and columns."""

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
    """A new layer that differs from ``layer`` in lacking some query heads, and the KV heads that only these read.

    It computes what ``layer`` does with the columns of ``out_proj`` for these heads at 0.

    Args:
        layer: left as it is; no parameter is shared.
        heads: query heads to remove: as many of each group, or all of a group, or both.

    Raises:
        TypeError: as `convert_layer`, and for a single head outside of a list.
        ValueError: for heads that there are not, all of them, and choices that leave groups of unequal sizes; the
            message says what would do.

    Example:
        >>> import qkv
        >>> from qkv.convert import prune_heads
        >>> pruned = prune_heads(qkv.GroupedQueryAttention(64, 8, 2), [0, 5])
        >>> pruned.num_heads, pruned.num_kv_heads
        (6, 2)

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", and the ``prune_heads`` that transformers 4
    had. Which heads to remove is for the caller to know.
    """
    projections, held = projections_of(check_layer("prune_heads", layer))
    kept = _keep("prune_heads", heads, held)
    state = state_of(layer)
    state |= LAYOUT.replace(state, kept.select(projections, held), kept.of(held))
    return rebuild(layer, state, kept.query_heads, len(kept.kv_heads))


def prune_state_dict(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], heads: Mapping[int, Iterable[int]]
) -> ConvertedModel:
    """Removes query heads from a transformers model, as `prune_heads` does in each layer.

    Args:
        state_dict, config: as in `convert_state_dict`.
        heads: for each layer, the query heads to remove. A configuration has one number of heads for all layers.

    Returns:
        State dict and configuration for ``AutoConfig.for_model(**config)``.

    Raises:
        CheckpointError: as `convert_state_dict`, for choices that `prune_heads` refuses or that leave layers with
            different numbers of heads, and where the configuration cannot express the result.

    Example:
        >>> from qkv.convert import prune_state_dict
        >>> pruned = prune_state_dict(model.state_dict(), model.config.to_dict(), {0: [1], 1: [3]})  # doctest: +SKIP
    """
    where, tensors = "config", specs_of(state_dict)
    family = find_family(where, config)
    known = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, known, tensors)
    if family.layout is None:
        raise CheckpointError(f"{where}: heads of {known.model_type} models cannot be pruned.")
    held = transformers_schema.heads(where, known)
    layers = find_layers(family.layout, family.part, tensors)
    unknown = sorted(set(heads) - {layer.number for layer in layers})
    if unknown:
        raise CheckpointError(f"{where}: the model has {len(layers)} layers; got heads to remove from {unknown}.")
    values, left = dict(state_dict), {}
    for layer in layers:
        try:
            kept = _keep(f"layer {layer.number}", heads.get(layer.number, ()), held)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        left[layer.number] = kept.of(held)
        parts = {part: state_dict[name] for part, name in layer.parts.items()}
        projections = kept.select(family.layout.read(parts, held), held)
        for part, value in family.layout.replace(parts, projections, kept.of(held)).items():
            values[layer.parts[part]] = value
    if len(set(left.values())) > 1:
        counts = ", ".join(f"layer {n} {after.num_heads} on {after.num_kv_heads}" for n, after in left.items())
        raise CheckpointError(
            f"{where}: as many query and KV heads must stay in every layer, since the configuration has one number of "
            f"each; there would be in {counts}."
        )
    after = left[0]
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
            f"{where}: the configuration of a {known.model_type} model cannot express {after.num_heads} query heads on "
            f"{after.num_kv_heads} KV heads of width {after.head_dim}: {error}"
        ) from error
    if transformers_schema.heads(result, pruned) != after:
        raise AssertionError(f"{result}: transformers reads {transformers_schema.heads(result, pruned)} from it")
    return ConvertedModel(values, new)


def _keep(caller: str, heads: Iterable[int], held: Heads) -> _Kept:
    """What stays when ``heads`` are removed."""
    if not isinstance(heads, Iterable):
        raise TypeError(f"{caller}: heads must be several, as [{heads!r}]; got {heads!r}.")
    removed = set(heads)
    every = range(held.num_heads)
    if not removed < set(every):
        raise ValueError(
            f"{caller}: heads must be some of the query heads 0 to {held.num_heads - 1}, and one must stay; "
            f"got {sorted(removed)}."
        )
    size = held.num_heads // held.num_kv_heads
    groups = [every[start : start + size] for start in every[::size]]
    staying = [[head for head in group if head not in removed] for group in groups]
    sizes = {len(group) for group in staying if group}
    if len(sizes) > 1:
        raise ValueError(
            f"{caller}: as many query heads must stay in each group that stays; got heads {sorted(removed)}, which "
            f"leave {[len(group) for group in staying]} in the groups of the {held.num_kv_heads} KV heads. "
            f"{_remedies(groups, staying)}"
        )
    kv_heads = [number for number, group in enumerate(staying) if group]
    return _Kept(torch.tensor([head for group in staying for head in group]), torch.tensor(kv_heads))


def _remedies(groups: list[range], staying: list[list[int]]) -> str:
    """The nearest choices that do: to remove some more, to keep some more, or to remove the small groups."""
    sizes = [len(kept) for kept in staying if kept]
    least, most = min(sizes), max(sizes)
    more = [f"{len(kept) - least} of {kept}" for kept in staying if len(kept) > least]
    small = [(group, kept) for group, kept in zip(groups, staying, strict=True) if 0 < len(kept) < most]
    back = [f"{most - len(kept)} of {sorted(set(group) - set(kept))}" for group, kept in small]
    return (
        f"Remove {' and '.join(more)} as well; or keep {' and '.join(back)}; or remove all of "
        f"{' and '.join(str(kept) for _, kept in small)}."
    )
