"""`accelerate`: models of others on our kernel, unchanged."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from qkv.integrations.torch.dispatcher import listener, routed

Model = TypeVar("Model", bound=nn.Module)


class Call(NamedTuple):
    """A kind of call, as a `Report` counts it."""

    where: str
    """module, line and function that made it"""
    query: tuple[int, ...]
    key: tuple[int, ...]
    reason: str | None
    """why it was left to torch; None where it was taken"""


class Report:
    """What `accelerate` took and what it left to torch, and why. ``str()`` of it is a table.

    Attributes:
        calls: how often each `Call` was made.
    """

    def __init__(self) -> None:
        self.calls: Counter[Call] = Counter()

    @property
    def taken(self) -> int:
        """How many calls qkv answered."""
        return sum(count for call, count in self.calls.items() if call.reason is None)

    @property
    def left(self) -> int:
        """How many calls were left to torch."""
        return self.calls.total() - self.taken

    def __str__(self) -> str:
        if not self.calls:
            return "No call of torch's attention on CPU. nn.MultiheadAttention makes one with need_weights=False."
        rows = [("calls", "where", "query", "key", "by")]
        rows += [
            (str(count), call.where, str(call.query), str(call.key), f"torch: {call.reason}" if call.reason else "qkv")
            for call, count in self.calls.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def _count(self, query: Tensor, key: Tensor, reason: str | None) -> None:
        frame = sys._getframe(2)  # of whoever called the operator
        where = f"{frame.f_globals.get('__name__')}:{frame.f_lineno} {frame.f_code.co_name}"
        self.calls[Call(where, tuple(query.shape), tuple(key.shape), reason)] += 1


@overload
def accelerate() -> AbstractContextManager[Report]: ...
@overload
def accelerate(model: Model, *, enabled: bool = True) -> Model: ...
def accelerate(model: Any = None, *, enabled: bool = True) -> Any:
    """Answers torch's own attention calls with our kernel, wherever the answer is the same.

    ``with accelerate() as report:`` holds for all calls of this thread (or asyncio task) within the block, and tells in
    ``report`` what was taken, what was left to torch, and why. ``accelerate(model)`` holds for this model from now on,
    in whichever thread it runs; ``accelerate(model, enabled=False)`` takes it back.

    Taken are calls of ``scaled_dot_product_attention`` on CPU, under whatever name the model has bound it, for which
    `attention` would choose the native kernel, and the fused inference of ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoderLayer``. All else runs as ever: fp64, other devices, nested and other special tensors,
    ``torch.func``, forward-mode derivatives, programs that are compiled or exported, shapes that broadcast, and
    whatever torch refuses. ``nn.MultiheadAttention`` makes no such call where it has to return the weights
    (``need_weights=True``, its default) and a gradient is wanted or the module is in training.

    Results, gradients, layouts and errors are torch's, up to rounding, with these exceptions: a masked key has no
    influence even where it holds NaN or inf; dropout draws other elements from the same seed; a second derivative is
    refused where torch's unfused kernel would have one (``sdpa_kernel(SDPBackend.MATH)`` leaves such calls to torch).
    A model with activation checkpoints recomputes in its backward pass, which then belongs into the block too.

    From the first use on, calls of attention on CPU that are not routed cost some microseconds more in this process.
    Have no other thread inside of one while the first block is entered. Take a model back for ``torch.jit.script`` and
    for ``nn.DataParallel``, which look for its own ``forward``.

    Args:
        model: a module, changed in place: the ``forward`` of its modules is wrapped. Deep copies and pickles stay
            accelerated; a module added later is not. (A ``copy.copy`` calls its original, as with whatever else sets a
            ``forward``.)
        enabled: False takes an earlier ``accelerate(model)`` back.

    Returns:
        the model; or without one, a context manager that gives a `Report`.

    Raises:
        TypeError: for a model that is not an ``nn.Module``.

    Example:
        >>> import torch, qkv
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> with qkv.accelerate() as report:
        ...     out = model(torch.randn(2, 10, 32))
        >>> report.taken, report.left
        (1, 0)
        >>> model = qkv.accelerate(model)

    Source: the semantics of ``torch.nn.functional.scaled_dot_product_attention`` on CPU.
    """
    if model is None:
        return _reported()
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module; got {type(model).__name__}.")
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _Routed):
            if not enabled:
                forward.restore(module)
        elif enabled and _may_attend(module):
            module.__dict__["forward"] = _Routed(module)
    return model


@contextmanager
def _reported() -> Iterator[Report]:
    report = Report()
    with routed(report._count):
        yield report


class _Routed:
    """A module's forward, whose calls are routed: what its class says at each call, or what its instance had said."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def forward(self) -> Callable[..., Any]:
        """What is routed."""
        if self.own is not None:
            return self.own
        kind = type(self.module)
        found: Any = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
        return found.__get__(self.module, kind)  # type: ignore[no-any-return]

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # callers read the signature
        return self.forward

    @property
    def __code__(self) -> Any:  # and torch.export the source
        return self.forward.__code__

    @property
    def __name__(self) -> str:
        return getattr(self.forward, "__name__", "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or listener() is not None:
            return self.forward(*args, **kwargs)
        with routed(_forget):
            return self.forward(*args, **kwargs)

    def restore(self, module: nn.Module) -> None:
        if self.own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self.own


def _forget(query: Tensor, key: Tensor, reason: str | None) -> None:
    """Keeps no report."""


def _may_attend(module: nn.Module) -> bool:
    """Whether the module could call attention by itself or through others: not the linear layers and norms of torch."""
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")
