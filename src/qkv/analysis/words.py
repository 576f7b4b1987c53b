"""Numbers with their units, and what layers attend to, in words."""

import math
from collections.abc import Sequence

from torch import Tensor

from qkv.convert.families.windows import as_ranges
from qkv.layer_record import LayerRecord


def listed(labels: Sequence[str]) -> str:
    """Layers by their labels: numbers that follow each other together.

    Example:
        >>> listed(["0", "1", "2", "5"]), listed(["encoder.0", "decoder.0"])
        ('0-2, 5', 'encoder.0, decoder.0')
    """
    if all(label.isdecimal() for label in labels):
        return as_ranges(map(int, labels))
    return ", ".join(labels)


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(count: float) -> str:
    """A number of bytes, to three digits.

    Example:
        >>> size(512), size(20_000), size(188_743_680)
        ('512 B', '20 kB', '189 MB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(count) >= 10**power:
            number = count / 10**power
            digits = f"{number:.{2 - math.floor(math.log10(abs(number)))}f}" if abs(number) < 100 else f"{number:.0f}"
            return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"
    return f"{count:.0f} B"


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
        return counted(layer.window, "key") + " at most"
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
        seen = rest if layer.window is None else f"{layer.window:,} keys"
        found.append(
            [
                "a context" if layer.is_cross else seen,
                f"{layer.mean(layer.keys_in_effect).nanmean():.1f}",
                f"{layer.mean(layer.distance.mean).nanmean():.1f}",
                f"{100 * spent.nanmean():.1f}%",
                *("" if cut != cut else f"{100 * cut:.1f}%" for cut in row),
            ]
        )
    return found
