"""Fences of Markdown as tests run them: those of a page in order, in one namespace; `>>>` with its outputs compared."""

import doctest
import io
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from qkv import arguments

FENCE = re.compile(r"^(?P<marks>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=marks)$", flags=re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Fence(NamedTuple):
    """A block of code, as it stands on a page."""

    language: str
    reason: str
    """why it is not run, after "skip:"; empty if it is"""
    text: str
    line: int


def fences(text: str) -> list[Fence]:
    """Those of a page, in order.

    Raises:
        ValueError: for an info string that is neither a language nor a language and a reason to skip.
    """
    found = []
    for each in FENCE.finditer(text):
        line = text.count("\n", 0, each.start()) + 1
        info = re.fullmatch(r"(\{?[\w-]*\}?)(?: skip: (\S.{9,}))?", each["info"].strip())
        if info is None and not each["info"].startswith("{"):
            raise ValueError(
                f"line {line}: a fence has a language, and at most `skip:` with a reason: {each['info']!r}"
            )
        language = each["info"].split()[0] if info is None else info[1]
        found.append(Fence(language, (info[2] if info else None) or "", each["text"], line))
    return found


def run(path: Path) -> int:
    """Runs the Python of a page; returns how many fences ran.

    Raises:
        AssertionError: for an output that differs from what the page shows.
    """
    page = types.ModuleType(f"page_{re.sub(r'[^a-z]', '_', path.stem.lower())}")  # compilers look up names in modules
    sys.modules[page.__name__] = page
    try:
        with mock.patch.object(arguments, "documentation", return_value=None):  # messages as pages quote them
            return _run_in(page.__dict__, path)
    finally:
        del sys.modules[page.__name__]


def _run_in(namespace: dict[str, Any], path: Path) -> int:
    count = 0
    for fence in fences(path.read_text()):
        if fence.language != "python" or fence.reason:
            continue
        count += 1
        place = f"{path.name}, line {fence.line}"
        if not fence.text.startswith(">>>"):
            lines = "\n" * fence.line  # errors name the page's lines
            exec(compile(lines + fence.text, str(path), "exec"), namespace)
            continue
        test = doctest.DocTestParser().get_doctest(fence.text, namespace, place, str(path), fence.line)
        runner, report = doctest.DocTestRunner(optionflags=OPTIONS), io.StringIO()
        runner.run(test, out=report.write, clear_globs=False)
        namespace.update(test.globs)
        assert not runner.failures, f"{place}:\n{report.getvalue()}"
    return count
