"""`LazyTensor`: what our kernels read in a form of its own, and everybody else as an ordinary tensor."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import Self

from qkv.cache.buffer import compact_copy


class LazyTensor(torch.Tensor):
    """A tensor that is written out only if somebody computes with it.

    transformers' models pass tensors on from a cache or a mask function to the attention function; some cut or combine
    them on the way, and get the ordinary tensor.
    """

    def dense(self) -> Tensor:
        """The tensor written out."""
        raise NotImplementedError

    def form(self) -> tuple[Any, ...]:
        """What the tensor is made of: the arguments of its class."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self)(*deepcopy(self.form(), memo))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: object) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self.form()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def written(value: object) -> object:
            return value.dense() if isinstance(value, LazyTensor) else value

        return func(*tree_map(written, args), **tree_map(written, kwargs or {}))


class Int8Tensor(LazyTensor):
    """Keys or values ``(B, Hkv, L, width)`` in int8, each row with what it is to be multiplied by."""

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

    def dense(self) -> Tensor:
        """The numbers in the dtype that the tensor shows."""
        return (self.codes * self.scale[..., None]).to(self.dtype)

    def form(self) -> tuple[Any, ...]:
        """Codes and scales without what lies around them in the memory of a cache, and the dtype."""
        return compact_copy(self.codes), compact_copy(self.scale), self.dtype

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Tensor(shape={tuple(self.shape)}, dtype={self.dtype})"
