"""SVG as matplotlib writes it, made small: the same picture in a fraction of the characters."""

import re
from collections import Counter

TAG = re.compile(r"<\w[^<>]*>")
"""An element's beginning with its attributes. In texts and in attributes ``<`` and ``>`` are escaped."""
PLACES = re.compile(r'(?<= (?:d|x|y)=")[^"]*')
"""Attributes whose numbers are points of the picture, 1/72 inch."""
NUMBER = re.compile(r"-?\d+\.\d{3,}(?:e-?\d+)?")
FAMILY = re.compile(r"font-family: ([^;\"]*)(?:; )?")
CELLS = re.compile(r'(<g id="QuadMesh_\d+">\n)(.*?)(\n *</g>)', flags=re.DOTALL)
CELL = re.compile(r'\s*<path d="M (\S+) (\S+)\s+L (\S+) (\S+)\s+L (\S+) (\S+)\s+L (\S+) (\S+)\s+L \1 \2\s+"([^<>]*)/>')


def shortened(picture: str) -> str:
    """An SVG with two decimals, its usual font named once, each colour of a grid as one path, and no indentation."""
    picture = CELLS.sub(lambda found: f"{found[1]}{_joined(found[2])}{found[3]}", picture)
    fonts = Counter(FAMILY.findall(picture))
    if fonts:
        usual = fonts.most_common(1)[0][0]
        picture = TAG.sub(lambda tag: FAMILY.sub(lambda font: "" if font[1] == usual else font[0], tag[0]), picture)
        picture = picture.replace("<svg ", f'<svg font-family="{usual}" ', 1)
    picture = TAG.sub(lambda tag: PLACES.sub(lambda place: NUMBER.sub(_rounded, place[0]), tag[0]), picture)
    return re.sub(r"^[ \t]+|[ \t]+$", "", picture, flags=re.MULTILINE)


def _rounded(number: re.Match[str]) -> str:
    return _written(float(number[0]))


def _written(number: float) -> str:
    digits = f"{number:.2f}".rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits


def _joined(cells: str) -> str:
    """The cells of a grid, those of a row and a style as one rectangle, with lines where their edges were.

    Anything but rectangles stays as it is.
    """
    found = list(CELL.finditer(cells))
    if "".join(cell[0] for cell in found) != cells:
        return cells
    runs: dict[str, list[tuple[list[float], float, float]]] = {}  # by style: the columns' edges, top and bottom
    for cell in found:
        (x0, y0, x1, y1, x2, y2, x3, y3), style = map(float, cell.groups()[:8]), cell[9]
        if not (x0 == x3 and x1 == x2 and y0 == y1 and y2 == y3):
            return cells
        of_style = runs.setdefault(style, [])
        if of_style and of_style[-1][1:] == (y0, y2) and of_style[-1][0][-1] == x0:
            of_style[-1][0].append(x1)
        else:
            of_style.append(([x0, x1], y0, y2))
    return "\n".join(f'<path d="{_path(some, "stroke: " in style)}"{style}/>' for style, some in runs.items())


def _path(runs: list[tuple[list[float], float, float]], has_edges: bool) -> str:
    """Rectangles, and the edges in them, those below each other as one line."""
    edges: dict[float, list[list[float]]] = {}  # by column: top and bottom
    lines = []
    for (left, *inner, right), top, bottom in runs:
        lines.append(f"M{_written(left)} {_written(top)}H{_written(right)}V{_written(bottom)}H{_written(left)}z")
        for x in inner if has_edges else ():
            of_column = edges.setdefault(x, [])
            if of_column and of_column[-1][1] == top:
                of_column[-1][1] = bottom
            else:
                of_column.append([top, bottom])
    lines += [
        "".join(f"M{_written(x)} {_written(top)}V{_written(bottom)}" for top, bottom in of_column)
        for x, of_column in edges.items()
    ]
    return "\n".join(lines)
