"""Keys and values in int8 with a scale for each row: `quantize`, and `Int8`, the format of caches that round so."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qkv import kernels
from qkv.cache.buffer import AppendBuffer, wants_grad
from qkv.cache.format import PLAIN, Format


class Int8(Format):
    """Codes of keys and values, and a scale in fp32 for each, as by `quantize`."""

    __slots__ = ()

    parts = ("keys", "values", "key_scales", "value_scales")
    dtype = torch.int8

    def require(self, caller: str, k: Tensor, v: Tensor) -> None:
        """Raises ValueError for integers, and for tensors that need a gradient."""
        if not (k.is_floating_point() and v.is_floating_point()):
            raise ValueError(f"{caller}: k and v must be floating-point; got {k.dtype}, {v.dtype}.")
        if wants_grad(k, v):
            raise ValueError(
                f"{caller}: int8 has no gradient; call it under torch.no_grad(), or cache keys in their own dtype."
            )

    def shapes(self, k: Sequence[int], v: Sequence[int], dtype: torch.dtype) -> list[tuple[Sequence[int], torch.dtype]]:
        """Shape and dtype of each part, for tokens of these shapes and this dtype."""
        return [(k, torch.int8), (v, torch.int8), (k[:3], torch.float32), (v[:3], torch.float32)]

    def encode(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """New tokens, as each part stores them."""
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        return k, v, k_scale, v_scale

    def extend(self, parts: Sequence[AppendBuffer], k: Tensor, v: Tensor, capacity: int) -> list[Tensor]:
        """As `Format.extend`; the kernel rounds straight into memory."""
        codes_k, codes_v, k_scale, v_scale = parts
        for x, codes, scales in ((k, codes_k, k_scale), (v, codes_v, v_scale)):
            if torch.is_grad_enabled() or not _kernel_can_quantize(x):
                for part, new in zip((codes, scales), quantize(x), strict=True):
                    part.extend(new, capacity)
            else:
                code = codes.append_uninitialised(x.shape, torch.int8, x.device, capacity)
                scale = scales.append_uninitialised(x.shape[:3], torch.float32, x.device, capacity)
                kernels.quantize(x, code, scale)
                torch.autograd.graph.increment_version((code, scale))  # as torch's in-place operators do
        return [part.tensor for part in parts if part.tensor is not None]


INT8 = Int8()

Dtype = torch.dtype | Literal["int8"] | None
"""The argument of caches for the dtype of what they store"""


def format_of(caller: str, dtype: Dtype) -> Format:
    """The format for ``torch.int8``, ``"int8"``, or None for the dtype of the keys.

    Raises:
        ValueError: for another dtype.
    """
    if dtype not in (None, torch.int8, "int8"):
        raise ValueError(f'{caller}: dtype must be torch.int8 or "int8", or None for that of the keys; got {dtype}.')
    return PLAIN if dtype is None else INT8


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows to int8 with a scale each: ``x ~ codes * scale[..., None]``, with an error of at most half a scale.

    Args:
        x: ``(..., width)``, floating-point.

    Returns:
        codes ``(..., width)`` from -127 to 127, and scale ``(...)`` in fp32, the largest magnitude of each row by 127.

    Example:
        >>> import torch
        >>> from qkv.cache import quantize
        >>> quantize(torch.tensor([0.5, -1.0, 0.25]))
        (tensor([  64, -127,   32], dtype=torch.int8), tensor(0.0079))

    Source: Dettmers et al. 2022 (LLM.int8), section 2.1, absmax quantization, of each row by itself.
    """
    if _kernel_can_quantize(x):
        codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:3], dtype=torch.float32)
        kernels.quantize(x, codes, scale)
        return codes, scale
    wide = x.float()
    scale = wide.abs().amax(dim=-1) / 127
    codes = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return codes.round_().to(torch.int8), scale


def _kernel_can_quantize(x: Tensor) -> bool:
    """Whether `kernels.quantize` takes the tensor."""
    floating = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cpu and floating and x.dim() == 4 and x.stride(3) == 1 and kernels.can_bypass_dispatcher(x)
