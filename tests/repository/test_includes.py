"""Includes in native/src go in one direction, as imports do (test_imports.py)."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "native/src"

# The folders of each level, the lowest first: a file may include its own folder and those of lower levels.
LEVELS = [
    {"sizes.h", "runtime"},
    {"abi"},
    {"simd"},
    {"mask", "rowwise"},
    {"matmul", "softmax"},
    {"attention"},
]

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.suffix in (".h", ".cpp", ".def"))


def includes(file: Path) -> list[Path]:
    return [Path(name) for name in re.findall(r'^#include "(.+)"', (SOURCE / file).read_text(), re.MULTILINE)]


def level(file: Path) -> int:
    for height, folders in enumerate(LEVELS):
        if file.parts[0] in folders:
            return height
    raise AssertionError(f"native/src/{file} is in no folder of LEVELS; add it")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_includes_upward(file: Path) -> None:
    for included in includes(file):
        assert included in FILES, f"{file} includes {included} by another path than from native/src"
        is_below = level(included) < level(file)
        assert is_below or included.parts[0] == file.parts[0], f"{file} includes {included}, which is not below it"


def test_includes_are_acyclic() -> None:
    list(TopologicalSorter({file: includes(file) for file in FILES}).static_order())  # raises CycleError


def test_there_are_few_folders_and_levels() -> None:
    names = {file.parts[0] for file in FILES}
    assert names == set().union(*LEVELS)
    assert len([name for name in names if (SOURCE / name).is_dir()]) <= 8
    assert len(LEVELS) <= 6
