"""`AppendBuffer`: a tensor with spare capacity along the tokens, so that appending copies only new tokens."""

import io
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv import kernels
from qkv.cache.rows import Placement
from qkv.torch_internals import transforms_are_active

MIN_SLOTS = 1024
"""What a cache of a window allocates at least, or all of it: so most windows never move to larger memory."""


def slots_for(tokens: int, most: int) -> int:
    """Slots to allocate for this many tokens in memory for at most ``most``, unless one call brings more.

    Memory that doubles is copied rarely, and a window that is longer than the text takes no more than its tokens need.
    """
    return max(tokens, min(most, max(2 * tokens, MIN_SLOTS)))


class AppendBuffer:
    """A tensor ``(B, heads, L, ...)`` that grows along L.

    Under ``torch.no_grad()`` and ``torch.inference_mode()``, new tokens are written into spare capacity, and methods
    return views, valid until the next call. Only memory that was allocated here and is not shared with a copy is
    written to; other memory is copied first. With gradients enabled, appending concatenates, since backward needs the
    tokens of each step; it also does if dtypes differ, with torch's type promotion.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        """all slots, spare ones included"""
        self.length = 0
        self._start = 0
        self._is_writable = False
        """whether memory was allocated here and is not shared"""
        self._cropped = 0
        """number of slots after the tokens that earlier views may still contain, as after a crop"""
        self._current_view: Tensor | None = None
        """what `grow` or `view` returned last, if it still contains all tokens"""

    @property
    def tensor(self) -> Tensor | None:
        """All tokens; None before the first."""
        if self.memory is None or self._current_view is not None:
            return self._current_view
        return self.memory.narrow(2, self._start, self.length)

    def view(self) -> Tensor | None:
        """All tokens, in the same tensor until they change; None before the first."""
        self._current_view = self.tensor
        return self._current_view

    @property
    def stop(self) -> int:
        """The slot of the next token."""
        return self._start + self.length

    def extend(self, new: Tensor, capacity: int) -> Tensor:
        """Appends ``new`` and returns all tokens. If memory must be reallocated, it gets ``capacity`` slots."""
        memory = self.memory
        # Under torch.vmap, memory has no batch dimension to write to.
        if (
            torch.is_grad_enabled()
            or transforms_are_active()
            or (memory is not None and self.length and memory.dtype is not new.dtype)
        ):
            tokens = self.tensor
            tokens = torch.cat([tokens, new] if tokens is not None and self.length else [new], dim=2)
            self._set_memory(tokens, tokens.shape[2])
            return tokens
        self._slots_for(new.shape, new.dtype, new.device, capacity).copy_(new)
        return self.grow(new.shape[2])

    def grow(self, count: int) -> Tensor:
        """Counts the next ``count`` slots, already written, as tokens and returns all tokens."""
        assert self.memory is not None
        self.length += count
        self._cropped = max(0, self._cropped - count)
        self._current_view = self.memory.narrow(2, self._start, self.length)
        return self._current_view

    def put(self, new: Tensor, placement: Placement, length: int, capacity: int) -> Tensor:
        """Writes new tokens ``(B, heads, L, ...)`` to slots of rows, then counts ``length`` tokens; returns all.

        Tokens are in these slots afterwards; of slots after the last token of a row, the numbers mean nothing.
        """
        added, tokens = length - self.length, self.tensor
        values = placement.of(new)
        if (
            torch.is_grad_enabled()
            or transforms_are_active()
            or (tokens is not None and self.length and tokens.dtype is not new.dtype)
        ):
            parts = [new.new_zeros(*new.shape[:2], added, *new.shape[3:])]
            memory = torch.cat([tokens, *parts] if tokens is not None and self.length else parts, dim=2)
            rows = memory.transpose(1, 2).index_put((placement.rows, placement.slots), values.to(memory.dtype))
            self._set_memory(rows.transpose(1, 2).contiguous(), length)
        else:
            slots = self._slots_for((*new.shape[:2], added, *new.shape[3:]), new.dtype, new.device, capacity)
            slots.zero_()  # numbers that are not finite cost some backends time, even if hidden
            assert self.memory is not None
            self.memory.transpose(1, 2)[:, self._start :].index_put_((placement.rows, placement.slots), values)
            self.length, self._current_view = length, None
            self._cropped = max(0, self._cropped - added)
        assert self.tensor is not None
        return self.tensor

    def write(self, new: Tensor, capacity: int) -> Tensor:
        """`extend` in place, for compiled programs without gradients: no view is kept, which they would return."""
        self.append_uninitialised((*new.shape,), new.dtype, new.device, capacity).copy_(new)
        assert self.memory is not None
        return self.memory.narrow(2, self._start, self.length)

    def replace(self, tensor: Tensor | None) -> None:
        """`adopt` for compiled programs, which cannot tell whether a tensor is a slice of memory; None for no token."""
        if tensor is None:
            self.crop(0)
        elif not self.is_current_view(tensor):
            self._set_memory(tensor, tensor.shape[2])

    def is_current_view(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is what `grow` or `view` returned last."""
        return tensor is not None and tensor is self._current_view

    def append_uninitialised(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capacity: int
    ) -> Tensor:
        """Appends uninitialised slots for tokens of this shape and returns them for the caller to fill.

        With zero tokens, ``(B, heads, 0, ...)``, before the first, it only allocates ``capacity`` slots.
        """
        slots = self._slots_for(shape, dtype, device, capacity)
        self.length, self._current_view = self.length + shape[2], None
        self._cropped = max(0, self._cropped - shape[2])
        return slots

    def _slots_for(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capacity: int) -> Tensor:
        """The slots of new tokens of this shape. Reallocates memory, with ``capacity`` slots, if they do not fit."""
        length, added = self.length, shape[2]
        memory, start = self.memory, self._start + length
        if (
            memory is None
            or not (self._is_writable and may_write(memory))
            or start + added > memory.shape[2]
            or not (length or _matches(memory, shape, dtype, device))
        ):
            memory = _new_memory((*shape[:2], capacity, *shape[3:]), dtype, device)
            tokens = self.tensor
            if tokens is not None and length:
                memory[:, :, :length] = tokens
            self._set_memory(memory, length, is_writable=True)
            start = length
        return memory.narrow(2, start, added)

    def claim(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, capacity: int) -> Tensor:
        """Appends uninitialised slots for tokens of this shape, which the kernel fills.

        Returns:
            The tokens, and after them any slots to spare. A view of the tokens alone would take longer than a token.
        """
        count, memory = shape[2], self.memory
        if (
            memory is None
            or not self.length
            or self.stop + count > memory.shape[2]
            or (self._cropped and not (self._is_writable and may_write(memory)))
        ):
            self._slots_for((*shape,), dtype, device, capacity)
            memory = self.memory
            assert memory is not None
        if self._cropped and not memory.is_inference():
            torch.autograd.graph.increment_version(memory)  # for views that contain these slots
        self.length, self._current_view = self.length + count, None
        self._cropped = max(0, self._cropped - count)
        return memory.narrow(2, self._start, memory.shape[2] - self._start) if self._start else memory

    def crop(self, length: int) -> None:
        """Removes all tokens after the first ``length``."""
        self._cropped += self.length - length
        self.length, self._current_view = length, None

    def select(self, rows: Tensor) -> "AppendBuffer":
        """A new buffer whose row i is row ``rows[i]`` of this one, for integer ``rows (B',)``."""
        selected, tokens = AppendBuffer(), self.tensor
        if tokens is None or self.memory is None:
            return selected
        if torch.is_grad_enabled():
            selected._set_memory(tokens.index_select(0, rows), self.length)
            return selected
        memory = _new_memory((rows.shape[0], *self.memory.shape[1:]), tokens.dtype, tokens.device)
        torch.index_select(tokens, 0, rows, out=memory[:, :, : self.length])
        selected._set_memory(memory, self.length, is_writable=True)
        return selected

    def joined(self, other: Self) -> "AppendBuffer":
        """A new buffer with the rows of this one and those of the other; shorter rows end in zeros."""
        joined = AppendBuffer()
        pair = [tokens for tokens in (self.tensor, other.tensor) if tokens is not None]
        length = max((tokens.shape[2] for tokens in pair), default=0)
        if pair:
            tokens = torch.cat([_lengthened(tokens, length) for tokens in pair])
            joined._set_memory(tokens, length, is_writable=not torch.is_grad_enabled() and not tokens.is_inference())
        return joined

    def require_like(self, caller: str, other: Self) -> None:
        """Raises ValueError unless the tokens of both have the same heads, width, dtype and device."""
        mine, theirs = self.tensor, other.tensor
        if mine is None or theirs is None:
            return
        widths = [(x.shape[1], *x.shape[3:]) for x in (mine, theirs)]
        if widths[0] != widths[1] or mine.dtype is not theirs.dtype or mine.device != theirs.device:
            want, got = ((tuple(x.shape), x.dtype, x.device) for x in (mine, theirs))
            raise ValueError(
                f"{caller}: heads, width, dtype and device of both caches must be the same; got tokens of {want[0]} in "
                f"{want[1]} on {want[2]} and of {got[0]} in {got[1]} on {got[2]}."
            )

    def adopt(self, tensor: Tensor) -> None:
        """Replaces the tokens by ``tensor``. A slice of this memory along the tokens stays in place."""
        if self.is_current_view(tensor):
            return
        memory = self.memory
        if self._is_writable and memory is not None and _is_token_slice(tensor, memory):
            stop = self.stop
            self._start, self.length = tensor.storage_offset() // memory.stride(2), tensor.shape[2]
            self._cropped, self._current_view = self._cropped + stop - self.stop, None
        else:
            self._set_memory(tensor, tensor.shape[2])

    def share(self) -> None:
        """Marks memory as shared, so that it is copied before the next write."""
        self._is_writable = False
        self._cropped = 0 if self.memory is None else self.memory.shape[2] - self.stop

    def _set_memory(self, memory: Tensor, length: int, *, is_writable: bool = False) -> None:
        """Replaces memory, whose first ``length`` slots are the tokens."""
        self.memory, self._start, self.length, self._current_view = memory, 0, length, None
        self._is_writable, self._cropped = is_writable, 0

    def __copy__(self) -> Self:
        """A copy that shares memory until either grows."""
        self.share()
        twin = type(self)()
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """A compact copy of the tokens, for deep copies and pickles.

        Raises:
            RuntimeError: for tokens that were computed with gradients.
        """
        return {"tokens": compact_copy(self.tensor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AppendBuffer.__init__(self)
        tokens = state["tokens"]
        if tokens is not None:
            self._set_memory(tokens, tokens.shape[2])


def append_in_place(parts: Sequence[AppendBuffer], k: Tensor, v: Tensor) -> list[Tensor] | None:
    """Appends new keys and values ``(B, Hkv, L, D)`` by the kernel, if they fit into spare capacity.

    The kernel bypasses torch's version counters, by which a backward pass detects overwritten tensors, so it writes
    only to slots that no view contains.

    Args:
        parts: buffers of keys and values, and of the scales of both in int8.
        k, v: the tokens.

    Returns:
        All tokens of each part; None, with nothing changed, for appends that are not eligible.
    """
    keys, values, *scales = parts
    if torch.is_grad_enabled() or keys.memory is None or values.memory is None:
        return None
    k_scale, v_scale = (scale.memory for scale in scales) if scales else (None, None)
    if not kernels.can_bypass_dispatcher(k, v, keys.memory, values.memory):
        return None
    stop = keys.stop
    if stop != values.stop or keys._cropped or values._cropped:
        return None
    if not kernels.append(k, v, keys.memory, values.memory, k_scale, v_scale, stop):
        return None
    return [part.grow(k.shape[2]) for part in parts]


def compact_copy(tokens: Tensor | None) -> Tensor | None:
    """A contiguous copy, in memory of its own.

    Raises:
        RuntimeError: for tokens that were computed with gradients.
    """
    if tokens is None:
        return None
    if tokens.requires_grad:
        raise RuntimeError(
            "Deep copies and pickles of a cache must not contain tokens that were computed with gradients. Use "
            "copy.copy, which shares the graph, or fill the cache under torch.no_grad()."
        )
    return tokens.clone(memory_format=torch.contiguous_format)


def send_by_value(kind: type) -> None:
    """Registers a class whose objects are sent to other processes as bytes.

    `torch.multiprocessing` sends the name of shared memory, which is freed with its tensor: here a temporary copy made
    for the pickle, freed before a spawned process opens it.
    """
    ForkingPickler.register(kind, _to_bytes)


def _to_bytes(thing: Any) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return _from_bytes, (buffer.getvalue(),)


def _from_bytes(numbers: bytes) -> Any:
    return torch.load(io.BytesIO(numbers), weights_only=False)  # part of a pickle, so trusted as much


send_by_value(AppendBuffer)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether results computed from the tensors need a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _lengthened(tokens: Tensor, length: int) -> Tensor:
    """Tokens ``(B, heads, L, ...)`` followed by zeros."""
    missing = length - tokens.shape[2]
    if not missing:
        return tokens
    zeros = tokens.new_zeros(*tokens.shape[:2], missing, *tokens.shape[3:])
    return torch.cat([tokens, zeros], dim=2)


def _new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory that can be written to in every mode, also if allocated in inference mode."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def may_write(memory: Tensor) -> bool:
    """Whether the current mode may write to memory. Compiled code allocates inference tensors in inference mode."""
    return torch.compiler.is_compiling() or not memory.is_inference() or torch.is_inference_mode_enabled()


def _matches(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether memory matches tokens in all but their number."""
    same_sizes = memory.shape[:2] == shape[:2] and memory.shape[3:] == shape[3:]
    return same_sizes and memory.dtype is dtype and memory.device == device


def _is_token_slice(tensor: Tensor, memory: Tensor) -> bool:
    """Whether ``tensor`` is a slice of memory along the tokens."""
    return (
        tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        and tensor.dtype is memory.dtype
        and tensor.stride() == memory.stride()
        and tensor.shape[:2] == memory.shape[:2]
        and tensor.shape[3:] == memory.shape[3:]
        and tensor.storage_offset() % memory.stride(2) == 0
    )
