"""`Cache`: the interface that layers use, and operations that all caches share."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.arguments import more, require_count
from qkv.cache.buffer import AppendBuffer
from qkv.cache.format import PLAIN, Format
from qkv.cache.handle import Handled, require_readable
from qkv.cache.rows import Rows, padding_before, require_padding_at_the_ends
from qkv.cache.state import load_state, state_of
from qkv.masks import Mask, gather_keys
from qkv.pages import Pages


class Shards(Protocol):
    """Keys that are over ranks."""

    @property
    def length(self) -> int:
        """Number of keys of all ranks."""

    def attend(self, q: Tensor, keys: "Keys", mask: Mask, scores: Any, backend: str) -> Tensor:
        """`qkv.attention` over the keys of all ranks, of which ``keys`` are those of this one."""


class Keys(NamedTuple):
    """Keys and values that a cache returns, in order, and the offset of the queries appended last.

    If rows differ in length, slots after the last token of a row are to be hidden, as `Cache.restrict` does.
    """

    k: Tensor
    """(B, Hkv, Lk, D); with pages, those of a pool, (pages, Hkv, page_size, D)"""
    v: Tensor
    """(B, Hkv, Lk, Dv); or in pages"""
    offset: int | Tensor | None
    """position of the first new column among these keys, (B,) if rows differ; None in cross-attention"""
    lengths: Tensor | None = None
    """(B,), number of keys of each row, the first ones; None if all are"""
    pages: Pages | None = None
    """where the keys of each row are, if in pages"""
    k_scale: Tensor | None = None
    """(B, Hkv, Lk), or in pages, what each key is multiplied by, as v_scale for values; None unless both are in int8"""
    v_scale: Tensor | None = None
    shards: Shards | None = None
    """where the other keys are, if these are those of one rank"""
    key_count: int | None = None
    """Lk, if k and v have slots to spare after these keys; None if they have none, or are in pages"""

    @classmethod
    def of(
        cls,
        tokens: Sequence[Tensor],
        offset: int | Tensor | None,
        lengths: Tensor | None = None,
        pages: Pages | None = None,
        key_count: int | None = None,
    ) -> "Keys":
        """From keys and values, and the scales of both if they are in int8."""
        k, v, *scales = tokens
        k_scale, v_scale = scales or (None, None)
        return cls(k, v, offset, lengths, pages, k_scale, v_scale, None, key_count)

    @property
    def tokens(self) -> list[Tensor]:
        """Keys and values, and the scales of both if they are in int8."""
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    @property
    def lk(self) -> int:
        """Lk, number of keys; of the longest row, if rows differ; of all ranks."""
        if self.shards is not None:
            return self.shards.length
        if self.key_count is not None:
            return self.key_count
        return self.k.shape[2] if self.pages is None else self.pages.length

    def gathered(self) -> "Keys":
        """The same keys without pages: a copy, with gradients."""
        if self.pages is None:
            return self
        return Keys.of([self.pages.gather(x) for x in self.tokens], self.offset, self.lengths)

    def options(self) -> dict[str, Any]:
        """Keywords for `qkv.attention`, besides k and v."""
        return {"offset": self.offset, "pages": self.pages, "k_scale": self.k_scale, "v_scale": self.v_scale}


class Owner:
    """Identity of the layer whose keys a cache stores, without a reference to the layer.

    A deep copy of a layer is another owner; a copy that shares its weights is the same.
    """

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[type["Owner"], tuple[str]]:
        return Owner, (self.name,)


class Cache(Handled):
    """Keys and values of earlier calls, to which `append` adds those of the current one.

    A cache stores copies of tensors passed to it. Copies of a cache are independent: ``copy.copy`` shares memory until
    either is written to; ``copy.deepcopy`` and pickles copy the tokens, and refuse tokens computed with gradients. The
    gradient mode may change between calls. Tensors returned under ``torch.no_grad()`` are valid until the next
    `append`, which may overwrite them; torch raises if a backward pass still needs them.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """names of what `state_dict` has besides the parts of the format"""
    OPTIONAL_STATE: ClassVar[tuple[str, ...]] = ()
    """names of what it may have"""
    of_context: ClassVar[bool] = False
    """whether its tokens are those of a context, and not of the queries' own text"""
    capacity: int | None = None
    """limit of the length; None without"""
    sink_tokens = 0
    """number of first tokens that are always kept"""
    name = ""
    """name of its layer within a model, for error messages"""
    is_of_one_rank = False
    """whether a call over ranks has filled it, so that it has some of the keys"""
    _format: Format = PLAIN
    """in which form tokens are stored"""

    def __init__(self) -> None:
        super().__init__()
        self._parts = tuple(AppendBuffer() for _ in self._format.parts)
        self._dtype: torch.dtype | None = None
        """of the tokens, as they were given"""
        self._owners: tuple[Owner, ...] = ()
        self._copied_owners: WeakSet[Owner] | None = None
        """of the layers that were copied together with this cache"""
        self._autocast: torch.dtype | None = None
        """to which torch.autocast cast the first tokens"""
        self._rows: Rows | None = None
        """None while all rows have the same number of tokens, without padding"""
        self._counts_slots = False
        """whether slots may be more than the tokens of the longest row, since a compiled call cannot count those"""

    @property
    def length(self) -> int:
        """Number of tokens in the cache; of the longest row, if rows differ."""
        self._settle()
        return self._parts[0].length

    @property
    def lengths(self) -> Tensor:
        """``(B,)``, number of tokens of each row; ``(0,)`` for an empty cache."""
        return self._rows_or_equal().lengths.clone()

    @property
    def columns(self) -> int:
        """Number of columns of the inputs so far: `length`, and any padding."""
        require_readable()
        return self.length if self._rows is None else self._rows.columns

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """Appends tokens to each row; returns all that the new queries may see.

        Args:
            k, v: keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``.
            is_token: boolean ``(B, L)``, False for padding, which is not stored; None if all are tokens.
        """
        raise NotImplementedError

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """Counts tokens of these shapes as appended, for the caller to write; returns as `append`.

        Their slots, from the offset of the result on, are uninitialised, as are those after shorter rows. The result
        has slots to spare, unless its ``key_count`` is None.

        Args:
            k, v: shapes of keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)``.
            like: a tensor of their dtype, on their device.

        Returns:
            None, with nothing changed, for tokens that only `append` takes, or refuses.
        """
        return None

    def _may_follow(self, shapes: Sequence[tuple[Sequence[int], torch.dtype]], like: Tensor) -> bool:
        """Whether new tokens, of these shapes in each part, may be next to those that the cache has."""
        if like.dtype is not self._dtype:
            return False
        for part, (shape, _) in zip(self._parts, shapes, strict=True):
            memory = part.memory
            if memory is not None:
                sizes = (*memory.shape,)
                if sizes[:2] != (*shape[:2],) or sizes[3:] != (*shape[3:],) or memory.device != like.device:
                    return False
        return True

    def offset(self, is_token: Tensor | None = None) -> int | Tensor:
        """The position of the next column, ``(B,)`` if rows differ. Padding before the first token moves it back.

        Raises:
            ValueError: for padding between new tokens of a row.
        """
        if is_token is None:
            return self.length if self._rows is None else self._rows.lengths
        require_padding_at_the_ends(type(self).__name__, is_token)
        return (self.length if self._rows is None else self._rows.lengths) - padding_before(is_token)

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns, for another layer that reads these keys.

        Raises:
            ValueError: for keys that the cache has dropped.
        """
        raise NotImplementedError

    def keys(self) -> Keys:
        """All keys and values, with the offset of the next token.

        Raises:
            ValueError: for an empty cache.
        """
        if self._is_new:
            raise ValueError(f"{type(self).__name__}: it is empty; append keys and values first.")
        return self.latest(0)

    def offset_of_latest(self, count: int) -> int | Tensor:
        """The position of the first of the last ``count`` columns, which `offset` returned before their append."""
        if self._rows is None:
            return self.length - count
        is_token = self._rows.all_columns()[:, self.columns - count :]
        return self._rows.lengths - is_token.sum(1) - padding_before(is_token)

    def split_padding(
        self, mask: Mask, batch: int, count: int, *, is_appended: bool = False
    ) -> tuple[Mask, Tensor | None]:
        """Takes from a mask which of ``count`` new columns are tokens.

        Padding of the mask covers all columns, those of earlier calls included; or the new ones alone; or as many as
        the cache has capacity. Earlier padding is remembered, since it was not stored. Columns that ``is_appended``
        tells to be in the cache already are new to another layer.

        Returns:
            the mask with padding over all columns, for `restrict`, and ``is_token`` for `append`.

        Raises:
            ValueError: for padding of another length, and for integer lengths that leave out tokens of earlier calls.
        """
        if mask.keep is None and mask.lengths is None:
            return mask, None
        earlier = self.columns - count if is_appended else self.columns
        total = earlier + count
        if mask.keep is not None and mask.keep.shape[1] != total:
            mask = replace(mask, keep=self._fit(mask.keep, earlier, count))
        keep = mask.keep_keys(total)
        assert keep is not None
        if mask.lengths is not None and earlier and count and not torch.compiler.is_compiling():
            self._require_earlier(mask.lengths, earlier)
        is_token = keep[:, earlier:].expand(batch, count)
        return mask, None if not torch.compiler.is_compiling() and is_token.all() else is_token

    def _require_earlier(self, lengths: Tensor, earlier: int) -> None:
        """Raises ValueError for lengths that leave out tokens of ``earlier`` columns, as if they counted new ones."""
        is_token = self._rows_or_equal().all_columns()[:, :earlier]
        if (is_token & (torch.arange(earlier, device=lengths.device) >= lengths[:, None])).any():
            raise ValueError(
                f"{type(self).__name__}: the mask's lengths must count all columns, {earlier} of earlier calls "
                f"included; got {lengths.tolist()}. For the new tokens alone, use Mask.padding(keep) with a boolean "
                "(B, L)."
            )

    def _fit(self, keep: Tensor, earlier: int, count: int) -> Tensor:
        """``keep`` over all columns, ``earlier`` ones and ``count`` new ones."""
        total = earlier + count
        if keep.shape[1] == count:
            return torch.cat([keep.new_ones(keep.shape[0], earlier), keep], dim=1)
        if keep.shape[1] == self.capacity and total <= self.capacity:
            return keep[:, :total]
        capacity = "" if self.capacity is None else f", or its capacity of {self.capacity}"
        raise ValueError(
            f"{type(self).__name__}: the mask's padding keep must cover all {total} columns, {earlier} of earlier "
            f"calls and {count} new ones, or the new ones alone{capacity}; got {keep.shape[1]}."
        )

    @property
    def _is_new(self) -> bool:
        """Whether it takes any batch, as before the first append. With tokens, the batch may have no rows."""
        return self._rows is None and not self.length

    @property
    def _batch(self) -> int:
        """Number of rows; 0 for an empty cache."""
        require_readable()
        if self._rows is not None:
            return self._rows.lengths.shape[0]
        memory = self._parts[0].memory
        return 0 if memory is None or not self.length else memory.shape[0]

    def _rows_or_equal(self, like: Tensor | None = None) -> Rows:
        """The rows; if they do not differ, equal ones, as many as a tensor ``(B, ...)`` of new tokens has."""
        require_readable()
        if self._rows is not None:
            return self._rows
        tensor = like if like is not None else self._parts[0].memory
        device = torch.device("cpu") if tensor is None else tensor.device
        return Rows.of_equal_length(self._batch if like is None else like.shape[0], self.length, device)

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Checks that a layer may use this cache, and records it as the owner.

        Args:
            owner: identity of the layer.
            mask: mask of the call.

        Raises:
            ValueError: if the cache contains keys of another layer; in self-attention also for a mask that shows later
                keys, which the queries of earlier calls have not seen.
        """
        self._settle()
        earlier = self.columns if torch.compiler.is_compiling() else self.length  # lengths of rows are tensors
        if earlier:
            self._require(owner)
        self.require_visible(mask, earlier)
        self._own(owner)

    def _settle(self) -> None:
        """Undoes what compiled calls (they count slots) and inference mode (it leaves inference tensors) have left."""
        if self._rows is None or torch.compiler.is_compiling():
            require_readable()
            return
        if self._rows.lengths.is_inference() and not torch.is_inference_mode_enabled():
            self._rows = self._rows.clone()
        if self._counts_slots:
            self._counts_slots = False
            self._crop_slots(int(self._rows.stored.max()) if self._batch else 0)

    def _crop_slots(self, length: int) -> None:
        """Removes slots after the first ``length``, which have no tokens."""
        for part in self._parts:
            part.crop(min(length, part.length))

    def _own(self, owner: Owner | None) -> None:
        """Records the layer whose keys are cached; None for the next one that uses it."""
        self._owners, self._copied_owners = () if owner is None else (owner,), None

    def require_visible(self, mask: Mask, earlier: int) -> None:
        """Raises ValueError for a mask that shows later keys, if there are ``earlier`` tokens that did not see them."""
        lengths = earlier if self._rows is None else self._rows.lengths.clamp(max=earlier)
        if earlier and mask.allow is None and mask.shows_later_keys(lengths):
            raise ValueError(
                f"{type(self).__name__}: with {earlier} tokens in the cache, the mask must not show keys after "
                f"the query, which those tokens did not see; got {mask!r}. Use Mask.causal(), pass all tokens "
                "(or the prefix) in one call, or use Mask.dense."
            )

    def _require(self, owner: Owner) -> None:
        """Raises ValueError if the cache contains keys of another layer."""
        if not self._owners or owner in self._owners:
            return
        if self._copied_owners is None or owner not in self._copied_owners:
            raise ValueError(
                f"{type(self).__name__}: its {self.length} tokens are keys of another layer, {self._owner_name}; "
                f"got a call of {owner.name}. Make one cache per layer, or reset it.{more('cache-of-another-layer')}"
            )

    @property
    def _owner_name(self) -> str:
        """The layer whose keys are cached, in messages."""
        return " ".join(filter(None, (self.name, self._owners[0].name if self._owners else "")))

    def crop(self, length: int | Tensor) -> None:
        """Removes all tokens after the first ``length`` of each row, for instance rejected drafts.

        Args:
            length: an int, or integers ``(B,)``, one for each row.

        Raises:
            TypeError: for anything else.
            ValueError: for a length below 0 or above those of the rows.
        """
        if type(length) is int and 0 <= length <= self.length and (self._rows is None or length == 0):
            self._cut(length)
            return
        lengths = self._check_crop(length)
        if not torch.equal(lengths, self.lengths):
            self._cut(int(lengths.max()), self._rows_or_equal().crop(lengths))

    def _cut(self, length: int, rows: Rows | None = None) -> None:
        """Removes all slots after the first ``length``; rows differ as ``rows`` says."""
        require_readable()
        self._rows = rows
        for part in self._parts:
            part.crop(length)

    def _check_crop(self, length: int | Tensor) -> Tensor:
        """The lengths ``(B,)`` after `crop`; raises as it does."""
        caller, lengths = type(self).__name__, self.lengths
        if isinstance(length, Tensor):
            if length.dtype.is_floating_point or length.dtype is torch.bool or length.shape != lengths.shape:
                raise TypeError(
                    f"{caller}: length of crop must be an int, or integers ({len(lengths)},), one for each row; "
                    f"got {length.dtype} of shape {tuple(length.shape)}."
                )
            cropped = length.to(lengths, copy=True)
        elif isinstance(length, int) and not isinstance(length, bool):
            if 0 <= length <= self.length:
                return lengths.clamp(max=length)
            cropped = lengths + 1  # out of range
        else:
            raise TypeError(f"{caller}: length of crop must be an int, or integers (B,); got {length!r}.")
        if not len(lengths) or ((cropped < 0) | (cropped > lengths)).any():
            tokens = self.length if self._rows is None else lengths.tolist()
            raise ValueError(
                f"{caller}: length of crop must be between 0 and {tokens}, the tokens in the cache; "
                f"got {length.tolist() if isinstance(length, Tensor) else length}."
            )
        return cropped

    def select(self, rows: Tensor) -> None:
        """Reorders the batch: row i becomes the former row ``rows[i]``, as in beam search.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1, with or without repetition. Without any row, the cache is empty.

        Raises:
            ValueError: for anything else.
        """
        if self._batch:
            index = self._check_rows("select", rows).to(self._rows_or_equal().lengths.device)
            if index.shape[0]:
                self._set_rows(self._parts, self._rows, index)
            else:
                self._empty()

    def repeat(self, count: int) -> None:
        """Repeats each row ``count`` times in succession, as for beams of one prompt.

        Raises:
            TypeError, ValueError: unless count is an int of at least 1.
        """
        require_count(f"{type(self).__name__}.repeat", "count", count)
        self.select(torch.arange(self._batch).repeat_interleave(count))

    def join(self, other: Self) -> None:
        """Adds the rows of another cache of the same layer after the own ones, such as newly prefilled prompts.

        Raises:
            TypeError: for a cache of another class.
            ValueError: for keys of another layer, shape or dtype.
        """
        self._require_like(other)
        if other._batch:
            self._combine(other, None)

    def replace(self, rows: Tensor, other: Self) -> None:
        """Replaces row ``rows[i]`` by row i of another cache of the same layer, for a text that took its place.

        Args:
            rows: integer ``(B',)``, from 0 to B - 1, each once.
            other: a cache of B' rows.

        Raises:
            TypeError: for a cache of another class.
            ValueError: for other rows, and keys of another layer, shape or dtype.
        """
        self._require_like(other)
        rows = self._check_rows("replace", rows)
        count = other._batch
        if rows.shape[0] != count or rows.unique().shape[0] != count:
            raise ValueError(
                f"{type(self).__name__}: rows of replace must be {count} different ones, as the other cache has; "
                f"got {rows}."
            )
        index = torch.arange(self._batch, device=rows.device)
        index[rows.long()] = self._batch + torch.arange(count, device=rows.device)
        self._combine(other, index)

    def _combine(self, other: Self, index: Tensor | None) -> None:
        """Takes rows ``index`` of this and the other cache, counted one after the other; None for all."""
        rows = self._rows_or_equal().join(other._rows_or_equal())
        mine = self._parts if self._batch else tuple(AppendBuffer() for _ in self._parts)
        joined = [one.joined(two) for one, two in zip(mine, other._parts, strict=True)]
        self._owners = self._owners or other._owners
        each = self if self._batch else other
        self._autocast, self._dtype = each._autocast, each._dtype
        self._set_rows(joined, rows, None if index is None else index.to(rows.lengths.device))

    def _set_rows(self, parts: Iterable[AppendBuffer], rows: Rows | None, index: Tensor | None) -> None:
        """Replaces the tokens by these, or by rows ``index`` of them."""
        if index is not None:
            parts, rows = [part.select(index) for part in parts], None if rows is None else rows.select(index)
        self._parts, self._rows = tuple(parts), rows
        if rows is not None and not torch.compiler.is_compiling():
            longest = int(rows.stored.max()) if len(rows.lengths) else 0
            for part in self._parts:
                part.crop(longest)

    def _require_like(self, other: Self) -> None:
        """Raises unless the other cache stores keys of the same layer in the same form."""
        caller = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"{caller}: only another {caller} can join it; got {type(other).__name__}.")
        if self._owners and other._owners and not set(self._owners) & set(other._owners):
            raise ValueError(
                f"{caller}: only a cache of the same layer, {self._owner_name}, can join it; got one of "
                f"{other._owner_name}."
            )
        if self._format.dtype is not other._format.dtype:
            want, got = (each._format.dtype or "the dtype of their tokens" for each in (self, other))
            raise ValueError(f"{caller}: both caches must store keys in {want}; got one that does in {got}.")
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.require_like(caller, theirs)
        if self._batch and other._batch and self._dtype is not other._dtype:
            raise ValueError(f"{caller}: both caches must have tokens of {self._dtype}; got {other._dtype}.")

    def _check_append(self, k: Tensor, v: Tensor, cached_k: Tensor | None, cached_v: Tensor | None) -> None:
        """`check_append`, and raises ValueError for tokens that the format cannot represent."""
        caller = type(self).__name__
        check_append(caller, k, v, cached_k, cached_v, self._dtype, self._autocast)
        self._format.require(caller, k, v)

    def _check_rows(self, operation: str, rows: Tensor) -> Tensor:
        """The rows; raises ValueError unless they are integers ``(n,)`` from 0 to B - 1."""
        batch = self._batch
        fits = isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int64, torch.int32)
        if not torch.compiler.is_compiling() and fits and rows.numel():
            fits = 0 <= int(rows.min()) <= int(rows.max()) < batch
        if not fits:
            raise ValueError(
                f"{type(self).__name__}: rows of {operation} must be a 1-dimensional tensor of integers from 0 to "
                f"{batch - 1}; got {rows!r}."
            )
        return rows

    def reset(self) -> None:
        """Removes all tokens and the owner, for another batch or layer."""
        self._empty()
        self._own(None)

    def _empty(self) -> None:
        """Removes all tokens."""
        self._cut(0)

    def mark(self) -> Any:
        """The state to which `restore` returns."""
        require_readable()
        return self._parts, self._parts[0].length, self._rows

    def restore(self, mark: Any) -> None:
        """Undoes all since ``mark``, unless tokens from before it were removed by `crop` or `reset`."""
        self._parts, length, rows = mark
        self._cut(length, rows)

    def restrict(self, mask: Mask, keys: Keys, queries: int) -> Mask:
        """A mask over all columns as one over the keys that the last append, of ``queries`` columns, returned."""
        if keys.lengths is None:
            return mask
        if mask.has_tensors:
            self._require_columns(mask, keys, queries)
            columns = (self.columns - queries, self.columns)
            mask = mask.gather_keys(self._column_of_keys(keys), self.columns, columns)
        return mask & Mask.padding(keys.lengths)

    def restrict_bias(self, bias: Tensor | None, keys: Keys) -> Tensor | None:
        """A bias ``(B or 1, H or 1, Lq, columns)`` as one over the keys that the last append returned."""
        if keys.lengths is None or not self._has_columns(bias, keys):
            return bias
        return gather_keys(bias[(None,) * (4 - bias.dim())], self._column_of_keys(keys)[:, None, None])

    def _require_columns(self, mask: Mask, keys: Keys, queries: int) -> None:
        """Raises ValueError unless the tensors of a mask cover all columns."""
        batch, heads = self._batch, 1 if mask.allow is None else mask.allow.shape[1]
        mask.require_fit(type(self).__name__, batch, heads, queries, self.columns, keys.k.device)

    def _has_columns(self, bias: Tensor | None, keys: Keys) -> TypeGuard[Tensor]:
        """Whether a bias has a number for each column. Raises ValueError if it does not fit; other types are left."""
        if not isinstance(bias, Tensor):
            return False
        batch = bias.shape[0] if bias.dim() == 4 else 1
        if not 1 <= bias.dim() <= 4 or bias.shape[-1] not in (1, self.columns) or batch not in (1, self._batch):
            raise ValueError(
                f"{type(self).__name__}: bias must be broadcastable to ({self._batch}, H, L, {self.columns}), over all "
                f"columns, padding included; got shape {tuple(bias.shape)}."
            )
        return bias.shape[-1] > 1

    def _column_of_keys(self, keys: Keys) -> Tensor:
        """``(B, Lk)``, the column of each key that the last append returned, if rows differ."""
        assert self._rows is not None
        assert keys.lengths is not None
        return self._rows.column_of_keys(keys.lk, keys.lengths, self.sink_tokens)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(part.memory.untyped_storage().nbytes() for part in self._parts if part.memory is not None)

    def state_dict(self) -> dict[str, Tensor]:
        """The tokens as tensors, which ``torch.save`` and safetensors can store; nothing for an empty cache.

        These are copies: the parts, such as ``keys`` and ``values``, and what else `load_state_dict` needs.

        Raises:
            RuntimeError: for tokens that were computed with gradients.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the tokens by a copy of those of a `state_dict`. The next layer to use the cache becomes its owner.

        Raises:
            TypeError: for anything but tensors.
            ValueError: for the state of a cache of another kind, window or capacity. Nothing is changed then.
        """
        load_state(self, state)

    def __repr__(self) -> str:
        lengths = [self.length] if self._rows is None else self._rows.lengths.tolist()
        tokens = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
        options = ", ".join(f"{name}={value}" for name, value in self._options().items())
        return (
            f"{type(self).__name__}({options}): {self._batch} row{'' if self._batch == 1 else 's'} of {tokens} tokens, "
            f"{self.nbytes:,} bytes"
        )

    def _stored(self) -> list[Tensor]:
        """All tokens of each part, if there are some."""
        return [part.tensor for part in self._parts if part.tensor is not None]

    def _options(self) -> dict[str, Any]:
        """Arguments of the constructor that are not at their defaults."""
        capacity = {} if self.capacity is None else {"capacity": self.capacity}
        dtype = self._format.dtype
        return {**capacity, **({} if dtype is type(self)._format.dtype else {"dtype": dtype})}

    def _tokens(self) -> Mapping[str, Tensor | None]:
        """All tokens of each part."""
        return {name: part.tensor for name, part in zip(self._format.parts, self._parts, strict=True)}

    def _load_tokens(self, tokens: Mapping[str, Tensor]) -> None:
        """Stores these tokens of each part in an empty cache, which may keep them."""
        for part, name in zip(self._parts, self._format.parts, strict=True):
            part.adopt(tokens[name])

    @property
    def _slots(self) -> int:
        """Number of slots of the longest row that have tokens."""
        return self._parts[0].length

    def _more_state(self) -> dict[str, Tensor]:
        """What `state_dict` has besides the parts and the padding."""
        return {}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        """Takes ``_more_state`` from a state whose parts and padding have been loaded; raises ValueError if unfit."""

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__setstate__({**vars(self), "_parts": tuple([copy(part) for part in self._parts])})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        apart = ("_owners", "_copied_owners", "handle")
        own = {name: value for name, value in vars(self).items() if name not in apart}
        twin.__setstate__({name: deepcopy(value, memo) for name, value in own.items()})
        # A deep copy together with the layer belongs to both, the layer and its copy. Weakly: if the layer is not
        # copied, nothing else refers to the copied owner.
        owners = [*self._owners, *(self._copied_owners or ())]
        twin._owners, twin._copied_owners = self._owners, WeakSet([*owners, *deepcopy(owners, memo)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The state without owners, so that the first layer to use it becomes the owner."""
        return {**super().__getstate__(), "_owners": (), "_copied_owners": None}


def autocast_to(x: Tensor) -> torch.dtype | None:
    """The dtype to which torch.autocast now casts on the device of x; None without."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def autocast_reason(then: torch.dtype | None, cached: torch.dtype, x: Tensor) -> str:
    """What torch.autocast has to do with ``x`` of another dtype than the cached tokens, for error messages.

    Args:
        then: to which it cast when the cache was filled, if it did.
    """
    now = autocast_to(x)
    if then is cached and now is not then:
        return f"The cache was filled under torch.autocast, in {then}: call the layer under it as well, or reset it."
    if now is x.dtype and then is not now:
        return (
            f"torch.autocast casts to {now} now, and did not when the cache was filled: call the layer without it, or "
            "fill the cache under it."
        )
    return ""


def check_append(
    caller: str,
    k: Tensor,
    v: Tensor,
    cached_k: Tensor | None,
    cached_v: Tensor | None,
    dtype: torch.dtype | None,
    autocast: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless k and v match each other and, where given, the cached ones.

    Args:
        dtype: of the cached tokens.
        autocast: to which torch.autocast cast them, if it did.
    """
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
            reason = autocast_reason(autocast, dtype, tensor) if dtype not in (None, tensor.dtype) else ""
            raise ValueError(
                f"{caller}: {name} must be ({batch}, {heads}, L, {width}) in {dtype} on {cached.device}, as at the "
                f"first append; got {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}. "
                f"{reason or 'Make one cache per layer and batch.'}"
            )
