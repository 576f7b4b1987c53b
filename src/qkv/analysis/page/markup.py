"""HTML and SVG from Python: text is escaped, and what cannot be seen of it is written out."""

import html

VOID = {"meta", "input", "br", "path", "line", "rect", "circle", "polyline"}
"""Elements without children here: those of SVG are closed in their tag."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def visible(text: str) -> str:
    r"""A text with escapes for characters that do not print: controls, marks of direction, halves of a pair.

    Example:
        >>> visible("a\u202eb\ud800")
        'a\\u202eb\\ud800'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def escaped(text: str) -> Markup:
    """A text as HTML, for elements and attributes."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(text)))


def element(name: str, *children: str, **attributes: str | int | float | None) -> Markup:
    """An element; children that are not markup are escaped. ``class_`` is class, ``aria_label`` is aria-label.

    Example:
        >>> element("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*parts: str) -> Markup:
    """Parts one after another."""
    return Markup("".join(map(escaped, parts)))


def written(value: str | int | float) -> str:
    """A number as attributes have it: two decimals suffice for places in a picture."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(caption: str, heading: list[str], rows: list[list[str]]) -> Markup:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    head = element("tr", *(element("th", name, scope="col") for name in heading))
    lines = [element("tr", _name_of_row(row[0]), *(element("td", cell) for cell in row[1:])) for row in rows]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *lines))
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _name_of_row(name: str) -> Markup:
    return element("th", name, scope="row", class_="words" if " " in name else None)


def figure(picture: Markup, shows: str, not_shown: str, numbers: Markup | None = None) -> Markup:
    """A picture with a sentence on what it shows and one on what it does not, and its numbers behind a button."""
    parts = [picture, element("figcaption", shows, " ", element("span", not_shown, class_="not"))]
    if numbers is not None:
        parts.append(element("details", element("summary", "Numbers"), numbers))
    return element("figure", *parts)
