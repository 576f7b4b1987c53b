"""`page_of`: a `Seen` as one HTML file, which needs nothing from elsewhere."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from qkv.analysis.page import pictures
from qkv.analysis.page.data import as_script, data_of, even_maps
from qkv.analysis.page.markup import Markup, element, escaped, joined
from qkv.analysis.seen import Seen
from qkv.analysis.words import counted

LARGEST = 20_000_000
"""Bytes of a page at most."""
BLOCKS = 64
"""Blocks of a map, as `record` makes them unless told otherwise."""


def page_of(seen: Seen, most: float) -> str:
    """What was found of a model on a text as one HTML document, with pictures, numbers and the text itself.

    The document fetches nothing, and its content policy forbids to: script and style stand in it, and are allowed by
    their hashes. The same `Seen` gives the same document. Without JavaScript all pictures are there but those of heads
    and tokens. Tokens are data of the script, which shows them as text.

    Args:
        seen: of a model on a text.
        most: nats a token that the proposal may cost, as in `Seen.proposal`.

    Raises:
        ValueError: for a document that would exceed 20 MB.

    Example:
        >>> from qkv.analysis.page import page_of
        >>> Path("page.html").write_text(page_of(seen, most=0.01), encoding="utf-8")  # doctest: +SKIP
    """
    style, script = _source("page.css"), _source("page.js")
    length, even = len(seen.tokens), even_maps(seen.recording)
    left_out = "; the rest was left out" if seen.tokens_left_out is None else ""
    if seen.tokens_left_out:
        left_out = f"; {seen.tokens_left_out:,} more were left out"
    parts = {
        "policy": _policy(style, script),
        "title": escaped(f"{seen.model} on {seen.text}"),
        "about": escaped(
            f"{counted(len(seen.recording.layers), 'layer')}, "
            f"{counted(length, 'token')} of the text{left_out}{_context(seen)}"
        ),
        "style": style,
        "prices": _prices(seen, most),
        "against": _against(seen),
        "agreements": _agreements(seen),
        "reaches": _reaches(seen),
        "cuts": _cuts(seen),
        "layers": pictures.layers(seen, even),
        "cache": pictures.cache(seen, most) if seen.cache_bytes({}) else element("p", "An encoder keeps no keys."),
        "data": as_script(data_of(seen, even)),
        "script": script,
    }
    # One pass over the template, so that no part is taken for a place in it.
    pieces = _source("page.html").split("{{")
    document = pieces[0]
    for piece in pieces[1:]:
        name, _, after = piece.partition("}}")
        document += parts[name] + after
    if len(document) > LARGEST:
        raise ValueError(
            f"page_of: the page would have {len(document):,} characters, and {LARGEST:,} are allowed; give fewer "
            "tokens or fewer prices."
        )
    return document


def frame(document: str) -> str:
    """A document in a frame, for a notebook: its names and styles meet none of the notebook's."""
    return (
        '<iframe sandbox="allow-scripts" title="What a model attends to" width="100%" height="800" frameborder="0" '
        f'srcdoc="{document.replace("&", "&amp;").replace(chr(34), "&quot;")}"></iframe>'
    )


def least_size(layers: int, heads: int, tokens: int, passes: int) -> tuple[int, int]:
    """Characters that a page has at least, before anything was computed: of maps, and of losses by token.

    Args:
        passes: how often the loss of all tokens is found.
    """
    blocks = min(tokens, BLOCKS) ** 2
    return 4 * layers * heads * blocks // 3, 4 * passes * (tokens - 1) * 2 // 3


def _context(seen: Seen) -> str:
    if seen.context is None:
        return ""
    left_out = "" if seen.context.tokens_left_out == 0 else " (the first)"
    return f", and {counted(seen.context.tokens, 'token')} of {seen.context.text}{left_out} for the encoder"


def _prices(seen: Seen, most: float) -> Markup:
    if not seen.prices:
        return element("p", "No price was measured: the loss with windows or fewer KV heads in some layers.")
    heading = element("h2", "What would changes save, and what would they cost?")
    bars = element("div", *(pictures.price_by_layer(price) for price in seen.prices), class_="row")
    by_layer = element("section", element("h2", "Which layers pay?"), bars)
    return joined(element("section", heading, pictures.savings(seen, most)), by_layer)


def _against(seen: Seen) -> Markup:
    if seen.against is None:
        return Markup("")
    return element("section", element("h2", "What does the other model lose?"), pictures.against(seen, seen.against))


def _agreements(seen: Seen) -> Markup:
    if not seen.agreements:
        return Markup("")
    found = map(pictures.head_agreement, seen.agreements)
    return element("section", element("h2", "Which KV heads are alike?"), *found)


def _reaches(seen: Seen) -> Markup:
    if not seen.reaches:
        return Markup("")
    found = (pictures.reach_by_layers(title, reach) for title, reach in seen.reaches)
    return element("section", element("h2", "How far does one token reach?"), element("div", *found, class_="row"))


def _cuts(seen: Seen) -> Markup:
    if not seen.recording.windows or all(layer.is_cross for layer in seen.recording.layers):
        return Markup("")
    return element("section", element("h2", "What would windows hide?"), pictures.cuts(seen))


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")


@cache
def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
