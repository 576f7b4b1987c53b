"""`fast_gated_mlp`: a gated MLP of few rows."""

import torch
from torch import Tensor

from qkv.kernels.binding import loaded

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Their numbers in native/src/abi/gated_mlp.h."""

Projection = tuple[Tensor, Tensor | None]
"""A weight ``(out_features, in_features)`` and a bias ``(out_features,)``, as of ``nn.Linear``."""


def fast_gated_mlp(
    x: Tensor, gate: Projection, up: Projection | None, down: Projection, activation: str
) -> Tensor | None:
    """``down(activation(gate(x)) * up(x))`` in one call of C, which reads tensors through DLPack.

    Tensors must satisfy `can_bypass_dispatcher`. Products are those of `fast_linear`, and what lies between the parts
    is rounded to the dtype of x, as by torch's operators.

    Args:
        x: ``(..., in_features)`` of 1 to 16 rows, in fp32, bf16 or fp16, as all weights and biases.
        gate: projection to the features that are activated.
        up: to as many; None if its rows are the second half of those of ``gate``.
        down: from these to the features of the result.
        activation: one of `ACTIVATIONS`.

    Returns:
        ``(..., features)``; None for tensors that do not fit together or are not supported. Shapes, dtypes and strides
        are checked in C (native/src/abi/fast_gated_mlp.cpp).

    Raises:
        MemoryError: if scratch memory cannot be allocated.
    """
    call = loaded().fast_gated_mlp
    if call is None:
        return None
    x, features = x.contiguous(), down[0].shape[0]
    out = torch.empty_like(x) if features == x.shape[-1] else x.new_empty((*x.shape[:-1], features))
    status = call(x, *gate, *(up or (None, None)), *down, out, ACTIVATIONS[activation], torch.get_num_threads())
    if status == 1:
        raise MemoryError(f"qkv's kernel: not enough scratch memory for {tuple(x.shape)} rows; pass fewer.")
    return None if status else out
