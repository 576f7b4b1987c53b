"""`accelerate`: torch's attention calls of unmodified models, routed to the kernel."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from qkv.integrations.torch.dispatcher import current_callback, routed

Model = TypeVar("Model", bound=nn.Module)


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
            return "No call of torch's attention on CPU. nn.MultiheadAttention makes one only with need_weights=False."
        rows = [("calls", "where", "query", "key", "by")]
        rows += [
            (str(count), call.where, str(call.query), str(call.key), f"torch: {call.reason}" if call.reason else "qkv")
            for call, count in self.calls.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def _count(self, query: Tensor, key: Tensor, reason: str | None) -> None:
        """Counts a call, with the location of its caller."""
        frame = sys._getframe(2)  # the caller of the operator
        where = f"{frame.f_globals.get('__name__')}:{frame.f_lineno} {frame.f_code.co_name}"
        self.calls[Call(where, tuple(query.shape), tuple(key.shape), reason)] += 1


@overload
def accelerate() -> AbstractContextManager[Report]: ...
@overload
def accelerate(model: Model, *, enabled: bool = True) -> Model: ...
def accelerate(model: Any = None, *, enabled: bool = True) -> Any:
    """Routes torch's attention calls to qkv's kernel where it computes the same.

    ``with accelerate() as report:`` routes all calls of this thread (or asyncio task) in the block, and counts in
    ``report`` the routed ones and those that fell back to torch, with reasons. ``accelerate(model)`` routes all calls
    of a model, in any thread, until ``accelerate(model, enabled=False)``.

    Routed are CPU calls of ``scaled_dot_product_attention``, under any name that the model has bound it to, for which
    `attention` would choose the native kernel, and the fused inference of ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoderLayer``. All others fall back: fp64, other devices, nested tensors and other subclasses,
    ``torch.func``, forward-mode derivatives, compiled and exported programs, shapes that broadcast, and calls that
    torch refuses. ``nn.MultiheadAttention`` makes no such call if it returns weights (``need_weights=True``, the
    default) and is in training or needs gradients.

    Results, gradients, layouts and errors are torch's, up to rounding, with these exceptions: a masked key has no
    influence even if it contains NaN or inf; dropout draws other elements from the same seed; second derivatives raise,
    which torch's unfused kernel has (``sdpa_kernel(SDPBackend.MATH)`` leaves calls to torch). With activation
    checkpointing, run backward inside the block as well.

    From the first use on, CPU calls of attention that are not routed cost some microseconds more in this process. Enter
    the first block while no other thread is inside an attention call. Call ``accelerate(model, enabled=False)`` before
    ``torch.jit.script`` and ``nn.DataParallel``, which need the original ``forward``.

    Args:
        model: a module, modified in place: the ``forward`` of its modules is wrapped. Deep copies and pickles stay
            accelerated; modules added later are not. (A ``copy.copy`` calls its original, as with every ``forward``
            that is set on an instance.)
        enabled: False undoes an earlier ``accelerate(model)``.

    Returns:
        The model; without one, a context manager that returns a `Report`.

    Raises:
        TypeError: for a model that is not an ``nn.Module``.

    Example:
        >>> import torch, qkv
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> with qkv.accelerate() as report:
        ...     out = model(torch.randn(2, 10, 32))
        >>> report.routed, report.fallback
        (1, 0)
        >>> model = qkv.accelerate(model)

    Source: the semantics of ``torch.nn.functional.scaled_dot_product_attention`` on CPU.
    """
    if model is None:
        return _reporting()
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module; got {type(model).__name__}.")
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, _RoutedForward):
            if not enabled:
                forward.restore(module)
        elif enabled and _may_attend(module):
            module.__dict__["forward"] = _RoutedForward(module)
    return model


@contextmanager
def _reporting() -> Iterator[Report]:
    report = Report()
    with routed(report._count):
        yield report


class _RoutedForward:
    """The forward of a module, with calls routed: the current one of its class, or the former one of the instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def forward(self) -> Callable[..., Any]:
        """The wrapped forward."""
        if self.own is not None:
            return self.own
        kind = type(self.module)
        forward: Any = next(vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base))
        return forward.__get__(self.module, kind)  # type: ignore[no-any-return]

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # for readers of the signature
        return self.forward

    @property
    def __code__(self) -> Any:  # for torch.export, which reads the source
        return self.forward.__code__

    @property
    def __name__(self) -> str:
        return getattr(self.forward, "__name__", "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler of torch 2.9 cannot call the bound method of `forward`
            return self.own(*args, **kwargs) if self.own else type(self.module).forward(self.module, *args, **kwargs)
        if current_callback() is not None:
            return self.forward(*args, **kwargs)
        with routed(_ignore):
            return self.forward(*args, **kwargs)

    def restore(self, module: nn.Module) -> None:
        """Undoes the wrapping of the module's forward."""
        if self.own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self.own


def _ignore(query: Tensor, key: Tensor, reason: str | None) -> None:
    """Callback without a report."""


def _may_attend(module: nn.Module) -> bool:
    """Whether a call of the module may reach attention, unlike torch's own modules without children."""
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")
