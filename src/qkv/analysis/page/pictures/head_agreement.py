"""Picture 10: how alike the KV heads of each layer are, once one is turned towards the other."""

import torch
from torch import Tensor

from qkv.analysis.page.markup import Markup, element, figure, joined, table
from qkv.analysis.seen import Agreement
from qkv.analysis.words import counted
from qkv.convert import LayerAgreement

STEPS = 10
"""Shades of a matrix."""
SIDE = 60
"""Of a matrix."""
_BEHIND = element("rect", class_="hidden", width=16, height=16)


def head_agreement(agreement: Agreement) -> Markup:
    """Two matrices a layer, rows and columns in the order of groups, and the table of what groups agree by."""
    pictures = [_layer(layer) for layer in agreement.layers]
    rows = [
        [str(layer.layer), kind, _written(layer), *_numbers(numbers, layer.groups)]
        for layer in agreement.layers
        for kind, numbers in (("keys", layer.keys), ("values", layer.values))
    ]
    means = {
        kind: _mean([_within(getattr(layer, kind), layer.groups) for layer in agreement.layers])
        for kind in ("keys", "values")
    }
    shades = [("M0 0h16v16h-16z", step, at) for step, at in ((0, "0"), (STEPS // 2, "0.5"), (STEPS, "1"))]
    ramp = [
        element("li", element("svg", _BEHIND, _cell(path, step), viewBox="0 0 16 16", aria_hidden="true"), at)
        for path, step, at in shades
    ]
    says = (
        f"Heads that become one with {agreement.change} agree by {means['keys']:.2f} in keys and "
        f"{means['values']:.2f} in values, in the mean over layers."
    )
    heading = ["layer", "of", "groups", "in a group, mean", "in a group, least", "of different groups, mean"]
    return figure(
        joined(element("div", *pictures, class_="matrices"), element("ul", *ramp, class_="legend")),
        "Shows how alike two KV heads are once one is turned towards the other (keys above, values below), "
        f"1 for the same. {says} Heads are in the order of their groups, which are outlined. Two heads that agree by a "
        f"lose (1 - a) / 2 of their squares in the mean. Shades are in steps of {1 / STEPS:g}.",
        "Does not show what that costs, which the loss does, nor what training would win back.",
        table(f"Agreement of KV heads, for {agreement.change}", heading, rows),
    )


def _layer(layer: LayerAgreement) -> Markup:
    order = torch.tensor([head for group in layer.groups for head in group])
    label = f"Layer {layer.layer}: agreement of {counted(len(order), 'KV head')}, groups {_written(layer)}"
    parts = []
    for top, numbers in ((0, layer.keys), (SIDE + 6, layer.values)):
        parts += [element("g", *_matrix(numbers[order][:, order], layer.groups), transform=f"translate(1 {top + 1})")]
    drawn = element("svg", *parts, viewBox=f"0 0 {SIDE + 2} {2 * SIDE + 8}", role="img", aria_label=label)
    return element("div", drawn, element("span", str(layer.layer)))


def _matrix(numbers: Tensor, groups: tuple[tuple[int, ...], ...]) -> list[Markup]:
    """The cells of a matrix, those of a shade in one path, and the outlines of groups."""
    side = SIDE / len(numbers)
    steps = (numbers.nan_to_num().clamp(0, 1) * STEPS).round().int()
    parts = [element("rect", class_="hidden", width=SIDE, height=SIDE)]
    for step in range(1, STEPS + 1):
        cells = (steps == step).nonzero().tolist()
        path = "".join(f"M{x * side:.2f} {y * side:.2f}h{side:.2f}v{side:.2f}h-{side:.2f}z" for y, x in cells)
        parts += [_cell(path, step)] if path else []
    start = 0.0
    for group in groups:
        width = side * len(group)
        parts.append(element("rect", class_="group", x=start, y=start, width=width, height=width))
        start += width
    return parts


def _cell(path: str, step: int) -> Markup:
    return element("path", class_="shade", d=path, fill_opacity=step / STEPS)


def _within(numbers: Tensor, groups: tuple[tuple[int, ...], ...]) -> list[float]:
    """The numbers of pairs of one group."""
    return [numbers[a, b].item() for group in groups for a in group for b in group if a < b]


def _numbers(numbers: Tensor, groups: tuple[tuple[int, ...], ...]) -> list[str]:
    within = _within(numbers, groups)
    pairs = [(a, b) for n, group in enumerate(groups) for other in groups[:n] for a in group for b in other]
    others = [numbers[a, b].item() for a, b in pairs]
    return [f"{_mean([within]):.3f}", f"{min(within, default=1):.3f}", f"{_mean([others]):.3f}" if others else ""]


def _mean(numbers: list[list[float]]) -> float:
    every = [number for some in numbers for number in some]
    return sum(every) / len(every) if every else 1.0


def _written(layer: LayerAgreement) -> str:
    return " | ".join(", ".join(map(str, group)) for group in layer.groups)
