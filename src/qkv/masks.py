"""`Mask`: which keys a query may see."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv import bands, drawing
from qkv.arguments import broadcasts, more, require_count, require_int, require_strided, require_tensors
from qkv.bands import Band
from qkv.tracing import can_read_values

PICTURED = 16
"""Tokens of a picture for notebooks, and more for wider windows."""
LARGEST_PICTURE = 8192


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Mask:
    """Which keys a query may see, as a frozen value that combines with ``&``, ``|`` and ``~``.

    Query row ``i`` has position ``p = i + offset``, or ``i + offset[b]``; key ``j`` has position ``j``. The query sees
    the key if

    - ``j <= p + right``, or ``j < prefix_tokens`` or ``j < prefix_lengths[b]``
    - ``j >= p - left`` and ``(p - j) % dilation == 0``, or ``j < sink_tokens``
    - ``(j - chunk_start) // chunk == (p - chunk_start) // chunk``

    all hold, or ``is_global[b, p]`` or ``is_global[b, j]``, and

    - ``keep[b, j]`` and ``j < lengths[b]``
    - ``documents[b, p] == documents[b, j]``
    - ``allow[b, h, i, j]``

    all hold; a field that is ``None`` sets no condition. True means *may attend*, everywhere. Build masks with the
    constructors (`full`, `causal`, `sliding`, `band`, `chunked`, `prefix`, `global_tokens`, `padding`, `documents`,
    `dense`), not with the fields. Masks print as calls of them; `draw` shows what is visible.

    ``a & b`` shows what both show, ``a | b`` what either shows, ``~a`` what a hides. Not every combination is a mask of
    these fields; those that are not raise, and say how to write the mask as a dense one.

    A mask stores neither Lq, Lk nor an offset: one mask serves a full pass, any chunk of it and every decoding step.

    Raises:
        TypeError: when a mask is used as a boolean (``mask1 and mask2``).
        ValueError: from the constructors, for invalid bounds, shapes and dtypes; from ``&``, ``|`` and ``~``, for
            combinations that are not a mask of these fields.

    Example:
        >>> from qkv import Mask
        >>> Mask.causal() & Mask.sliding(window=4)
        Mask.causal(window=3)
        >>> Mask.causal(window=2).visible(3, 3).int()
        tensor([[[[1, 0, 0],
                  [1, 1, 0],
                  [0, 1, 1]]]], dtype=torch.int32)
    """

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    prefix_tokens: int = 0
    dilation: int = 1
    chunk: int | None = None
    chunk_start: int = 0
    keep: Tensor | None = None
    lengths: Tensor | None = None
    document_ids: Tensor | None = None
    prefix_lengths: Tensor | None = None
    is_global: Tensor | None = None
    allow: Tensor | None = None

    @staticmethod
    def full() -> "Mask":
        """Every query sees every key."""
        return FULL

    @staticmethod
    def causal(window: int | None = None, sink_tokens: int = 0, dilation: int = 1) -> "Mask":
        """A query sees its own key and those before it; with a window, ``window`` keys in all, itself included.

        Args:
            window: number of keys seen, the query's own included, at least 1; None for all.
            sink_tokens: number of first keys that are visible outside of the window as well.
            dilation: distance between the keys of the window: with 2, every other one.

        Example:
            >>> from qkv import Mask
            >>> print(Mask.causal(window=3, dilation=2).draw(7))
            #......
            .#.....
            #.#....
            .#.#...
            #.#.#..
            .#.#.#.
            ..#.#.#

        Source: Mistral 7B, section 2 and transformers' ``sliding_window``. flash-attn's ``window_size=(W, 0)`` is
        ``window=W + 1`` here. Dilation: Longformer, section 3.1; LongNet, section 2.2.
        """
        if window is None:
            return Mask.band(None, 0, sink_tokens, dilation)
        require_count("Mask.causal", "window", window, 1, " (the query's own key counts as one)")
        require_count("Mask.causal", "dilation", dilation)
        return Mask.band((window - 1) * dilation, 0, sink_tokens, dilation)

    @staticmethod
    def sliding(window: int, sink_tokens: int = 0, dilation: int = 1) -> "Mask":
        """A query sees ``window / 2`` keys on each side, and its own.

        Args:
            window: even number of keys, half of them before the query and half after it.
            sink_tokens: number of first keys that are visible outside of the window as well.
            dilation: distance between the keys of the window, which reaches ``window / 2 * dilation`` to each side.

        Source: Longformer, section 3.1 ("w/2 tokens on each side"; "dilated"). For the window of Mistral, which looks
        back only, see `causal`.
        """
        require_count("Mask.sliding", "window", window, 1, " (half on each side of the query)")
        require_count("Mask.sliding", "dilation", dilation)
        if window % 2:
            raise ValueError(
                f"Mask.sliding: window must be even, half on each side of the query; got {window}. "
                f"Use {window + 1}, or Mask.band(left, right) for uneven sides, or Mask.causal(window={window})."
            )
        return Mask.band(window // 2 * dilation, window // 2 * dilation, sink_tokens, dilation)

    @staticmethod
    def band(left: int | None, right: int | None, sink_tokens: int = 0, dilation: int = 1) -> "Mask":
        """A query at position p sees keys ``p - left`` to ``p + right``, both included.

        Args:
            left: number of keys before the query's own at which the band begins; None for all of them.
            right: number of keys after the query's own at which the band ends; None for all of them.
            sink_tokens: number of first keys that are visible regardless of ``left`` and ``dilation``; ``right`` still
                applies.
            dilation: of these keys, only those whose distance from the query is a multiple of it are seen.
        """
        if left is not None:
            require_count("Mask.band", "left", left, 0, " (None means unbounded)")
            left = operator.index(left)
        if right is not None:
            require_count("Mask.band", "right", right, 0, " (None means unbounded)")
            right = operator.index(right)
        require_count("Mask.band", "sink_tokens", sink_tokens, 0, " (it is a number of keys)")
        require_count("Mask.band", "dilation", dilation)
        sink_tokens, dilation = operator.index(sink_tokens), operator.index(dilation)
        return Mask()._with_positions(bands.normalised(Band(left, right, sink_tokens, dilation=dilation)))

    @staticmethod
    def chunked(size: int, start: int = 0) -> "Mask":
        """A query sees the keys of its own chunk of ``size`` positions, those after it included.

        Llama 4's layers are ``Mask.causal() & Mask.chunked(8192)``.

        Args:
            size: number of positions in a chunk.
            start: a position at which a chunk begins; chunks go on in both directions.

        Example:
            >>> from qkv import Mask
            >>> print((Mask.causal() & Mask.chunked(3)).draw(7))
            #......
            ##.....
            ###....
            ...#...
            ...##..
            ...###.
            ......#

        Source: Llama 4, and transformers' ``chunked_overlay``, which is combined with a causal mask in the same way.
        """
        require_count("Mask.chunked", "size", size, 1, " (it is a number of positions)")
        require_int("Mask.chunked", "start", start)
        size = operator.index(size)
        return Mask(chunk=size, chunk_start=operator.index(start) % size)

    @staticmethod
    def prefix(lengths: int | Tensor) -> "Mask":
        """A causal mask, except that all queries see all of the first keys: a prefix LM.

        Args:
            lengths: number of first keys that all queries see; or integer ``(B,)``, one for each row of the batch.

        Example:
            >>> from qkv import Mask
            >>> print(Mask.prefix(3).draw(5))
            ###..
            ###..
            ###..
            ####.
            #####

        Source: T5, section 3.2.1 ("causal masking with a prefix"); PaliGemma, section 3.1, whose image and prompt are
        the prefix.
        """
        if not isinstance(lengths, Tensor):
            require_count("Mask.prefix", "lengths", lengths, 0, ", or a tensor (B,)")
            return Mask(right=0, prefix_tokens=operator.index(lengths))
        if lengths.dim() != 1 or not _has_integers(lengths):
            raise ValueError(
                "Mask.prefix: lengths must be an int or integers of shape (B,), the number of first keys that all "
                f"queries of a row see; got {lengths.dtype} of shape {tuple(lengths.shape)}."
            )
        return Mask(right=0, prefix_lengths=lengths)

    @staticmethod
    def global_tokens(is_global: Tensor) -> "Mask":
        """Global tokens see all keys and are seen by all queries; other pairs are hidden.

        Combined with a window by ``|``: ``Mask.sliding(512) | Mask.global_tokens(is_global)``.

        Args:
            is_global: boolean ``(B, L)`` or ``(1, L)``, or integers 0 and 1, one for each position: ``is_global[b, j]``
                of key j, ``is_global[b, i + offset]`` of query row i. L is the number of keys.

        Example:
            >>> import torch
            >>> from qkv import Mask
            >>> mask = Mask.sliding(window=2) | Mask.global_tokens(torch.arange(6)[None] == 4)
            >>> print(mask.draw(6))
            ##..#.
            ###.#.
            .####.
            ..###.
            ######
            ....##

        Source: Longformer, section 3.1, and transformers' ``global_attention_mask``, except that global and other
        tokens have the same projections here.
        """
        require_tensors("Mask.global_tokens", is_global=is_global)
        flags = _as_flags("Mask.global_tokens", "is_global", is_global)
        if flags is None:
            raise ValueError(
                "Mask.global_tokens: is_global must be boolean (B, L), True for global tokens; "
                f"got {is_global.dtype} of shape {tuple(is_global.shape)}."
            )
        return Mask()._with_positions(bands.EMPTY, flags)

    @staticmethod
    def padding(keep: Tensor) -> "Mask":
        """Hides padded keys of each batch row.

        Args:
            keep: boolean ``(B, Lk)``, True where the key is real, or integers 1 and 0 in its place, as the
                ``attention_mask`` of transformers' tokenizers; or integer ``(B,)``, the number of real keys of a row
                padded on the right.
        """
        require_tensors("Mask.padding", keep=keep)
        flags = _as_flags("Mask.padding", "keep", keep)
        if flags is not None:
            return Mask(keep=flags)
        if _has_integers(keep) and keep.dim() == 1:
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
        if not _has_integers(ids) or ids.dim() != 2:
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
                f"A float mask is a score: pass it as bias=.{more('polarity')}"
            )
        return Mask(allow=allow[(None,) * (4 - allow.dim())])

    def __and__(self, other: "Mask") -> "Mask":
        """The keys visible in both masks."""
        self._require_mask("&", other)
        both: dict[str, Any] = {
            kind.field: _combine_optional(kind.of(self), kind.of(other), kind.intersect)
            for kind in TENSORS
            if kind.intersect is not None
        }
        return replace(self._intersect_positions(other), **both)

    def __or__(self, other: "Mask") -> "Mask":
        """The keys visible in either mask."""
        self._require_mask("|", other)
        for outer, inner in ((self, other), (other, self)):
            if outer._contains(inner):
                return outer
        # Masks that differ in one condition: the union of both, under all that they share.
        differences = [kind for kind in TENSORS if kind.intersect and kind.of(self) is not kind.of(other)]
        either: Mask | None = None
        if not differences:
            either = self._unite_positions(other)
        elif len(differences) == 1 and self._band.same(other._band) and self.is_global is other.is_global:
            (kind,) = differences
            a, b = kind.of(self), kind.of(other)
            if kind.unite is not None and a is not None and b is not None:
                either = self._with_tensors({kind: kind.unite(a, b)})
        if either is None:
            raise ValueError(
                f"{self!r} | {other!r}: their union is not a mask of these kinds. "
                "Combine dense masks: Mask.dense(a.visible(lq, lk) | b.visible(lq, lk))."
            )
        return either

    def __invert__(self) -> "Mask":
        """The keys that the mask hides."""
        tensors = dict(self._present())
        inverse = None if tensors else bands.complement(self._band)
        if inverse is not None:
            return Mask()._with_positions(inverse)
        if len(tensors) == 1 and self._band.is_full:
            ((kind, tensor),) = tensors.items()
            if kind.has_complement:
                return self._with_tensors({kind: ~tensor})
        raise ValueError(
            f"~({self!r}): what it hides is not a mask of these kinds. "
            "Invert a dense mask: Mask.dense(~mask.visible(lq, lk))."
        )

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} has no truth value: combine masks with `&` and `|`, not with `and` and `or`; "
            "`mask.is_full` says whether a mask hides nothing."
        )

    def __eq__(self, other: object) -> bool:
        """Equal numbers and identical tensor objects."""
        return self._identity() == other._identity() if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[int | None, ...]:
        """What equal masks have in common: numbers and the ids of tensors."""
        tensors = (kind.of(self) for kind in TENSORS)
        return (*self.values()[:NUMBERS], *(None if t is None else id(t) for t in tensors))

    def __repr__(self) -> str:
        parts = bands.written(self._band)
        if self.is_global is not None:
            is_global = f"Mask.global_tokens({bands.shown(self.is_global)})"
            parts = [is_global] if self._band.is_empty else [f"{' & '.join(parts)} | {is_global}"]
        conditions = [
            f"Mask.{kind.constructor}({bands.shown(tensor)})" for kind, tensor in self._present() if kind.intersect
        ]
        if conditions and " | " in "".join(parts):
            parts = [f"({parts[0]})"]
        return " & ".join(parts + conditions) or "Mask.full()"

    def draw(self, lq: int, lk: int | None = None, *, offset: int | None = None) -> str:
        """The mask as text, to be printed: a line for each query, a character for each key.

        ``#`` is visible, ``.`` hidden. Beyond 72 queries or keys, a character stands for a square cell of pairs, and
        is ``+`` if only some of them are visible. A mask with tensors is drawn for each row of the batch and each head
        in which it may differ.

        Args:
            lq: number of queries.
            lk: number of keys; ``lq`` if None.
            offset: position of the first query among the keys. Required, as in `qkv.attention`, if the mask depends on
                positions and lq differs from lk.

        Raises:
            TypeError: for numbers that are not ints.
            ValueError: for numbers below 1, a missing offset, and tensors that do not fit these lengths.

        Example:
            >>> from qkv import Mask
            >>> print(Mask.sliding(window=2).draw(5))
            ##...
            ###..
            .###.
            ..###
            ...##
        """
        return drawing.draw(*self.pattern("Mask.draw", lq, lk, offset))

    def pattern(
        self, caller: str, lq: int, lk: int | None, offset: int | None
    ) -> tuple[Callable[[int, int], Tensor], int, int]:
        """What `drawing` draws: what queries see, from one number up to another, and the lengths."""
        lk = lq if lk is None else lk
        require_count(caller, "lq", lq)
        require_count(caller, "lk", lk)
        if offset is None and lq != lk and self.is_positional:
            raise ValueError(
                f"{caller}: {self!r} depends on the positions of queries, so {lq} queries with {lk} keys need an "
                f"offset; got None. offset={lk - lq} aligns the last query with the last key.{more('offset')}"
            )
        offset = 0 if offset is None else offset
        require_int(caller, "offset", offset)
        tensors = [tensor for _, tensor in self.tensors()]
        batch = max((tensor.shape[0] for tensor in tensors), default=1)
        heads = 1 if self.allow is None else self.allow.shape[1]
        self.require_fit(caller, batch, heads, lq, lk, tensors[0].device if tensors else torch.device("cpu"))
        first = offset

        def rows(start: int, stop: int) -> Tensor:
            return self.select_queries(start, stop).visible(stop - start, lk, first + start)

        return rows, lq, lk

    def _repr_html_(self) -> str:
        """The mask as a picture, for notebooks."""
        return html_of(self, repr(self))

    @property
    def _band(self) -> Band:
        """What positions alone show, global tokens apart."""
        return Band(
            *(self.left, self.right, self.sink_tokens, self._prefix),
            *(self.dilation, self.chunk, self.chunk_start),
        )

    @property
    def _prefix(self) -> int | Tensor:
        """Number of first keys that all queries see."""
        return self.prefix_tokens if self.prefix_lengths is None else self.prefix_lengths

    def _require_mask(self, operation: str, other: object) -> None:
        if not isinstance(other, Mask):
            remedy = "Mask.dense(allow)" if isinstance(other, Tensor) else "Mask.causal(), Mask.padding(keep), ..."
            raise TypeError(f"{self!r} {operation} {type(other).__name__}: both must be a qkv.Mask. Use {remedy}.")

    def _contains(self, other: "Mask") -> bool:
        """Whether each condition of this mask follows from those of the other."""
        if other._band.is_empty and other.is_global is None:
            return True
        seen_globally = other.is_global is None or other.is_global is self.is_global or self._band.is_full
        conditions = [kind for kind in TENSORS if kind.intersect and kind.of(self) is not None]
        return (
            seen_globally
            and bands.contains(self._band, other._band)
            and all(kind.of(self) is kind.of(other) for kind in conditions)
        )

    def _intersect_positions(self, other: "Mask") -> "Mask":
        """The mask of the positions that both show: bands and global tokens, without other tensors."""
        if self.is_global is other.is_global:
            return Mask()._with_positions(bands.intersection(self._band, other._band), self.is_global)
        for a, b in ((self, other), (other, self)):
            if a.is_global is None and a._band.is_full:
                return Mask()._with_positions(b._band, b.is_global)
            if a.is_global is None and a._band.is_empty:
                return Mask()._with_positions(bands.EMPTY)
        raise ValueError(
            f"{self!r} & {other!r}: global tokens see all keys, which the other mask does not show; their "
            "intersection is not a mask of these kinds. Combine the windows first, (a & b) | Mask.global_tokens(...), "
            "or dense masks: Mask.dense(a.visible(lq, lk) & b.visible(lq, lk))."
        )

    def _unite_positions(self, other: "Mask") -> "Mask | None":
        """The mask of the positions that either shows, with all else as it is; None if they have no band."""
        band = bands.union(self._band, other._band)
        if band is None:
            return None
        return self._with_positions(band, _combine_optional(self.is_global, other.is_global, torch.logical_or))

    def _with_positions(self, band: Band, is_global: Tensor | None = None) -> "Mask":
        """The mask with other positions, and all else as it is."""
        left, right, sink_tokens, prefix, dilation, chunk, chunk_start = band
        return replace(
            self,
            left=left,
            right=right,
            sink_tokens=sink_tokens,
            prefix_tokens=0 if isinstance(prefix, Tensor) else prefix,
            dilation=dilation,
            chunk=chunk,
            chunk_start=chunk_start,
            prefix_lengths=prefix if isinstance(prefix, Tensor) else None,
            is_global=None if band.is_full else is_global,
        )

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key, whatever the lengths."""
        bounded = self.left is not None or self.right is not None or self.dilation != 1 or self.chunk is not None
        return not bounded and not self.has_tensors

    @property
    def is_causal(self) -> bool:
        """Whether every query sees its own key and all before it, and nothing hides any of them."""
        return self.right == 0 and not self.prefix_tokens and not self.has_tensors and replace(self, right=None).is_full

    @property
    def has_tensors(self) -> bool:
        """Whether any tensor hides or shows keys, besides the band."""
        return self._has_any(TENSOR_FIELDS)

    @property
    def is_pairwise(self) -> bool:
        """Whether more than padding, bounds, sinks, chunks and a prefix of one length hides pairs."""
        return self.dilation != 1 or self._has_any(PAIRWISE)

    @property
    def is_positional(self) -> bool:
        """Whether visibility depends on the position of the query, so that an offset is needed."""
        bounded = self.left is not None or self.right is not None or self.dilation != 1 or self.chunk is not None
        return bounded or self._has_any(POSITIONAL)

    @property
    def counts_from_first_key(self) -> bool:
        """Whether a chunk or a prefix is at a position among the keys, and not at a distance from the query."""
        return self.chunk is not None or bool(self.prefix_tokens) or self.prefix_lengths is not None

    @property
    def is_relative(self) -> bool:
        """Whether visibility depends on the distance of query and key alone."""
        return not (self.sink_tokens or self.counts_from_first_key or self.has_tensors)

    @property
    def lookback(self) -> int | None:
        """Number of keys before its own that a query may see, sinks apart; None for all."""
        return None if self.is_global is not None else _min_bound(self.left, self.chunk and self.chunk - 1)

    def shows_later_keys(self, length: int | Tensor) -> bool:
        """Whether any of the first ``length`` queries, ``(B,)`` if rows differ, may see a key from ``length`` on.

        Numbers in tensors count only where they can be read.
        """
        if self.is_global is not None:
            return True
        if self.right is not None and self.right <= 0 and _is_all_true(self._prefix <= length):
            return False
        return self.chunk is None or not _is_all_true((length - self.chunk_start) % self.chunk == 0)

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
        if self.left is not None:
            seen = key >= position - self.left
        if self.dilation != 1:
            seen = seen & ((position - key) % self.dilation == 0)
        if self.sink_tokens:
            seen = seen | (key < self.sink_tokens)
        if self.chunk is not None:
            chunk_of_query = torch.div(position - self.chunk_start, self.chunk, rounding_mode="floor")
            chunk_of_key = torch.div(key - self.chunk_start, self.chunk, rounding_mode="floor")
            seen = seen & (chunk_of_query == chunk_of_key)
        if self.right is not None:
            ahead = key <= position + self.right
            if self.prefix_tokens:
                ahead = ahead | (key < self.prefix_tokens)
            if self.prefix_lengths is not None:
                ahead = ahead | (key < self.prefix_lengths[:, None, None, None])
            seen = seen & ahead
        is_key = (position >= 0) & (position < lk)
        row = position.where(is_key, lk).flatten(1)
        if self.is_global is not None:
            of_query = _at_positions(self.is_global, row)
            seen = seen | of_query[:, None, :, None] | self.is_global[:, None, None, :]
        keep = self.keep_keys(lk)
        if keep is not None:
            seen = seen & keep[:, None, None, :]
        if self.document_ids is not None:
            of_query = _at_positions(self.document_ids, row)
            seen = seen & is_key & (of_query[:, None, :, None] == self.document_ids[:, None, None, :])
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
        """First key and one past the last key that positions show to any query, with the keys of the queries.

        All keys for offsets in a tensor: reading its numbers would synchronise a GPU, and break a trace.
        """
        if isinstance(offset, Tensor) or self.is_global is not None:
            return 0, lk
        # Compilers decide comparisons of symbolic lengths, but not min and max.
        start, stop = 0, lk
        if self.right is not None and self.prefix_lengths is None:
            end = offset + lq + max(self.right, 0)
            if _is_statically_true(end < lk) and _is_statically_true(self.prefix_tokens < lk):
                stop = max(0, end, self.prefix_tokens)
        first, end = (0, lk) if self.chunk is None else self._chunks_of(offset, offset + lq - 1)
        if _is_statically_true(end < stop):
            stop = max(0, end)
        left = 0 if self.left is None else max(self.left, 0)
        if self.left is not None and not self.sink_tokens and _is_statically_true(offset > left):
            start = min(stop, offset - left)
        if _is_statically_true(first > start):
            start = min(stop, first)
        return start, stop

    def _chunks_of(self, first: int, last: int) -> tuple[int, int]:
        """Where the chunk of the first position begins, and where that of the last one ends."""
        assert self.chunk is not None
        begin, end = (position - (position - self.chunk_start) % self.chunk for position in (first, last))
        return begin, end + self.chunk

    def simplified(self, lq: int, lk: int, offset: int | Tensor) -> "Mask":
        """The mask without bounds that hide nothing from these queries; unchanged for offsets in a tensor."""
        if isinstance(offset, Tensor):
            return self
        left, right, chunk = self.left, self.right, self.chunk
        if right is not None and _is_statically_true(offset + right >= lk - 1):
            right = None
        if left is not None and _is_statically_true(offset + lq - 1 - left <= self.sink_tokens):
            left = None
        if chunk is not None and lq > 0:
            begin, end = self._chunks_of(offset + lq - 1, offset)
            if _is_statically_true(begin <= 0) and _is_statically_true(end >= lk):
                chunk = None
        if left == self.left and right == self.right and chunk == self.chunk:
            return self
        prefix = self._band.prefix
        band = self._band._replace(left=left, right=right, chunk=chunk, prefix=0 if right is None else prefix)
        return self._with_positions(band if band.hides_near else band._replace(sink_tokens=0), self.is_global)

    def select_keys(self, start: int, stop: int, sink_tokens: int = 0) -> "Mask":
        """The mask restricted to the keys ``0 .. sink_tokens - 1`` and ``start .. stop - 1``.

        Their positions are renumbered from 0: an offset changes by ``sink_tokens - start``.
        """
        mask = self
        if self.chunk is not None:
            mask = replace(mask, chunk_start=(self.chunk_start - start + sink_tokens) % self.chunk)
        if self.prefix_tokens:
            in_front, rest = min(self.prefix_tokens, sink_tokens), min(self.prefix_tokens, stop) - start
            mask = replace(mask, prefix_tokens=in_front + max(0, rest))
        if not self.has_tensors:
            return mask
        return mask._with_tensors(
            {kind: kind.select_keys(tensor, start, stop, sink_tokens) for kind, tensor in self._present()}
        )

    def gather_keys(self, index: Tensor, lk: int, queries: tuple[int, int]) -> "Mask":
        """The mask whose key j of row b is key ``index[b, j]`` of this one.

        Args:
            index: integer ``(B, n)``.
            lk: number of keys of this mask.
            queries: first position of the queries among the keys of this mask, and one past the last.
        """
        if self.is_global is not None:
            raise ValueError(
                f"{self!r} with rows of different lengths: padding has no keys, so it cannot contain global "
                "tokens. Pass rows of one length, or call the layer without a cache."
            )
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
        # Queries may have no position among the gathered keys, so documents become a dense mask.
        of_query, of_key = documents[:, queries[0] : queries[1]], gather_keys(documents, index)
        return gathered & Mask.dense((of_query[:, :, None] == of_key[:, None])[:, None])

    def select_queries(self, start: int, stop: int) -> "Mask":
        """The mask restricted to the query rows ``start .. stop - 1``, whose offset is larger by ``start``."""
        if self.allow is None or self.allow.shape[2] == 1:
            return self
        return replace(self, allow=self.allow[:, :, start:stop])

    def select_heads(self, start: int, stop: int) -> "Mask":
        """The mask restricted to the query heads ``start .. stop - 1``."""
        if self.allow is None or self.allow.shape[1] == 1:
            return self
        return replace(self, allow=self.allow[:, start:stop])

    def select_apart(self, queries: tuple[int, int], keys: tuple[int, int], lk: int, offset: int | Tensor) -> "Mask":
        """The mask of some query rows over some keys, which need not be those at the positions of the queries.

        Documents and global tokens, which are read there, become a dense mask, unless the keys contain the positions.

        Args:
            queries: first row, and one past the last; their offset is larger by the first.
            keys: first key, and one past the last, renumbered from 0; an offset is smaller by the first.
            lk: number of keys of this mask.
            offset: position of the first query of this mask.
        """
        (first, end), (start, stop) = queries, keys
        rows = self.select_queries(first, end)
        if (start, stop) == (0, lk):
            return rows
        if self.positional_tensors():
            within = not isinstance(offset, Tensor) and start <= offset + first and offset + end <= stop
            if not within:
                return Mask.dense(rows.visible(end - first, lk, offset + first)[..., start:stop])
        selected = rows.select_keys(start, stop)
        # Other keys than the first must not become sinks by their new numbers.
        return replace(selected, sink_tokens=min(max(self.sink_tokens - start, 0), stop - start))

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


def _at_positions(tensor: Tensor, position: Tensor) -> Tensor:
    """Entries ``(B or 1, Lk)`` at positions ``(B or 1, Lq)`` from 0 to Lk, where 0 is at Lk: ``(B or 1, Lq)``."""
    row = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    return F.pad(tensor, (0, 1))[row, position]


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


def _has_integers(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.dtype != torch.bool


def _as_flags(caller: str, name: str, tensor: Tensor) -> Tensor | None:
    """A boolean tensor (B, L), or integers 0 and 1 as one; None for other dtypes and dimensions.

    Raises:
        ValueError: for other integers, where numbers can be read.
    """
    if tensor.dim() != 2 or tensor.dtype == torch.bool or not _has_integers(tensor):
        return tensor if tensor.dim() == 2 and tensor.dtype == torch.bool else None
    flags = tensor != 0
    if tensor.numel() and can_read_values(tensor) and not torch.equal(flags.to(tensor.dtype), tensor):
        least, most = int(tensor.min()), int(tensor.max())
        raise ValueError(
            f"{caller}: {name} must be boolean, or integers 0 and 1; got integers from {least} to {most}. For "
            "documents packed into a row, use Mask.documents(ids)."
        )
    return flags


def _is_all_true(condition: "bool | Tensor") -> bool:
    """Whether a condition holds; True for numbers that cannot be read."""
    if isinstance(condition, Tensor):
        return bool(condition.all()) if can_read_values(condition) else True
    return condition


def _combine_optional(a: Tensor | None, b: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """``combine(a, b)``, or the one that is not None."""
    if a is None or b is None or a is b:
        return b if a is None else a
    return combine(a, b)


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
    intersect: Callable[[Tensor, Tensor], Tensor] | None
    """the tensor of ``a & b``; None for part of the positions, which `qkv.bands` intersects"""
    unite: Callable[[Tensor, Tensor], Tensor] | None
    """the tensor of ``a | b``; None where no tensor of this kind expresses it"""
    select_keys: Callable[[Tensor, int, int, int], Tensor]
    """the tensor of `Mask.select_keys`"""
    is_positional: bool = False
    """whether it is also read at the position of the query"""
    has_complement: bool = False
    """whether ``~`` of the tensor is that of ``~mask``"""

    def of(self, mask: Mask) -> Tensor | None:
        tensor: Tensor | None = getattr(mask, self.field)
        return tensor


def html_of(mask: Mask, title: str) -> str:
    """A picture of a mask below a title; the title alone where the mask does not tell of which lengths."""
    tensors = [tensor for _, tensor in mask.tensors()]
    if not can_read_values(*tensors):
        return drawing.preformatted(title)
    lq, lk = _pictured(mask)
    if not lq or not lk or (lq != lk and mask.is_positional):
        return drawing.preformatted(title)
    return drawing.figure(title, *mask.pattern("Mask", lq, lk, None))


def _pictured(mask: Mask) -> tuple[int, int]:
    """Lengths at which a picture shows what the mask does: those of its tensors, or beyond its bounds."""
    lengths = [tensor.shape[1] for _, tensor in mask.tensors() if tensor.dim() == 2]
    if mask.allow is not None:
        lq, lk = mask.allow.shape[2:]
        return lq, max([lk, *lengths])
    if lengths:
        return lengths[0], lengths[0]
    bounds = [abs(bound) for bound in (mask.left, mask.right, mask.chunk) if bound is not None]
    counts = [int(tensor.max()) for tensor in (mask.lengths, mask.prefix_lengths) if tensor is not None and len(tensor)]
    longest = max([*bounds, *counts, mask.sink_tokens, mask.prefix_tokens])
    length = min(max(PICTURED, longest * 3 // 2), LARGEST_PICTURE)
    return length, length


TENSORS = (
    TensorKind(
        "keep",
        "padding",
        "keep",
        lambda b, h, lq, lk: (b, lk),
        torch.logical_and,
        torch.logical_or,
        select_keys,
        has_complement=True,
    ),
    TensorKind(
        "lengths", "padding", "lengths", lambda b, h, lq, lk: (b,), torch.minimum, torch.maximum, _select_lengths
    ),
    TensorKind(
        "document_ids",
        "documents",
        "ids",
        lambda b, h, lq, lk: (b, lk),
        _intersect_ids,
        None,
        select_keys,
        is_positional=True,
    ),
    TensorKind("prefix_lengths", "prefix", "lengths", lambda b, h, lq, lk: (b,), None, None, _select_lengths),
    TensorKind(
        "is_global",
        "global_tokens",
        "is_global",
        lambda b, h, lq, lk: (b, lk),
        None,
        None,
        select_keys,
        is_positional=True,
    ),
    TensorKind(
        "allow",
        "dense",
        "allow",
        lambda b, h, lq, lk: (b, h, lq, lk),
        torch.logical_and,
        torch.logical_or,
        select_keys,
        has_complement=True,
    ),
)
"""Every kind of tensor that a mask may have, in the order in which masks are printed."""

TENSOR_FIELDS = tuple(kind.field for kind in TENSORS)
PAIRWISE = tuple(kind.field for kind in TENSORS if kind.constructor != "padding")
POSITIONAL = tuple(kind.field for kind in TENSORS if kind.is_positional)
FIELDS = tuple(field.name for field in fields(Mask))
NUMBERS = len(FIELDS) - len(TENSORS)
"""How many of the fields are numbers. They come first."""

FULL = Mask()
