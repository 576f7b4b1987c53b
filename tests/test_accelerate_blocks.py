"""Blocks of `accelerate` are left in any order, from anywhere, by anything: what is left is off, what is not is on."""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv import kernels
from qkv.integrations.torch import dispatcher
from qkv.integrations.torch.accelerate import Report

pytestmark = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))

Q = torch.randn(1, 2, 5, 8)


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    assert not is_routed()
    yield
    assert not is_routed()


def is_routed() -> bool:
    """Whether the kernel answers a call made here and now."""
    solved, actual = [], dispatcher.solve

    def solve(*call: object) -> Tensor | str:
        solved.append(call)
        return actual(*call)  # type: ignore[arg-type]

    dispatcher.solve = solve
    try:
        F.scaled_dot_product_attention(Q, Q, Q)
    finally:
        dispatcher.solve = actual
    return bool(solved)


def orders(count: int) -> list[tuple[int, ...]]:
    """Every order of entering and leaving so many blocks: the first time that a number comes, it is entered."""
    return sorted(set(itertools.permutations(sorted([*range(count)] * 2))))


@pytest.mark.parametrize("left_by", ["exit", "an exception", "closing a generator", "collecting a generator", "del"])
def test_blocks_that_overlap_in_any_order(left_by: str) -> None:
    """The block entered last of those that are open is told of a call; with none open, nobody is."""

    def within() -> Iterator[Report]:
        with qkv.accelerate() as report:
            yield report

    for order in orders(3):
        open_blocks: dict[int, object] = {}
        reports: dict[int, Report] = {}
        entered: list[int] = []
        for number in order:
            if number not in reports:
                entered.append(number)
                if "generator" in left_by:
                    generator = within()
                    reports[number], open_blocks[number] = next(generator), generator
                    del generator
                else:
                    block = qkv.accelerate()
                    reports[number], open_blocks[number] = block.__enter__(), block
                    del block
            elif left_by == "exit":
                open_blocks.pop(number).__exit__(None, None, None)  # type: ignore[attr-defined]
            elif left_by == "an exception":
                error = ValueError("in the block")
                with contextlib.suppress(ValueError):
                    open_blocks.pop(number).__exit__(ValueError, error, None)  # type: ignore[attr-defined]
            elif left_by == "closing a generator":
                open_blocks.pop(number).close()  # type: ignore[attr-defined]
            else:
                del open_blocks[number]
                gc.collect(0)
            counts = {n: report.taken for n, report in reports.items()}
            assert is_routed() == bool(open_blocks), order
            told = [n for n, report in reports.items() if report.taken > counts[n]]
            assert told == [n for n in entered if n in open_blocks][-1:], order
        assert not is_routed()


@pytest.mark.parametrize("how", ["exit", "close", "collect"])
def test_a_block_left_in_another_thread_is_off(how: str) -> None:
    def within() -> Iterator[None]:
        with qkv.accelerate():
            yield

    block, generator = qkv.accelerate(), within()
    held: list[object] = []
    if how == "exit":
        block.__enter__()
    else:
        next(generator)
        held.append(generator)
        del generator
    assert is_routed()
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            if how == "exit":
                block.__exit__(None, None, None)
            elif how == "close":
                held.pop().close()  # type: ignore[attr-defined]
            else:
                held.clear()
                gc.collect()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert not errors and not is_routed()


def test_a_task_made_within_a_block_does_not_outlive_it() -> None:
    async def main() -> None:
        left = asyncio.Event()

        async def inner() -> tuple[bool, bool]:
            during = is_routed()
            started.set()
            await left.wait()
            return during, is_routed()

        started = asyncio.Event()
        with qkv.accelerate():
            task = asyncio.create_task(inner())
            await started.wait()
            assert is_routed()
        left.set()
        assert await task == (True, False)

    asyncio.run(main())


def test_tasks_beside_each_other_have_blocks_of_their_own() -> None:
    async def worker(number: int) -> int:
        await asyncio.sleep(0)
        with qkv.accelerate() as report:
            for _ in range(number):
                F.scaled_dot_product_attention(Q, Q, Q)
                await asyncio.sleep(0)
        assert not is_routed()
        return report.taken

    async def main() -> list[int]:
        return list(await asyncio.gather(*(worker(number) for number in range(1, 6))))

    assert asyncio.run(main()) == [1, 2, 3, 4, 5]


def test_a_task_that_is_cancelled_leaves_its_block() -> None:
    async def main() -> None:
        async def stuck() -> None:
            with qkv.accelerate():
                await asyncio.sleep(3600)

        task = asyncio.create_task(stuck())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not is_routed()

    asyncio.run(main())


def test_a_copied_context_ends_with_the_block() -> None:
    with qkv.accelerate():
        context = contextvars.copy_context()
        assert context.run(is_routed)
    assert not context.run(is_routed)


def test_a_generator_suspended_within_its_block_keeps_it_until_it_ends() -> None:
    """As a fixture of pytest, or a context manager of somebody's own, does."""

    @contextlib.contextmanager
    def own() -> Iterator[Report]:
        with qkv.accelerate() as report:
            yield report

    with own() as report:
        F.scaled_dot_product_attention(Q, Q, Q)
    assert report.taken == 1 and not is_routed()
    with contextlib.ExitStack() as stack:
        reports = [stack.enter_context(own()) for _ in range(3)]
        F.scaled_dot_product_attention(Q, Q, Q)
    assert [report.taken for report in reports] == [0, 0, 1]


def test_blocks_hand_over_hand_keep_nothing_of_those_before() -> None:
    block = qkv.accelerate()
    block.__enter__()
    for _ in range(100):
        other = qkv.accelerate()
        other.__enter__()
        block.__exit__(None, None, None)
        block = other
    held, depth = dispatcher._innermost.get(), 0
    while held is not None:
        held, depth = held.outer, depth + 1
    assert depth <= 2
    block.__exit__(None, None, None)


class Attend(nn.Module):
    """A module that enters a block of its own and fails, or calls another."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ZeroDivisionError
        return F.scaled_dot_product_attention(x, x, x)


def test_a_model_that_fails_or_is_called_within_a_block_changes_nothing() -> None:
    model = qkv.accelerate(Attend(fails=True))
    with pytest.raises(ZeroDivisionError):
        model(Q)
    assert not is_routed()
    with qkv.accelerate() as report:
        with pytest.raises(ZeroDivisionError):
            model(Q)
        qkv.accelerate(Attend(fails=False))(Q)
    assert report.taken == 1
