"""Calls of attention that the integrations answer: who is told of them, and what is counted for a report.

A `block` is told of all calls of its thread or task; `tally` counts those of one module, for `qkv.report`.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

Callback = Callable[[FrameType, Sequence[int], Sequence[int], str | None], None]
"""Called for each attention call with the frame of its caller, the shapes of its queries and of its keys, and the
reason why torch computed it; None if qkv did."""


class _Block:
    """A ``with block(...)``, entered inside of ``outer``."""

    def __init__(self, notify: Callback, outer: "_Block | None") -> None:
        self.notify, self.outer, self.is_open = notify, outer, True


_innermost: ContextVar[_Block | None] = ContextVar("innermost", default=None)
"""The block entered last in this thread or task. It may be closed by now, also by another thread."""


@contextmanager
def block(notify: Callback) -> Iterator[None]:
    """Context manager that has ``notify`` called for each call of this thread or asyncio task.

    Blocks may be closed in any order and from any thread: a generator may outlive the block of its caller or be
    collected in another thread, and a task may outlive the block that it was created in. So closing a block marks it,
    instead of restoring the state before, and the innermost open block is in effect.
    """
    entered = _Block(notify, _open_block())
    _innermost.set(entered)
    try:
        yield
    finally:
        entered.is_open = False
        _innermost.set(_open_block())


def current_callback() -> Callback | None:
    """The callback of the innermost open block of this thread or task; None outside of all blocks."""
    found = _open_block()
    return None if found is None else found.notify


def _open_block() -> _Block | None:
    """The innermost open block of this thread or task. Drops closed ones from the chain."""
    found = _innermost.get()
    while found is not None and not found.is_open:
        found = found.outer
    if found is not None:
        while found.outer is not None and not found.outer.is_open:
            found.outer = found.outer.outer  # else chains of overlapping blocks would grow without bound
    return found


class Call(NamedTuple):
    """The kind of an attention call, by which a `Report` counts."""

    where: str
    """module, line and function of the caller"""
    query: tuple[int, ...]
    key: tuple[int, ...]
    reason: str | None
    """why torch computed it; None if qkv did"""


class Report:
    """Counts of the calls that `accelerate` routed to qkv and of those that fell back to torch. ``str()`` is a table.

    Attributes:
        calls: number of calls of each kind.
    """

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()

    @property
    def routed(self) -> int:
        """Number of calls that qkv computed."""
        return sum(count for call, count in self.calls.items() if call.reason is None)

    @property
    def fallback(self) -> int:
        """Number of calls that torch computed."""
        return self.calls.total() - self.routed

    def __str__(self) -> str:
        if not self.calls:
            return (
                "No call of attention in this block, neither of torch's on a CPU nor of qkv's in a model of "
                "transformers. nn.MultiheadAttention makes one only with need_weights=False; compiled programs, and "
                "models that compute attention by hand, make none."
            )
        merged: dict[tuple[str, str | None], Calls] = {}
        for call, count in self.calls.items():
            merged.setdefault((call.where, call.reason), Calls()).add(call.query, call.key, count)
        return table((calls.row(where, answer(reason)) for (where, reason), calls in merged.items()))

    def count(self, frame: FrameType, query: Sequence[int], key: Sequence[int], reason: str | None) -> None:
        """Counts a call; a ``Callback``."""
        self.calls[Call(place(frame), tuple(query), tuple(key), reason)] += 1


@dataclass
class Calls:
    """The number of calls of one kind, and the least and largest sizes among them."""

    count: int = 0
    query: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    key: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, query: tuple[int, ...], key: tuple[int, ...], count: int = 1) -> None:
        """Adds calls with queries and keys of these shapes."""
        self.count += count
        self.query, self.key = _widened(self.query, query), _widened(self.key, key)

    def row(self, where: str, by: str) -> tuple[str, ...]:
        """The calls as a row of `table`."""
        return str(self.count), where, _shown(self.query), _shown(self.key), by


def table(rows: Iterable[Sequence[str]]) -> str:
    """Calls as text, one kind a line."""
    lines = [("calls", "where", "query", "key", "by"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def answer(reason: str | None) -> str:
    """Who answered a call, as a table says it; ``reason`` is why torch did, None if qkv did."""
    if reason is not None:
        return f"torch: {reason}"
    composed = _composed.get()
    return "qkv" if composed is None else f"qkv: composed: {composed}"


ONE_CALL = "qkv: one call of the kernel"
"""As `answer`, of a module of which the kernel computed all."""


_composed: ContextVar[str | None] = ContextVar("composed", default=None)
"""Why the module that is being called in this thread or task is not computed in one call."""


@contextmanager
def because(reason: str) -> Iterator[None]:
    """Context manager of a module's call that is composed of its parts, for a reason."""
    token = _composed.set(reason)
    try:
        yield
    finally:
        _composed.reset(token)


def place(frame: FrameType) -> str:
    """Module, line and function of a frame."""
    return f"{frame.f_globals.get('__name__')}:{frame.f_lineno} {frame.f_code.co_name}"


def tally(module: nn.Module, where: str, by: str, query: tuple[int, ...] = (), key: tuple[int, ...] = ()) -> None:
    """Counts a call for a module, without state in it: copies, pickles and the module itself do not change."""
    with _lock:
        kinds = _tallies.setdefault(module, {})
        kinds.setdefault((where, by), Calls()).add(query, key)


@dataclass(frozen=True)
class TallyFor:
    """A `Callback` that counts the calls of torch's attention within a module for it. Modules of transformers, which
    call ours, are counted themselves.
    """

    module: nn.Module

    def __call__(self, frame: FrameType, query: Sequence[int], key: Sequence[int], reason: str | None) -> None:
        tally(self.module, place(frame), answer(reason), tuple(query), tuple(key))


def tallied(modules: Iterable[nn.Module]) -> dict[tuple[str, str], Calls]:
    """The calls of these modules so far, by place and by what answered them."""
    found: dict[tuple[str, str], Calls] = {}
    with _lock:
        for module in modules:
            for kind, calls in _tallies.get(module, {}).items():
                total = found.setdefault(kind, Calls())
                total.count += calls.count
                for shapes in zip(calls.query or (), calls.key or (), strict=False):
                    total.add(*shapes, count=0)
    return found


_lock = threading.Lock()
_tallies: WeakKeyDictionary[nn.Module, dict[tuple[str, str], Calls]] = WeakKeyDictionary()


def _widened(
    bounds: tuple[tuple[int, ...], tuple[int, ...]] | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The least and largest sizes, with those of ``shape``."""
    if bounds is None or len(bounds[0]) != len(shape):
        return shape, shape
    least, largest = bounds
    if shape in (least, largest):
        return bounds
    return tuple(map(min, least, shape)), tuple(map(max, largest, shape))


def _shown(bounds: tuple[tuple[int, ...], tuple[int, ...]] | None) -> str:
    """``(2, 8, 1 to 40, 64)``."""
    if bounds is None or not bounds[0]:
        return ""
    sizes = [str(a) if a == b else f"{a} to {b}" for a, b in zip(*bounds, strict=True)]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
