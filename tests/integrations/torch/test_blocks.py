"""Blocks of `accelerate` may be left in any order and from any thread; the innermost open one is in effect."""

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
from qkv.integrations import calls
from qkv.integrations.torch import dispatcher
from qkv.integrations.torch.accelerate import Report

pytestmark = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))

Q = torch.randn(1, 2, 5, 8)


@pytest.fixture(autouse=True)
def not_routed_before_and_after() -> Iterator[None]:
    assert not is_routed()
    yield
    assert not is_routed()


def is_routed() -> bool:
    """Whether the kernel computes a call made in the current thread and task."""
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
    """All orders of entering and leaving ``count`` blocks: each number occurs twice, first to enter, then to leave."""
    return sorted(set(itertools.permutations(sorted([*range(count)] * 2))))


@pytest.mark.parametrize("left_by", ["exit", "an exception", "closing a generator", "collecting a generator", "del"])
def test_blocks_that_overlap_in_any_order(left_by: str) -> None:
    """A call is counted by the open block entered last, if any is open."""

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
            counts = {n: report.routed for n, report in reports.items()}
            assert is_routed() == bool(open_blocks), order
            notified = [n for n, report in reports.items() if report.routed > counts[n]]
            assert notified == [n for n in entered if n in open_blocks][-1:], order
        assert not is_routed()


@pytest.mark.parametrize("how", ["exit", "close", "collect"])
def test_a_block_left_in_another_thread_has_no_effect(how: str) -> None:
    def within() -> Iterator[None]:
        with qkv.accelerate():
            yield

    block, generator = qkv.accelerate(), within()
    generators: list[object] = []
    if how == "exit":
        block.__enter__()
    else:
        next(generator)
        generators.append(generator)
        del generator
    assert is_routed()
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            if how == "exit":
                block.__exit__(None, None, None)
            elif how == "close":
                generators.pop().close()  # type: ignore[attr-defined]
            else:
                generators.clear()
                gc.collect()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert not errors and not is_routed()


def test_a_task_is_not_routed_after_the_block_it_was_created_in() -> None:
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


def test_concurrent_tasks_have_separate_blocks() -> None:
    async def worker(number: int) -> int:
        await asyncio.sleep(0)
        with qkv.accelerate() as report:
            for _ in range(number):
                F.scaled_dot_product_attention(Q, Q, Q)
                await asyncio.sleep(0)
        assert not is_routed()
        return report.routed

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


def test_a_copied_context_is_not_routed_after_the_block() -> None:
    with qkv.accelerate():
        context = contextvars.copy_context()
        assert context.run(is_routed)
    assert not context.run(is_routed)


def test_a_block_within_a_generator_lasts_until_it_ends() -> None:
    """Such as a pytest fixture or a context manager."""

    @contextlib.contextmanager
    def own() -> Iterator[Report]:
        with qkv.accelerate() as report:
            yield report

    with own() as report:
        F.scaled_dot_product_attention(Q, Q, Q)
    assert report.routed == 1 and not is_routed()
    with contextlib.ExitStack() as stack:
        reports = [stack.enter_context(own()) for _ in range(3)]
        F.scaled_dot_product_attention(Q, Q, Q)
    assert [report.routed for report in reports] == [0, 0, 1]


def test_a_chain_of_overlapping_blocks_does_not_grow() -> None:
    block = qkv.accelerate()
    block.__enter__()
    for _ in range(100):
        other = qkv.accelerate()
        other.__enter__()
        block.__exit__(None, None, None)
        block = other
    chained, depth = calls._innermost.get(), 0
    while chained is not None:
        chained, depth = chained.outer, depth + 1
    assert depth <= 2
    block.__exit__(None, None, None)


class Attend(nn.Module):
    """A module that raises, or calls attention."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ZeroDivisionError
        return F.scaled_dot_product_attention(x, x, x)


def test_a_model_that_raises_or_is_called_within_a_block() -> None:
    model = qkv.accelerate(Attend(fails=True))
    with pytest.raises(ZeroDivisionError):
        model(Q)
    assert not is_routed()
    with qkv.accelerate() as report:
        with pytest.raises(ZeroDivisionError):
            model(Q)
        qkv.accelerate(Attend(fails=False))(Q)
    assert report.routed == 1
