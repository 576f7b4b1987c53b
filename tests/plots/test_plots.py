"""Figures: what is drawn are the numbers of the analysis, read back from the artists and found here another way."""

import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
import torch
from analysis.planted import HOSTILE, NAMES, planted
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from qkv import Mask, look, plots
from qkv.analysis import Recording
from qkv.convert import HeadAgreement
from qkv.plots import canvas

SEEN = planted()
RECORDING, PRICE = SEEN.recording, SEEN.prices[0]
GENERATOR = torch.Generator().manual_seed(0)
Q, K = torch.randn(2, 2, 3, 50, 8, generator=GENERATOR)
BLOCKS = look.block_map(Q, K, mask=Mask.causal(), blocks=10, maxima=True)
MATRIX = torch.rand(4, 4, generator=GENERATOR)
MATRIX = (MATRIX + MATRIX.mT) / 2
AGREEMENT = HeadAgreement(MATRIX.clone().fill_diagonal_(1), (MATRIX - 0.4).fill_diagonal_(1))

PLOTS: dict[str, Callable[..., Figure]] = {
    "agreement": lambda **ax: plots.agreement(AGREEMENT, groups=[[2, 0], [1, 3]], **ax),
    "block_map": lambda **ax: plots.block_map(BLOCKS, head=1, **ax),
    "cache": lambda **ax: plots.cache(8, 2, 64, window=300, **ax),
    "cut": lambda **ax: plots.cut(RECORDING, **ax),
    "groups": lambda **ax: plots.groups(6, 2, **ax),
    "heads": lambda **ax: plots.heads(RECORDING, "cut", window=3, **ax),
    "mask": lambda **ax: plots.mask(Mask.causal(window=3), 7, **ax),
    "price": lambda **ax: plots.price(PRICE, **ax),
    "reach": lambda **ax: plots.reach([3, None, 5], tokens=9, **ax),
    "savings": lambda **ax: plots.savings(SEEN, **ax),
    "tokens": lambda **ax: plots.tokens(PRICE, SEEN.tokens, **ax),
}


def test_each_public_plot_is_among_those_tested() -> None:
    assert {*PLOTS, "svg"} == set(plots.__all__)


def only(figure: Figure) -> Axes:
    """The axes that are not a scale of colours."""
    return figure.axes[0]


def cells_of(axes: Axes) -> dict[tuple[int, int], float | None]:
    """The number of each cell by the row and column around whose middle it stands; None where nothing is drawn."""
    (mesh,) = [each for each in axes.collections if type(each).__name__ == "QuadMesh"]
    middles = np.asarray(mesh.get_coordinates())
    middles = (middles[1:, 1:] + middles[:-1, :-1]) / 2
    numbers = np.ma.atleast_2d(mesh.get_array())
    hidden = np.ma.getmaskarray(numbers)
    places = np.ndindex(*numbers.shape)
    return {(round(middles[at][1]), round(middles[at][0])): None if hidden[at] else float(numbers[at]) for at in places}


def mean(numbers: Tensor) -> float:
    known = [number for number in numbers.tolist() if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


# What holds for all.


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_in_the_axes_that_are_given_and_changes_no_setting(name: str) -> None:
    before = dict(mpl.rcParams)
    alone = PLOTS[name]()
    outer = Figure(figsize=(9, 5))
    left, right = outer.subfigures(1, 2)
    axes, other = left.subplots(), right.subplots()
    assert PLOTS[name](ax=axes) is outer
    assert not (other.lines or other.collections or other.patches or other.texts)
    assert axes.get_title() == only(alone).get_title() != ""
    for figure in (alone, outer):
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert file.getvalue()[:4] == b"\x89PNG"
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", PLOTS)
def test_figures_made_alike_are_the_same_svg(name: str) -> None:
    before = dict(mpl.rcParams)
    picture = plots.svg(PLOTS[name]())
    assert picture == plots.svg(PLOTS[name]())
    assert dict(mpl.rcParams) == before
    assert picture.startswith("<?xml") and picture.endswith("</svg>\n")
    assert "<date>" not in picture and "dc:date" not in picture
    assert only(PLOTS[name]()).get_title().split()[0] in picture  # letters, not their outlines


SVG, QUADS = "{http://www.w3.org/2000/svg}", re.compile(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H\1z")


def _of_grids(picture: str) -> list[ET.Element]:
    root = ET.fromstring(picture)
    return [each for each in root.iter(f"{SVG}g") if each.get("id", "").startswith("QuadMesh")]


def _families(node: ET.Element, inherited: str = "") -> list[tuple[str, str]]:
    """Each text with the font that it has."""
    found = re.search("font-family: ([^;]*)", node.get("style", ""))
    family = found[1] if found else node.get("font-family", inherited)
    text = (node.text or "").strip(" \n") if node.tag in (f"{SVG}text", f"{SVG}tspan") else ""
    own = [(text, family)] if text else []
    return own + [one for child in node for one in _families(child, family)]


WITHOUT_EDGES = {"a mask without edges of cells": lambda **ax: plots.mask(Mask.causal(window=9), 42, **ax)}


@pytest.mark.parametrize("name", [*PLOTS, *WITHOUT_EDGES])
def test_a_short_svg_shows_what_matplotlib_wrote(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = {**PLOTS, **WITHOUT_EDGES}[name]
    figure, again = draw(), draw()
    for each in (figure, again):
        each.axes[0].set_title(' x="1.23456" 1.23456 <')
        each.axes[0].title.set_family("monospace")
    short = plots.svg(figure)
    monkeypatch.setattr(canvas, "shortened", lambda picture: picture)
    whole = plots.svg(again)
    assert len(short) < 0.85 * len(whole)
    assert _families(ET.fromstring(short)) == _families(ET.fromstring(whole))
    for grid, shown in zip(_of_grids(whole), _of_grids(short), strict=True):
        cells = _cells_and_edges(shown)
        for path in grid.iter(f"{SVG}path"):
            style, (left, right, top, bottom) = path.get("style", ""), _bounds(path)
            around = [
                (of, x0, x1)
                for of, x0, x1, y0, y1 in cells
                if x0 <= left + 0.01 and right - 0.01 <= x1 and y0 <= top + 0.01 and bottom - 0.01 <= y1
            ]
            assert [of for of, *_ in around] == [style]
            assert around[0][1:] == pytest.approx((left, right), abs=0.0051) or "stroke: " not in style
    places, expected = map(_places, (short, whole))
    assert places == pytest.approx(expected, abs=0.0051) and len(places) > 20


def _bounds(path: ET.Element) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a cell as matplotlib writes it."""
    numbers = [float(x) for x in re.findall(r"-?[\d.]+", path.get("d", ""))]
    (left, right), (top, bottom) = sorted({*numbers[::2]}), sorted({*numbers[1::2]})
    return left, right, top, bottom


def _cells_and_edges(grid: ET.Element) -> list[tuple[str, float, float, float, float]]:
    """The cells between the edges of a short picture, or of its whole rectangles where no edges are drawn."""
    found = []
    for path in grid.iter(f"{SVG}path"):
        style, drawn = path.get("style", ""), path.get("d", "")
        lines = [tuple(map(float, line)) for line in re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", drawn)]
        for left, top, right, bottom in (map(float, one) for one in QUADS.findall(drawn)):
            inner = [x for x, y0, y1 in lines if left < x < right and y0 <= top and bottom <= y1]
            edges = sorted([left, *inner, right])
            found += [(style, x0, x1, top, bottom) for x0, x1 in pairwise(edges)]
    return found


def _places(picture: str) -> list[float]:
    """The numbers of all paths and points but those of grids."""
    rest = re.sub(r'<g id="QuadMesh.*?</g>', "", picture, flags=re.DOTALL)
    attributes = re.findall(r'<[^<>]* (?:d|x|y)="([^"]*)"', rest)
    return [float(x) for each in attributes for x in re.findall(r"-?\d[\d.]*", each)]


@pytest.mark.parametrize("name", PLOTS)
def test_axes_of_something_else_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"plots.{name}: ax must be Axes of matplotlib.*got ndarray.*give one"):
        PLOTS[name](ax=Figure().subplots(1, 2))


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_the_remedy_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"plots.{name}: it needs matplotlib .*pip install 'qkv\[plots\]'"):
        PLOTS[name]()


def test_plots_need_neither_pyplot_nor_transformers() -> None:
    code = """
import sys
from qkv import Mask, plots
loaded = "matplotlib" in sys.modules
plots.svg(plots.mask(Mask.causal(), 4)), plots.groups(4, 2), plots.reach([2]), plots.cache(4, 2, 8)
print(loaded, {"matplotlib.pyplot", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False set()"


# Mechanisms.

RULES: dict[str, tuple[Mask, Callable[[int, int], bool]]] = {
    "full": (Mask.full(), lambda p, j: True),
    "causal": (Mask.causal(), lambda p, j: j <= p),
    "window": (Mask.causal(window=4, sink_tokens=2), lambda p, j: p - 4 < j <= p or (j < 2 and j <= p)),
    "both sides": (Mask.sliding(4), lambda p, j: abs(p - j) <= 2),
    "dilated": (Mask.causal(window=3, dilation=2), lambda p, j: p - j in (0, 2, 4)),
}


@pytest.mark.parametrize("lq, lk, offset", [(9, 9, 0), (5, 11, 6), (4, 7, 2), (1, 8, 7)])
@pytest.mark.parametrize("name", RULES)
def test_the_cells_of_a_mask_are_the_keys_that_queries_see(name: str, lq: int, lk: int, offset: int) -> None:
    mask, rule = RULES[name]
    axes = only(plots.mask(mask, lq, lk, offset=offset))
    assert cells_of(axes) == {(i, j): 2.0 * rule(i + offset, j) for i in range(lq) for j in range(lk)}
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert low < high and bottom > top, "the first query is on top"
    own = {(int(x), int(y)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    assert own == (set() if name == "full" else {(i + offset, i) for i in range(lq) if i + offset < lk})


def test_a_large_mask_is_drawn_in_cells() -> None:
    axes = only(plots.mask(Mask.causal(), 300))
    found = cells_of(axes)
    assert len(found) == 100 * 100
    assert {key for key, number in found.items() if number == 2} == {(i, j) for i in range(100) for j in range(i)}
    assert {key for key, number in found.items() if number == 1} == {(i, i) for i in range(100)}
    assert axes.get_xlabel() == "key, 3 in a cell" and not axes.lines
    assert axes.xaxis.get_major_formatter()(20, 0) == "60"


def test_the_mask_of_a_row_and_of_a_head() -> None:
    allow = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    for row in range(2):
        for head in range(3):
            figure = plots.mask(Mask.dense(allow), 5, 6, row=row, head=head)
            expected = {(i, j): 2.0 * bool(allow[row, head, i, j]) for i in range(5) for j in range(6)}
            assert cells_of(only(figure)) == expected
            assert only(figure).get_title().endswith(f", row {row}, head {head}")
    with pytest.raises(ValueError, match=r"plots.mask: row must be less than the mask's 2; got 2"):
        plots.mask(Mask.dense(allow), 5, 6, row=2)
    with pytest.raises(ValueError, match=r"plots.mask: head must be at least 0; got -1"):
        plots.mask(Mask.dense(allow), 5, 6, head=-1)
    plots.mask(Mask.causal(), 5, row=7, head=2)  # the same for all rows and heads


def test_a_mask_needs_an_offset_where_mask_draw_needs_one() -> None:
    with pytest.raises(ValueError, match=r"plots.mask: Mask.causal\(\) depends on .* offset=3 aligns the last query"):
        plots.mask(Mask.causal(), 4, 7)
    with pytest.raises(ValueError, match=r"plots.mask: lq must be at least 1; got 0"):
        plots.mask(Mask.causal(), 0)
    with pytest.raises(TypeError, match=r"plots.mask: mask must be a qkv.Mask; got Tensor"):
        plots.mask(torch.ones(3, 3), 3)  # type: ignore[arg-type]


KINDS = [(6, 6, "multi-head"), (6, 2, "grouped-query"), (6, 1, "multi-query"), (1, 1, "multi-query")]


@pytest.mark.parametrize("heads, kv_heads, kind", KINDS)
def test_query_heads_are_joined_to_the_head_that_they_share(heads: int, kv_heads: int, kind: str) -> None:
    axes = only(plots.groups(heads, kv_heads))
    joined = {tuple(map(tuple, line.get_xydata().tolist())) for line in axes.lines}
    size = heads // kv_heads
    middle = {group: sum(range(group * size, group * size + size)) / size for group in range(kv_heads)}
    assert joined == {((head, 1.0), (middle[head // size], 0.0)) for head in range(heads)}
    places = [tuple(place) for each in axes.collections for place in each.get_offsets().tolist()]
    assert sorted(places) == sorted([(h, 1.0) for h in range(heads)] + [(m, 0.0) for m in middle.values()])
    assert axes.get_title().startswith(f"{kind}: {heads} query head")


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"plots.groups: num_kv_heads must divide num_heads=6; got 4"):
        plots.groups(6, 4)
    with pytest.raises(ValueError, match=r"plots.groups: num_heads must be at least 1; got 0"):
        plots.groups(0, 1)


def reached(windows: list[int | None], length: int) -> list[int]:
    """By walking: which tokens the last one depends on, layer by layer from the top down."""
    found = []
    for depth in range(1, len(windows) + 1):
        seen = {length - 1}
        for window in reversed(windows[:depth]):
            seen = {j for i in seen for j in range(0 if window is None else max(0, i - window + 1), i + 1)}
        found.append(len(seen))
    return found


@pytest.mark.parametrize("windows", [[4], [4, 4, 4], [1, 6, 2], [3, None, 5], [None], [2, 2, 40]])
@pytest.mark.parametrize("measured", [False, True])
def test_bars_are_the_tokens_that_reach_a_position(windows: list[int | None], measured: bool) -> None:
    marks = [3 * n + 1 for n in range(len(windows))] if measured else None
    axes = only(plots.reach(windows, tokens=30, measured=marks))
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == reached(windows, 30)
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx(range(len(windows)))
    assert [bar.get_hatch() is not None for bar in bars] == [None in windows[: n + 1] for n in range(len(windows))]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == ([[[mark, n] for n, mark in enumerate(marks)]] if marks is not None else [])


def test_reach_without_a_length_ends_at_the_farthest() -> None:
    assert [bar.get_width() for bar in only(plots.reach([4, 5, None])).patches] == [4, 8, 8]
    with pytest.raises(ValueError, match=r"plots.reach: each of windows must be at least 1, or None.*got 0"):
        plots.reach([4, 0])
    with pytest.raises(ValueError, match=r"plots.reach: windows must have one for each layer; got none"):
        plots.reach([])
    with pytest.raises(ValueError, match=r"plots.reach: measured must have a number for each of the 2 layers; got 3"):
        plots.reach([4, 5], measured=[1, 2, 3])


def test_lines_of_caches_are_their_bytes() -> None:
    axes = only(plots.cache(8, 2, 64, window=300, num_layers=3, bytes_per_number=4, tokens=5000, mark=1000))
    lines = {line.get_label(): dict(line.get_xydata().tolist()) for line in axes.lines if line.get_label()[0] != "_"}
    counts = [64, 128, 256, 300, 512, 1024, 2048, 4096, 5000]
    one = 3 * 2 * 64 * 4  # keys and values of a head and token, in all layers
    assert lines == {
        "multi-head": {n: n * 8 * one for n in counts},
        "grouped-query, 2 KV heads": {n: n * 2 * one for n in counts},
        "multi-query": {n: n * one for n in counts},
        "a window of 300, multi-head": {n: min(n, 300) * 8 * one for n in counts},
        "int8, 2 KV heads": {n: n * 2 * 3 * 2 * (64 + 4) for n in counts},  # with a scale in fp32 each
    }
    marked = [line.get_xdata() for line in axes.lines if line.get_label()[0] == "_"]
    assert marked == [[1000, 1000]]
    names = [line.get_label() for line in only(plots.cache(8, 8, 64)).lines]
    assert names == ["multi-head", "multi-query", "int8, 8 KV heads"]
    styles = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in axes.lines}
    assert len(styles) == 6 and len({marker for _, marker, _ in styles}) == 6, "told apart without colours"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads=8; got 3"),
        ({"head_dim": 0}, r"head_dim must be at least 1; got 0"),
        ({"tokens": 64}, r"tokens must be at least 65; got 64"),
        ({"window": 0}, r"window must be at least 1; got 0"),
        ({"mark": -1}, r"mark must be at least 1; got -1"),
    ],
)
def test_sizes_of_caches_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"plots.cache: {words}"):
        plots.cache(**{"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, **change})


# What layers attend to.


def expected_heads(of: str, window: int | None) -> dict[tuple[int, int], float | None]:
    found: dict[tuple[int, int], float | None] = {(n, head): None for n in range(2) for head in range(4)}
    for n, layer in enumerate(RECORDING.layers):
        for head in range(layer.heads):
            if of in ("cut", "change"):
                lost = layer.cut.mass if of == "cut" else layer.cut.change
                number = mean(lost[RECORDING.windows.index(window), 0, head, window:])  # query i has i + 1 keys
            else:
                number = {
                    "keys_in_effect": lambda: mean(layer.keys_in_effect[0, head]),
                    "distance": lambda: mean(layer.distance.mean[0, head]),
                    "sinks": lambda: mean(layer.sinks.first[0, head] + layer.sinks.learned[0, head]),
                }[of]()
            found[n, head] = None if math.isnan(number) else pytest.approx(number, rel=1e-5)
    return found


@pytest.mark.parametrize("of", ["cut", "change", "keys_in_effect", "distance", "sinks"])
@pytest.mark.parametrize("window", [3, 7])
def test_cells_of_heads_are_their_numbers(of: Any, window: int) -> None:
    given = window if of in ("cut", "change") else None
    figure = plots.heads(RECORDING, of, window=given)
    axes, bar = figure.axes
    assert cells_of(axes) == expected_heads(of, given)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    numbers = [number.expected for number in expected_heads(of, given).values() if number is not None]
    low, high = bar.get_ylim()
    assert low <= min(numbers) * (1 + 1e-6) and max(numbers) <= high * (1 + 1e-6)
    if of in ("cut", "sinks"):
        assert (low, high) == (0, 1)
    assert bar.get_yscale() == ("log" if of == "keys_in_effect" else "linear")
    assert axes.patch.get_hatch() is not None


def test_of_several_rows_the_largest_cut_and_the_mean_of_the_others() -> None:
    layer = RECORDING.layers[0]
    low = layer._replace(
        cut=look.WindowCut(layer.cut.mass / 2, layer.cut.change / 2), keys_in_effect=layer.keys_in_effect / 2
    )
    both = layer._replace(
        cut=look.WindowCut(*(torch.cat(pair, 1) for pair in zip(low.cut, layer.cut, strict=True))),
        keys_in_effect=torch.cat([low.keys_in_effect, layer.keys_in_effect]),
    )
    rows = Recording(RECORDING.windows, RECORDING.sink_tokens, (both,))
    whole = Recording(RECORDING.windows, RECORDING.sink_tokens, (layer,))
    for of in ("cut", "change"):
        assert cells_of(only(plots.heads(rows, of, window=7))) == cells_of(only(plots.heads(whole, of, window=7)))
    once = cells_of(only(plots.heads(whole, "keys_in_effect")))
    found = cells_of(only(plots.heads(rows, "keys_in_effect")))
    assert found == {key: pytest.approx(0.75 * number, rel=1e-5) for key, number in once.items()}


def test_cross_attention_has_no_cut() -> None:
    first, second = RECORDING.layers
    mixed = RECORDING._replace(layers=(first._replace(is_cross=True, windows=()), second))
    found = cells_of(only(plots.heads(mixed, "cut", window=3)))
    assert [found[0, head] for head in range(4)] == [None] * 4
    assert [found[1, head] is None for head in range(4)] == [False, False, False, True]
    assert len(only(plots.cut(mixed)).lines) == len(only(plots.cut(RECORDING)).lines) - first.kv_heads
    with pytest.raises(ValueError, match=r"plots.cut: recording must have a layer of self-attention.*got none"):
        plots.cut(RECORDING._replace(layers=(first._replace(is_cross=True, windows=()),)))


@pytest.mark.parametrize(
    "of, window, words",
    [
        ("entropy", None, r"of must be one of cut, change, keys_in_effect, distance, sinks; got 'entropy'"),
        ("cut", None, r"window must be one of the recorded \[7, 3\]; got None"),
        ("change", 4, r"window must be one of the recorded \[7, 3\]; got 4.*record\(\.\.\., windows="),
        ("sinks", 3, r"window belongs to cut and change; got 3 with 'sinks'"),
    ],
)
def test_numbers_that_were_not_recorded_are_refused(of: Any, window: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=rf"plots.heads: {words}"):
        plots.heads(RECORDING, of, window=window)


def test_lines_of_cuts_are_those_of_kv_heads_and_of_the_worst() -> None:
    axes = only(plots.cut(RECORDING))
    expected = []
    for layer in RECORDING.layers:
        size = layer.heads // layer.kv_heads
        for kv_head in range(layer.kv_heads):
            members = range(kv_head * size, kv_head * size + size)
            at = [(w, max(mean(layer.cut.mass[RECORDING.windows.index(w), 0, h, w:]) for h in members)) for w in (3, 7)]
            expected.append(at)
    *thin, thick, _ = [line.get_xydata().tolist() for line in axes.lines]
    assert [[pytest.approx(point, rel=1e-5) for point in line] for line in expected] == thin
    worst = [[w, max(line[n][1] for line in expected)] for n, w in enumerate((3, 7))]
    assert [pytest.approx(point, rel=1e-5) for point in worst] == thick
    assert axes.lines[-2].get_linewidth() > 2 * axes.lines[0].get_linewidth()
    assert axes.get_ylim() == (0, 1) and axes.get_title() == "Weight that windows cut, 1 sink token kept"
    with pytest.raises(ValueError, match=r"plots.cut: recording must have two windows or more; got \[7\]"):
        plots.cut(RECORDING._replace(windows=(7,)))


@pytest.mark.parametrize("maxima", [False, True])
def test_cells_of_a_map_are_weights_of_blocks(maxima: bool) -> None:
    weights = (Q[1, 2] @ K[1, 2].mT * 8**-0.5 + torch.full((50, 50), -math.inf).triu(1)).softmax(-1)
    blocks = weights.view(10, 5, 10, 5)
    expected = blocks.amax((1, 3)) if maxima else blocks.sum(3).mean(1)
    axes = only(plots.block_map(BLOCKS, row=1, head=2, maxima=maxima))
    assert cells_of(axes) == {
        (i, j): None if j > i else pytest.approx(expected[i, j].item(), rel=1e-4) for i in range(10) for j in range(10)
    }


def test_tiny_weights_of_a_map_have_the_last_colour_and_are_not_hidden() -> None:
    mean_weights = torch.tensor([[[[1.0, 0.0], [1e-9, 0.5]]]])
    figure = plots.block_map(look.BlockMap(mean_weights, None))
    assert cells_of(only(figure))[1, 0] == pytest.approx(1e-9)
    (mesh,) = only(figure).collections
    assert mesh.norm.vmin == pytest.approx(1e-4, rel=1e-5) and mesh.norm(1e-9) == 0
    with pytest.raises(ValueError, match=r"plots.block_map: found must have maxima.*look.block_map\(maxima=True\)"):
        plots.block_map(look.BlockMap(mean_weights, None), maxima=True)
    for name in ("row", "head"):
        with pytest.raises(ValueError, match=rf"plots.block_map: {name} must be less than 1; got 1"):
            plots.block_map(look.BlockMap(mean_weights, None), **{name: 1})  # type: ignore[arg-type]


# What changes cost.


def test_bars_are_prices() -> None:
    costs = torch.tensor([0.25, -0.5, 0.0])
    increase = costs[:, None, None] + torch.tensor([[-1.0, 1.0, math.nan]])
    names = tuple(f"model.layers.{n}.self_attn" for n in (0, 2, 5))
    axes = only(plots.price(PRICE._replace(layers=names, increase=increase)))
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == pytest.approx([0.25, -0.5, 0])
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2])
    assert [bar.get_hatch() is None for bar in bars] == [True, False, False]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "5"]
    many = PRICE._replace(layers=tuple(f"layers.{n}" for n in range(30)), increase=torch.ones(30, 1, 11))
    shown = [label.get_text() for label in only(plots.price(many)).get_xticklabels()]
    assert shown == [str(n) for n in range(0, 30, 3)]


def boxes(axes: Axes) -> list[tuple[float, float, float, float]]:
    """Left, right and middle of the box of each token, and its number."""
    (drawn,) = [each for each in axes.collections if type(each).__name__ == "PolyCollection"]
    found = []
    for path, number in zip(drawn.get_paths(), drawn.get_array(), strict=True):
        (left, low), (right, high) = path.vertices.min(0), path.vertices.max(0)
        found.append((left, right, (low + high) / 2, float(number)))
    return found


def test_tokens_stand_on_their_increase_of_the_loss() -> None:
    axes = only(plots.tokens(PRICE, SEEN.tokens))
    increase = [0.0, *(PRICE.together[-1].loss - PRICE.loss)[0].nan_to_num().tolist()]
    written = ["⏎" if token == "\n" else token for token in SEEN.tokens]
    assert [text.get_text() for text in axes.texts] == written
    column = line = 0
    for text, (left, right, middle, number), token, want in zip(
        axes.texts, boxes(axes), written, increase, strict=True
    ):
        assert (left, right, middle) == (column, column + len(token), line) and text.get_position() == (left, line)
        assert number == pytest.approx(want, abs=1e-6)
        column, line = (0, line + 1) if token == "⏎" else (column + len(token), line)
    (drawn,) = axes.collections
    most = max(map(abs, increase))
    assert (drawn.norm.vmin, drawn.norm.vmax) == pytest.approx((-most, most))
    assert axes.get_title().endswith("tokens 0 to 11 of 12, which pay most")


def test_the_stretch_that_pays_most_is_shown_and_any_other_on_request() -> None:
    increase = torch.zeros(1, 2, 99)
    increase[0, 1, 40:45] = 1
    increase[0, 0, 10] = 3
    dear = PRICE._replace(loss=torch.ones(2, 99), increase=increase, together=())
    words = [f"<{n}>" for n in range(100)]

    def shown(**options: Any) -> list[str]:
        return [text.get_text() for text in only(plots.tokens(dear, words, **options)).texts]

    assert shown(row=1, count=5) == words[41:46]
    assert words[11] in shown(row=0, count=4) and len(shown(row=0, count=4)) == 4
    assert shown(start=97, count=9) == words[97:]
    assert shown() == words
    for options, message in (
        ({"row": 2}, "row must be less than 2; got 2"),
        ({"start": 100}, "start must be less than 100; got 100"),
        ({"count": 0}, "count must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=rf"plots.tokens: {message}"):
            shown(**options)
    with pytest.raises(ValueError, match=r"plots.tokens: tokens must be the 100 that were priced; got 99"):
        plots.tokens(dear, words[:-1])


def test_without_layers_together_tokens_have_the_mean_of_layers() -> None:
    alone = PRICE._replace(together=())
    found = [number for *_, number in boxes(only(plots.tokens(alone, SEEN.tokens)))]
    assert found == pytest.approx([0, *PRICE.increase.mean(0)[0].nan_to_num().tolist()], abs=1e-6)


@pytest.mark.filterwarnings("ignore:Glyph")  # of matplotlib's font
def test_hostile_tokens_are_shown_as_they_read() -> None:
    tokens = [*HOSTILE, "$x^2$", r"\frac{1}{2}", "$", "%", "a\tb"]
    priced = PRICE._replace(
        loss=torch.ones(1, len(tokens) - 1), increase=torch.ones(1, 1, len(tokens) - 1), together=(), layers=NAMES[:1]
    )
    figure = plots.tokens(priced, tokens)
    picture = plots.svg(figure)
    picture.encode()
    shown = [text.get_text() for text in only(figure).texts]
    assert shown[-5:] == ["$x^2$", r"\frac{1}{2}", "$", "%", r"a\tb"]
    assert "<script>" not in picture and "&lt;script&gt;" in picture and ">$x^2$<" in picture
    assert all(len(text) <= 24 and text.isprintable() for text in shown)
    assert all(right <= 88 for _, right, _, _ in boxes(only(figure)))


def test_marks_of_savings_are_bytes_and_loss() -> None:
    axes = only(plots.savings(SEEN, most=0.05))
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    window, pooled = SEEN.prices
    # 12 tokens in layer 0 on 2 KV heads, 5 in layer 1 on 1, of width 8 + 6 in 2 bytes; 4 tokens of a window and a sink.
    costs = [mean((some.loss - window.loss)[0]) for some in window.together]
    expected = [[(12 * 2 + 4) * 28, costs[0]], [(4 * 2 + 4) * 28, costs[1]]]
    for got, want in zip(lines[window.change], sorted(expected), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    cost = mean((pooled.together[0].loss - pooled.loss)[0])
    assert lines[pooled.change] == [pytest.approx([(12 + 5) * 28, cost], rel=1e-4)]
    assert lines["as it is"] == [[(12 * 2 + 5) * 28, 0]]
    cheap = [point for point in expected if point[1] <= 0.05]
    assert cheap and lines["the proposal"] == [pytest.approx(min(cheap), rel=1e-4, abs=1e-6)]
    assert "the proposal" not in {line.get_label() for line in only(plots.savings(SEEN, most=-9.0)).lines}
    with pytest.raises(ValueError, match=r"plots.savings: seen must have prices of several layers.*together="):
        plots.savings(SEEN._replace(prices=(window._replace(together=()),)))
    with pytest.raises(ValueError, match=r"plots.savings: most must be a finite number; got nan"):
        plots.savings(SEEN, most=math.nan)


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("groups", [None, [[2, 0], [1, 3]], torch.tensor([[3, 1], [0, 2]]), [[1], [0, 2, 3]]], ids=str)
def test_cells_of_agreement_are_in_the_order_of_groups(of: Any, groups: Any) -> None:
    matrix = getattr(AGREEMENT, of)
    axes = only(plots.agreement(AGREEMENT, of, groups=groups))
    lists = [[int(head) for head in group] for group in groups] if groups is not None else [[0, 1, 2, 3]]
    order = [head for group in lists for head in group]
    assert cells_of(axes) == {
        (i, j): pytest.approx(matrix[one, other].item()) for i, one in enumerate(order) for j, other in enumerate(order)
    }
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == list(map(str, order))
    outlined = [(box.get_x(), box.get_y(), box.get_width(), box.get_height()) for box in axes.patches]
    starts = [sum(map(len, lists[:n])) - 0.5 for n in range(len(lists))]
    sizes = [(start, start, len(group), len(group)) for start, group in zip(starts, lists, strict=True)]
    assert outlined == ([] if groups is None else sizes)


def test_groups_of_agreement_have_each_head_once() -> None:
    for wrong in ([[0, 1], [1, 2]], [[0, 1]], [[0, 1], [2, 4]]):
        with pytest.raises(ValueError, match=r"plots.agreement: groups must have each of the 4 heads once; got \[\["):
            plots.agreement(AGREEMENT, groups=wrong)
    with pytest.raises(ValueError, match=r"plots.agreement: of must be 'keys' or 'values'; got 'queries'"):
        plots.agreement(AGREEMENT, "queries")  # type: ignore[arg-type]


def lightness(colour: str) -> float:
    """Relative luminance, as WCAG has it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_of_numbers_rise_in_lightness() -> None:
    from qkv.plots.canvas import RAMP

    ramp = [lightness(to_hex(mpl.colormaps[RAMP](n / 50))) for n in range(51)]
    assert all(after > before for before, after in pairwise(ramp))


def test_words_on_dark_boxes_are_light() -> None:
    axes = only(plots.tokens(PRICE, SEEN.tokens))
    (drawn,) = axes.collections
    for text, (*_, number) in zip(axes.texts, boxes(axes), strict=True):
        below = lightness(to_hex(drawn.cmap(drawn.norm(number))))
        words = lightness(to_hex(text.get_color()))
        assert (max(below, words) + 0.05) / (min(below, words) + 0.05) >= 4.5
