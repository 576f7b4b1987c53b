"""Picture 10: how alike the KV heads of each layer are, once one is turned towards the other."""

import torch
from torch import Tensor

from qkv.analysis.page.markup import Markup, element, figure, joined, table
from qkv.analysis.seen import Agreement
from qkv.analysis.words import agreement_by_group, counted, groups_of, how_heads_agree
from qkv.convert import LayerAgreement

STEPS = 10
"""Shades of a matrix."""
SIDE = 60
"""Of a matrix."""
_BEHIND = element("rect", class_="hidden", width=16, height=16)


def head_agreement(agreement: Agreement) -> Markup:
    """Two matrices a layer, rows and columns in the order of groups, and the table of what groups agree by."""
    pictures = [_layer(layer) for layer in agreement.layers]
    shades = [("M0 0h16v16h-16z", step, at) for step, at in ((0, "0"), (STEPS // 2, "0.5"), (STEPS, "1"))]
    ramp = [
        element("li", element("svg", _BEHIND, _cell(path, step), viewBox="0 0 16 16", aria_hidden="true"), at)
        for path, step, at in shades
    ]
    says = how_heads_agree(agreement.change, agreement.layers)
    heading = ["layer", "of", "groups", "in a group, mean", "in a group, least", "of different groups, mean"]
    return figure(
        joined(element("div", *pictures, class_="matrices"), element("ul", *ramp, class_="legend")),
        "Shows how alike two KV heads are once one is turned towards the other (keys above, values below), "
        f"1 for the same. {says} Heads are in the order of their groups, which are outlined. Two heads that agree by a "
        f"lose (1 - a) / 2 of their squares in the mean. Shades are in steps of {1 / STEPS:g}.",
        "Does not show what that costs, which the loss does, nor what training would win back.",
        table(f"Agreement of KV heads, for {agreement.change}", heading, agreement_by_group(agreement.layers)),
    )


def _layer(layer: LayerAgreement) -> Markup:
    order = torch.tensor([head for group in layer.groups for head in group])
    label = f"Layer {layer.layer}: agreement of {counted(len(order), 'KV head')}, groups {groups_of(layer)}"
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
