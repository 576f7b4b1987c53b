"""Numbers with their units, and what layers attend to, in words."""

import math
from collections.abc import Sequence

from torch import Tensor

from qkv.analysis.labels import labels_of, listed
from qkv.convert import LayerAgreement
from qkv.layer_record import LayerRecord


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nats(number: float) -> str:
    """An increase of the loss, with its sign."""
    return f"{number:+.4f}" if math.isfinite(number) else "no number"


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.1f}%" if math.isfinite(share) else "no number"


def keys_seen(layer: LayerRecord) -> str:
    """What a query of a layer sees."""
    if layer.is_cross:
        return "a context"
    if layer.window is not None:
        return counted(layer.window, "key") + (
            " to each side, its own counted, at most" if layer.sees_later_keys else " at most"
        )
    if layer.mask.allow is not None:
        return "what a dense mask shows"
    return "all keys before it and its own" if layer.mask.is_causal else "all keys"


def what_layers_see(layers: Sequence[LayerRecord], cuts: Tensor) -> list[list[str]]:
    """What each layer sees, its numbers in the mean over queries and heads, and what windows cut: rows of a table.

    Args:
        cuts: of `Recording.cut_by_layer`.
    """
    found = []
    for layer, row in zip(layers, cuts.tolist(), strict=True):
        spent = layer.mean(layer.sinks.first + layer.sinks.learned)
        rest = "all keys" if layer.mask.allow is None else "a dense mask"
        side = " a side" if layer.sees_later_keys else ""
        seen = rest if layer.window is None else f"{layer.window:,} keys{side}"
        found.append(
            [
                "a context" if layer.is_cross else seen,
                _tenths(layer.mean(layer.keys_in_effect).nanmean().item()),
                _tenths(layer.mean(layer.distance.mean).nanmean().item()),
                percent(spent.nanmean().item()),
                *("" if layer.is_cross else percent(cut) for cut in row),
            ]
        )
    return found


def _tenths(number: float) -> str:
    return f"{round(number, 1) + 0.0:.1f}" if math.isfinite(number) else "no number"  # + 0.0, as there is a -0.0


def narrow_layers(layers: Sequence[LayerRecord], window: int) -> str | None:
    """Which layers a window does not change, since they see as few keys already; None if it changes all.

    Example:
        >>> narrow_layers(record(mistral, text).layers, 8192)  # doctest: +SKIP
        'layers 0-31 see 4,096 keys at most'
    """
    found: dict[tuple[int, bool], list[str]] = {}
    for label, layer in zip(labels_of(layers), layers, strict=True):
        if not layer.is_cross and layer.window is not None and layer.window <= window:
            found.setdefault((layer.window, layer.sees_later_keys), []).append(label)
    says = [
        f"{'layer' if len(some) == 1 else 'layers'} {listed(some)} {'sees' if len(some) == 1 else 'see'} "
        f"{own:,} {'key' if own == 1 else 'keys'}{' a side' if is_for_sides else ''} at most"
        for (own, is_for_sides), some in found.items()
    ]
    return "; ".join(says) or None


def without_number(layers: Sequence[LayerRecord]) -> str | None:
    """What the means of layers leave out, in words; None if nothing."""
    found = [
        f"{count:,} in layer {label}"
        for label, layer in zip(labels_of(layers), layers, strict=True)
        if (count := int(layer.no_number[0].sum())) > 0
    ]
    if not found:
        return None
    return f"Queries of heads that have no number, for NaN or inf, and are left out of the means: {', '.join(found)}."


def how_heads_agree(change: str, layers: Sequence[LayerAgreement]) -> str:
    """How alike the KV heads are that a change would make one, in the mean over layers."""
    keys = _mean([number for layer in layers for number in _in_groups(layer.keys, layer.groups)])
    values = _mean([number for layer in layers for number in _in_groups(layer.values, layer.groups)])
    return (
        f"Heads that become one with {change} agree by {keys:.2f} in keys and {values:.2f} in values, in the mean over "
        "layers."
    )


def agreement_by_group(layers: Sequence[LayerAgreement]) -> list[list[str]]:
    """Rows of a table: layer, keys or values, groups; agreement in a group (mean, least) and of others (mean)."""
    return [
        [str(layer.layer), kind, groups_of(layer), *_within_and_without(numbers, layer.groups)]
        for layer in layers
        for kind, numbers in (("keys", layer.keys), ("values", layer.values))
    ]


def groups_of(layer: LayerAgreement) -> str:
    """The KV heads of a layer, those together that would become one.

    Example:
        >>> groups_of(agreement_by_layer(state_dict, config, 2)[0])  # doctest: +SKIP
        '0, 2 | 1, 3'
    """
    return " | ".join(", ".join(map(str, group)) for group in layer.groups)


def _within_and_without(numbers: Tensor, groups: Sequence[Sequence[int]]) -> list[str]:
    within = _in_groups(numbers, groups)
    pairs = [(a, b) for n, group in enumerate(groups) for other in groups[:n] for a in group for b in other]
    others = [numbers[a, b].item() for a, b in pairs]
    return [f"{_mean(within):.3f}", f"{min(within, default=1):.3f}", f"{_mean(others):.3f}" if others else ""]


def _in_groups(numbers: Tensor, groups: Sequence[Sequence[int]]) -> list[float]:
    """The numbers of pairs of one group."""
    return [numbers[a, b].item() for group in groups for a in group for b in group if a < b]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 1.0
