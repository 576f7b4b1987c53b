"""`PagePool`: memory for keys and values in pages, and `PageTable`: the pages of each row of a batch."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv import kernels
from qkv.arguments import require_count
from qkv.cache.buffer import compact_copy, may_write, send_by_value
from qkv.cache.int8 import Dtype, format_of
from qkv.cache.rows import Placement
from qkv.torch_internals import transforms_are_active

SPLIT = 480
"""number of keys that the kernel reads in place if their pages follow each other: KV_SPLIT of native/src/sizes.h"""
MIN_PAGES = 16
MAX_PAGE_SIZE = 2**20


class PagePool:
    """Memory for keys and values of one layer, in pages that rows of several caches hold and may share.

    Args:
        page_size: number of tokens in a page, at most 2**20.
        pages: number of pages to allocate, and limit; None grows without bound.
        dtype: None for that of the keys; or ``torch.int8`` or ``"int8"``, rounded as in an `Int8KVCache`.

    Caches with one pool, copies among them, must not be used by several threads at the same time: one would move pages
    to larger memory while another writes. Give each thread a pool of its own.

    A page is in use while a row of any cache holds it. With gradients enabled, appending copies memory, as in a
    `KVCache`; a cache that shares its pool with others goes on in a pool of its own then.

    Raises:
        TypeError, ValueError: for numbers that are not counts, a page_size above its limit, and another dtype.

    Example:
        >>> import torch, qkv
        >>> pool = qkv.PagePool(page_size=4)
        >>> prompt, k = qkv.PagedKVCache(pool), torch.randn(1, 2, 6, 8)
        >>> keys = prompt.append(k, k)
        >>> prompt.repeat(3)
        >>> pool.used
        2
        >>> keys = prompt.append(k[:1, :, :1].expand(3, -1, -1, -1), k[:1, :, :1].expand(3, -1, -1, -1))
        >>> pool.used  # the full page is shared by three rows; each has written to a last page of its own
        4

    Source: vLLM (Kwon et al. 2023), section 4.
    """

    def __init__(self, page_size: int = 16, pages: int | None = None, *, dtype: Dtype = None) -> None:
        require_count("PagePool", "page_size", page_size)
        if page_size > MAX_PAGE_SIZE:
            raise ValueError(
                f"PagePool: page_size must be at most {MAX_PAGE_SIZE} tokens; got {page_size}. Rows take whole pages: "
                "use small ones, such as 16."
            )
        if pages is not None:
            require_count("PagePool", "pages", pages, suffix=", or None to grow")
        self.format = format_of("PagePool", dtype)
        """in which form tokens are stored"""
        self.token_dtype: torch.dtype | None = None
        """of the tokens, as they were given"""
        self.page_size = page_size
        self.limit = pages
        self.parts: tuple[Tensor, ...] = ()
        """(pages, Hkv, page_size, ...), those of the format, once there are some; the pages of a head are contiguous"""
        self._is_writable = False
        """whether memory was allocated here and is not shared"""
        self._holders: list[int] = []
        """number of rows that hold each page"""
        self._run = SPLIT // math.gcd(SPLIT, page_size)
        """number of pages in a run, the unit that is given to one row if possible: whole splits of the kernel"""
        self._free_in_run: list[int] = []
        self._free_runs: dict[int, None] = {}
        self._partial_runs: dict[int, None] = {}
        self.holds = 0
        """number of times that pages have been held so far"""

    @property
    def used(self) -> int:
        """Number of pages in use."""
        return len(self._holders) - sum(self._free_in_run)

    @property
    def allocated(self) -> int:
        """Number of pages allocated."""
        return len(self._holders)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(x.untyped_storage().nbytes() for x in self.parts)

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return sum(x[:1].numel() * x.element_size() for x in self.parts)

    @property
    def has_graph(self) -> bool:
        """Whether memory was computed with gradients."""
        return any(x.requires_grad for x in self.parts)

    def holders(self, page: int) -> int:
        """Number of rows that hold a page."""
        return self._holders[page]

    def hold(self, pages: Iterable[int]) -> None:
        """Counts one more holder of each page."""
        self.holds += 1
        for page in pages:
            if not self._holders[page]:
                self._count_free(page // self._run, -1)
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Counts one holder of each page less; frees pages without."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._count_free(page // self._run, 1)

    def _count_free(self, run: int, change: int) -> None:
        self._free_in_run[run] += change
        free = self._free_in_run[run]
        self._free_runs.pop(run, None)
        self._partial_runs.pop(run, None)
        if free:
            (self._free_runs if free == self._run_size(run) else self._partial_runs)[run] = None

    def _run_size(self, run: int) -> int:
        """Number of pages of a run, the last of which may be shorter."""
        return min(self._run, len(self._holders) - run * self._run)

    def require_free(self, caller: str, count: int, lengths: Sequence[int]) -> None:
        """Raises ValueError unless ``count`` pages are free, or can be allocated."""
        if self.limit is not None and self.used + count > self.limit:
            raise ValueError(
                f"{caller}: the pool has {self.limit} pages of {self.page_size} tokens, {self.used} of them in use; "
                f"got {count} more pages to write to for rows of {list(lengths)} tokens. Free rows by reset, select or "
                "replace, or make a pool of more pages, or of pages=None to grow."
            )

    def take(self, entry: int, after: int | None) -> int:
        """Holds a free page for entry number ``entry`` of a row, whose last page is ``after``.

        If possible, it is where entries of a row lie in runs of their own, from multiples of the size of a run on.
        """
        following, place = None if after is None else after + 1, entry % self._run
        if following is None or following >= len(self._holders) or self._holders[following]:
            following = None
        run = next(iter(self._free_runs), None)
        if (
            following is not None
            and following % self._run == place
            and (place or following // self._run in self._free_runs)
        ):
            page = following
        elif run is not None and place < self._run_size(run):
            page = run * self._run + place
        else:
            page = self._any() if following is None else following
        self.hold((page,))
        return page

    def _any(self) -> int:
        """A free page."""
        run = next(iter(self._partial_runs or self._free_runs))
        first = run * self._run
        return next(page for page in range(first, first + self._run_size(run)) if not self._holders[page])

    def reserve(self, k: Tensor, v: Tensor, count: int) -> None:
        """Allocates memory if fewer than ``count`` pages are free, or while none is in use, for tokens like these."""
        used = self.used
        if not self._holders or (not used and (self.has_graph or not self.takes(k.shape, v.shape, k))):
            pages = max(2 * count, MIN_PAGES) if self.limit is None else self.limit
            self._holders, self._free_in_run = [], []
            self._free_runs, self._partial_runs = {}, {}
            self.token_dtype = k.dtype
            shapes = self.format.shapes(k.shape, v.shape, k.dtype)
            self._allocate([k.new_empty((0, *shape[1:]), dtype=dtype) for shape, dtype in shapes], pages)
        elif self.limit is None and used + count > self.allocated:
            self._allocate(self.parts, max(2 * self.allocated, used + count))
        elif self.limit is None and len(self._free_runs) < count and 2 * used >= self.allocated:
            self._allocate(self.parts, 2 * self.allocated)

    def takes(self, k: Sequence[int], v: Sequence[int], like: Tensor) -> bool:
        """Whether pages are of tokens of these shapes, and of the dtype and device of ``like``."""
        return like.dtype is self.token_dtype and all(
            (x.shape[1], x.shape[3:], x.device) == (shape[1], (*shape[3:],), like.device)
            for x, (shape, _) in zip(self.parts, self.format.shapes(k, v, like.dtype), strict=True)
        )

    def _allocate(self, like: Sequence[Tensor], pages: int) -> None:
        """Allocates memory for ``pages`` pages, in which the present ones come first."""
        self.parts = tuple([self._grown(x, pages) for x in like])
        self._is_writable = not self.has_graph
        before = len(self._holders)
        self._holders += [0] * (pages - before)
        runs = -(-pages // self._run)
        self._free_in_run += [0] * (runs - len(self._free_in_run))
        for run in range(before // self._run, runs):
            first = run * self._run
            free = sum(not held for held in self._holders[first : first + self._run])
            self._free_in_run[run] = 0
            self._count_free(run, free)

    def _grown(self, x: Tensor, pages: int) -> Tensor:
        count = len(self._holders)
        if count and _is_recording():
            return torch.cat([x, x.new_zeros(pages - count, *x.shape[1:])])
        with torch.inference_mode(False):  # memory that can be written to in every mode; zeros, since NaN cost time
            memory = torch.zeros(x.shape[1], pages, self.page_size, *x.shape[3:], dtype=x.dtype, device=x.device)
        memory = memory.transpose(0, 1)
        if count:
            memory[:count] = x
        return memory

    def put(self, index: tuple[Tensor, ...], tokens: Sequence[Tensor]) -> None:
        """Writes tokens of each part, ``(..., Hkv, ...)``, to rows ``index`` of ``(pages, page_size, Hkv, ...)``."""
        recorded = _is_recording()
        if not recorded:
            self.make_writable()
        pairs = tuple((x.transpose(1, 2), new) for x, new in zip(self.parts, tokens, strict=True))
        if recorded:
            self.parts = tuple([x.index_put(index, new.to(x.dtype)).transpose(1, 2) for x, new in pairs])
            self._is_writable = False
        else:
            for x, new in pairs:
                x.index_put_(index, new)

    def copy_pages(self, pool: "PagePool", before: Sequence[int], after: Sequence[int]) -> None:
        """Copies pages ``before`` of a pool to pages ``after`` of this one."""
        device = pool.parts[0].device
        source, to = (torch.tensor(pages, device=device) for pages in (before, after))
        self.put((to,), [x[source].transpose(1, 2) for x in pool.parts])

    def can_write(self) -> bool:
        """Whether pages may be written to as they are."""
        return self._is_writable and all(map(may_write, self.parts))

    def make_writable(self) -> None:
        """Copies memory that must not be written to: of a graph, or of another pool."""
        if not self.can_write():
            self.parts = tuple([self._grown(x, self.allocated) for x in self.parts])
            self._is_writable = True

    def copied(self, *, keeps_graph: bool = True) -> "PagePool":
        """Another pool with the same memory, which each copies before it writes, and without holders."""
        twin = PagePool(self.page_size, self.limit, dtype=self.format.dtype)
        if self.parts:
            self._is_writable = False
            twin.token_dtype = self.token_dtype
            twin.parts = tuple([x if keeps_graph else x.detach() for x in self.parts])
            twin._holders, twin._free_in_run = [0] * self.allocated, []
            for run in range(-(-self.allocated // self._run)):
                twin._free_in_run.append(0)
                twin._count_free(run, twin._run_size(run))
        return twin

    @classmethod
    def of_pages(
        cls, page_size: int, limit: int | None, kept: Dtype, dtype: torch.dtype | None, parts: Sequence[Tensor]
    ) -> "PagePool":
        """A pool that begins with these pages: ``parts`` of tokens that were given in ``dtype`` and kept as told."""
        pool = cls(page_size, limit, dtype=kept)
        if parts:
            k, v = (x[:0].to(dtype) for x in parts[:2])
            pool.reserve(k, v, len(parts[0]))
            with torch.no_grad():
                pages = torch.arange(len(parts[0]), device=k.device)
                pool.put((pages,), [x.transpose(1, 2) for x in parts])
        return pool

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("PagePool: a pool has neither copies nor pickles; copy the caches, each with its own pages.")


def _is_recording() -> bool:
    """Whether a graph or a transform may need the tokens of each step, so that memory is not overwritten."""
    return torch.is_grad_enabled() or transforms_are_active()


class PageTable:
    """The pages of each row of a batch, in order, which it holds in a pool while it exists.

    New pages alone change a table, which keeps its tokens; all else makes another one, so that a cache which goes back
    to an earlier table finds its pages.

    Args:
        pool: where the pages are.
        rows: the pages of each row.
    """

    def __init__(self, pool: PagePool, rows: Sequence[Sequence[int]] = ()) -> None:
        self.pool = pool
        self.rows = [list(row) for row in rows]
        pool.hold(page for row in self.rows for page in row)
        self._tensor: Tensor | None = None
        self._room, self._holds = 0, 0

    def __del__(self) -> None:
        if "rows" in self.__dict__:
            self.pool.drop(page for row in self.rows for page in row)

    @property
    def tensor(self) -> Tensor:
        """Integer ``(B, entries)``, with zeros after the pages of a row."""
        if self._tensor is None:
            entries = max(map(len, self.rows), default=0)
            spare = entries + max(8, entries // 2)
            with torch.inference_mode(False):
                rows = [row + [0] * (spare - len(row)) for row in self.rows]
                self._tensor = torch.tensor(rows, dtype=torch.int64).view(len(rows), spare)
        return self._tensor

    def pages(self) -> list[int]:
        """All pages, each once."""
        return list(dict.fromkeys(page for row in self.rows for page in row))

    def make_room(self, caller: str, lengths: Sequence[int], added: Sequence[int], k: Tensor, v: Tensor) -> "PageTable":
        """Gives each row pages for ``added`` tokens after its first ``lengths``, and a last page of its own.

        Returns:
            the table with these pages: another one if last pages had to be copied.

        Raises:
            ValueError: if the pool has too few pages left, with nothing changed.
        """
        self._leave_graph()
        pool, size = self.pool, self.pool.page_size
        rows = self.rows or [[] for _ in lengths]
        shared = self._rows_to_copy(rows, lengths, added)
        missing = [max(0, -(-(n + more) // size) - len(row)) for row, n, more in zip(rows, lengths, added, strict=True)]
        count = len(shared) + sum(missing)
        if count or not pool.parts:
            pool.require_free(caller, count, lengths)
            pool.reserve(k, v, count)
        self.rows = rows
        table = self._with_own_last_pages(shared) if shared else self
        table._grow(missing)
        table._room = min((len(row) * size - n for row, n in zip(table.rows, lengths, strict=True)), default=0)
        table._holds = pool.holds
        return table

    def _grow(self, missing: Sequence[int]) -> None:
        """Gives each row so many more pages."""
        rows = self.rows
        new = [(b, len(rows[b]) + i) for b, more in enumerate(missing) for i in range(more)]
        for b, _ in new:
            rows[b].append(self.pool.take(len(rows[b]), rows[b][-1] if rows[b] else None))
        self._enter(new)

    def _leave_graph(self) -> None:
        """Moves to a pool of its own before a write that would record or end a graph of the tokens of others."""
        pool = self.pool
        if self._would_change_a_graph():
            self.pool = pool.copied()
            self.pool.hold(page for row in self.rows for page in row)
            pool.drop(page for row in self.rows for page in row)

    def _would_change_a_graph(self) -> bool:
        """Whether a write would record or end a graph of the tokens of others."""
        pool = self.pool
        return (pool.has_graph or _is_recording()) and pool.used > len(self.pages())

    def _rows_to_copy(self, rows: list[list[int]], lengths: Sequence[int], added: Sequence[int]) -> list[int]:
        """The rows that append to a last page which others hold as well; the last holder of one keeps it."""
        size, found = self.pool.page_size, []
        seen: Counter[int] = Counter()
        for b, (row, length, more) in enumerate(zip(rows, lengths, added, strict=True)):
            if more and length % size:
                seen[row[-1]] += 1
                if seen[row[-1]] < self.pool.holders(row[-1]):
                    found.append(b)
        return found

    def _with_own_last_pages(self, shared: Sequence[int]) -> "PageTable":
        """A table in which these rows have copies of their last pages."""
        pool, rows = self.pool, [list(row) for row in self.rows]
        before = [rows[b][-1] for b in shared]
        after: list[int] = []
        try:
            for b in shared:
                row = rows[b]
                after.append(pool.take(len(row) - 1, row[-2] if len(row) > 1 else None))
                row[-1] = after[-1]
            pool.copy_pages(pool, before, after)
            table = PageTable(pool, rows)
        finally:
            pool.drop(after)
        table._tensor = self._tensor
        table._enter([(b, len(rows[b]) - 1) for b in shared])
        return table

    def _enter(self, places: list[tuple[int, int]]) -> None:
        """Enters the pages at these places of the rows into the tensor."""
        if not places or self._tensor is None:
            return
        if max(map(len, self.rows)) > self._tensor.shape[1] or len(self.rows) != self._tensor.shape[0]:
            self._tensor = None
            return
        rows, entries = zip(*places, strict=True)
        pages = torch.tensor([self.rows[b][i] for b, i in places])
        with torch.inference_mode(False):
            self._tensor = self._tensor.index_put((torch.tensor(rows), torch.tensor(entries)), pages)

    def append_in_place(self, k: Tensor, v: Tensor, starts: Tensor | None, start: int) -> bool:
        """Appends tokens to all rows by the kernel. Returns False, with nothing changed, where it cannot.

        Args:
            k, v: ``(B, Hkv, L, width)``.
            starts: ``(B,)``, the length of each row; None if it is ``start`` in all.
        """
        pool = self.pool
        if self._holds != pool.holds or torch.is_grad_enabled() or k.dim() != 4 or k.shape[2] > self._room:
            return False
        parts = pool.parts
        if not parts or not (pool.can_write() and kernels.can_bypass_dispatcher(k, v, *parts)):
            return False
        if not k.dtype is v.dtype is pool.token_dtype:
            return False
        if not kernels.append_pages(k, v, parts, self.tensor, starts, start):
            return False
        torch.autograd.graph.increment_version(parts)  # as torch's in-place operators do
        self._room -= k.shape[2]
        return True

    def claim(self, count: int) -> bool:
        """Counts ``count`` tokens of each row, for the kernel to write. Returns False if pages are missing."""
        pool = self.pool
        if self._holds != pool.holds or count > self._room:
            return False
        pool.make_writable()
        torch.autograd.graph.increment_version(pool.parts)  # as torch's in-place operators do
        self._room -= count
        return True

    def put(self, placement: Placement, tokens: Sequence[Tensor]) -> None:
        """Writes new tokens of each part, ``(B, Hkv, L, ...)``, to slots of the rows."""
        size = self.pool.page_size
        rows, slots = placement.rows, placement.slots
        pages = self.tensor.to(slots.device)[rows, slots // size]
        self.pool.put((pages, slots % size), [placement.of(x) for x in tokens])
        self._room = 0

    def crop(self, lengths: Sequence[int]) -> "PageTable":
        """The first pages of each row, for ``lengths`` tokens; this table if it has no others."""
        self._room = 0
        counts = [-(-length // self.pool.page_size) for length in lengths]
        pairs = list(zip(self.rows, counts, strict=True))
        if all(len(row) <= count for row, count in pairs):
            return self
        cropped = PageTable(self.pool, [row[:count] for row, count in pairs])
        cropped._tensor = self._tensor
        return cropped

    def joined(self, other: "PageTable", caller: str, index: Sequence[int] | None) -> "PageTable":
        """Rows ``index`` of this table and the other, counted one after the other; all if None."""
        mine, theirs = self, other
        if other.pool is not self.pool:
            mine = PageTable(self.pool.copied(), self.rows) if self._would_change_a_graph() else self
            theirs = other._moved(mine.pool, caller)
        rows = mine.rows + theirs.rows
        return mine._with_rows(rows if index is None else [rows[i] for i in index])

    def _moved(self, pool: PagePool, caller: str) -> "PageTable":
        """A table of the same tokens in another pool, copied there."""
        pages = self.pages()
        if self.pool.token_dtype is None or not pages:
            return PageTable(pool, [[] for _ in self.rows])
        pool.require_free(caller, len(pages), [len(row) * pool.page_size for row in self.rows])
        k, v = (x[:0].to(self.pool.token_dtype) for x in self.pool.parts[:2])
        pool.reserve(k, v, len(pages))
        number: dict[int, int] = {}
        for page in pages:
            number[page] = pool.take(len(number), next(reversed(number.values()), None))
        try:
            pool.copy_pages(self.pool, list(number), list(number.values()))
            return PageTable(pool, [[number[page] for page in row] for row in self.rows])
        finally:
            pool.drop(number.values())

    def select(self, index: Sequence[int]) -> "PageTable":
        """The rows with these indices."""
        return self._with_rows([self.rows[i] for i in index])

    def _with_rows(self, rows: Sequence[Sequence[int]]) -> "PageTable":
        """A table of these rows of pages, detached from a graph unless gradients are enabled."""
        cuts = self.pool.has_graph and not torch.is_grad_enabled()
        return PageTable(self.pool.copied(keeps_graph=False) if cuts else self.pool, rows)

    def __copy__(self) -> Self:
        """A table that holds the same pages. Those of a graph, which appending would cut, come in another pool."""
        pool = self.pool
        return type(self)(pool.copied() if pool.has_graph else pool, self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """The pages of the rows alone, for deep copies and pickles, which have a pool of their own.

        Raises:
            RuntimeError: for tokens that were computed with gradients.
        """
        pool, pages = self.pool, self.pages()
        number = {page: i for i, page in enumerate(pages)}
        memory = [x if pages else x.detach() for x in pool.parts]
        parts = [compact_copy(x[torch.tensor(pages, device=x.device).long()]) for x in memory]
        rows = [[number[page] for page in row] for row in self.rows]
        return {"pool": (pool.page_size, pool.limit, pool.format.dtype, pool.token_dtype, parts), "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PageTable.__init__(self, PagePool.of_pages(*state["pool"]), state["rows"])


send_by_value(PageTable)
