"""The catalogue of errors: its messages are those of the code, and messages that name an entry are in it."""

import ast
import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from qkv import arguments
from qkv.arguments import CATALOGUE, more

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / f"{CATALOGUE}.md"
LEAST = 10
"""Letters of a text in the code, without its numbers, from which on it can be told from others."""


class Template(NamedTuple):
    """A text of the code, as a pattern of the messages that it makes."""

    pattern: re.Pattern[str]
    entry: str | None
    """the entry of the catalogue that it names"""


def _templates() -> list[Template]:
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(_template(node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(_template([node]))
    return [each for each in found if len(re.sub(r"\\.|\W|\d", "", each.pattern.pattern)) >= LEAST]


def _template(parts: list[ast.expr]) -> Template:
    pattern, entry = "", None
    for part in parts:
        named = _named(part)
        if named is not None:
            entry, text = named, more(named)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            text = part.value
        else:
            pattern += ".*"
            continue
        pattern += r"\s+".join(map(re.escape, re.split(r"\s+", text)))
    return Template(re.compile(pattern, flags=re.DOTALL), entry)


def _named(part: ast.expr) -> str | None:
    """The argument of a call of `more`."""
    call = part.value if isinstance(part, ast.FormattedValue) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "more"):
        return None
    (name,) = call.args
    assert isinstance(name, ast.Constant) and isinstance(name.value, str)
    return name.value


def _entries() -> list[tuple[str | None, str]]:
    """The sections of the page, each with its name if it has one."""
    text = PAGE.read_text()
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        name = re.match(r'<a id="([\w-]+)"></a>', section)
        found.append((name[1] if name else None, section))
    return found


with mock.patch.object(arguments, "documentation", return_value=None):
    TEMPLATES, ENTRIES = _templates(), _entries()
NAMED = {each.entry for each in TEMPLATES if each.entry is not None}


def test_entries_that_messages_name_are_in_the_catalogue_and_no_others_have_a_name() -> None:
    names = [name for name, _ in ENTRIES if name is not None]
    assert len(names) == len(set(names)) and set(names) == NAMED and len(names) >= 8
    sources = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    assert len(re.findall(r"\bmore\(['\"]", sources)) - 1 == sum(each.entry is not None for each in TEMPLATES)


def test_messages_of_the_catalogue_are_those_of_the_code() -> None:
    count = 0
    for name, section in ENTRIES:
        raised = re.findall(r"^(?:\w+\.)*\w*Error: (.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        for message in map(str.strip, raised):
            entries = {each.entry for each in TEMPLATES if each.pattern.fullmatch(message)}
            named = re.search(r'More:\s"([\w-]+)" on the page Errors', message)
            assert entries == {named[1] if named else None}, message
            assert name is None or (named and named[1] == name), message
            count += 1
    assert count >= 25


def test_each_named_entry_shows_a_message_or_quotes_it_and_says_what_to_do() -> None:
    for name, section in ENTRIES:
        if name is None:
            continue
        title = section.splitlines()[0].partition("</a>")[2].lower()
        of_code = [each.pattern.pattern.lower() for each in TEMPLATES if each.entry == name]
        first = re.escape(title.split(",")[0]).replace(r"\ ", r"\s+")
        assert "Error: " in section or any(first in pattern for pattern in of_code), title
        assert "**Cause**" in section and "**Do**" in section, title


def test_the_first_table_of_the_page_has_the_named_entries_with_their_messages() -> None:
    rows = re.findall(r"^\| \[([\w-]+)\]\(#\1\) \| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, section.splitlines()[0].partition("</a>")[2]) for name, section in ENTRIES if name]


class Metadata(dict[str, list[str]]):
    """Of an installed package, as `importlib.metadata` has it."""

    def get_all(self, name: str, default: object = None) -> object:
        """All lines of that name."""
        return self.get(name, default)


@pytest.mark.parametrize(
    "urls, words",
    [
        ((), ' More: "offset" on the page Errors of the documentation of qkv'),
        (("Source, https://example.org/source",), ' More: "offset" on the page Errors of the documentation of qkv'),
        (
            ("Source, https://example.org/source", "Documentation, https://example.org/qkv/"),
            " More: https://example.org/qkv/reference/errors.html#offset",
        ),
    ],
)
def test_a_message_has_an_address_where_the_package_names_one(
    urls: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = Metadata({"Project-URL": list(urls)} if urls else {})
    monkeypatch.setattr("importlib.metadata.metadata", {"qkv": fields}.__getitem__)
    monkeypatch.setattr(arguments, "documentation", arguments.documentation.__wrapped__)
    assert more("offset") == words


def test_a_folder_of_sources_without_metadata_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.metadata", refuse)
    assert arguments.documentation.__wrapped__() is None
