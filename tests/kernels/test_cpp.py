"""The kernel's own tests in native/tests, on the library that is installed, once for each instruction set."""

import pytest
from native_tests import BUILD, ROOT, build, run

from qkv.kernels import supported_isas


@pytest.fixture(scope="module")
def built() -> None:
    """Nothing is left to do after `make`, which builds them first."""
    build()


REPEATED = {"test_masks", "test_scores", "test_sizes"}
"""Of the grid in tests/contract, without Python."""


def test_the_kernel_passes_what_the_contract_in_python_lacks(built: None) -> None:
    files = {path.stem for path in (ROOT / "native/tests").glob("test_*.cpp")}
    assert files > REPEATED
    found = run(BUILD / "qkv_tests", *(f"{name}.cpp:" for name in sorted(files - REPEATED)))
    assert "SKIPPED" not in found


@pytest.mark.long
@pytest.mark.parametrize("isa", supported_isas())
def test_the_kernel_passes_its_own_tests(built: None, isa: str) -> None:
    found = run("ctest", "--test-dir", BUILD, "-R", f"^{isa}$", "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in found and "Skipped" not in found
