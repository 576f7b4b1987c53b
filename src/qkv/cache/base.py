"""`Cache`: the interface that layers use, and operations that all caches share."""

from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.cache.buffer import AppendBuffer
from qkv.masks import Mask

if TYPE_CHECKING:
    from qkv.cache.int8 import Int8Keys


class Keys(NamedTuple):
    """Keys and values that a cache returns, in order, and the offset of the queries appended last."""

    k: Tensor
    """(B, Hkv, Lk, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv)"""
    offset: int | None
    """position of the first appended token among these keys; None in cross-attention"""

    def options(self) -> dict[str, Any]:
        """Keywords for `qkv.attention`, beside k and v."""
        return {"offset": self.offset}


class Owner:
    """Identity of the layer whose keys a cache stores, without a reference to the layer.

    A deep copy of a layer is another owner; a copy that shares its weights is the same.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Cache:
    """Keys and values of earlier calls, to which `append` adds those of the current one.

    A cache stores copies of tensors passed to it. Copies of a cache are independent: ``copy.copy`` shares memory until
    either is written to; ``copy.deepcopy`` and pickles copy the tokens, and refuse tokens computed with gradients. The
    gradient mode may change between calls. Tensors returned under ``torch.no_grad()`` are valid until the next
    `append`, which may overwrite them; torch raises if a backward pass still needs them.
    """

    def __init__(self, parts: int = 2) -> None:
        self._parts = tuple(AppendBuffer() for _ in range(parts))
        """buffers of keys and values, and of the scales of both in int8"""
        self._owners: tuple[Owner, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self._parts[0].length

    def append(self, k: Tensor, v: Tensor) -> "Keys | Int8Keys":
        """Appends keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``; returns all that the new queries may see."""
        raise NotImplementedError

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Checks that a layer may use this cache, and records it as the owner.

        Args:
            owner: identity of the layer.
            mask: mask of the call.

        Raises:
            ValueError: if the cache contains keys of another layer; in self-attention also for a mask that shows later
                keys, which the queries of earlier calls have not seen.
        """
        if self.length:
            self._require(owner)
            if (mask.right is None or mask.right > 0) and mask.allow is None:
                raise ValueError(
                    f"{type(self).__name__}: with {self.length} tokens in the cache, the mask must not show keys after "
                    f"the query, which those tokens did not see; got {mask!r}. Use Mask.causal(), pass all tokens in "
                    "one call, or use Mask.dense."
                )
        self._owners = (owner,)

    def _require(self, owner: Owner) -> None:
        """Raises ValueError if the cache contains keys of another layer."""
        if self._owners and owner not in self._owners:
            raise ValueError(
                f"{type(self).__name__}: its {self.length} tokens are keys of another layer, {self._owners[0].name}; "
                f"got a call of {owner.name}. Make one cache per layer, or reset it."
            )

    def crop(self, length: int) -> None:
        """Removes all tokens after the first ``length``, for instance rejected drafts of speculative decoding.

        Raises:
            TypeError: for a length that is not an int.
            ValueError: for a length below 0 or above `length`.
        """
        self._check_crop(length)
        self.restore(length)

    def _check_crop(self, length: int) -> None:
        """Raises as `crop` for lengths that are not an int from 0 to `length`."""
        caller = type(self).__name__
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"{caller}: length of crop must be an int; got {length!r}.")
        if not 0 <= length <= self.length:
            raise ValueError(
                f"{caller}: length of crop must be between 0 and {self.length}, the tokens in the cache; got {length}."
            )

    def select(self, rows: Tensor) -> None:
        """Reorders the batch: row i becomes the former row ``rows[i]``, as in beam search.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1, with or without repetition.

        Raises:
            ValueError: for anything else.
        """
        memory = self._parts[0].memory
        if memory is None:
            return
        fits = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
        if not torch.compiler.is_compiling() and fits and rows.numel():
            fits = 0 <= int(rows.min()) <= int(rows.max()) < memory.shape[0]
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: rows of select must be a 1-dimensional tensor of integers from 0 to "
                f"{memory.shape[0] - 1}; got {rows!r}."
            )
        rows = rows.to(memory.device)
        self._parts = tuple([part.select(rows) for part in self._parts])

    def reset(self) -> None:
        """Removes all tokens and the owner, for another batch or layer."""
        self.restore(0)
        self._owners = ()

    def mark(self) -> Any:
        """The state to which `restore` returns."""
        return self.length

    def restore(self, mark: Any) -> None:
        """Undoes all appends since ``mark``."""
        for part in self._parts:
            part.crop(mark)

    def restrict(self, mask: Mask) -> Mask:
        """The mask restricted to the keys that the last append returned: here, all."""
        return mask

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(part.memory.untyped_storage().nbytes() for part in self._parts if part.memory is not None)

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._parts = tuple([copy(part) for part in self._parts])
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        # A deep copy together with the layer belongs to both, the layer and its copy.
        twin._owners = (*self._owners, *twin._owners)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The state without owners, so that the first layer to use it becomes the owner."""
        return {**vars(self), "_owners": ()}


def check_append(
    caller: str, k: Tensor, v: Tensor, cached_k: Tensor | None, cached_v: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Raises ValueError unless k and v match each other and, where given, the cached ones, of tokens in ``dtype``."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{caller}: {name} must be (B, Hkv, L, width); got shape {tuple(tensor.shape)}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{caller}: k and v must agree in batch, heads and length; got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"{caller}: k and v must agree in dtype and device; got {k.dtype} on {k.device} and {v.dtype} on "
            f"{v.device}."
        )
    for name, tensor, cached in (("k", k, cached_k), ("v", v, cached_v)):
        if cached is None:
            continue
        same_sizes = tensor.shape[:2] == cached.shape[:2] and tensor.shape[3] == cached.shape[3]
        if not same_sizes or tensor.dtype != dtype or tensor.device != cached.device:
            batch, heads, _, width = cached.shape
            raise ValueError(
                f"{caller}: {name} must be ({batch}, {heads}, L, {width}) in {dtype} on {cached.device}, as at the "
                f"first append; got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}. "
                "Make one cache per layer and batch."
            )
