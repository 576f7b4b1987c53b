"""Charts as SVG, which stand without JavaScript."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qkv.analysis.page.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 40
MARKS = 5
"""Shapes of marks."""
SERIES = 4
"""Colours of series, in page.css."""

Point = tuple[float, float]


class Axis(NamedTuple):
    """Places of numbers between 0 and 1, and the numbers that are written beside it."""

    name: str
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def linear(name: str, least: float, most: float, text: Callable[[float], str], unit: float = 1) -> Axis:
    """An axis of equal steps, with ticks of 1, 2 or 5 times a power of ten, of a unit."""
    if not most > least:
        least, most = least - 0.5, least + 0.5
    rough = (most - least) / (5 * unit)
    power = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
    first = math.ceil(least / step - 1e-9)
    ticks = [n * step for n in range(first, math.floor(most / step + 1e-9) + 1)]
    return Axis(name, lambda x: (x - least) / (most - least), [(tick, text(tick)) for tick in ticks])


def logarithmic(name: str, ticks: Sequence[tuple[float, str]], least: float, most: float) -> Axis:
    """An axis of equal factors, of positive numbers."""
    low, high = math.log(least), math.log(most)
    if not high > low:
        low, high = low - 0.5, low + 0.5
    return Axis(name, lambda x: (math.log(x) - low) / (high - low), ticks)


def nearly_logarithmic(name: str, least: float, most: float, unit: float) -> Axis:
    """An axis of equal steps around 0, up to ``unit``, and of equal factors beyond."""

    def bent(x: float) -> float:
        return math.copysign(math.log1p(abs(x) / unit), x)

    low, high = bent(least), bent(most)
    if not high > low:
        low, high = low - 0.5, low + 0.5
    sizes = [unit * 10.0**n for n in range(6)]
    ticks = [tick for tick in [*(-size for size in reversed(sizes)), 0.0, *sizes] if least <= tick <= most]
    return Axis(name, lambda x: (bent(x) - low) / (high - low), [(tick, f"{tick:g}") for tick in ticks])


class Chart:
    """A chart that is drawn part by part."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self.parts: list[Markup] = []
        for value, text in y.ticks:
            at = self._down(value)
            self.parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
            self.parts.append(element("text", text, x=LEFT - 6, y=at + 4, text_anchor="end"))
        for value, text in x.ticks:
            at = self._right(value)
            self.parts.append(element("line", class_="tick", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4))
            self.parts.append(element("text", text, x=at, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
        bottom = HEIGHT - BOTTOM
        self.parts.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        self.parts.append(element("text", x.name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle"))
        up = f"translate(12 {(TOP + bottom) / 2:g}) rotate(-90)"
        self.parts.append(element("text", y.name, transform=up, text_anchor="middle"))

    def at(self, x: float, y: float) -> Point:
        """The place of a point."""
        return self._right(x), self._down(y)

    def _right(self, x: float) -> float:
        return LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT)

    def _down(self, y: float) -> float:
        return HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Draws a line through points, with gaps at those that are not finite."""
        places = [self.at(x, y) if math.isfinite(y) else None for x, y in points]
        path = ""
        for before, place in zip([None, *places], places, strict=False):
            if place is not None:
                path += f"{'M' if before is None else 'L'}{place[0]:.1f} {place[1]:.1f}"
        self.parts.append(element("path", class_=kind, d=path))

    def mark(self, x: float, y: float, series: int, title: str) -> None:
        """Draws a mark whose shape and colour are those of a series."""
        place = self.at(x, y)
        self.parts.append(element("g", mark(*place, series), element("title", title)))

    def ring(self, x: float, y: float, title: str) -> None:
        """Draws a ring around a mark."""
        right, down = self.at(x, y)
        self.parts.append(
            element("g", element("circle", class_="ring", cx=right, cy=down, r=9), element("title", title))
        )

    def bar(self, left: float, right: float, y: float, title: str) -> None:
        """Draws a bar between two numbers of the horizontal axis, from 0 to y."""
        (x0, zero), (x1, end) = self.at(left, 0), self.at(right, y)
        kind = "bar more" if y > 0 else "bar less"
        box = {"x": x0, "width": x1 - x0, "y": min(zero, end), "height": abs(end - zero)}
        self.parts.append(element("g", element("rect", class_=kind, **box), element("title", title)))

    def cell(self, least: Point, most: Point, shade: int) -> None:
        """Fills a rectangle between two points, the darker the smaller the shade."""
        (left, bottom), (right, top) = self.at(*least), self.at(*most)
        box = {"x": left, "width": right - left, "y": top, "height": bottom - top}
        self.parts.append(element("rect", class_=f"change c{shade}", **box))

    def drawn(self, label: str) -> Markup:
        """The picture, with a text in place of it."""
        return element(
            "svg", *self.parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label
        )


def mark(x: float, y: float, series: int) -> Markup:
    """The mark of a series."""
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
        "M-4-4h8v8h-8z",
        "M0-5l5 9h-10z",
        "M0-5l5 5l-5 5l-5-5z",
        "M-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",
    )
    return element(
        "path", class_=f"mark s{series % SERIES}", d=shapes[series % MARKS], transform=f"translate({x:.1f} {y:.1f})"
    )


def legend(names: Sequence[str]) -> Markup:
    """What the marks of series stand for, as a list."""
    entries = [
        element("li", element("svg", mark(8, 8, n), viewBox="0 0 16 16", aria_hidden="true"), name)
        for n, name in enumerate(names)
    ]
    return element("ul", joined(*entries), class_="legend")
