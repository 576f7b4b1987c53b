"""The site: `make docs` writes it to build/docs. Pages are plain Markdown, which forges show as well."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import qkv

sys.path.append(str(Path(__file__).parent))
import llms

project = "qkv"
author = "the authors of qkv"
copyright = author  # noqa: A001
release = version = qkv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"qkv {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
myst_heading_anchors = 4

default_role = "py:obj"  # `Attention` in a docstring is a link
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Source", "Errors"]
napoleon_use_rtype = False
python_display_short_literal_types = True

nitpicky = True
nitpick_ignore_regex = [
    # Other packages' names in signatures: nothing is fetched while building.
    ("py:.*", r"(torch|transformers|matplotlib|typing|typing_extensions|collections|pathlib)(\..*)?"),
    (
        "py:.*",
        r"(Any|Callable|Number|types.FrameType|contextlib.AbstractContextManager|Iterable|Iterator|Mapping|Sequence|Unpack|Tensor|TypeVar|nn|Axes|Figure|Path|Never)(\..*)?",
    ),
    # In signatures: types of the code inside, which no page has.
    ("py:class", r"qkv\.(analysis|convert|integrations|layers|parallel)\.[\w.]+|qkv\.cache\.base\.Shards"),
    # In signatures: the keywords of a call as a type, whose meanings its docstring gives; type variables.
    ("py:.*", r"(.*\.)?(Options|LayerOptions|HeadOptions|ScoreOptions|Model|Self)"),
]


def _public_names() -> dict[str, str]:
    """Where an object is defined, and the public name that its page has."""
    objects = {name: getattr(qkv, name) for name in qkv.__all__}
    return {f"{each.__module__}.{each.__qualname__}": f"qkv.{name}" for name, each in objects.items()}


PUBLIC = _public_names()
PLACES = ("qkv", "qkv.cache", "qkv.cache.Cache", "qkv.convert", "qkv.analysis")
PLACES += ("qkv.integrations.torch", "qkv.integrations.transformers", "qkv.integrations.calls")
"""Where a name is looked for that is written without its module."""


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A link to a public name that is written as the code knows it: by its module, or without one."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    python = env.domains["py"]
    for name in (PUBLIC.get(target), *(f"{place}.{target}" for place in PLACES)):
        if name in python.objects:
            return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
    return None


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns what forges understand into what MyST does: anchors of headings, files of the repository, and a page that
    stands for one of them.
    """
    docs = Path(app.srcdir)
    here = (docs / page).parent
    shown = llms.pages_of_files()
    file = next((file for file, its_page in shown.items() if its_page == docs / f"{page}.md"), docs / f"{page}.md")
    pages = {docs.parent / "README.md": docs / "index.md", **shown}
    text = source[0] if file.is_relative_to(docs) else file.read_text()
    text = re.sub(r'^(#+ )<a id="([\w.-]+)"></a> *', r"(\2)=\n\1", text, flags=re.MULTILINE)

    def link(found: re.Match[str]) -> str:
        """To a page or a picture. Other files are copied into the site, and lines of them a forge alone shows."""
        target = (file.parent / found[1]).resolve()
        if target.is_dir():
            target /= "README.md"
        target = pages.get(target, target)
        if not target.exists():
            return found[0]
        path = os.path.relpath(target, here)
        if target.is_relative_to(docs) or target.suffix == ".svg":
            return f"]({path}{found[2] or ''})"
        return f"](<path:{path}>)"

    source[0] = re.sub(r"\]\(([\w./-]+)(#[\w.-]+)?\)", link, text)


def tidy(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as napoleon reads them."""
    for number, line in enumerate(lines):
        if line.strip() == "Raises:" and lines[number + 1].strip().startswith("As "):
            lines[number] = line.replace("Raises", "Errors")  # a sentence, no list
        lines[number] = lines[number].replace(", **", ", \\*\\*")


def restore(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Attributes whose first line has a colon, before which napoleon sees a type."""
    if what in ("attribute", "data", "property") and lines and lines[-1].startswith(":type: "):
        lines[0] = f"{lines.pop().removeprefix(':type: ')}: {lines[0]}"


class SideBySide(SphinxPostTransform):
    """Two blocks of code that follow each other on the pages "from" stand in two columns; outputs stand below."""

    default_priority = 400

    def run(self, **options: Any) -> None:
        """Of one page."""
        if not self.env.docname.startswith("from/"):
            return
        for left in list(self.document.findall(nodes.literal_block)):
            place = left.parent.index(left)
            right = left.parent[place + 1] if place + 1 < len(left.parent) else None
            if isinstance(right, nodes.literal_block) and not right.astext().startswith(">>>"):
                left.parent.remove(right)
                left.replace_self(nodes.container("", left.deepcopy(), right, classes=["columns"]))


def write_for_programs(app: Sphinx, error: Exception | None) -> None:
    """The site as text for programs: an index, and all pages in one file."""
    if error is None:
        (Path(app.outdir) / "llms.txt").write_text(llms.index())
        (Path(app.outdir) / "llms-full.txt").write_text(llms.whole())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", tidy, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", restore, priority=600)
    app.connect("build-finished", write_for_programs)
    app.add_post_transform(SideBySide)
