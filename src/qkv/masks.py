"""`Mask`: which keys a query may see."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.arguments import broadcasts, require_count, require_strided, require_tensors


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Mask:
    """Which keys a query may see, as a frozen value that combines with ``&``.

    Query row ``i`` has position ``p = i + offset``, or ``i + offset[b]``; key ``j`` has position ``j``. The query sees
    the key if

    - ``j <= p + right``
    - ``j >= p - left`` or ``j < sink_tokens``
    - ``keep[b, j]`` and ``j < lengths[b]``
    - ``documents[b, p] == documents[b, j]``
    - ``allow[b, h, i, j]``

    all hold; a field that is ``None`` sets no condition. True means *may attend*, everywhere. Build masks with the
    constructors (`full`, `causal`, `sliding`, `band`, `padding`, `documents`, `dense`), not with the fields.

    A mask stores neither Lq, Lk nor an offset: one mask serves a full pass, any chunk of it and every decoding step.

    Raises:
        TypeError: when a mask is used as a boolean (``mask1 and mask2``).
        ValueError: from the constructors, for invalid bounds, shapes and dtypes.

    Example:
        >>> from qkv import Mask
        >>> Mask.causal(window=3)
        Mask.band(left=2, right=0)
        >>> Mask.causal() & Mask.sliding(window=4)
        Mask.band(left=2, right=0)
        >>> Mask.causal(window=2).visible(3, 3).int()
        tensor([[[[1, 0, 0],
                  [1, 1, 0],
                  [0, 1, 1]]]], dtype=torch.int32)
    """

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    keep: Tensor | None = None
    lengths: Tensor | None = None
    document_ids: Tensor | None = None
    allow: Tensor | None = None

    @staticmethod
    def full() -> "Mask":
        """Every query sees every key."""
        return FULL

    @staticmethod
    def causal(window: int | None = None, sink_tokens: int = 0) -> "Mask":
        """A query sees its own key and those before it; with a window, ``window`` keys in all, itself included.

        Args:
            window: number of keys seen, the query's own included, at least 1; None for all.
            sink_tokens: number of first keys that are visible outside of the window as well.

        Source: Mistral 7B, section 2 and transformers' ``sliding_window``. flash-attn's ``window_size=(W, 0)`` is
        ``window=W + 1`` here.
        """
        if window is None:
            return Mask.band(None, 0, sink_tokens)
        require_count("Mask.causal", "window", window, 1, " (the query's own key counts as one)")
        return Mask.band(window - 1, 0, sink_tokens)

    @staticmethod
    def sliding(window: int, sink_tokens: int = 0) -> "Mask":
        """A query sees ``window / 2`` keys on each side, and its own.

        Args:
            window: even number of keys, half of them before the query and half after it.
            sink_tokens: number of first keys that are visible outside of the window as well.

        Source: Longformer, section 3.1 ("w/2 tokens on each side"). For the window of Mistral, which looks back
        only, see `causal`.
        """
        require_count("Mask.sliding", "window", window, 1, " (half on each side of the query)")
        if window % 2:
            raise ValueError(
                f"Mask.sliding: window must be even, half on each side of the query; got {window}. "
                f"Use {window + 1}, or Mask.band(left, right) for uneven sides, or Mask.causal(window={window})."
            )
        return Mask.band(window // 2, window // 2, sink_tokens)

    @staticmethod
    def band(left: int | None, right: int | None, sink_tokens: int = 0) -> "Mask":
        """A query at position p sees keys ``p - left`` to ``p + right``, both included.

        Args:
            left: number of keys seen before the query's own; None for all of them.
            right: number of keys seen after the query's own; None for all of them.
            sink_tokens: number of first keys that are visible regardless of ``left``; ``right`` still applies.
        """
        if left is not None:
            require_count("Mask.band", "left", left, 0, " (None means unbounded)")
            left = operator.index(left)
        if right is not None:
            require_count("Mask.band", "right", right, 0, " (None means unbounded)")
            right = operator.index(right)
        require_count("Mask.band", "sink_tokens", sink_tokens, 0, " (it is a number of keys)")
        # Without a left bound every earlier key is visible anyway.
        return Mask(left=left, right=right, sink_tokens=0 if left is None else operator.index(sink_tokens))

    @staticmethod
    def padding(keep: Tensor) -> "Mask":
        """Hides padded keys of each batch row.

        Args:
            keep: boolean ``(B, Lk)``, True where the key is real; or integer ``(B,)``, the number of real keys of a
                row padded on the right.
        """
        require_tensors("Mask.padding", keep=keep)
        if keep.dtype == torch.bool and keep.dim() == 2:
            return Mask(keep=keep)
        if not keep.dtype.is_floating_point and keep.dtype != torch.bool and keep.dim() == 1:
            return Mask(lengths=keep)
        raise ValueError(
            "Mask.padding: keep must be boolean (B, Lk), True for real keys, or integer lengths (B,); "
            f"got {keep.dtype} of shape {tuple(keep.shape)}."
        )

    @staticmethod
    def documents(ids: Tensor) -> "Mask":
        """Hides the keys of other documents packed into the same row.

        Args:
            ids: integer ``(B, L)``, the document of each position: ``ids[b, j]`` of key j, ``ids[b, i + offset]`` of
                query row i. L is the number of keys.
        """
        require_tensors("Mask.documents", ids=ids)
        if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.dim() != 2:
            raise ValueError(
                f"Mask.documents: ids must be integers of shape (B, L); got {ids.dtype} of shape {tuple(ids.shape)}."
            )
        return Mask(document_ids=ids)

    @staticmethod
    def dense(allow: Tensor) -> "Mask":
        """Any pattern, as a dense boolean tensor.

        Args:
            allow: boolean, broadcastable to ``(B, H, Lq, Lk)``, True where the query may see the key.
        """
        require_tensors("Mask.dense", allow=allow)
        if allow.dtype != torch.bool or not 2 <= allow.dim() <= 4:
            raise ValueError(
                "Mask.dense: allow must be boolean with 2 to 4 dimensions, broadcastable to (B, H, Lq, Lk), True where "
                f"a query may attend; got {allow.dtype} of shape {tuple(allow.shape)}. "
                "A float mask is a score: pass it as bias=."
            )
        return Mask(allow=allow[(None,) * (4 - allow.dim())])

    def __and__(self, other: "Mask") -> "Mask":
        """The keys visible in both masks."""
        if not isinstance(other, Mask):
            remedy = "Mask.dense(allow)" if isinstance(other, Tensor) else "Mask.causal(), Mask.padding(keep), ..."
            raise TypeError(f"{self!r} & {type(other).__name__}: both must be a qkv.Mask. Use {remedy}.")
        left, sink_tokens = _intersect_left(self, other)
        return Mask(
            left=left,
            right=_min_bound(self.right, other.right),
            sink_tokens=sink_tokens,
            **{kind.field: _intersect_optional(kind.of(self), kind.of(other), kind.intersect) for kind in TENSORS},
        )

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} has no truth value: combine masks with `&`, not with `and`; "
            "`mask.is_full` says whether a mask hides nothing."
        )

    def __eq__(self, other: object) -> bool:
        """Equal bounds and identical tensor objects."""
        return self._identity() == other._identity() if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int | None, ...]:
        """What equal masks have in common: bounds and the ids of tensors."""
        tensors = (kind.of(self) for kind in TENSORS)
        return (self.left, self.right, self.sink_tokens, *(None if t is None else id(t) for t in tensors))

    def __repr__(self) -> str:
        parts: list[str] = []
        if self.left is not None or self.right is not None:
            sinks = f", sink_tokens={self.sink_tokens}" if self.sink_tokens else ""
            parts.append(f"Mask.band(left={self.left}, right={self.right}{sinks})")
        for kind, tensor in self._present():
            dtype = str(tensor.dtype).removeprefix("torch.")
            parts.append(f"Mask.{kind.constructor}(<{dtype} {tuple(tensor.shape)}>)")
        return " & ".join(parts) or "Mask.full()"

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key, whatever the lengths."""
        return self.left is None and self.right is None and not self.has_tensors

    @property
    def has_tensors(self) -> bool:
        """Whether any tensor hides keys, besides the interval."""
        return self._has_any(TENSOR_FIELDS)

    @property
    def is_pairwise(self) -> bool:
        """Whether a tensor other than padding hides keys, perhaps from some queries and not from others."""
        return self._has_any(PAIRWISE)

    @property
    def is_positional(self) -> bool:
        """Whether visibility depends on the position of the query, so that an offset is needed."""
        return self.left is not None or self.right is not None or self._has_any(POSITIONAL)

    def _has_any(self, names: tuple[str, ...]) -> bool:
        return any(getattr(self, name) is not None for name in names)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The name of each tensor of the mask, as in error messages, and the tensor."""
        return ((f"{kind.constructor} {kind.argument}", tensor) for kind, tensor in self._present())

    def positional_tensors(self) -> dict[str, Tensor]:
        """The tensors ``(B or 1, Lk)`` that are also read at the position of the query, by field."""
        return {kind.field: tensor for kind, tensor in self._present() if kind.is_positional}

    def values(self) -> tuple[Any, ...]:
        """All fields, in order: ``Mask(*mask.values()) == mask``."""
        return tuple(getattr(self, name) for name in FIELDS)

    def _present(self) -> "Iterator[tuple[TensorKind, Tensor]]":
        """The kinds of tensors that the mask has, and the tensors."""
        for kind in TENSORS if self.has_tensors else ():
            tensor = kind.of(self)
            if tensor is not None:
                yield kind, tensor

    def require_fit(self, caller: str, batch: int, heads: int, lq: int, lk: int, device: torch.device) -> None:
        """Raises ValueError unless the tensors of the mask fit these sizes and are on this device."""
        for kind, tensor in self._present():
            name, shape = f"{kind.constructor} {kind.argument}", kind.shape(batch, heads, lq, lk)
            require_strided(caller, f"mask's {name}", tensor)
            if tensor.device != device:
                raise ValueError(f"{caller}: mask is on {tensor.device}, q on {device}; use mask.to({str(device)!r}).")
            # Only a dense mask may broadcast along the keys; all may along the batch.
            exact = len(shape) == 4 or tensor.shape[1:] == shape[1:]
            if not (exact and broadcasts(tensor, shape)):
                raise ValueError(f"{caller}: mask's {name} must fit {shape}; got shape {tuple(tensor.shape)}.")

    def visible(self, lq: int, lk: int, offset: int | Tensor = 0, *, device: torch.device | None = None) -> Tensor:
        """The mask as a dense tensor.

        Args:
            lq, lk: number of queries and of keys.
            offset: position of the first query, or integer ``(B,)``, that of each row of the batch. A query at a
                position that has no document sees no key.
            device: that of the tensors of the mask or of the offset if None.

        Returns:
            boolean, broadcastable to ``(B, H, lq, lk)``, not broadcast in the last two dimensions.
        """
        if device is None:
            tensors = [offset] if isinstance(offset, Tensor) else [tensor for _, tensor in self.tensors()]
            device = tensors[0].device if tensors else None
        position = positions(lq, offset, device)[:, None, :, None]
        key = torch.arange(lk, device=device)
        seen = torch.ones(1, 1, lq, lk, dtype=torch.bool, device=device)
        if self.right is not None:
            seen = key <= position + self.right
        if self.left is not None:
            near = key >= position - self.left
            seen = seen & (near | (key < self.sink_tokens) if self.sink_tokens else near)
        keep = self.keep_keys(lk)
        if keep is not None:
            seen = seen & keep[:, None, None, :]
        if self.document_ids is not None:
            has_document = (position >= 0) & (position < lk)
            of_query = _documents_at(self.document_ids, position.where(has_document, lk).flatten(1))
            same = of_query[:, None, :, None] == self.document_ids[:, None, None, :]
            seen = seen & has_document & same
        if self.allow is not None:
            seen = seen & self.allow
        return seen

    def keep_keys(self, lk: int) -> Tensor | None:
        """``keep`` and ``lengths`` combined as boolean ``(B, lk)``; None without either."""
        if self.lengths is None:
            return self.keep
        within = torch.arange(lk, device=self.lengths.device) < self.lengths[:, None]
        return within if self.keep is None else within & self.keep

    def key_range(self, lq: int, lk: int, offset: int | Tensor) -> tuple[int, int]:
        """First key and one past the last key that the interval shows to any query; all for offsets in a tensor."""
        if isinstance(offset, Tensor):
            return 0, lk  # Reading its numbers would synchronise a GPU, and break a trace.
        # Compilers decide comparisons of symbolic lengths, but not min and max.
        stop = lk
        if self.right is not None and _is_statically_true(offset + lq + self.right < lk):
            stop = max(0, offset + lq + self.right)
        start = 0
        if self.left is not None and not self.sink_tokens and _is_statically_true(offset > self.left):
            start = min(stop, offset - self.left)
        return start, stop

    def simplified(self, lq: int, lk: int, offset: int | Tensor) -> "Mask":
        """The mask without bounds that hide nothing from these queries; unchanged for offsets in a tensor."""
        if isinstance(offset, Tensor):
            return self
        left, right = self.left, self.right
        if right is not None and _is_statically_true(offset + right >= lk - 1):
            right = None
        if left is not None and _is_statically_true(offset + lq - 1 - left <= self.sink_tokens):
            left = None
        if left == self.left and right == self.right:
            return self
        return replace(self, left=left, right=right, sink_tokens=0 if left is None else self.sink_tokens)

    def select_keys(self, start: int, stop: int, sink_tokens: int = 0) -> "Mask":
        """The mask restricted to the keys ``0 .. sink_tokens - 1`` and ``start .. stop - 1``.

        Their positions are renumbered from 0: an offset changes by ``sink_tokens - start``.
        """
        if not self.has_tensors:
            return self

        return self._with_tensors(
            {kind: kind.select_keys(tensor, start, stop, sink_tokens) for kind, tensor in self._present()}
        )

    def gather_keys(self, index: Tensor, lk: int, queries: tuple[int, int]) -> "Mask":
        """The mask whose key j of row b is key ``index[b, j]`` of this one.

        Args:
            index: integer ``(B, n)``.
            lk: number of keys of this mask.
            queries: first position of the queries among the keys of this mask, and one past the last.
        """
        if not self.has_tensors:
            return self
        keep, documents, allow = self.keep_keys(lk), self.document_ids, self.allow
        if keep is not None:
            keep = gather_keys(keep, index)
        if allow is not None and allow.shape[3] > 1:
            allow = gather_keys(allow, index[:, None, None])
        gathered = replace(self, keep=keep, lengths=None, document_ids=None, allow=allow)
        if documents is None:
            return gathered
        # Positions of queries among the gathered keys may be none of theirs.
        of_query, of_key = documents[:, queries[0] : queries[1]], gather_keys(documents, index)
        return gathered & Mask.dense((of_query[:, :, None] == of_key[:, None])[:, None])

    def select_queries(self, start: int, stop: int) -> "Mask":
        """The mask restricted to the query rows ``start .. stop - 1``, whose offset is larger by ``start``."""
        if self.allow is None or self.allow.shape[2] == 1:
            return self
        return replace(self, allow=self.allow[:, :, start:stop])

    def to(self, device: torch.device | str) -> "Mask":
        """The mask with its tensors on ``device``."""
        return self._with_tensors({kind: tensor.to(device) for kind, tensor in self._present()})

    def _with_tensors(self, tensors: "dict[TensorKind, Tensor]") -> "Mask":
        changes: dict[str, Any] = {kind.field: tensor for kind, tensor in tensors.items()}
        return replace(self, **changes)


def positions(lq: int, offset: int | Tensor, device: torch.device | None) -> Tensor:
    """The positions of queries: ``(1, lq)``, or ``(B, lq)`` for offsets ``(B,)``."""
    first = offset[:, None] if isinstance(offset, Tensor) else offset
    return torch.arange(lq, device=device)[None] + first


def _documents_at(ids: Tensor, position: Tensor) -> Tensor:
    """The ids ``(B or 1, Lk)`` at positions ``(B or 1, Lq)`` from 0 to Lk, where none is at Lk: ``(B or 1, Lq)``."""
    row = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return F.pad(ids, (0, 1))[row, position]


def _is_statically_true(condition: bool) -> bool:
    """Whether a condition on lengths is true; while exporting, for all lengths that the program accepts."""
    if not torch.compiler.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _min_bound(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _intersect_left(a: Mask, b: Mask) -> tuple[int | None, int]:
    """The left bound and the sink tokens of ``a & b``."""
    if a.left is None or b.left is None:
        bounded = b if a.left is None else a
        return bounded.left, bounded.sink_tokens
    if a.left == b.left:
        return a.left, min(a.sink_tokens, b.sink_tokens)
    narrow, wide = (a, b) if a.left < b.left else (b, a)
    if narrow.sink_tokens > wide.sink_tokens:
        raise ValueError(
            f"{a!r} & {b!r}: the narrower window has {narrow.sink_tokens} sink tokens, the wider one "
            f"{wide.sink_tokens}; their intersection is not a band. "
            "Give both the same sink_tokens, or combine dense masks: Mask.dense(a.visible(...) & b.visible(...))."
        )
    return narrow.left, narrow.sink_tokens


def _intersect_optional(
    a: Tensor | None, b: Tensor | None, intersect: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    """``intersect(a, b)``, or the one that is not None."""
    if a is None or b is None or a is b:
        return b if a is None else a
    return intersect(a, b)


def _intersect_ids(a: Tensor, b: Tensor) -> Tensor:
    """Ids that are equal for two positions exactly if both ``a`` and ``b`` are."""
    pairs = torch.stack(torch.broadcast_tensors(a, b), dim=-1)
    _, ids = torch.unique(pairs.flatten(0, -2), dim=0, return_inverse=True)
    intersection: Tensor = ids.view(pairs.shape[:-1])
    return intersection


def gather_keys(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries ``index (B, ..., n)`` of the last dimension, keys, of ``(B or 1, ..., Lk)``."""
    sizes = [max(pair) for pair in zip(tensor.shape[:-1], index.shape[:-1], strict=True)]
    return tensor.expand(*sizes, -1).gather(-1, index.expand(*sizes, -1))


def select_keys(tensor: Tensor, start: int, stop: int, sink_tokens: int) -> Tensor:
    """The entries ``0 .. sink_tokens - 1`` and ``start .. stop - 1`` of the last dimension, keys."""
    if tensor.shape[-1] == 1:
        return tensor
    selected = tensor[..., start:stop]
    return torch.cat([tensor[..., :sink_tokens], selected], dim=-1) if sink_tokens else selected


def _select_lengths(lengths: Tensor, start: int, stop: int, sink_tokens: int) -> Tensor:
    """How many of the selected keys are among the first ``lengths``."""
    return lengths.clamp(max=sink_tokens) + (lengths.clamp(max=stop) - start).clamp(min=0)


class TensorKind(NamedTuple):
    """Description of one tensor of a mask. What it hides is in `Mask.visible`."""

    field: str
    """its name among the fields of `Mask`"""
    constructor: str
    """the constructor of `Mask` that takes it"""
    argument: str
    """its name in that constructor"""
    shape: Callable[[int, int, int, int], tuple[int, ...]]
    """the required shape, from batch, heads, lq and lk"""
    intersect: Callable[[Tensor, Tensor], Tensor]
    """the tensor of ``a & b``"""
    select_keys: Callable[[Tensor, int, int, int], Tensor]
    """the tensor of `Mask.select_keys`"""
    is_positional: bool = False
    """whether it is also read at the position of the query"""

    def of(self, mask: Mask) -> Tensor | None:
        tensor: Tensor | None = getattr(mask, self.field)
        return tensor


TENSORS = (
    TensorKind("keep", "padding", "keep", lambda b, h, lq, lk: (b, lk), torch.logical_and, select_keys),
    TensorKind("lengths", "padding", "lengths", lambda b, h, lq, lk: (b,), torch.minimum, _select_lengths),
    TensorKind("document_ids", "documents", "ids", lambda b, h, lq, lk: (b, lk), _intersect_ids, select_keys, True),
    TensorKind("allow", "dense", "allow", lambda b, h, lq, lk: (b, h, lq, lk), torch.logical_and, select_keys),
)
"""Every kind of tensor that a mask may have, in the order in which masks are printed."""

TENSOR_FIELDS = tuple(kind.field for kind in TENSORS)
PAIRWISE = tuple(kind.field for kind in TENSORS if kind.constructor != "padding")
POSITIONAL = tuple(kind.field for kind in TENSORS if kind.is_positional)
FIELDS = tuple(field.name for field in fields(Mask))

FULL = Mask()
