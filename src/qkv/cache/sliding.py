"""`SlidingKVCache`: the keys and values of a sliding window."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.arguments import described, more, require_int
from qkv.cache.base import Cache, Keys, autocast_to
from qkv.cache.buffer import AppendBuffer, append_in_place, slots_for
from qkv.cache.int8 import Dtype, format_of
from qkv.cache.rows import Rows, gather_tokens, padding_before, place, recent_tokens, require_is_token
from qkv.masks import Mask, select_keys


class SlidingKVCache(Cache):
    """The last ``window`` keys and values, in memory for at most two windows, whatever the number of tokens.

    Args:
        window: number of keys that a query sees, its own included, as in ``Mask.causal(window=...)``.
        sink_tokens: number of first keys that are kept as well.
        dtype: None for that of the keys; or ``torch.int8`` or ``"int8"``, rounded as in an `Int8KVCache`.

    Chunks of up to ``window`` positions, ``Mask.causal() & Mask.chunked(window)``, are kept whole as well.

    Positions count among the returned keys, sinks first, so that ``Mask.causal(window, sink_tokens)`` with the returned
    offset shows the same keys as without a cache. (ALiBi does not work with sinks, whose distances change.)

    Example:
        >>> import torch, qkv
        >>> cache = qkv.SlidingKVCache(window=4)
        >>> for _ in range(100):
        ...     keys = cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> cache.length, keys.k.shape[2] <= 8
        (100, True)

    Source: Mistral 7B, section 2 (rolling buffer); StreamingLLM for the sinks, except that keys keep the rotary
    position at which they were computed.
    """

    STATE = ("window", "sink_tokens", "dropped")

    def __init__(self, window: int, sink_tokens: int = 0, *, dtype: Dtype = None) -> None:
        self._format = format_of("SlidingKVCache", dtype)
        super().__init__()
        require_int("SlidingKVCache", "window", window)
        require_int("SlidingKVCache", "sink_tokens", sink_tokens)
        if window < 1:
            raise ValueError(f"SlidingKVCache: window must be at least 1 key, the query's own; got {window}.")
        if sink_tokens < 0:
            raise ValueError(f"SlidingKVCache: sink_tokens must be at least 0; got {sink_tokens}.")
        self.window = window
        self.sink_tokens = sink_tokens
        self._length = 0

    @property
    def length(self) -> int:
        """Number of tokens appended, dropped ones included; of the longest row, if rows differ."""
        self._settle()
        return self._length if self._rows is None else int(self._rows.lengths.max())

    def require_visible(self, mask: Mask, earlier: int) -> None:
        """Raises ValueError as `Cache.require_visible`, and for a mask that shows dropped keys."""
        lookback = mask.lookback
        if lookback is None or lookback >= self.window or mask.sink_tokens > self.sink_tokens:
            raise ValueError(
                f"SlidingKVCache(window={self.window}, sink_tokens={self.sink_tokens}) drops keys that {mask!r} shows. "
                f"Use Mask.causal(window={self.window}, sink_tokens={self.sink_tokens}), or a KVCache."
                f"{more('dropped-keys')}"
            )
        super().require_visible(mask, earlier)

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """As `Cache.append`; returns the sinks and all keys in a window of a new query.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than before, and as `Int8KVCache`.
        """
        keys, values, *_ = [None if self._is_new else part.memory for part in self._parts]
        self._check_append(k, v, keys, values)
        if keys is None:
            self._autocast, self._dtype = autocast_to(k), k.dtype
        mark = self.mark()
        try:
            if self._rows is None and is_token is None:
                return self._append_equally(k, v)
            return self._append_rows(k, v, is_token)
        except BaseException:  # as in KVCache.append
            self.restore(mark)
            raise

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `Cache.claim`; None for tokens beyond a window as well, some of which are dropped once they were read."""
        count, rows, shapes = k[2], self._rows, self._format.shapes(k, v, like.dtype)
        if torch.is_grad_enabled() or count > self.window + 1:
            return None
        if rows is None and not self._length:
            self._autocast, self._dtype = autocast_to(like), like.dtype
        elif not self._may_follow(shapes, like):
            return None
        if rows is not None:
            rows = self._keep_recent(rows, rows.stored + count > self._capacity)
            self._rows = rows.append(count, None)
        else:
            if self._parts[0].length + count > self._capacity:
                self._parts = tuple([self._recent(part.tensor) for part in self._parts])
            self._length += count
        slots, pairs = self._parts[0].length, zip(self._parts, shapes, strict=True)
        capacity = slots_for(slots + count, self._capacity)
        tokens = [part.claim(shape, dtype, like.device, capacity) for part, (shape, dtype) in pairs]
        if rows is None or self._rows is None:
            return Keys.of(tokens, slots, key_count=slots + count)
        return Keys.of(tokens, rows.stored, self._rows.stored, key_count=slots + count)

    def _append_equally(self, k: Tensor, v: Tensor) -> Keys:
        """Appends the same number of tokens to each row."""
        new, capacity = k.shape[2], self._capacity
        if self._parts[0].length + new > capacity:
            self._parts = tuple([self._recent(part.tensor) for part in self._parts])
        before = self._parts[0].length
        grown = append_in_place(self._parts, k, v) if before + new <= capacity else None
        if grown is None:
            grown = self._format.extend(self._parts, k, v, slots_for(before + new, capacity))
            if before + new > capacity:  # a prompt of several windows is cut
                self._parts = tuple([self._recent(x) for x in grown])
        self._length += new
        return Keys.of(grown, before)

    def _append_rows(self, k: Tensor, v: Tensor, is_token: Tensor | None) -> Keys:
        """Appends tokens to rows that differ in length, now or afterwards."""
        require_is_token("SlidingKVCache", is_token, k)
        self._settle()
        new, rows = k.shape[2], self._rows_or_equal(k)
        added = new if is_token is None else is_token.sum(1)
        rows = self._keep_recent(rows, rows.stored + added > self._capacity)
        placement, grown = place(rows.stored, new, is_token, keeps_padding=torch.compiler.is_compiling())
        length, stored = self._parts[0].length + grown, rows.stored
        parts = zip(self._parts, self._format.encode(k, v), strict=True)
        tokens = [part.put(x, placement, length, slots_for(length, self._capacity)) for part, x in parts]
        offset = stored if is_token is None else stored - padding_before(is_token)
        rows = rows.append(new, is_token)
        self._rows = self._keep_recent(rows, rows.stored > self._capacity)
        self._counts_slots |= torch.compiler.is_compiling()
        return Keys.of(tokens, offset, rows.stored)

    def _rows_or_equal(self, like: Tensor | None = None) -> Rows:
        rows = super()._rows_or_equal(like)
        dropped = self._length - self._parts[0].length
        return rows if rows.dropped is not None else rows._replace(dropped=torch.full_like(rows.lengths, dropped))

    def _keep_recent(self, rows: Rows, is_full: Tensor) -> Rows:
        """Drops the tokens of full rows that the next query does not see; returns the rows then."""
        slots = self._parts[0].length
        if not slots or not (torch.compiler.is_compiling() or is_full.any()):
            return rows
        index, kept = recent_tokens(rows.stored, is_full, self.window, self.sink_tokens, slots)
        parts = tuple(AppendBuffer() for _ in self._parts)
        for part, old in zip(parts, self._parts, strict=True):
            assert old.tensor is not None
            part.extend(gather_tokens(old.tensor, index), slots_for(index.shape[1], self._capacity))
        self._parts = parts
        return rows._replace(dropped=rows.lengths - kept)

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns.

        Raises:
            ValueError: for a prompt of several windows, which is cut once its own layer has read it.
        """
        rows, offset = self._rows_or_equal(), self.offset_of_latest(count)
        assert rows.dropped is not None
        first = offset - rows.dropped
        added = rows.all_columns()[:, self.columns - count :].sum(1)
        sees_dropped = rows.stored - added < self.sink_tokens + self.window - 1
        if ((rows.dropped > 0) & (added > 0) & sees_dropped).any():
            raise ValueError(
                f"SlidingKVCache: it must have all keys that the last {count} tokens see to be read by another layer; "
                f"got {rows.stored.max()} of {self.length} tokens. Append at most {self.window + 1} at once, or use a "
                "KVCache."
            )
        if self._rows is None:
            return Keys.of(self._stored(), self._parts[0].length - count)
        return Keys.of(self._stored(), first, rows.stored)

    @property
    def _capacity(self) -> int:
        """Most slots: the sinks, and two windows, so that old keys are dropped only once per window."""
        return self.sink_tokens + 2 * self.window

    def _recent(self, tokens: Tensor | None) -> AppendBuffer:
        """The tokens that the next query may see besides its own: the sinks, and those in its window."""
        recent = AppendBuffer()
        if tokens is not None:
            sinks = min(self.sink_tokens, tokens.shape[2])
            start = max(sinks, tokens.shape[2] - (self.window - 1))
            kept = torch.cat([tokens[:, :, :sinks], tokens[:, :, start:]], dim=2)
            recent.extend(kept, slots_for(kept.shape[2], self._capacity))
        return recent

    def crop(self, length: int | Tensor) -> None:
        """As `Cache.crop`.

        Raises:
            TypeError, ValueError: as there; ValueError if the window of the next query would contain dropped keys.
        """
        lengths, rows = self._check_crop(length), self._rows_or_equal()
        if torch.equal(lengths, rows.lengths) and not (isinstance(length, int) and length == 0):
            return
        assert rows.dropped is not None
        kept = lengths - rows.dropped
        too_few = (rows.dropped > 0) & (lengths < rows.lengths) & (kept - self.sink_tokens < self.window - 1)
        if too_few.any():
            least = torch.minimum(rows.lengths, rows.dropped + self.sink_tokens + self.window - 1)
            want, had = (x.tolist() if self._rows is not None else int(x[0]) for x in (least, rows.lengths))
            raise ValueError(
                f"SlidingKVCache: length of crop must be at least {want} of {had} tokens, or the window of the "
                f"next query would contain dropped keys; got {described(length)}. Crop earlier, or use a KVCache."
            )
        if isinstance(length, int) and (self._rows is None or length == 0):
            count = length and length - (self._length - self._parts[0].length)
            self._length = length
            self._cut(count)
        else:
            self._cut(int(kept.max()), rows.crop(lengths))

    def _empty(self) -> None:
        super()._empty()
        self._length = 0

    def mark(self) -> Any:
        """The state to which `restore` returns."""
        return super().mark(), self._length

    def restore(self, mark: Any) -> None:
        """As `Cache.restore`."""
        of_parts, self._length = mark
        super().restore(of_parts)

    def _options(self) -> dict[str, Any]:
        sinks = {"sink_tokens": self.sink_tokens} if self.sink_tokens else {}
        return {"window": self.window, **sinks, **super()._options()}

    def _more_state(self) -> dict[str, Tensor]:
        stored = self._parts[0].length
        dropped = torch.tensor(self._length - stored) if self._rows is None else self._rows_or_equal().dropped
        assert dropped is not None
        numbers = {"window": torch.tensor(self.window), "sink_tokens": torch.tensor(self.sink_tokens)}
        return {"dropped": dropped.clone(), **numbers}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        had = int(state["window"]), int(state["sink_tokens"])
        if had != (self.window, self.sink_tokens):
            raise ValueError(
                f"SlidingKVCache: the state must be of window={self.window} and sink_tokens={self.sink_tokens}; got "
                f"{had[0]} and {had[1]}."
            )
        dropped, stored = state["dropped"], self._parts[0].length
        want = () if self._rows is None else self._rows.lengths.shape
        if dropped.dtype is not torch.int64 or dropped.shape != want or (dropped < 0).any():
            raise ValueError(
                f"SlidingKVCache: dropped of the state must be int64 {tuple(want)}, at least 0; got {dropped.dtype} "
                f"{tuple(dropped.shape)}."
            )
        if self._rows is not None:
            self._rows = self._rows._replace(dropped=dropped.clone())
        else:
            self._length = stored + int(dropped)

    def restrict(self, mask: Mask, keys: Keys, queries: int) -> Mask:
        """A mask over all columns as one over the keys that the last append, of ``queries`` columns, returned."""
        returned = keys.lk
        if self._rows is not None and mask.counts_from_first_key:
            raise ValueError(
                f"SlidingKVCache: {mask!r} counts from the first key, of which rows of different lengths have dropped "
                "different numbers. Use a KVCache, or rows of one length."
            )
        if self._rows is not None or returned == self._length:
            return super().restrict(mask, keys, queries)
        if mask.has_tensors:
            self._require_columns(mask, keys, queries)
        return mask.select_keys(self._length - (returned - self.sink_tokens), self._length, self.sink_tokens)

    def restrict_bias(self, bias: Tensor | None, keys: Keys) -> Tensor | None:
        """A bias ``(B or 1, H or 1, Lq, columns)`` as one over the keys that the last append returned."""
        returned = keys.lk
        if self._rows is not None or returned == self._length:
            return super().restrict_bias(bias, keys)
        if not self._has_columns(bias, keys):
            return bias
        return select_keys(bias, self._length - (returned - self.sink_tokens), self._length, self.sink_tokens)

    def _require_like(self, other: Self) -> None:
        super()._require_like(other)
        if (self.window, self.sink_tokens) != (other.window, other.sink_tokens):
            raise ValueError(
                f"SlidingKVCache: both caches must have window={self.window} and sink_tokens={self.sink_tokens}; got "
                f"{other.window} and {other.sink_tokens}."
            )
