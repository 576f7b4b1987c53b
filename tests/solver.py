"""A backend on a device: what the contract holds to account."""

from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor

import qkv
from qkv.backends import Backend
from qkv.problem import pose

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Solver(NamedTuple):
    """Takes and returns tensors on CPU, where oracle and peer wait, and computes on its device."""

    backend: Backend
    device: str

    def __str__(self) -> str:
        return self.backend.NAME if self.device == "cpu" else f"{self.backend.NAME}-{self.device}"

    def attention(self, case: Case, inputs: dict[str, Tensor]) -> Tensor:
        return qkv.attention(**self._call(case, inputs), backend=self.backend.NAME).cpu()

    def attention_with_lse(self, case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = qkv.attention_with_lse(**self._call(case, inputs), backend=self.backend.NAME)
        return out.cpu(), lse.cpu()

    def reasons(
        self, case: Case, dtype: torch.dtype = torch.float32, *, needs_grad: bool = False, wants_lse: bool = False
    ) -> list[str]:
        """Why it does not solve the case."""
        call = self._call(case, case.inputs(dtype))
        if needs_grad:
            call = {name: x.requires_grad_() if isinstance(x, Tensor) else x for name, x in call.items()}
        return self.backend.why_not(pose("test", **call, wants_lse=wants_lse))

    def _call(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
        options = case.options()
        mask = case.mask().to(self.device)
        return {**{name: self._moved(tensor) for name, tensor in inputs.items()}, **options, "mask": mask}

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; a view with all that it is a view of, neighbours included."""
        if tensor._base is None or self.device == "cpu":
            return tensor.to(self.device)
        return tensor._base.to(self.device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
