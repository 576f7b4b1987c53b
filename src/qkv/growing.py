"""`Growing`: a tensor of tokens with room behind it, so that appending copies what is new alone."""

import torch
from torch import Tensor


class Growing:
    """A tensor ``(B, heads, L, width)`` that grows along L.

    What its methods return are views of one memory, valid until the next call. Where a gradient is wanted, appending
    concatenates instead, so that every step keeps what its backward needs.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._start = 0
        self.length = 0

    @property
    def tensor(self) -> Tensor | None:
        """All that is held, or None before the first `extend`."""
        return None if self._memory is None else self._memory[:, :, self._start : self._start + self.length]

    def extend(self, new: Tensor, room: int) -> Tensor:
        """All that is held and ``new`` behind it. If memory must be had anew, it gets ``room`` for so many tokens."""
        held, length, added = self.tensor, self.length, new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or (held is not None and held.requires_grad)):
            together = new if held is None else torch.cat([held, new], dim=2)
            self._put(together, together.shape[2])
            return together
        if self._memory is None or self._start + length + added > self._memory.shape[2]:
            batch, heads, _, width = new.shape
            larger = new.new_empty(batch, heads, room, width)
            if held is not None:
                larger[:, :, :length] = held
            self._put(larger, length)
        start = self._start
        memory = self._memory
        assert memory is not None
        memory[:, :, start + length : start + length + added] = new
        self.length = length + added
        return memory[:, :, start : start + self.length]

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, integer ``(B',)``, in this order and as often as they are named."""
        held = self.tensor
        if held is None or self._memory is None:
            return
        if torch.is_grad_enabled() and held.requires_grad:
            self._put(held.index_select(0, rows), self.length)
            return
        _, heads, room, width = self._memory.shape
        memory = held.new_empty(rows.shape[0], heads, room, width)
        torch.index_select(held, 0, rows, out=memory[:, :, : self.length])
        self._put(memory, self.length)

    def hold(self, tensor: Tensor) -> None:
        """Goes on with ``tensor``: a part of what was returned last, which stays in place, or any other."""
        memory = self._memory
        if memory is not None and _lie_together(tensor, memory):
            self._start, self.length = tensor.storage_offset() // max(memory.stride(2), 1), tensor.shape[2]
        else:
            self._put(tensor, tensor.shape[2])

    def _put(self, memory: Tensor, length: int) -> None:
        self._memory, self._start, self.length = memory, 0, length


def _lie_together(part: Tensor, memory: Tensor) -> bool:
    """Whether ``part`` is the memory cut along its tokens."""
    return (
        part.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        and part.stride() == memory.stride()
        and part.shape[:2] == memory.shape[:2]
    )
