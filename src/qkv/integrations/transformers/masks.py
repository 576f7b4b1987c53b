"""`make_mask`: converts transformers' mask functions to a `Mask` instead of evaluating them.

transformers describes a mask as a closure over (batch, head, query, key) and evaluates it into a dense tensor. Its own
closures are recognised by their code objects, and their parameters read from their cells. None of this is documented:
for releases that rename them, masks are dense, which is equally correct but slower.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import kernels
from qkv.integrations.transformers.lazy_tensor import LazyTensor
from qkv.masks import FULL, Mask
from qkv.torch_internals import transforms_are_active

MaskFunction = Callable[..., Any]


class MaskTensor(LazyTensor):
    """A `Mask` and an offset in the form of an additive mask ``(B, 1, Lq, Lk)``.

    Models of transformers pass masks as tensors. Those that slice, combine or add them get the additive mask of eager
    attention: 0 where a key is visible, the dtype's minimum elsewhere.
    """

    mask: Mask
    offset: int
    packing: Any
    """The `_Packing` of `unpadding`, cached on first use."""

    @staticmethod
    def __new__(
        cls, mask: Mask, offset: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> "MaskTensor":
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        self.mask = mask
        self.offset = offset
        return self

    def materialize(self) -> Tensor:
        """The additive mask."""
        visible = self.mask.visible(self.shape[2], self.shape[3], self.offset, device=self.device)
        hidden = torch.zeros((), dtype=self.dtype, device=self.device).masked_fill(
            ~visible, torch.finfo(self.dtype).min
        )
        return hidden.expand(self.shape).contiguous()

    def constructor_args(self) -> tuple[Any, ...]:
        """Mask and offset, and the shape, dtype and device of the additive mask."""
        return self.mask, self.offset, tuple(self.shape), self.dtype, str(self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MaskTensor({self.mask!r}, offset={self.offset}, shape={tuple(self.shape)})"


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """The mask function that transformers' models call; arguments as in ``masking_utils.eager_mask``.

    Returns:
        a `MaskTensor`, with a dense `Mask` if ``mask_function`` is not recognised; an ordinary additive mask while
        tracing or under functorch transforms, so that the padding of this call does not become a constant.
    """
    from transformers.masking_utils import (
        causal_mask_function,
        eager_mask,
    )  # torch 2.9 cannot follow transformers itself

    mask_function = mask_function or causal_mask_function
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": device}
    if kernels.is_tracing() or transforms_are_active():
        additive: Tensor = eager_mask(*sizes, dtype=dtype, **options)
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            additive.qkv_kinds = {}  # type: ignore[attr-defined]
        return additive
    from transformers import masking_utils

    mask = recognise_mask(mask_function, range(kv_offset, kv_offset + kv_length))
    prepare_padding = getattr(masking_utils, "prepare_padding_mask", None)
    if mask is None or prepare_padding is None:
        seen = masking_utils.sdpa_mask(*sizes, **options)
        return MaskTensor(Mask.dense(seen), 0, seen.shape, dtype, device)
    keep = prepare_padding(attention_mask, kv_length, kv_offset)
    if keep is not None:
        keep = keep[:, kv_offset : kv_offset + kv_length].bool()
        if not keep.all():
            mask = mask & Mask.padding(keep)
    return MaskTensor(mask, int(q_offset) - kv_offset, (batch_size, 1, q_length, kv_length), dtype, device)


class MaskKind(NamedTuple):
    """What an additive mask shows whose last query is at the last key."""

    number: int
    """of the mask in `_masks`"""
    hides_keys: bool
    """whether there are keys that no query sees: padding"""


def kind_of(additive: Tensor, window: int | None) -> tuple[MaskKind, Tensor]:
    """The kind of a mask, and the keys ``(B, Lk)`` that some query sees.

    Compiled programs compute masks, so that what they mean is known by their numbers alone.

    Args:
        additive: ``(B, 1, Lq, Lk)``.
        window: number of keys of a causal window that it may have.
    """
    batch, heads, rows, keys = additive.shape
    if heads != 1 or not additive.is_floating_point():
        return MaskKind(0, False), torch.ones(batch, keys, dtype=torch.bool)
    if not additive.any():  # that of most steps
        return MaskKind(_NUMBER_OF_FULL, False), torch.ones(batch, keys, dtype=torch.bool)
    visible = additive[:, 0] == 0
    keep = visible.any(dim=1)
    if (visible | (additive[:, 0] <= torch.finfo(additive.dtype).min)).all():
        for number, mask in enumerate(_masks(window)):
            if mask is not None and (
                (rows == 1 and mask.left is None)
                or torch.equal(mask.visible(rows, keys, keys - rows)[0] & keep[:, None], visible)
            ):
                return MaskKind(number, not keep.all()), keep
    return MaskKind(0, False), keep


def mask_of_kind(additive: Tensor, kind: MaskKind, keep: Tensor, window: int | None) -> Tensor | None:
    """A mask as a `MaskTensor`; None for one that shows all, itself for any other than those of `_masks`."""
    mask = _masks(window)[kind.number]
    if mask is None:
        return additive
    if kind.hides_keys:
        mask = mask & Mask.padding(keep)
    if mask is FULL:
        return None
    _, _, rows, keys = additive.shape
    return MaskTensor(mask, keys - rows, additive.shape, additive.dtype, additive.device)


@functools.lru_cache(maxsize=64)
def _masks(window: int | None) -> tuple[Mask | None, ...]:
    """The masks that are known by their numbers; None for any other, and for a window if there is none."""
    return None, FULL, Mask.causal(), None if window is None else Mask.causal(window=window)


_NUMBER_OF_FULL = _masks(None).index(FULL)


def recognise_mask(mask_function: MaskFunction, keys: range) -> Mask | None:
    """The `Mask` equivalent to a mask function for these keys; None for functions other than transformers' own."""
    try:
        return _recognise(mask_function, keys, within_documents=False)
    except KeyError:  # a closure with other parameter names
        return None


def _recognise(function: MaskFunction, keys: range, *, within_documents: bool) -> Mask | None:
    """As `recognise_mask`. ``within_documents``: whether a documents mask is combined with the function."""
    from transformers import masking_utils

    if function is getattr(masking_utils, "causal_mask_function", None):
        return Mask.causal()
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return FULL
    kind = _closure_kinds().get(getattr(function, "__code__", None))
    if kind is None:
        return None
    cells = inspect.getclosurevars(function).nonlocals
    if kind == "and":
        parts = cells["mask_functions"]
        packed = within_documents or any(
            _closure_kinds().get(getattr(part, "__code__", None)) == "packed" for part in parts
        )
        masks = [_recognise(part, keys, within_documents=packed) for part in parts]
        return None if None in masks else functools.reduce(operator.and_, masks, FULL)
    if kind in ("window", "window both ways") and cells["sliding_window"] < 1:
        return None
    if kind == "window":
        return Mask.band(cells["sliding_window"] - 1, None)
    if kind == "window both ways":
        return Mask.band(cells["sliding_window"], cells["sliding_window"])
    if kind == "chunks":
        return None if within_documents else _recognise_chunks(cells["chunk_size"], cells["left_padding"], keys)
    if kind == "or":
        return _recognise_prefix(cells["mask_functions"], keys)
    if kind == "packed":
        return Mask.documents(cells["packed_sequence_mask"])
    # Positions restart in each document, but distances within a document are the same as in the row.
    return _recognise(cells["mask_function"], keys, within_documents=True) if within_documents else None


def _recognise_chunks(size: int, left_padding: Tensor, keys: range) -> Mask | None:
    """Chunks that begin at the first real token of each row."""
    first = left_padding.flatten()[:1]
    if size >= 1 and bool((left_padding == first).all()):
        return Mask.chunked(size, start=int(first) - keys.start) if len(first) else None
    positions = torch.arange(keys.start, keys.stop, device=left_padding.device)
    return Mask.documents((positions - left_padding[:, None]) // size)


def _recognise_prefix(functions: Sequence[MaskFunction], keys: range) -> Mask | None:
    """A causal mask, or pairs in the same block, where there is no block but one from the first token on."""
    from transformers import masking_utils

    if len(functions) != 2 or functions[0] is not getattr(masking_utils, "causal_mask_function", None):
        return None
    if _closure_kinds().get(getattr(functions[1], "__code__", None)) != "blocks":
        return None
    blocks = inspect.getclosurevars(functions[1]).nonlocals["block_sequence_ids"]
    in_block = blocks >= 0
    lengths = in_block.sum(dim=1)
    is_first = in_block == (torch.arange(blocks.shape[1], device=blocks.device) < lengths[:, None])
    is_one = (blocks == blocks[:, :1]) | ~in_block
    if not bool((is_first & is_one).all()):
        return None
    return Mask.prefix((lengths - keys.start).clamp(min=0))


@functools.cache
def _closure_kinds() -> dict[object, str]:
    """Kinds of transformers' mask closures, by code object."""
    from transformers import masking_utils

    zeros = torch.zeros(1, 1, dtype=torch.int64)
    makers: dict[str, Callable[[], Any]] = {
        "and": lambda: masking_utils.and_masks(masking_utils.causal_mask_function),
        "or": lambda: masking_utils.or_masks(masking_utils.causal_mask_function),
        "blocks": lambda: masking_utils.blockwise_overlay(zeros),
        "window": lambda: masking_utils.sliding_window_overlay(1),
        "window both ways": lambda: masking_utils.sliding_window_bidirectional_overlay(1),
        "chunks": lambda: masking_utils.chunked_overlay(1, zeros),
        "packed": lambda: masking_utils.packed_sequence_mask_function(zeros),
        "restarting positions": lambda: masking_utils.remap_positions_for_packed_sequence(
            masking_utils.causal_mask_function, zeros
        ),
    }
    kinds: dict[object, str] = {}
    for kind, make in makers.items():
        with contextlib.suppress(AttributeError, TypeError):  # not in this release, or with another signature
            kinds[make().__code__] = kind
    return kinds
