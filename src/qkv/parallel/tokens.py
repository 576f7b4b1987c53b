"""`Tokens`: which positions of a sequence each rank of a mesh holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qkv.arguments import require_count, require_int, require_tensors
from qkv.masks import FULL, Mask
from qkv.parallel.agreement import agreed, number_of
from qkv.parallel.compiling import between_graphs
from qkv.parallel.exchange import Route, exchange
from qkv.parallel.plan import joining, pairs
from qkv.parallel.runs import Layout, Runs, even, require_layout, rows_of, zigzag


@dataclass(frozen=True, slots=True, repr=False)
class Tokens:
    """Which positions of a sequence each rank holds: a frozen value, equal on all ranks.

    A rank holds some runs of positions, and has a row for each of them, run after run. Runs may have any lengths, and a
    rank may have none: nothing need be divisible.

    Args:
        runs: for each rank, its runs as ``(start, stop)``, at most 64. Together they hold each position from 0 on once.
        mesh: of one dimension.

    Raises:
        TypeError: for runs that are not pairs of ints, and anything but a DeviceMesh.
        ValueError: for runs that overlap or leave a gap, a mesh of more dimensions, and another number of ranks.

    Example:
        >>> from qkv import parallel
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> mesh = init_device_mesh("cpu", (4,))  # doctest: +SKIP
        >>> tokens = parallel.Tokens.zigzag(1000, mesh)  # doctest: +SKIP
        >>> x = tokens.take(x, dim=1)  # doctest: +SKIP

    Source: torch's ``context_parallel`` and its load balancers, with runs of any lengths; the fragments of
    attention-gym's ``ContextParallelPlan``.
    """

    runs: Layout
    mesh: DeviceMesh

    def __post_init__(self) -> None:
        _require_mesh("Tokens", self.mesh)
        object.__setattr__(self, "runs", require_layout("Tokens", self.runs, self.mesh.size()))

    @classmethod
    def even(cls, n: int, mesh: DeviceMesh) -> "Tokens":
        """One run for each rank, in order, whose lengths differ by at most 1.

        For windows and full masks, under which queries see as many keys anywhere.
        """
        return cls(even(_length("Tokens.even", n, mesh), mesh.size()), mesh)

    @classmethod
    def zigzag(cls, n: int, mesh: DeviceMesh) -> "Tokens":
        """For each rank one run from the front and one from the back, of 2 P in all.

        For causal masks, under which later queries see more keys. Windows send twice as much as with `even`.
        """
        return cls(zigzag(_length("Tokens.zigzag", n, mesh), mesh.size()), mesh)

    @classmethod
    def best(cls, n: int, mesh: DeviceMesh, mask: Mask | None = None) -> "Tokens":
        """`even` or `zigzag`: the one whose busiest rank has fewer scores to compute; `even` if that is the same.

        Args:
            n: number of tokens.
            mesh: of one dimension.
            mask: of queries and keys at the same positions; all are visible if None.
        """
        _length("Tokens.best", n, mesh)
        mask = FULL if mask is None else mask
        if not isinstance(mask, Mask):
            raise TypeError(f"Tokens.best: mask must be a qkv.Mask or None; got {type(mask).__name__}.")
        layouts = [even(n, mesh.size()), zigzag(n, mesh.size())]
        work = [max(sum(pairs(mask, run, (0, n), 0) for run in runs) for runs in layout) for layout in layouts]
        return cls(layouts[work[1] < work[0]], mesh)

    @property
    def length(self) -> int:
        """Number of tokens of all ranks."""
        return sum(map(rows_of, self.runs))

    @property
    def rank(self) -> int:
        """The place of this process in the mesh."""
        return self.mesh.get_local_rank()

    @property
    def own(self) -> Runs:
        """The runs of this rank."""
        return self.runs[self.rank]

    @property
    def rows(self) -> int:
        """Number of tokens of this rank."""
        return rows_of(self.own)

    @property
    def positions(self) -> Tensor:
        """The positions of this rank's rows, int64 ``(rows,)``, on the device of the mesh."""
        device = self.mesh.device_type
        return torch.cat([torch.arange(*run, device=device) for run in self.own or ((0, 0),)])

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's rows of a tensor that has all of them, in dimension ``dim``. Differentiable.

        Take labels as well as inputs; shift labels before.

        Raises:
            TypeError: unless x is a tensor.
            ValueError: for another number of rows.
        """
        self._require_rows("Tokens.take", x, dim, self.length, "the layout is of", "tokens")
        parts = [x.narrow(dim, run.start, run.stop - run.start) for run in self.own]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    @between_graphs
    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rows of all ranks, in order, on each of them: the inverse of `take`.

        Differentiable: the gradient of a row is the sum of those that the ranks have for it, as if their losses were
        added. All ranks must call it, and its backward pass if any does.

        Args:
            x: with this rank's rows in dimension ``dim``.
            dim: the dimension.

        Raises:
            TypeError: unless x is a tensor.
            ValueError: for another number of rows than the layout gives to this rank, and for rows of other shapes on
                other ranks.
        """
        route = self.route._replace(caller="Tokens.join")

        def make() -> Tensor:
            self._require_rows("Tokens.join", x, dim, self.rows, f"the layout gives rank {self.rank}", "rows")
            return x.movedim(dim, 0)

        def described(first: Tensor) -> dict[str, str]:
            return {"tokens": repr(self.runs), "x": f"<{first.dtype}, rows of {tuple(first.shape[1:])}>"}

        first = agreed("Tokens.join", route, make, described)
        rows = first.reshape(1, 1, len(first), math.prod(first.shape[1:]))
        route = route._replace(call=number_of(described(first)))
        found = exchange(joining(self.runs, self.rank), route, [rows])
        joined = found.kinds[0][0][0]
        return joined.reshape(self.length, *first.shape[1:]).movedim(0, dim)

    @property
    def route(self) -> Route:
        """The ranks, for exchanges."""
        return Route(self.mesh.get_group(), self.rank, self.mesh.size())

    def _require_rows(self, caller: str, x: object, dim: int, rows: int, whose: str, what: str) -> None:
        require_tensors(caller, x=x)
        require_int(caller, "dim", dim)
        assert isinstance(x, Tensor)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != rows:
            raise ValueError(
                f"{caller}: {whose} {rows} {what}, so x must have as many in dimension {dim}; "
                f"got shape {tuple(x.shape)}."
            )

    def __repr__(self) -> str:
        runs = ", ".join(f"{rank}: {_written(own)}" for rank, own in enumerate(self.runs[:8]))
        return f"Tokens({self.length} over {len(self.runs)} ranks; {runs}{', ...' if len(self.runs) > 8 else ''})"


class Whole:
    """The layout of keys that every rank has all of: `WHOLE`."""

    def __repr__(self) -> str:
        return "WHOLE"


WHOLE = Whole()
"""In place of a layout of keys: every rank has all of them, such as a short context."""


def _written(runs: Runs) -> str:
    return " ".join(f"{start}..{stop}" for start, stop in runs) or "none"


def _length(caller: str, n: int, mesh: object) -> int:
    require_count(caller, "n", n, 0, ", a number of tokens")
    _require_mesh(caller, mesh)
    return n


def _require_mesh(caller: str, mesh: object) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{caller}: mesh must be a torch.distributed DeviceMesh; got {type(mesh).__name__}. "
            'Use init_device_mesh("cpu", (ranks,)).'
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"{caller}: mesh must have one dimension; got {mesh.ndim}. Take one of them by its name: mesh['cp']."
        )
