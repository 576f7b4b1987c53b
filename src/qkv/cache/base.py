"""`Cache`: what a layer asks of a cache, and what all of them can do."""

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
    """What a cache returns: keys and values in order, and where the queries appended last stand among them."""

    k: Tensor
    """(B, Hkv, Lk, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv)"""
    offset: int | None
    """Position of the first appended token among these keys; None where queries have no position among them."""

    def options(self) -> dict[str, Any]:
        """What `qkv.attention` is to know of them."""
        return {"offset": self.offset}


class Owner:
    """Whose keys a cache holds. A layer leaves it there, so that no cache keeps a layer alive.

    A deep copy of a layer is another owner; one that shares its weights is the same.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Cache:
    """What a layer asks of a cache, and what all of them can do.

    A cache keeps nothing that it was given, but copies. Its own copies go on independently: ``copy.copy`` shares memory
    until one of both is written to, ``copy.deepcopy`` and pickles hold the tokens alone, and refuse those that were
    computed with gradients. It works in every mode of gradients, whatever the one before; but what `append` returned
    under ``torch.no_grad()`` is valid until the next `append` alone, which may write there: torch notices if a backward
    pass still needed it.
    """

    def __init__(self, parts: int = 2) -> None:
        self._parts = tuple(AppendBuffer() for _ in range(parts))
        """Keys and values; and the scales of both, where they are held in int8."""
        self._owners: tuple[Owner, ...] = ()

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._parts[0].length

    def append(self, k: Tensor, v: Tensor) -> "Keys | Int8Keys":
        """Adds keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``, and returns all that new queries may see."""
        raise NotImplementedError

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Refuses the call of a layer that this cache is not for, before anything has changed.

        Args:
            owner: the layer's.
            mask: of the call.

        Raises:
            ValueError: for a layer other than the one whose keys are held; and in self-attention for a mask that shows
                later keys, since the queries of earlier calls have not seen those of this one.
        """
        if self.length:
            self._require(owner)
            if (mask.right is None or mask.right > 0) and mask.allow is None:
                raise ValueError(
                    f"{type(self).__name__}: {mask!r} shows a query the keys after its own, and those of the "
                    f"{self.length} tokens held have been answered without the ones of this call. Use Mask.causal(), "
                    "give all tokens at once, or write out what is seen: Mask.dense."
                )
        self._owners = (owner,)

    def _require(self, owner: Owner) -> None:
        if self._owners and owner not in self._owners:
            raise ValueError(
                f"{type(self).__name__}: the {self.length} tokens held are keys of another layer, "
                f"{self._owners[0].name}; got a call of {owner.name}. Make one cache for each layer, or reset it."
            )

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``, as when a draft of them was refused.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, or fewer than none.
        """
        self._check_crop(length)
        self.restore(length)

    def _check_crop(self, length: int) -> None:
        caller = type(self).__name__
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"{caller}: crop takes the number of tokens to keep, an int; got {length!r}.")
        if not 0 <= length <= self.length:
            raise ValueError(f"{caller}: crop keeps between 0 and the {self.length} tokens held; got {length}.")

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order and as often as they are named, as when beams go on.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1.

        Raises:
            ValueError: for other rows.
        """
        memory = self._parts[0].memory
        if memory is None:
            return
        fits = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
        if not torch.compiler.is_compiling() and fits and rows.numel():
            fits = 0 <= int(rows.min()) <= int(rows.max()) < memory.shape[0]
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: select takes integers from 0 to {memory.shape[0] - 1}, a row of the batch "
                f"each, in a tensor of one dimension; got {rows!r}."
            )
        rows = rows.to(memory.device)
        self._parts = tuple([part.select(rows) for part in self._parts])

    def reset(self) -> None:
        """Forgets all: for other texts, in another batch, or of another layer."""
        self.restore(0)
        self._owners = ()

    def mark(self) -> Any:
        """What `restore` takes to undo the appends that come."""
        return self.length

    def restore(self, mark: Any) -> None:
        """Undoes the appends since ``mark``."""
        for part in self._parts:
            part.crop(mark)

    def restrict(self, mask: Mask) -> Mask:
        """The mask over the keys that the last append returned: here, over all."""
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
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
        # Of the layer, and of the one that is copied along.
        twin._owners = (*self._owners, *twin._owners)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """All but whose keys they are: the next layer's."""
        return {**vars(self), "_owners": ()}


def check_append(
    caller: str, k: Tensor, v: Tensor, held_k: Tensor | None, held_v: Tensor | None, dtype: torch.dtype | None
) -> None:
    """Refuses keys and values that do not go together, or not with those held, before anything has changed."""
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
    for name, tensor, held in (("k", k, held_k), ("v", v, held_v)):
        if held is None:
            continue
        same_sizes = tensor.shape[:2] == held.shape[:2] and tensor.shape[3] == held.shape[3]
        if not same_sizes or tensor.dtype != dtype or tensor.device != held.device:
            batch, heads, _, width = held.shape
            raise ValueError(
                f"{caller}: {name} must be ({batch}, {heads}, L, {width}) in {dtype} on {held.device}, as at the "
                f"first append; got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}. "
                "Make one cache for each layer and batch."
            )
