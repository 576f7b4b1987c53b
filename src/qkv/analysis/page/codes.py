"""Arrays as text: integers of 8 or 16 bits, little-endian, in base64."""

import base64
from typing import Any

import torch
from torch import Tensor

LARGEST = 32766
"""Code of the largest number, of 16 bits with a sign."""
NO_NUMBER = -32768
"""Code of what is not finite."""


def signed(numbers: Tensor) -> dict[str, Any]:
    """Numbers in equal steps: ``step`` times a code of 16 bits, off by half a step at most."""
    numbers = numbers.double()
    is_finite = numbers.isfinite()
    step = float(f"{numbers[is_finite].abs().max().item() if is_finite.any() else 0.0:.6e}") * 1.000001 / LARGEST
    if step == 0:
        step = 1.0
    codes = (numbers / step).round().nan_to_num(0.0, 0.0, 0.0).masked_fill(~is_finite, NO_NUMBER)
    return {"step": step, "codes": _base64(codes.to(torch.int16))}


def share(numbers: Tensor, bits: int) -> str:
    """Numbers from 0 to 1 as the square of ``code / (2**bits - 1)``; code 0 is 0 alone. NaN is 0."""
    largest = 2**bits - 1
    numbers = numbers.double().nan_to_num()
    codes = (numbers.clamp(0, 1).sqrt() * largest).round().clamp(min=1).masked_fill(numbers <= 0, 0)
    return _base64(codes.to({8: torch.uint8, 16: torch.uint16}[bits]))


def _base64(codes: Tensor) -> str:
    array = codes.cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")
