"""`ranks`: processes of 2, 3, 4 or more ranks, which the tests of a session share."""

import functools
from collections.abc import Callable, Iterator

import pytest
from parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(3).run(function, *args)`` calls a function on three ranks, and returns what each returns."""
    started: list[Ranks] = []

    @functools.cache
    def of(count: int) -> Ranks:
        started.append(Ranks(count))
        return started[-1]

    yield of
    for each in started:
        each.stop()
