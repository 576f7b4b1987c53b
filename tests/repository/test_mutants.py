"""The planted bugs of mutants.py, which are too many to plant each time, can still be planted."""

import os

import pytest
from mutants import LEFT_OUT, MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_replaces_exists(mutant: Mutant) -> None:
    assert mutant.right in (ROOT / "src" / "qkv" / mutant.file).read_text()
    assert mutant.right != mutant.wrong
    assert mutant.isa is None or mutant.is_native
    folder = ROOT / ("native/tests" if mutant.is_emulated else "tests")
    assert all((folder / name).exists() for name in mutant.tests)


def test_a_copy_has_all_sources_of_the_kernel() -> None:
    assert not [name for folder, _, names in os.walk(ROOT / "native") for name in LEFT_OUT(folder, names)]
