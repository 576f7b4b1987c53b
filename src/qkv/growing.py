"""`Growing`: a tensor of tokens with room behind it, so that appending copies what is new alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv import kernels


class Growing:
    """A tensor ``(B, heads, L, ...)`` that grows along L.

    What its methods return are views of one memory, valid until the next call. Where a gradient is wanted, appending
    concatenates instead, so that every step keeps what its backward needs, and where dtypes differ, as torch does.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        """All of it, room included."""
        self._start = 0
        self.length = 0
        self._shown: Tensor | None = None
        """What `extend` or `grow` returned last, while it is all that is held."""

    @property
    def tensor(self) -> Tensor | None:
        """All that is held, or None before anything was."""
        if self.memory is None or self._shown is not None:
            return self._shown
        return self.memory.narrow(2, self._start, self.length)

    @property
    def stop(self) -> int:
        """Where in memory new tokens go."""
        return self._start + self.length

    def extend(self, new: Tensor, room: int) -> Tensor:
        """All that is held and ``new`` behind it. If memory must be had anew, it gets ``room`` for so many tokens."""
        memory = self.memory
        if wants_grad(memory, new) or (memory is not None and self.length and memory.dtype is not new.dtype):
            held = self.tensor
            together = new if held is None else torch.cat([held, new], dim=2)
            self._put(together, together.shape[2])
            return together
        self._room_for(new.shape, new.dtype, new.device, room).copy_(new)
        return self.grow(new.shape[2])

    def grow(self, count: int) -> Tensor:
        """All that is held and ``count`` tokens behind it, which memory has by now."""
        assert self.memory is not None
        self.length += count
        self._shown = self.memory.narrow(2, self._start, self.length)
        return self._shown

    def shows(self, tensor: Tensor | None) -> bool:
        """Whether `extend` or `grow` returned it last."""
        return tensor is not None and tensor is self._shown

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
        """The place of new tokens of this shape behind all that is held: to be filled in, and held from now on.

        With none, ``(B, heads, 0, ...)``, before the first, it has memory made for ``room`` tokens.
        """
        place = self._room_for(shape, dtype, device, room)
        self.length, self._shown = self.length + shape[2], None
        return place

    def _room_for(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
        """The place of new tokens of this shape, in memory that is had anew where they do not fit."""
        length, added = self.length, shape[2]
        memory, start = self.memory, self._start + length
        if memory is None or start + added > memory.shape[2] or not (length or _suits(memory, shape, dtype, device)):
            memory = torch.empty((*shape[:2], room, *shape[3:]), dtype=dtype, device=device)
            held = self.tensor
            if held is not None and length:
                memory[:, :, :length] = held
            self._put(memory, length)
            start = length
        return memory.narrow(2, start, added)

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        self.length, self._shown = length, None

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, integer ``(B',)``, in this order and as often as they are named."""
        held = self.tensor
        if held is None or self.memory is None:
            return
        if torch.is_grad_enabled() and held.requires_grad:
            self._put(held.index_select(0, rows), self.length)
            return
        memory = held.new_empty(rows.shape[0], *self.memory.shape[1:])
        torch.index_select(held, 0, rows, out=memory[:, :, : self.length])
        self._put(memory, self.length)

    def hold(self, tensor: Tensor) -> None:
        """Goes on with ``tensor``: a part of what was returned last, which stays in place, or any other."""
        if self.shows(tensor):
            return
        memory, self._shown = self.memory, None
        if memory is not None and _lie_together(tensor, memory):
            self._start, self.length = tensor.storage_offset() // max(memory.stride(2), 1), tensor.shape[2]
        else:
            self._put(tensor, tensor.shape[2])

    def _put(self, memory: Tensor, length: int) -> None:
        self.memory, self._start, self.length, self._shown = memory, 0, length, None


def append_in_place(parts: Sequence[Growing], k: Tensor, v: Tensor) -> list[Tensor] | None:
    """Has the kernel write new keys and values ``(B, Hkv, L, D)`` behind those held, where that is all there is to do.

    Outside of ``torch.no_grad()`` it is not: torch counts what is written to a tensor there.

    Args:
        parts: of keys and of values; and of the scales of both, where they are held in int8.
        k, v: the tokens.

    Returns:
        All that each part holds; or None, with nothing changed, where memory is full or there is more to do.
    """
    keys, values, *scales = parts
    if torch.is_grad_enabled() or keys.memory is None or values.memory is None or keys.stop != values.stop:
        return None
    k_scale, v_scale = (scale.memory for scale in scales) if scales else (None, None)
    if not kernels.may_pass(k, v, keys.memory, values.memory):
        return None
    if not kernels.append(k, v, keys.memory, values.memory, k_scale, v_scale, keys.stop):
        return None
    return [part.grow(k.shape[2]) for part in parts]


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether what is computed of the tensors is to have a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _suits(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens of this shape fit into the memory."""
    same_sizes = memory.shape[:2] == shape[:2] and memory.shape[3:] == shape[3:]
    return same_sizes and memory.dtype is dtype and memory.device == device


def _lie_together(part: Tensor, memory: Tensor) -> bool:
    """Whether ``part`` is the memory cut along its tokens."""
    return (
        part.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        and part.stride() == memory.stride()
        and part.shape[:2] == memory.shape[:2]
    )
