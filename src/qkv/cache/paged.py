"""`PagedKVCache`: all keys and values so far, in pages that rows and caches share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv.cache.base import Cache, Keys, autocast_to
from qkv.cache.int8 import Dtype, format_of
from qkv.cache.pool import PagePool, PageTable
from qkv.cache.rows import Rows, padding_before, place, require_is_token
from qkv.pages import Pages


class PagedKVCache(Cache):
    """A `KVCache` in pages: each row takes as many as its own length needs, and rows share those of a common prefix.

    `select`, `repeat`, `join`, `replace` and ``copy.copy`` copy no tokens: the new rows hold the same pages. A row that
    appends to a last page which others hold gets a copy of that page. Pages that no row holds any longer are free. Keys
    ``(B, Hkv, L, D)`` are appended as to any cache; a pool has them as ``(pages, Hkv, page_size, D)``.

    Args:
        pool: a pool that caches of one layer share; a new one if None.
        page_size: number of tokens in a page, of a new pool.
        pages: number of pages to allocate, and limit, of a new pool; None grows without bound.
        dtype: of a new pool: None for that of the keys; or ``torch.int8`` or ``"int8"``, rounded as in an
            `Int8KVCache`.

    The kernel reads pages in place, or copies scattered ones into the CPU caches; its results have the bits of a
    `KVCache`, or of an `Int8KVCache`. Other backends, and gradients, gather the pages of each row. A deep copy or a
    pickle has a pool of its own, with its own pages alone.

    Example:
        >>> import torch, qkv
        >>> layer = qkv.CausalAttention(16, 2).eval()
        >>> pool = qkv.PagePool(page_size=4)
        >>> prompt = qkv.PagedKVCache(pool)
        >>> with torch.no_grad():
        ...     y = layer(torch.randn(1, 8, 16), cache=prompt)
        ...     answers = qkv.PagedKVCache(pool)
        ...     answers.join(prompt)
        ...     answers.repeat(5)
        ...     y = layer(torch.randn(5, 1, 16), cache=answers)
        >>> answers.lengths.tolist(), pool.used
        ([9, 9, 9, 9, 9], 7)

    Source: vLLM (Kwon et al. 2023), section 4.
    """

    def __init__(
        self,
        pool: PagePool | None = None,
        *,
        page_size: int | None = None,
        pages: int | None = None,
        dtype: Dtype = None,
    ) -> None:
        if pool is None:
            format_of("PagedKVCache", dtype)
            pool = PagePool(16 if page_size is None else page_size, pages, dtype=dtype)
        elif not isinstance(pool, PagePool):
            raise TypeError(f"PagedKVCache: pool must be a qkv.PagePool or None; got {type(pool).__name__}.")
        elif page_size is not None or pages is not None or dtype is not None:
            raise ValueError(
                f"PagedKVCache: page_size, pages and dtype are those of the pool, {pool.page_size}, {pool.limit} and "
                f"{pool.format.dtype}; got {page_size}, {pages} and {dtype}. Pass either them or a pool."
            )
        self._format = pool.format
        super().__init__()
        self._parts = ()
        self._table = PageTable(pool)
        self._length = 0

    @property
    def pool(self) -> PagePool:
        """Where the pages are."""
        return self._table.pool

    @property
    def length(self) -> int:
        return self._length

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """As `Cache.append`; returns the pages of the pool, with ``pages`` that says where the keys of each row are.

        Raises:
            ValueError: for a batch, heads, width, dtype or device other than before, and if the pool is full.
            NotImplementedError: in a graph of torch.compile(fullgraph=True) or torch.export. (A layer without gradients
                on a CPU is one operator there, within which it runs.)
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "PagedKVCache: append must run eagerly, since rows take pages by their lengths; got a call in a graph "
                "of torch.compile(fullgraph=True) or torch.export. Compile without fullgraph, or use a KVCache."
            )
        starts = None if self._rows is None else self._rows.lengths
        if is_token is None and self._length and self._table.append_in_place(k, v, starts, self._length):
            return self._count(k.shape[2], None)
        mark = self.mark()
        try:
            self._write(k, v, is_token)
            return self._count(k.shape[2], is_token)
        except BaseException:  # as in KVCache.append
            self.restore(mark)
            raise

    def claim(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> Keys | None:
        """As `Cache.claim`; rows get pages of their own to be written to.

        Raises:
            ValueError: as `append`, if the pool is full.
        """
        if torch.is_grad_enabled() or not self._takes(k, v, like):
            return None
        if not self._length:
            self._autocast, self._dtype = autocast_to(like), like.dtype
        table, mark = self._table, self.mark()
        if not table.claim(k[2]):
            lengths = [self._length] * k[0] if self._rows is None else self._rows.lengths.tolist()
            stand_ins = [like.new_empty(()).expand(*shape) for shape in (k, v)]
            try:
                self._table = table.make_room(type(self).__name__, lengths, [k[2]] * k[0], *stand_ins)
                self._table.claim(k[2])
            except BaseException:  # as in KVCache.append
                self.restore(mark)
                raise
        return self._count(k[2], None)

    def _takes(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> bool:
        """Whether tokens of these shapes may follow those there are."""
        pool = self.pool
        if not self._is_new and k[0] != self._batch:
            return False
        return not pool.parts or (self._is_new and not pool.used) or pool.takes(k, v, like)

    def _write(self, k: Tensor, v: Tensor, is_token: Tensor | None) -> None:
        """Writes new tokens to pages."""
        rows = self._make_room(k, v, is_token)
        starts = None if self._rows is None else rows.lengths
        if k.shape[2] and (is_token is not None or not self._table.append_in_place(k, v, starts, self._length)):
            self._table.put(place(rows.lengths, k.shape[2], is_token)[0], self._format.encode(k, v))

    def _make_room(self, k: Tensor, v: Tensor, is_token: Tensor | None) -> Rows:
        """Validates new tokens, and gives rows the pages that they lack. Returns the rows without these tokens."""
        caller = type(self).__name__
        if not self._length:
            self._autocast, self._dtype = autocast_to(k), self.pool.token_dtype
        self._check_append(k, v, *self._like(k))
        require_is_token(caller, is_token, k)
        rows = self._rows_or_equal(k)
        lengths = [self._length] * k.shape[0] if self._rows is None else rows.lengths.tolist()
        added = [k.shape[2]] * len(lengths) if is_token is None else is_token.sum(1).tolist()
        self._table, self._dtype = self._table.make_room(caller, lengths, added, k, v), k.dtype
        return rows

    def _like(self, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Tensors of the batch, heads and widths that new tokens must have; None if they may be any."""
        pool, batch = self.pool, k.shape[0] if self._is_new else self._batch
        if not pool.parts or (self._is_new and not pool.used):
            return None, None
        keys, values = (x[:1].expand(batch, -1, -1, -1) for x in pool.parts[:2])
        return keys, values

    def _count(self, count: int, is_token: Tensor | None) -> Keys:
        """Counts ``count`` new columns and returns all that their queries may see."""
        offset = self.offset()
        if self._rows is None and is_token is None:
            self._length += count
            lengths = None
        else:
            rows = self._rows_or_equal(is_token)
            offset = rows.lengths if is_token is None else rows.lengths - padding_before(is_token)
            self._rows = rows.append(count, is_token)
            lengths = self._rows.lengths
            self._length = int(lengths.max()) if len(lengths) else 0
        return self._keys(offset, lengths)

    def _keys(self, offset: int | Tensor, lengths: Tensor | None) -> Keys:
        return Keys.of(self.pool.parts, offset, lengths, Pages(self._table.tensor, self._length))

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns."""
        return self._keys(self.offset_of_latest(count), None if self._rows is None else self._rows.lengths)

    @property
    def _batch(self) -> int:
        if self._rows is not None:
            return self._rows.lengths.shape[0]
        return len(self._table.rows) if self._length else 0

    def _rows_or_equal(self, like: Tensor | None = None) -> Rows:
        if self._rows is not None:
            return self._rows
        tensors = self.pool.parts[:1] if like is None else (like,)
        device = tensors[0].device if tensors else torch.device("cpu")
        return Rows.of_equal_length(self._batch if like is None else like.shape[0], self._length, device)

    def select(self, rows: Tensor) -> None:
        if self._batch:
            index = self._check_rows("select", rows)
            if index.shape[0]:
                self._set_table(self._table.select(index.tolist()), self._rows_or_equal(), index)
            else:
                self._empty()

    def _combine(self, other: Self, index: Tensor | None) -> None:
        mine = self._table if self._batch else PageTable(self.pool)
        rows = self._rows_or_equal().join(other._rows_or_equal())
        table = mine.joined(other._table, type(self).__name__, None if index is None else index.tolist())
        self._owners = self._owners or other._owners
        each = self if self._batch else other
        self._autocast, self._dtype = each._autocast, each._dtype
        self._set_table(table, rows, index)

    def _set_table(self, table: PageTable, rows: Rows, index: Tensor | None) -> None:
        """Replaces the pages, and counts rows ``index`` of ``rows``, or all."""
        if index is not None:
            rows = rows.select(index.to(rows.lengths.device))
        lengths = rows.lengths.tolist()
        self._table, self._length = table, max(lengths, default=0)
        self._rows = None if lengths and rows.columns and set(lengths) == {rows.columns} else rows

    def _require_like(self, other: Self) -> None:
        super()._require_like(other)
        mine, theirs = self.pool, other.pool
        if mine.page_size != theirs.page_size:
            raise ValueError(
                f"PagedKVCache: both caches must have pages of {mine.page_size} tokens; got {theirs.page_size}."
            )
        if mine is theirs or not mine.used or not other._batch:
            return
        for x, y in zip(mine.parts[:2], theirs.parts[:2], strict=True):
            pairs = ((x, mine.token_dtype), (y, theirs.token_dtype))
            want, got = ((pages.shape[1], pages.shape[3], dtype, pages.device) for pages, dtype in pairs)
            if want != got:
                raise ValueError(
                    "PagedKVCache: heads, width, dtype and device of both caches must be the same; got "
                    f"{', '.join(map(str, want))} and {', '.join(map(str, got))}."
                )

    def mark(self) -> Any:
        return self._table, self._length, self._rows

    def restore(self, mark: Any) -> None:
        self._table, length, rows = mark
        self._cut(length, rows)

    def _cut(self, length: int, rows: Rows | None = None) -> None:
        self._length, self._rows = length, rows
        if rows is not None:
            self._table = self._table.crop(rows.lengths.tolist())
        elif length:
            self._table = self._table.crop([length] * len(self._table.rows))
        else:
            self._table = PageTable(self.pool)

    def _tokens(self) -> dict[str, Tensor]:
        return dict(zip(self._format.parts, self.keys().gathered().tokens, strict=True))

    def _load_tokens(self, tokens: Mapping[str, Tensor]) -> None:
        parts = [tokens[name] for name in self._format.parts]
        k, v = (x.new_empty((), dtype=self._dtype).expand(x.shape) for x in parts[:2])  # as they were given
        rows = self._make_room(k, v, None)
        self._table.put(place(rows.lengths, k.shape[2], None)[0], parts)
        self._length = k.shape[2]

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        self._cut(self._length, self._rows)  # shorter rows need fewer pages

    @property
    def _slots(self) -> int:
        return self._length

    def _options(self) -> dict[str, Any]:
        return {"page_size": self.pool.page_size, **super()._options()}

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of its rows, each counted once; `PagePool.nbytes` has the allocated ones."""
        return len(self._table.pages()) * self.pool.page_nbytes

    def __copy__(self) -> Self:
        twin = super().__copy__()
        twin._table = self._table.__copy__()
        return twin
