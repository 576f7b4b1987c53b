"""The site: its code runs, its links lead somewhere, its generated parts are those of the code, no name is missing."""

import ast
import builtins
import doctest
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from repository.fences import fences, run
from repository.test_docstrings import MODULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
OUTSIDE = ("https://", "http://", "mailto:")


@cache
def _module(name: str) -> Any:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHOWN = _module("llms").pages_of_files()
DOCUMENTS = [ROOT / "README.md", *SHOWN, *PAGES]


@pytest.mark.filterwarnings("ignore")  # of transformers' and torch's own making
@pytest.mark.parametrize("name", [name for name in NAMES if "```python" in (DOCS / name).read_text()])
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(name: str) -> None:
    import qkv

    try:
        assert run(DOCS / name) or all(each.reason for each in fences((DOCS / name).read_text()))
    finally:
        qkv.unregister()


def test_a_wrong_output_and_a_fence_without_a_reason_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n```python\n>>> a\n1\n```\n\n```python skip: nobody has that library\nb\n```\n"
    )
    assert run(page) == 2
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match=r"Expected:\n +3\nGot:\n +2"):
        run(page)
    page.write_text("text\n\n```python skip\na\n```\n")
    with pytest.raises(ValueError, match="line 3: a fence has a language"):
        run(page)


@pytest.mark.parametrize("name", [name for name in NAMES if "```python" in (DOCS / name).read_text()])
def test_the_code_of_a_page_uses_no_name_that_a_reader_has_not_seen_above(name: str) -> None:
    """Also that of fences which do not run here."""
    seen, unknown = set(dir(builtins)), []
    for fence in fences((DOCS / name).read_text()):
        if fence.language != "python":
            continue
        code = "".join(each.source for each in doctest.DocTestParser().get_examples(fence.text)) or fence.text
        if "Traceback" in fence.text:  # calls that raise
            continue
        loads, stores = _names_in(ast.parse(code))
        unknown += [f"line {fence.line}: {one}" for one in sorted(loads - stores - seen)]
        seen |= stores
    assert not unknown


def _names_in(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names that code reads, and those that it binds."""
    loads, stores = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loads if isinstance(node.ctx, ast.Load) else stores).add(node.id)
        elif isinstance(node, ast.alias):
            stores.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            stores.add(node.name)
        elif isinstance(node, ast.arg):
            stores.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            stores.add(node.name)
    return loads, stores


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_to_an_anchor_in_it(page: Path) -> None:
    dead = []
    for target in _links(page.read_text()):
        if target.startswith(OUTSIDE):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            dead.append(target)
    assert not dead


def _links(text: str) -> list[str]:
    """The targets of links and pictures, and the pages of contents."""
    plain = re.sub(r"^(`{3,})[^\n{]*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    plain = re.sub(r"`[^`\n]*`", "`", plain)
    listed = [
        f"{entry}.md"
        for contents in re.findall(r"^```\{toctree\}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        for entry in re.findall(r"^[\w/-]+$", contents, flags=re.MULTILINE)
    ]
    figures = re.findall(r"^```\{figure\} (\S+)$", text, flags=re.MULTILINE)
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", plain) + listed + figures


@cache
def _anchors(file: Path) -> set[str]:
    """Names that links into a page may end on: headings as forges write them, and those given by hand."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"<[^>]*>|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    slugs = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


def test_every_page_is_reached_from_the_first_one() -> None:
    reached, to_do = set(), [DOCS / "index.md"]
    while to_do:
        page = to_do.pop()
        if page in reached:
            continue
        reached.add(page)
        for target in _links(page.read_text()):
            file = (page.parent / target.partition("#")[0]).resolve()
            file = SHOWN.get(file, file)
            if file in PAGES:
                to_do.append(file)
    assert {page.relative_to(DOCS).as_posix() for page in PAGES if page not in reached} == set()


def test_the_text_of_pages_leads_to_every_page_and_not_the_contents_alone() -> None:
    linked = {DOCS / "index.md"}
    for page in PAGES:
        text = re.sub(r"^```\{toctree\}\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        files = ((page.parent / target.partition("#")[0]).resolve() for target in _links(text))
        linked |= {SHOWN.get(file, file) for file in files} - {page}
    assert set(PAGES) <= linked


def test_the_site_shows_every_page_of_results_every_study_and_what_its_pages_link_to() -> None:
    written = {file for folder in ("benchmarks", "studies") for file in (ROOT / folder).rglob("README.md")}
    assert written <= set(SHOWN)
    linked = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in _links(page.read_text())
    }
    outside = {file for file in linked if file.suffix == ".md" and not file.is_relative_to(DOCS)}
    assert outside == set(SHOWN)


def test_a_page_that_shows_a_file_links_to_it_for_forges_and_has_its_title() -> None:
    for file, page in SHOWN.items():
        title, link = page.read_text().splitlines()[0], os.path.relpath(file, page.parent)
        assert f"]({link})" in page.read_text()
        assert title == file.read_text().splitlines()[0] or file.is_relative_to(ROOT / "benchmarks")


def test_the_page_of_the_command_line_is_that_of_the_commands() -> None:
    commands = _module("commands")
    assert commands.PAGE.read_text() == commands.page(), "run make pages"


def test_the_commands_on_the_pages_exist_with_their_options() -> None:
    import typer

    from qkv.cli.app import app

    whole: Any = typer.main.get_command(app)
    known: dict[str, Any] = whole.commands
    count = 0
    for page in (ROOT / "README.md", *PAGES):
        for fence in fences(page.read_text()):
            for line in fence.text.splitlines() if fence.language == "sh" else ():
                for command in re.split(r"&&|\|", line.partition("  #")[0]):
                    words = shlex.split(command)
                    if words[:1] != ["qkv"]:
                        continue
                    count += 1
                    command_of = whole if words[1].startswith("--") else known[words[1]]
                    options = {name for each in command_of.params for name in each.opts}
                    assert {word for word in words if word.startswith("--")} <= options, f"{page.name}: {command}"
    assert count >= 20


@pytest.mark.parametrize("name", sorted(_module("pictures").PICTURES))
def test_a_picture_is_the_one_that_its_code_draws(name: str) -> None:
    pictures = _module("pictures")
    drawn, kept = pictures.drawn(name), (pictures.FOLDER / f"{name}.svg").read_text()
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert drawn.startswith("<?xml") and pinned
    if importlib.metadata.version("matplotlib") == pinned[1]:
        (words, numbers), (kept_words, kept_numbers) = _parts(drawn), _parts(kept)
        assert words == kept_words, "run make pages"
        assert numbers == pytest.approx(kept_numbers, abs=0.02), "run make pages"


def _parts(picture: str) -> tuple[str, list[float]]:
    """A picture without its numbers and the names made of them, which rounding changes; and the numbers."""
    plain = re.sub(r'(id="|#)[pm][0-9a-f]{10}', r"\1", picture)
    number = r"-?\d+\.\d+(?:e-?\d+)?|-?\d+"
    return re.sub(number, "0", plain), [float(each) for each in re.findall(number, plain)]


def test_every_picture_is_on_a_page_and_there_are_no_others() -> None:
    pictures = _module("pictures")
    files = {file.stem for file in pictures.FOLDER.glob("*.svg")}
    shown = {Path(target).stem for page in PAGES for target in _links(page.read_text()) if target.endswith(".svg")}
    assert files == set(pictures.PICTURES) and files <= shown


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference" / "api").glob("*.md"))
    whole = set(re.findall(r"automodule:: (\S+)\n +:members:$", text, flags=re.MULTILINE))
    named = set()
    module = "qkv"
    for kind, name in re.findall(r"(currentmodule|automodule|auto\w+):: (\S+)", text):
        if kind.endswith("module"):
            module = name
        named |= {name, f"{module}.{name}"}
    on_a_page = {_place(name) for name in named} | {
        _place(f"{module}.{name}") for module in whole for name in _listed(module)
    }
    missing = [name for module in MODULES for name in _listed(module) if _place(f"{module}.{name}") not in on_a_page]
    assert not missing


def _listed(module: str) -> list[str]:
    return [*getattr(importlib.import_module(module), "__all__", ())]


def _place(name: str) -> str:
    """Where the object of a dotted name is defined; the name itself if there is no such object."""
    module, _, attribute = name.rpartition(".")
    try:
        each = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return name
    return f"{getattr(each, '__module__', '')}.{getattr(each, '__qualname__', name)}"


def test_the_index_for_programs_has_every_page_with_what_it_answers() -> None:
    llms = _module("llms")
    listed = re.findall(r"^- \[([^]]+)\]\(([^)]+)\): (.{20,})$", llms.index(), flags=re.MULTILINE)
    assert sorted(link for _, link, _ in listed) == sorted(
        page.relative_to(DOCS).with_suffix(".html").as_posix() for page in PAGES if page.name != "index.md"
    )
    for name, link, says in listed:
        text = (DOCS / link).with_suffix(".md").read_text()
        assert text.startswith(f"# {name.split('`')[0].split(' ')[0]}") and says.split()[0].strip("`") in text
        assert "](" not in says
        assert (text in llms.whole()) == (link not in ("log.html", "transformers.html"))


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    subprocess.run(command, check=True)
    assert (tmp_path / "search.html").exists()
    assert (tmp_path / "llms.txt").read_text() == _module("llms").index()
    assert (tmp_path / "llms-full.txt").read_text() == _module("llms").whole()
    assert not list((tmp_path / "_downloads").rglob("*.md")), "a link to Markdown leads to a page"
    for page in tmp_path.rglob("*.html"):
        for picture in re.findall(r'<img [^>]*src="([^":]+)"', page.read_text()):
            assert (page.parent / picture).exists(), (page, picture)


def test_the_table_of_versions_has_the_ranges_of_the_package_and_what_is_tested_here() -> None:
    from qkv.cli.doctor import versions

    text = (DOCS / "project" / "versioning.md").read_text()
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.MULTILINE)
    ranges = {each.name: each.tested for each in versions()}
    assert [row[0].lower() for row in rows] == ["python", "torch", "transformers", "matplotlib"]
    constraints = (ROOT / "constraints.txt").read_text()
    for name, admitted, oldest, newest in rows:
        assert ranges[name.lower()] == admitted and admitted.startswith(f">={oldest}")
        pinned = re.search(rf"^{name}==([\d.]+)", constraints, flags=re.MULTILINE)
        assert pinned is None or _numbers(pinned[1])[:2] <= _numbers(newest)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def test_the_version_is_that_of_the_changelog_or_comes_after_it() -> None:
    import qkv

    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^]]+)\](?: - (\S+))?$", text, flags=re.MULTILINE)
    cited = (ROOT / "CITATION.cff").read_text()
    version, date = next(heading for heading in headings if heading[0] != "Unreleased")
    assert f"version: {version}\n" in cited and f"date-released: {date}\n" in cited
    if headings[0][0] == "Unreleased":
        plain, dev = qkv.__version__.split(".dev")
        assert (
            _numbers(plain) > _numbers(version)
            and f"it will be {plain}. `qkv --version` says {plain}.dev{dev}." in text
        )
    else:
        assert qkv.__version__ == version


def test_the_guide_to_speed_has_all_instruction_sets() -> None:
    sets = re.findall(
        r"^ISA_\w+\((\w+),", (ROOT / "native" / "src" / "abi" / "isas.def").read_text(), flags=re.MULTILINE
    )
    guide = (DOCS / "guides" / "speed.md").read_text()
    assert len(sets) >= 7 and all(f"`{name}`" in guide for name in sets)


def test_environment_variables_of_the_code_are_on_the_page_of_the_command_line() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "native" / "src").rglob("*.cpp")]
    sources = "".join(file.read_text() for file in files)
    read = set(re.findall(r"""(?:environ\.get|getenv)\(["'](QKV_\w+)["']""", sources))
    page = (DOCS / "reference" / "cli.md").read_text()
    assert read == set(re.findall(r"^\| `(QKV_\w+)` \|", page, flags=re.MULTILINE))
