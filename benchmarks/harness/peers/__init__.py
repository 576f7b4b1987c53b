"""`PEERS`: the libraries that qkv is measured against, each with its fastest arguments."""

from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from harness.case import Case
from harness.peers import flex, onnx_runtime, openvino_sdpa, torch_sdpa
from qkv.bench.attention_call import PreparedCall


class Peer(Protocol):
    """The interface of a peer's module."""

    NAME: str

    def why_not(self, case: Case, dtype: torch.dtype) -> str | None:
        """Why the peer is not measured on a case, or None where it is."""
        ...

    def prepare(self, case: Case, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> PreparedCall:
        """The call to measure. One-time work, such as compiling, is done here."""
        ...


def _peer(module: ModuleType) -> Peer:
    return cast(Peer, module)


PEERS: tuple[Peer, ...] = tuple(map(_peer, (torch_sdpa, flex, onnx_runtime, openvino_sdpa)))
