"""What holds for all tests."""

from collections.abc import Iterator

import pytest
from solver import Solver


@pytest.fixture(autouse=True)
def solver_at_work(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes a ``solver`` runs on its instruction set, gradients that it takes included."""
    solver = getattr(request.node, "callspec", None) and request.node.callspec.params.get("solver")
    if not isinstance(solver, Solver):
        yield
        return
    with solver.at_work():
        yield
