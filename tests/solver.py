"""`Solver`: a backend on a device, or the kernel with one instruction set, as run by the contract tests."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case
from torch import Tensor
from torch._dynamo import _trace_wrapped_higher_order_op as indexing
from torch.nn.attention import flex_attention

import qkv
from qkv import kernels
from qkv.backends import BACKENDS, Backend, flex, native
from qkv.problem import make_problem

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@cache
def library(isa: str) -> kernels.Library | str:
    """The kernel with this instruction set, loaded from a copy under another name."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("QKV_ISA", isa)
        return kernels.load(shutil.copy(kernels.LIBRARY, Path(folder) / f"{isa}.so"))


class Solver(NamedTuple):
    """Takes and returns tensors on CPU, where oracle and peer wait, and computes on its device.

    A test that takes one as ``solver`` runs within `at_work` (conftest.py); another enters it on its own.
    """

    backend: Backend
    device: str = "cpu"
    isa: str | None = None
    """an instruction set of the kernel other than the default one"""

    def __str__(self) -> str:
        return "-".join(
            [self.backend.NAME, *([self.device] if self.device != "cpu" else []), *filter(None, [self.isa])]
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it, calls go to the instruction set of this solver; FlexAttention on CPU goes without Dynamo.

        Tracing takes a hundred times as long as the operations; contract/test_grid.py traces once, apart. Tensors are
        indexed without the function that gives them gradients, which takes half of the time; there are none on CPU.
        """
        with pytest.MonkeyPatch.context() as patch:
            if self.backend is flex and self.device == "cpu":
                patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
                patch.setattr(indexing, "mod_index", torch.ops.aten.index.Tensor)
            if self.isa is None:
                yield
                return
            with kernels.use(library(self.isa)):
                yield

    def attention(self, case: Case, inputs: dict[str, Tensor]) -> Tensor:
        return qkv.attention(**self._call(case, inputs), backend=self.backend.NAME).cpu()

    def attention_with_lse(self, case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = qkv.attention_with_lse(**self._call(case, inputs), backend=self.backend.NAME)
        return out.cpu(), lse.cpu()

    def reasons(
        self, case: Case, dtype: torch.dtype = torch.float32, *, needs_grad: bool = False, wants_lse: bool = False
    ) -> list[str]:
        """The reasons why the backend does not solve the case."""
        return _reasons(self._replace(isa=None), case, dtype, needs_grad, wants_lse)

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a view with all that it is a view of, neighbours included."""
        if tensor._base is None or self.device == "cpu":
            return tensor.to(self.device)
        return tensor._base.to(self.device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _call(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
        assert self.isa is None or kernels.loaded().isa == self.isa, f"not within at_work() of {self}"
        options = case.options()
        options["mask"] = case.mask().to(self.device)
        given = {name: value for name, value in options.items() if isinstance(value, Tensor)} | inputs
        return options | {name: self.moved(tensor) for name, tensor in given.items()}


@cache
def _reasons(solver: Solver, case: Case, dtype: torch.dtype, needs_grad: bool, wants_lse: bool) -> list[str]:
    inputs = {name: tensor.requires_grad_(needs_grad) for name, tensor in case.inputs(dtype).items()}
    call = solver._call(case, inputs)
    return solver.backend.why_not(make_problem("test", **call, wants_lse=wants_lse))


SOLVERS = [
    *(Solver(backend, device) for device in DEVICES for backend in BACKENDS),
    *(
        Solver(native, isa=isa)
        for isa in (kernels.supported_isas() if kernels.absence() is None else [])
        if isa != kernels.loaded().isa
    ),
]


def solvable(cases: list[Case], dtypes: Sequence[torch.dtype], **wants: bool) -> pytest.MarkDecorator:
    """Every solver with every case that it can solve; contract/test_grid.py checks the reasons against all others."""
    found = [
        pytest.param(solver, dtype, case, id=f"{solver}-{str(dtype).removeprefix('torch.')}-{case.name}")
        for solver in SOLVERS
        for dtype in dtypes
        for case in cases
        if not solver.reasons(case, dtype, **wants)
    ]
    return pytest.mark.parametrize(("solver", "dtype", "case"), found)
