"""A little of each campaign of `make fuzz`, and all seeds that have once failed."""

import pytest
import torch
from fuzz import attention

SEEDS = [0, 1, 17, 24]
"""Draws that have failed, forward or backward."""


@pytest.fixture(autouse=True)
def _threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("seed", [*SEEDS, *range(1000, 1020)])
def test_a_random_call_is_right_on_every_backend(seed: int, backward: bool) -> None:
    _, wrong = attention.check(seed, backward=backward)
    assert not wrong, "\n".join(wrong)
