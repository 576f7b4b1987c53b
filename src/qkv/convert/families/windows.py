"""`with_windows`: sliding windows in some layers of a model, as its configuration expresses them."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.family import Family
from qkv.convert.families.registry import FAMILIES
from qkv.convert.files.json_document import short_repr
from qkv.layers.rotary_config import rope_parameters

BY_LAYER = [name for name, family in FAMILIES.items() if family.set_windows is not None]
"""Model types whose layers can differ in their windows."""
WHOLE = [name for name, family in FAMILIES.items() if family.set_window is not None and family.set_windows is None]
"""Model types with one window for all layers."""


def require_windows(where: str, family: Family, model_type: str) -> None:
    """Raises a CheckpointError for a family whose configurations have no windows that could be set."""
    if family.set_window is None and family.set_windows is None:
        raise CheckpointError(
            f"{where}: the configuration of a {model_type} model cannot express a window; those of "
            f"{', '.join(BY_LAYER)} can, by layer, and those of {', '.join(WHOLE)} one for all layers."
        )


def with_windows(
    where: str,
    family: Family,
    config: dict[str, Any],
    window: int,
    layers: Sequence[int] | None,
    num_tensors: int,
) -> dict[str, Any]:
    """The configuration with a window of ``window`` keys in ``layers`` (None: in all), and the others as they are.

    Raises:
        CheckpointError: for a window below 2 or wider than a layer has already, layers that do not exist or are named
            twice, and a configuration that cannot express the result.
    """
    hf_config = transformers_schema.read_config(where, config, num_tensors)
    old = transformers_schema.windows(hf_config)
    if type(window) is not int or window < 2:
        raise CheckpointError(
            f"{where}: window must be an integer, at least 2 (the caches of transformers fail at 1, the query's own "
            f"key); got {short_repr(window)}."
        )
    chosen = range(len(old)) if layers is None else _check_layers(where, layers, len(old))
    present = {own for own in old if own is not None and own < window}
    narrower = [layer for layer in chosen if old[layer] in present]
    if narrower:
        raise CheckpointError(
            f"{where}: a window can only be narrowed; {name_layers(narrower)} already {_has(narrower)} one of "
            f"{', '.join(map(str, present))}, got {window}. Give a smaller window, or other layers."
        )
    new = [window if layer in set(chosen) else own for layer, own in enumerate(old)]
    try:
        result = _express(family, config, hf_config, new)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    converted = transformers_schema.read_config(f"the result of converting {where}", result, num_tensors)
    if transformers_schema.windows(converted) != new:
        raise AssertionError(f"{where}: transformers reads windows {transformers_schema.windows(converted)}")
    turned = [layer for layer in range(len(old)) if _rotation(hf_config, layer) != _rotation(converted, layer)]
    if turned:
        windowed = [layer for layer, own in enumerate(old) if own]
        others = f" Give some of {name_layers(windowed)}." if windowed else ""
        raise CheckpointError(
            f"{where}: layers with a window have a rotary embedding of their own in a {hf_config.model_type} model, so "
            f"layers must have had one; {name_layers(turned)} {_has(turned)} none." + others
        )
    return result


def name_layers(layers: Iterable[int]) -> str:
    """Layers in words.

    Example:
        >>> name_layers([3]), name_layers([7, 0, 1, 2, 5])
        ('layer 3', 'layers 0-2, 5, 7')
    """
    numbers = as_ranges(layers)
    return f"layer {numbers}" if numbers.isdigit() else f"layers {numbers}"


def as_ranges(layers: Iterable[int]) -> str:
    """Layer numbers with neighbours as ranges, as ``--layers`` takes them.

    Example:
        >>> as_ranges([7, 0, 1, 2, 5])
        '0-2, 5, 7'
    """
    runs = [
        [layer for _, layer in run] for _, run in groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _check_layers(where: str, layers: Sequence[int], count: int) -> Sequence[int]:
    """The layers, which must exist and differ."""
    if not layers or any(type(layer) is not int or not 0 <= layer < count for layer in layers):
        raise CheckpointError(
            f"{where}: layers must be one or more of 0 to {count - 1}, since the model has {count}; "
            f"got {short_repr(list(layers))}."
        )
    if len(set(layers)) < len(layers):
        twice = {layer for layer in layers if list(layers).count(layer) > 1}
        raise CheckpointError(f"{where}: layers must differ; got {name_layers(twice)} more than once.")
    return layers


def _express(family: Family, config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """The configuration with these windows."""
    used = {window for window in windows if window is not None}
    if len(set(windows)) == 1 and family.set_window is not None:
        return family.set_window(config, *used)
    if family.set_windows is None:
        raise CheckpointError(
            f"the configuration of a {hf_config.model_type} model has one window for all layers. Give all of them; "
            f"those of {', '.join(BY_LAYER)} have windows by layer."
        )
    if len(used) > 1:
        widest = max(used)
        rest = [layer for layer, window in enumerate(windows) if window == widest]
        raise CheckpointError(
            f"the layers of a configuration that have a window have the same; {name_layers(rest)} {_has(rest)} one of "
            f"{widest} already, got {min(used)} for others. Give a window of {widest}, or {name_layers(rest)} as well."
        )
    return family.set_windows(config, hf_config, windows)


def _has(layers: Sequence[int]) -> str:
    return "has" if len(layers) == 1 else "have"


def _rotation(config: Any, layer: int) -> Any:
    """The rotary settings of a layer."""
    by_type, kinds = rope_parameters(config), getattr(config, "layer_types", None)
    return by_type.get(kinds[layer] if kinds else None) or by_type.get(None)
