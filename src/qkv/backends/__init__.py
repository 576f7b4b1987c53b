"""The backends, in the order in which ``auto`` tries them."""

import threading
import warnings
from types import ModuleType
from typing import NamedTuple, Protocol, cast

import torch

from qkv import kernels
from qkv.arguments import more
from qkv.backends import flex, native, reference, sdpa
from qkv.backends.result import Result
from qkv.problem import Problem


class Backend(Protocol):
    """Interface of a backend module. Those in `BACKENDS` are chosen from, and run by the contract tests."""

    NAME: str

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot solve the problem; empty if it can."""
        ...

    def why_rather_not(self, problem: Problem) -> list[str]:
        """Every reason why ``auto`` should skip this backend although it can solve the problem."""
        ...

    def run(self, problem: Problem) -> Result:
        """The result of a problem for which `why_not` is empty."""
        ...


class BackendError(NotImplementedError):
    """Raised if no backend, or not the requested one, can solve a problem. Lists every reason."""


def _backend(module: ModuleType) -> Backend:
    return cast(Backend, module)


BACKENDS: tuple[Backend, ...] = (_backend(native), _backend(sdpa), _backend(flex), _backend(reference))


class Explanation(NamedTuple):
    """The backend that a call would use, and the reasons against each of the others."""

    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines: list[str] = []
        for name, reasons in self.reasons.items():
            if name == self.chosen:
                verdict = f"chosen: {kernels.description()}" if name == native.NAME else "chosen"
            else:
                verdict = "; ".join(reasons) or "comes later in the order"
            lines.append(f"{name:<{width}}  {verdict}")
        return "\n".join(lines)


def choose(caller: str, problem: Problem, backend: str) -> Backend:
    """The backend for the problem: the requested one, or for ``auto`` the first without a reason against it.

    Raises:
        ValueError: for an unknown name.
        BackendError: if the requested one, or for ``auto`` any, cannot solve it.
    """
    if backend == "auto":
        for candidate in BACKENDS:
            if not candidate.why_not(problem) and not candidate.why_rather_not(problem):
                return candidate
        raise BackendError(f"{caller}: no backend can solve this call.{more('backend')}\n{explain(problem)}")
    for candidate in BACKENDS:
        if backend == candidate.NAME:
            reasons = candidate.why_not(problem)
            if reasons:
                against = "; ".join(reasons)
                raise BackendError(f"{caller}: backend {backend!r} cannot solve this call: {against}.{more('backend')}")
            return candidate
    names = ", ".join(repr(candidate.NAME) for candidate in BACKENDS)
    raise ValueError(f"{caller}: backend must be 'auto' or one of {names}; got {backend!r}.")


def solve(caller: str, problem: Problem, backend: str) -> Result:
    """The result of the backend that `choose` returns, which raises as it does."""
    problem = _readable(problem, backend)
    chosen = choose(caller, problem, backend)
    if not kernels.is_tracing():
        last.choice = chosen.NAME
        last.reasons = [] if chosen.NAME == native.NAME else native.why_not(problem) + native.why_rather_not(problem)
        if backend == "auto" and chosen.NAME != native.NAME:
            _warn_without_kernel(caller, problem)
    return chosen.run(problem)


class _Last(threading.local):
    """The choice that `solve` made last in this thread, for reports. The fast path makes none."""

    choice: str | None = None
    reasons: list[str] = []  # noqa: RUF012 (replaced, never changed)
    """against the native backend, where another was chosen"""


last = _Last()

_has_warned = False


def _warn_without_kernel(caller: str, problem: Problem) -> None:
    """Warns, once in a process, of a call that the kernel would have computed if there were one."""
    global _has_warned
    absent = kernels.absence()
    if _has_warned or absent is None or not problem.q.is_cpu or problem.q.dtype is torch.float64:
        return
    _has_warned = True
    warnings.warn(
        f"{caller}: qkv runs without its compiled kernel: {absent}. Calls on a CPU take torch's attention, which is "
        f"slower; this is said once.{more('no-kernel')}",
        RuntimeWarning,
        stacklevel=4,
    )


def _readable(problem: Problem, backend: str) -> Problem:
    """The problem, without pages unless this backend reads them in place."""
    if problem.pages is None:
        return problem
    reads_pages = backend in ("auto", native.NAME) and not problem.needs_grad and not native.why_not(problem)
    return problem if reads_pages else problem.gathered()


def explain(problem: Problem) -> Explanation:
    """The backend that ``auto`` chooses for the problem, and every reason against each of the others."""
    problem = problem.gathered()
    reasons = {backend.NAME: backend.why_not(problem) + backend.why_rather_not(problem) for backend in BACKENDS}
    chosen = next((name for name, against in reasons.items() if not against), None)
    return Explanation(chosen, reasons)
