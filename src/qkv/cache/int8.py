"""`Int8KVCache`: all keys and values so far in int8, and `quantize`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import kernels
from qkv.cache.base import check_append
from qkv.cache.buffer import AppendBuffer, wants_grad
from qkv.cache.kv import FullCache


class Int8Keys(NamedTuple):
    """`Keys` in int8, with scales."""

    k: Tensor
    v: Tensor
    offset: int | Tensor
    k_scale: Tensor
    """(B, Hkv, Lk), what each key is multiplied by, as v_scale for values"""
    v_scale: Tensor
    lengths: Tensor | None = None
    """(B,), number of keys of each row, the first ones; None if all are"""

    @property
    def lk(self) -> int:
        """Lk, number of keys; of the longest row, if rows differ."""
        return self.k.shape[2]

    def options(self) -> dict[str, Any]:
        """Keywords for `qkv.attention`, besides k and v."""
        return {"offset": self.offset, "k_scale": self.k_scale, "v_scale": self.v_scale}


class Int8KVCache(FullCache):
    """A `KVCache` in int8: half the bytes of bf16, plus a scale of 4 bytes for each key and each value.

    Keys and values are rounded as by `quantize`.

    Args:
        capacity: as in `KVCache`.

    Example:
        >>> import torch, qkv
        >>> layer, cache = qkv.MultiQueryAttention(64, 2, mask=qkv.Mask.causal()).eval(), qkv.Int8KVCache()
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(1, 5, 64), cache=cache)
        >>> cache.append(*torch.randn(2, 1, 1, 1, 32)).k.dtype
        torch.int8
    """

    PARTS = ("keys", "values", "key_scales", "value_scales")
    STATE = ("dtype",)

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Int8Keys:
        """As `Cache.append`.

        Raises:
            ValueError: as `KVCache.append`, and for integers and tensors that require a gradient.
        """
        (keys, values, k_scale, v_scale), offset = self._extend(k, v, is_token)
        return Int8Keys(keys, values, offset, k_scale, v_scale, self._returned)

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Int8Keys | None:
        """As `Cache.claim`."""
        claimed = self._claim(k, v, like)
        if claimed is None:
            return None
        (keys, values, k_scale, v_scale), offset = claimed
        return Int8Keys(keys, values, offset, k_scale, v_scale, self._returned)

    def _shapes(
        self, k: Sequence[int], v: Sequence[int], dtype: torch.dtype
    ) -> list[tuple[Sequence[int], torch.dtype]]:
        return [(k, torch.int8), (v, torch.int8), (k[:3], torch.float32), (v[:3], torch.float32)]

    def _extend_equally(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        grown = self._append_in_place(k, v)
        if grown is not None:
            return grown
        self._require_codable(k, v)
        capacity = self._check_tokens(k, v, k.shape[2])
        for x, codes, scales in self._pairs(k, v):
            if torch.is_grad_enabled() or not _kernel_can_quantize(x):
                for part, new in zip((codes, scales), quantize(x), strict=True):
                    part.extend(new, capacity)
            else:
                code = codes.append_uninitialised(x.shape, torch.int8, x.device, capacity)
                scale = scales.append_uninitialised(x.shape[:3], torch.float32, x.device, capacity)
                kernels.quantize(x, code, scale)
                torch.autograd.graph.increment_version((code, scale))  # as torch's in-place operators do
        return [part.tensor for part in self._parts if part.tensor is not None]

    def _encode(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        self._require_codable(k, v)
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        return k, v, k_scale, v_scale

    @staticmethod
    def _require_codable(k: Tensor, v: Tensor) -> None:
        """Raises ValueError for tokens that int8 cannot represent."""
        if not (k.is_floating_point() and v.is_floating_point()):
            raise ValueError(f"Int8KVCache: k and v must be floating-point; got {k.dtype}, {v.dtype}.")
        if wants_grad(k, v):
            raise ValueError("Int8KVCache: int8 has no gradient; call it under torch.no_grad(), or use a KVCache.")

    def reserve(self, k: Tensor, v: Tensor, capacity: int) -> None:
        """Allocates memory for ``capacity`` tokens of these shapes, before the first append.

        Raises:
            ValueError: for keys and values that are not ``(B, Hkv, L, width)``.
        """
        check_append("Int8KVCache", k, v, None, None, None)
        for x, codes, scales in self._pairs(k, v):
            no_tokens = x[:, :, :0].shape
            codes.append_uninitialised(no_tokens, torch.int8, x.device, capacity)
            scales.append_uninitialised(no_tokens[:3], torch.float32, x.device, capacity)

    def keys(self) -> Int8Keys:
        """All keys and values, with the offset of the next token.

        Raises:
            ValueError: before the first append.
        """
        k, v, k_scale, v_scale = [part.tensor for part in self._parts]
        if k is None or v is None or k_scale is None or v_scale is None:
            raise ValueError("Int8KVCache: it is empty; append keys and values first.")
        return Int8Keys(k, v, self.offset(), k_scale, v_scale, self._returned)

    def latest(self, count: int) -> Int8Keys:
        """What `append` returned for the last ``count`` columns."""
        return self.keys()._replace(offset=self.offset_of_latest(count))

    def _more_state(self) -> dict[str, Tensor]:
        return {"dtype": torch.empty(0, dtype=self._dtype)}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        super()._load_more(state)
        self._dtype = state["dtype"].dtype

    def _pairs(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, AppendBuffer, AppendBuffer], ...]:
        """Keys and values, each with the buffers of its codes and scales."""
        codes_k, codes_v, k_scale, v_scale = self._parts
        return (k, codes_k, k_scale), (v, codes_v, v_scale)


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
