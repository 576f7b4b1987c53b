"""The ways to compute attention, in the order in which ``auto`` asks them."""

from types import ModuleType
from typing import NamedTuple, Protocol, cast

from qkv.backends import flex, native, reference, sdpa
from qkv.backends.result import Result
from qkv.problem import Problem


class Backend(Protocol):
    """What a backend module gives. A new one joins, and joins the contract tests, by being listed in `BACKENDS`."""

    NAME: str

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot solve the problem; empty where it can."""
        ...

    def why_rather_not(self, problem: Problem) -> list[str]:
        """Every reason why ``auto`` should pass it over although it could."""
        ...

    def run(self, problem: Problem) -> Result:
        """Solve a problem that `why_not` has no reason against."""
        ...


class BackendError(NotImplementedError):
    """No backend, or not the one asked for, can solve a problem. Lists every reason."""


def _backend(module: ModuleType) -> Backend:
    return cast(Backend, module)


BACKENDS: tuple[Backend, ...] = (_backend(native), _backend(sdpa), _backend(flex), _backend(reference))


class Explanation(NamedTuple):
    """Which backend a call would use, and what speaks against each of the others."""

    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines: list[str] = []
        for name, reasons in self.reasons.items():
            verdict = "chosen" if name == self.chosen else "; ".join(reasons) or "comes later in the order"
            lines.append(f"{name:<{width}}  {verdict}")
        return "\n".join(lines)


def choose(caller: str, problem: Problem, backend: str) -> Backend:
    """The backend that solves the problem: the one asked for, or for ``auto`` the first without a reason against.

    Raises:
        ValueError: for an unknown name.
        BackendError: when the one asked for cannot, or none can; an explicit request never falls back.
    """
    if backend == "auto":
        for candidate in BACKENDS:
            if not candidate.why_not(problem) and not candidate.why_rather_not(problem):
                return candidate
        raise BackendError(f"{caller}: no backend can solve this call.\n{explain(problem)}")
    for candidate in BACKENDS:
        if backend == candidate.NAME:
            reasons = candidate.why_not(problem)
            if reasons:
                raise BackendError(f"{caller}: backend {backend!r} cannot solve this call: {'; '.join(reasons)}.")
            return candidate
    names = ", ".join(repr(candidate.NAME) for candidate in BACKENDS)
    raise ValueError(f"{caller}: backend must be 'auto' or one of {names}; got {backend!r}.")


def explain(problem: Problem) -> Explanation:
    """What ``auto`` chooses for the problem, and every reason against each backend."""
    reasons = {backend.NAME: backend.why_not(problem) + backend.why_rather_not(problem) for backend in BACKENDS}
    chosen = next((name for name, against in reasons.items() if not against), None)
    return Explanation(chosen, reasons)
