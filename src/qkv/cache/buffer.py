"""`AppendBuffer`: a tensor of tokens with room behind it, so that appending copies what is new alone."""

import io
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv import kernels


class AppendBuffer:
    """A tensor ``(B, heads, L, ...)`` that grows along L.

    Under ``torch.no_grad()`` and ``torch.inference_mode()`` new tokens are written into memory that has room for them,
    and what the methods return are views of it, valid until the next call. Memory is written to only if it was had
    here and no copy shares it, never if it was given or computed: then it is copied first. Elsewhere appending
    concatenates, so that every step keeps what its backward needs; where dtypes differ as well, as torch does.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        """All of it, room included."""
        self.length = 0
        self._start = 0
        self._is_writable = False
        """Whether memory may be written to."""
        self._cropped = 0
        """How many tokens behind those held somebody may have a view of, as after a crop."""
        self._current_view: Tensor | None = None
        """What `grow` returned last, while it is all that is held."""

    @property
    def tensor(self) -> Tensor | None:
        """All that is held, or None before anything was."""
        if self.memory is None or self._current_view is not None:
            return self._current_view
        return self.memory.narrow(2, self._start, self.length)

    @property
    def stop(self) -> int:
        """Where in memory new tokens go."""
        return self._start + self.length

    def extend(self, new: Tensor, capacity: int) -> Tensor:
        """Appends ``new`` and returns all tokens. A buffer that must be reallocated gets ``capacity`` slots."""
        memory = self.memory
        # Under torch.vmap, memory of ours has no batch to write to.
        if (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or (memory is not None and self.length and memory.dtype is not new.dtype)
        ):
            held = self.tensor
            together = torch.cat([held, new] if held is not None and self.length else [new], dim=2)
            self._put(together, together.shape[2])
            return together
        self._slots_for(new.shape, new.dtype, new.device, capacity).copy_(new)
        return self.grow(new.shape[2])

    def grow(self, count: int) -> Tensor:
        """All that is held and ``count`` tokens behind it, which memory has by now."""
        assert self.memory is not None
        self.length += count
        self._cropped = max(0, self._cropped - count)
        self._current_view = self.memory.narrow(2, self._start, self.length)
        return self._current_view

    def is_current_view(self, tensor: Tensor | None) -> bool:
        """Whether `grow` returned it last."""
        return tensor is not None and tensor is self._current_view

    def append_uninitialised(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capacity: int
    ) -> Tensor:
        """Appends uninitialised slots for tokens of this shape and returns them for the caller to fill.

        With zero tokens, ``(B, heads, 0, ...)``, before the first, it only allocates ``capacity``.
        """
        place = self._slots_for(shape, dtype, device, capacity)
        self.length, self._current_view = self.length + shape[2], None
        self._cropped = max(0, self._cropped - shape[2])
        return place

    def _slots_for(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, capacity: int) -> Tensor:
        """The place of new tokens of this shape, in memory that is had anew where they do not fit."""
        length, added = self.length, shape[2]
        memory, start = self.memory, self._start + length
        if (
            memory is None
            or not (self._is_writable and _may_write(memory))
            or start + added > memory.shape[2]
            or not (length or _suits(memory, shape, dtype, device))
        ):
            memory = _new_memory((*shape[:2], capacity, *shape[3:]), dtype, device)
            held = self.tensor
            if held is not None and length:
                memory[:, :, :length] = held
            self._put(memory, length, is_writable=True)
            start = length
        return memory.narrow(2, start, added)

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        self._cropped += self.length - length
        self.length, self._current_view = length, None

    def select(self, rows: Tensor) -> "AppendBuffer":
        """Another that holds these rows of the batch, integer ``(B',)``, in this order and as often as named."""
        chosen, held = AppendBuffer(), self.tensor
        if held is None or self.memory is None:
            return chosen
        if torch.is_grad_enabled():
            chosen._put(held.index_select(0, rows), self.length)
            return chosen
        memory = _new_memory((rows.shape[0], *self.memory.shape[1:]), held.dtype, held.device)
        torch.index_select(held, 0, rows, out=memory[:, :, : self.length])
        chosen._put(memory, self.length, is_writable=True)
        return chosen

    def adopt(self, tensor: Tensor) -> None:
        """Goes on with ``tensor``: a part of what was returned, which stays in place, or any other."""
        if self.is_current_view(tensor):
            return
        memory = self.memory
        if self._is_writable and memory is not None and _is_part(tensor, memory):
            stop = self.stop
            self._start, self.length = tensor.storage_offset() // memory.stride(2), tensor.shape[2]
            self._cropped, self._current_view = self._cropped + stop - self.stop, None
        else:
            self._put(tensor, tensor.shape[2])

    def share(self) -> None:
        """Has memory be written to no more, since somebody else holds it from now on."""
        self._is_writable = False
        self._cropped = 0 if self.memory is None else self.memory.shape[2] - self.stop

    def _put(self, memory: Tensor, length: int, *, is_writable: bool = False) -> None:
        self.memory, self._start, self.length, self._current_view = memory, 0, length, None
        self._is_writable, self._cropped = is_writable, 0

    def __copy__(self) -> Self:
        """Another, with the same memory until either of them grows."""
        self.share()
        twin = type(self)()
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The tokens alone, for deep copies and pickles.

        Raises:
            RuntimeError: for tokens that were computed with gradients.
        """
        return {"tokens": compact_copy(self.tensor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AppendBuffer.__init__(self)
        tokens = state["tokens"]
        if tokens is not None:
            self._put(tokens, tokens.shape[2])


def append_in_place(parts: Sequence[AppendBuffer], k: Tensor, v: Tensor) -> list[Tensor] | None:
    """Has the kernel write new keys and values ``(B, Hkv, L, D)`` behind those held, where that is all there is to do.

    It goes past torch, which counts what is written to a tensor to know whether the backward pass still finds what it
    needs. So it writes only to what nobody has seen.

    Args:
        parts: of keys and of values; and of the scales of both, where they are held in int8.
        k, v: the tokens.

    Returns:
        All that each part holds; or None, with nothing changed, where memory is full or there is more to do.
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
    """A copy without what lies around them in memory.

    Raises:
        RuntimeError: for tokens that were computed with gradients.
    """
    if tokens is None:
        return None
    if tokens.requires_grad:
        raise RuntimeError(
            "A deep copy or pickle of a cache holds numbers alone, and these tokens were computed with gradients. Use "
            "copy.copy, which shares the graph, or fill the cache under torch.no_grad()."
        )
    return tokens.clone(memory_format=torch.contiguous_format)


def send_by_value(kind: type) -> None:
    """Has processes be handed objects of this class as bytes.

    `torch.multiprocessing` sends a tensor as the name of its memory, which ends with it: here with a copy that was made
    for the pickle alone, before a spawned process has opened it.
    """
    ForkingPickler.register(kind, _by_value)


def _by_value(thing: Any) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return _from_bytes, (buffer.getvalue(),)


def _from_bytes(numbers: bytes) -> Any:
    return torch.load(io.BytesIO(numbers), weights_only=False)  # of a pickle, as trusted as the rest of it


send_by_value(AppendBuffer)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether what is computed of the tensors is to have a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that can be written to in every mode, whatever the present one."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)


def _may_write(memory: Tensor) -> bool:
    """Whether the present mode writes to it: what a compiled program made under inference_mode is for this mode."""
    return torch.compiler.is_compiling() or not memory.is_inference() or torch.is_inference_mode_enabled()


def _suits(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tokens of this shape fit into the memory."""
    same_sizes = memory.shape[:2] == shape[:2] and memory.shape[3:] == shape[3:]
    return same_sizes and memory.dtype is dtype and memory.device == device


def _is_part(tensor: Tensor, memory: Tensor) -> bool:
    """Whether it is the memory cut along its tokens."""
    return (
        tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        and tensor.dtype is memory.dtype
        and tensor.stride() == memory.stride()
        and tensor.shape[:2] == memory.shape[:2]
        and tensor.shape[3:] == memory.shape[3:]
        and tensor.storage_offset() % memory.stride(2) == 0
    )
