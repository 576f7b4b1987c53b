"""The one direction of includes in native/src, as tests/repository/test_imports.py has it for Python."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "native/src"

# The rooms of each floor, the lowest first: a file may include its own room and those of lower floors.
FLOORS = [
    {"sizes.h", "runtime"},
    {"abi"},
    {"simd"},
    {"mask"},
    {"matmul", "softmax"},
    {"attention"},
]

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.suffix in (".h", ".cpp", ".def"))


def includes(file: Path) -> list[Path]:
    return [Path(name) for name in re.findall(r'^#include "(.+)"', (SOURCE / file).read_text(), re.MULTILINE)]


def floor(file: Path) -> int:
    for height, rooms in enumerate(FLOORS):
        if file.parts[0] in rooms:
            return height
    raise AssertionError(f"native/src/{file} is in no room of FLOORS; give it one")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_includes_upward(file: Path) -> None:
    for included in includes(file):
        assert included in FILES, f"{file} includes {included} by another path than from native/src"
        is_below = floor(included) < floor(file)
        assert is_below or included.parts[0] == file.parts[0], f"{file} includes {included}, which is not below it"


def test_files_include_each_other_in_no_circle() -> None:
    list(TopologicalSorter({file: includes(file) for file in FILES}).static_order())  # raises CycleError


def test_there_are_few_rooms_and_floors() -> None:
    assert {file.parts[0] for file in FILES} == set().union(*FLOORS)
    assert len(set().union(*FLOORS)) <= 8
    assert len(FLOORS) <= 6
