"""Short names of the layers of a model, and their numbers."""

import re
from collections.abc import Iterable, Sequence

from qkv.convert.families.windows import as_ranges
from qkv.layer_record import LayerRecord


def labels(names: Sequence[str]) -> list[str]:
    """Short names of layers: their numbers, where they differ in these alone.

    Example:
        >>> labels(["model.layers.0.self_attn", "model.layers.1.self_attn"])
        ['0', '1']
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(.*)", name) for name in names]
    around = {(part[1], part[3]) for part in parts if part}
    numbers = [part[2] for part in parts if part]
    if len(around) == 1 and len(set(numbers)) == len(names):
        return numbers
    return [name.removeprefix("model.") for name in names]


def labels_of(layers: Sequence[LayerRecord]) -> list[str]:
    """Short names of all layers: their numbers, with the group where there are several.

    Example:
        >>> labels_of(record(t5, text, decoder_input_ids=target).layers)  # doctest: +SKIP
        ['encoder 0', 'encoder 1', 'decoder 0', 'cross 0', 'decoder 1', 'cross 1']
    """
    groups = [layer.group for layer in layers]
    found = [""] * len(groups)
    for group in dict.fromkeys(groups):
        members = [index for index, other in enumerate(groups) if other == group]
        names = [layers[index].name for index in members]
        if len(set(names)) < len(names):  # a module that is called several times, as in ALBERT
            names = [f"{name}, call {call}" for call, name in enumerate(names)]
        for index, label in zip(members, labels(names), strict=True):
            found[index] = label if len(set(groups)) == 1 else f"{group} {label}"
    return found


def numbers_of(names: Sequence[str]) -> list[int]:
    """The numbers of layers in the model, as their names have them; else, their places among these."""
    return [int(label) if label.isdecimal() else index for index, label in enumerate(labels(names))]


def numbers_in(layers: Sequence[LayerRecord]) -> list[int]:
    """The number of each layer within its group, as `labels_of` has it; else, its place among all."""
    ends = [label.rpartition(" ")[2] for label in labels_of(layers)]
    return [int(end) if end.isdecimal() else index for index, end in enumerate(ends)]


def listed(labels: Iterable[str]) -> str:
    """Layers by their labels: numbers that follow each other together.

    Example:
        >>> listed(["0", "1", "2", "5"]), listed(["encoder 0", "decoder 0", "decoder 1"]), listed(["a.0", "a.b"])
        ('0-2, 5', 'encoder 0, decoder 0-1', 'a.0, a.b')
    """
    numbers: dict[str, list[int]] = {}
    others: list[str] = []
    for label in labels:
        group, _, number = label.rpartition(" ")
        if number.isdecimal():
            numbers.setdefault(group, []).append(int(number))
        else:
            others.append(label)
    return ", ".join([*(f"{group} {as_ranges(some)}".strip() for group, some in numbers.items()), *others])
