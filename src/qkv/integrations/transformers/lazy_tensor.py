"""`LazyTensor`: a tensor subclass that our backends read in compressed form; any torch op materializes it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import Self

from qkv.cache.buffer import compact_copy
from qkv.layers.latent_heads import LatentHeads


class LazyTensor(torch.Tensor):
    """A tensor that is materialized only if a torch op is applied to it.

    Models of transformers pass tensors from a cache or mask function to the attention function. Those that slice or
    combine them on the way get an ordinary tensor.
    """

    def materialize(self) -> Tensor:
        """The ordinary tensor."""
        raise NotImplementedError

    def constructor_args(self) -> tuple[Any, ...]:
        """The arguments with which the class creates an equal tensor, for copies and pickles."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self)(*deepcopy(self.constructor_args(), memo))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: object) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self.constructor_args()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def materialized(value: object) -> object:
            return value.materialize() if isinstance(value, LazyTensor) else value

        return func(*tree_map(materialized, args), **tree_map(materialized, kwargs or {}))


class Int8Tensor(LazyTensor):
    """Keys or values ``(B, Hkv, L, width)`` in int8 with a scale per row."""

    codes: Tensor
    """(B, Hkv, L, width)"""
    scale: Tensor
    """(B, Hkv, L)"""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> "Int8Tensor":
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        self.codes = codes
        self.scale = scale
        return self

    def materialize(self) -> Tensor:
        """The dequantised values, in the tensor's dtype."""
        return (self.codes * self.scale[..., None]).to(self.dtype)

    def constructor_args(self) -> tuple[Any, ...]:
        """Codes and scales, copied out of the memory of the cache, and the dtype."""
        return compact_copy(self.codes), compact_copy(self.scale), self.dtype

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Tensor(shape={tuple(self.shape)}, dtype={self.dtype})"


class LatentTensor(LazyTensor):
    """Keys ``(B, H, L, width)`` or values of all heads, as the latents from which they are computed."""

    latents: Tensor
    """(B, 1, L, rank + rope_dim), with the rotary key of each token"""
    heads: LatentHeads
    part: int
    """0 for keys, 1 for values, as `LatentHeads.expand` returns them"""

    @staticmethod
    def __new__(cls, latents: Tensor, heads: LatentHeads, part: int) -> "LatentTensor":
        batch, _, length, row = latents.shape
        width = heads.value_dim if part else heads.nope_dim + row - heads.rank
        shape = (batch, heads.num_heads, length, width)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=latents.dtype, device=latents.device)
        self.latents = latents
        self.heads = heads
        self.part = part
        return self

    def materialize(self) -> Tensor:
        """The keys or values of all heads."""
        return self.heads.expand(self.latents)[self.part]

    def constructor_args(self) -> tuple[Any, ...]:
        """The latents, copied out of the memory of the cache, and how heads read them."""
        return compact_copy(self.latents), self.heads, self.part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LatentTensor(shape={tuple(self.shape)}, dtype={self.dtype})"
