"""The site as text, for programs that read it: llms.txt and llms-full.txt, which `make docs` writes beside the pages.

The format of the first is that of llmstxt.org: a title, a summary, and lists of links, each with what its page answers.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent
LONG = (DOCS / "log.md", DOCS / "transformers.md")
"""Pages that are not in the second: records of experiments, and of tests."""
LEAD = """# qkv

> Attention for PyTorch on a CPU: a kernel with forward and backward pass, seven attention mechanisms as one layer, and
> one line that runs an existing model on that kernel. On a GPU, the same code runs torch's own kernels.

True in a mask means "may attend". A window counts the query's own key. Queries and keys of different number need an
offset. All code on the pages runs in the tests.
"""


def index() -> str:
    """What there is and where: the pages of each group in the order of the site."""
    lines = [LEAD]
    for heading, pages in groups():
        links = [page.relative_to(DOCS).with_suffix(".html").as_posix() for page in pages]
        lines += [f"## {heading}", ""]
        lines += [f"- [{title(page)}]({link}): {summary(page)}" for page, link in zip(pages, links, strict=True)]
        lines.append("")
    return "\n".join(lines)


def whole() -> str:
    """All pages but two long ones, one after another, as they are written."""
    pages = [page for _, pages in groups() for page in pages if page not in LONG]
    return "\n\n".join([LEAD, *(page.read_text() for page in pages)])


def title(page: Path) -> str:
    """The first heading of a page, without code marks."""
    found = re.search(r"^# (.*)$", page.read_text(), flags=re.MULTILINE)
    assert found is not None, page
    return found[1].replace("`", "")


def summary(page: Path) -> str:
    """The first paragraph of a page, which says what it answers, on one line; links without their targets."""
    for paragraph in page.read_text().split("\n\n")[1:]:
        if re.match(r"[A-Z`*\[]", paragraph):
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return plain.replace("`", "")
    raise ValueError(f"{page} must say in its first paragraph what it answers.")


def pages_of_files() -> dict[Path, Path]:
    """Files of the repository that the site shows as pages of its own, and those pages, which name them."""
    shows = re.compile(r"^<!-- The site shows (\S+) here. -->$", flags=re.MULTILINE)
    found = ((page, shows.search(page.read_text())) for page in DOCS.rglob("*.md"))
    return {page.parent.joinpath(each[1]).resolve(): page for page, each in found if each}


def groups() -> list[tuple[str, list[Path]]]:
    """The contents of the site: captions, and their pages."""
    found = []
    for contents in re.findall(
        r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        caption = re.search(r"^:caption: (.*)$", contents, flags=re.MULTILINE)
        entries = re.findall(r"^[\w/-]+$", contents, flags=re.MULTILINE)
        found.append((caption[1] if caption else "Start", [DOCS / f"{entry}.md" for entry in entries]))
    return found
