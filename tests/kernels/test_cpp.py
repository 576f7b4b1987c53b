"""The kernel's own tests in native/tests, on the library that is installed, once for each instruction set."""

import pytest
from native_tests import BUILD, build, run

from qkv.kernels import supported_isas


@pytest.fixture(scope="module")
def built() -> None:
    """Nothing is left to do after `make`, which builds them first."""
    build()


# The contract in Python runs on all of them; here, the best does in `make test`.
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.long if i else ()) for i, isa in enumerate(supported_isas())]
)
def test_the_kernel_passes_its_own_tests(built: None, isa: str) -> None:
    found = run("ctest", "--test-dir", BUILD, "-R", f"^{isa}$", "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in found and "Skipped" not in found
