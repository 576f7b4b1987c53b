"""`ShardedKVCache`: the keys and values of a text over the ranks of a mesh, in blocks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from qkv import functional
from qkv.arguments import require_count
from qkv.backends.result import accumulation_dtype
from qkv.backends.sinks import add_sinks
from qkv.cache import Cache, Keys
from qkv.cache.base import Owner, autocast_to
from qkv.cache.rows import Rows
from qkv.masks import FULL, Mask
from qkv.parallel.agreement import agreed, digest
from qkv.parallel.compiling import between_graphs
from qkv.parallel.exchange import Route, exchange
from qkv.parallel.merging import merge
from qkv.parallel.plan import dealing
from qkv.parallel.runs import Layout, Run
from qkv.parallel.tokens import Tokens
from qkv.partial import Partial
from qkv.scores import ScoreOptions

MIN_CAPACITY = 16
_CAUSAL = Mask.causal()


class Blocks(NamedTuple):
    """Which positions of a text a rank holds: position p is on rank ``(p // block) % ranks``."""

    block: int
    rank: int
    ranks: int

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The rank's own positions from ``start`` to ``stop``, as intervals in order."""
        turn = self.block * self.ranks
        for first in range(start // turn * turn + self.rank * self.block, stop, turn):
            begin, end = max(first, start), min(first + self.block, stop)
            if begin < end:
                yield begin, end

    def layout(self, length: int) -> Layout:
        """The runs of all ranks of a text."""
        each = (self._replace(rank=rank) for rank in range(self.ranks))
        return tuple(tuple(Run(*run) for run in blocks.runs(0, length)) for blocks in each)

    def count(self, stop: int) -> int:
        """Number of own positions before ``stop``."""
        turns, rest = divmod(stop, self.block * self.ranks)
        return turns * self.block + min(max(rest - self.rank * self.block, 0), self.block)


class Shards(NamedTuple):
    """Where the keys of a text are of which `Keys` has those of this rank."""

    mesh: DeviceMesh
    blocks: Blocks
    length: int
    """of all ranks"""

    @between_graphs
    def attend(self, q: Tensor, keys: Keys, mask: Mask, scores: ScoreOptions, backend: str) -> Tensor:
        """`qkv.attention` over the keys of all ranks, by one collective, whose bytes are those of the queries' results.

        Args:
            q: ``(B, H, Lq, D)``, the same on all ranks.
            keys: of this rank, with the position of the first query among all.
            mask, scores: over the keys of all ranks, the same on all.
            backend: as in `qkv.attention`.

        Returns:
            ``(B, H, Lq, Dv)``, the same bits on all ranks.

        Raises:
            ValueError: for dropout, and gradients.
        """
        _refuse_training((q, keys.k, keys.v), scores.get("dropout", 0.0))
        self._require_agreement(q, mask, scores)
        wide = accumulation_dtype(q.dtype)
        local: Partial | None = None
        for piece in self._pieces(q.to(wide), keys, mask, scores):
            partial = functional.attend("attention", backend=backend, **piece)
            local = partial if local is None else functional.merge([local, partial])
        if local is None:
            nothing = q.new_zeros(*q.shape[:3], keys.v.shape[3], dtype=wide)
            local = Partial(nothing, nothing.new_full(nothing.shape[:3], -torch.inf))
        out, lse = merge(local, self.mesh)
        sinks = scores.get("sink_logits")
        return (out if sinks is None else add_sinks(out, lse, sinks)[0]).to(q.dtype)

    def _require_agreement(self, q: Tensor, mask: Mask, scores: ScoreOptions) -> None:
        """Raises ValueError, with QKV_CHECK=1, unless all ranks make the same call."""
        given = {"q": q, **dict(mask.tensors()), "bias": scores.get("bias")}

        def described(given: dict[str, Any]) -> dict[str, str]:
            found = {name: "None" if one is None else digest(one) for name, one in given.items()}
            return {"tokens": f"{self.length} in blocks of {self.blocks.block}", "mask": repr(mask), **found}

        agreed("ShardedKVCache", Route(self.mesh.get_group(), *self.blocks[1:]), lambda: given, described)

    def _pieces(self, q: Tensor, keys: Keys, mask: Mask, scores: ScoreOptions) -> Iterator[dict[str, Any]]:
        """The calls of this rank: one over the blocks that all queries see, and one for each other block."""
        offset, bias = keys.offset, scores.get("bias")
        assert isinstance(offset, int)
        of_pieces = {**scores, "bias": None, "sink_logits": None}
        is_plain = mask in (FULL, _CAUSAL) and bias is None and scores.get("alibi") is None
        seen = self.length if mask == FULL else offset + 1
        whole = self.blocks.count(seen) if is_plain else 0
        if whole:
            k, v = (x[:, :, :whole].to(q.dtype) for x in (keys.k, keys.v))
            yield {"q": q, "k": k, "v": v, **of_pieces}
        at = 0
        for start, stop in self.blocks.runs(0, self.length):
            rows = slice(at, at + stop - start)
            at = rows.stop
            if rows.stop <= whole:
                continue
            if rows.start < whole:  # a block that the queries see from within
                start += whole - rows.start
                rows = slice(whole, rows.stop)
            k, v = (x[:, :, rows].to(q.dtype) for x in (keys.k, keys.v))
            of_piece = {
                "mask": mask.select_apart((0, q.shape[2]), (start, stop), self.length, offset),
                "offset": offset - start,
                "bias": bias if bias is None or bias.shape[-1] == 1 else bias[..., start:stop],
            }
            yield {"q": q, "k": k, "v": v, **of_pieces, **of_piece}


class ShardedKVCache(Cache):
    """Keys and values of a text over the ranks of a mesh, a block of tokens after the other: 1 / P of them on each.

    Position p is on rank ``(p // block) % P``. All ranks pass the same tokens to the layer and get the same output, in
    the same bits. A call sends each rank's result for its queries, ``(B, H, Lq, Dv + 1)`` in fp32 or higher, to all
    others, in one collective: as many bytes however long the text is. A prompt may be over ranks itself, by the
    ``tokens`` of the first call, whose keys are then dealt out. With `Heads`, on another dimension of the mesh,
    a rank has its heads of its blocks.

    Args:
        mesh: of one dimension.
        block: tokens of a block; any number.
        capacity: number of tokens of the whole text to allocate memory for, and limit of the length; None grows.

    Rows of a batch have one length: padding is refused, and so are masks with windows, whose keys take little memory
    (give each rank a `SlidingKVCache`), gradients and dropout.

    Raises:
        TypeError: for another mesh, and anything but ints.
        ValueError: for a mesh of several dimensions, and numbers below 1.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from qkv import parallel
        >>> mesh = init_device_mesh("cpu", (4,))  # doctest: +SKIP
        >>> cache = parallel.ShardedKVCache(mesh)  # doctest: +SKIP
        >>> tokens = parallel.Tokens.zigzag(n, mesh)  # doctest: +SKIP
        >>> layer(tokens.take(prompt), cache=cache, tokens=tokens)  # doctest: +SKIP
        >>> layer(step, cache=cache)  # doctest: +SKIP

    Source: vLLM's decode context parallelism (``cp_kv_cache_interleave_size``) and Helix (Bhatia et al. 2025), for
    blocks over ranks; Tree attention (Shyam et al. 2024) for the merge.
    """

    STATE = ("layout",)

    def __init__(self, mesh: DeviceMesh, block: int = 480, capacity: int | None = None) -> None:
        super().__init__()
        caller = type(self).__name__
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"{caller}: mesh must be a torch.distributed DeviceMesh; got {type(mesh).__name__}. "
                'Use init_device_mesh("cpu", (ranks,)).'
            )
        if mesh.ndim != 1:
            raise ValueError(
                f"{caller}: mesh must have one dimension; got {mesh.ndim}. Take one of them by its name: mesh['cp']."
            )
        require_count(caller, "block", block)
        if capacity is not None:
            require_count(caller, "capacity", capacity)
        self.capacity = capacity
        self._mesh = _Kept(mesh)
        self._blocks = Blocks(block, mesh.get_local_rank(), mesh.size())
        self._length = 0

    @property
    def length(self) -> int:
        """Number of tokens of all ranks."""
        return self._length

    def admit(self, owner: Owner, mask: Mask) -> None:
        """As `Cache.admit`.

        Raises:
            ValueError: as it does, and for a mask with a window.
        """
        if mask.lookback is not None and not mask.counts_from_first_key:
            sinks = f", {mask.sink_tokens}" if mask.sink_tokens else ""
            raise ValueError(
                f"{type(self).__name__}: it holds all tokens, over ranks, and the mask must show them; got {mask!r}, "
                f"which shows {mask.lookback + 1}. Give each rank a SlidingKVCache({mask.lookback + 1}{sinks})."
            )
        super().admit(owner, mask)

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """As `Cache.append`, for tokens that all ranks pass; returns those of this rank.

        Raises:
            ValueError: for padding; for a batch, heads, width, dtype or device other than before; beyond capacity.
        """
        start = self._length
        if is_token is not None:
            raise ValueError(
                f"{type(self).__name__}: rows must have one length, so that a position is on one rank; got padding. "
                "Leave it out, or give each row a cache of its own."
            )
        own = [slice(first - start, end - start) for first, end in self._blocks.runs(start, start + k.shape[2])]
        new = [torch.cat([x[:, :, each] for each in own], dim=2) if own else x[:, :, :0] for x in (k, v)]
        return self._store(new[0], new[1], k.shape[2])

    @between_graphs
    def fill(self, k: Tensor, v: Tensor, tokens: Tokens) -> None:
        """Stores the first tokens, of which each rank passes those that a layout gives it, by one collective.

        Args:
            k, v: keys ``(B, Hkv, rows, D)`` and values ``(B, Hkv, rows, Dv)`` of this rank.
            tokens: the layout.

        Raises:
            ValueError: for a cache that has tokens, a layout of another mesh, gradients, and beyond capacity.
        """
        caller = type(self).__name__
        _refuse_training((k, v), 0.0)
        if self._length:
            raise ValueError(
                f"{caller}: a call with tokens= must be the first; got a cache of {self._length} tokens. Pass later "
                "ones to all ranks, without tokens=."
            )
        if tokens.mesh != self._mesh.mesh:
            raise ValueError(f"{caller}: the layout must be of the mesh of the cache; got {tokens.mesh}.")
        plan = dealing(tokens.runs, self._blocks.layout(tokens.length), k.shape[1], tokens.rank)
        (own,) = exchange(plan, tokens.route._replace(caller=caller), [k, v]).kinds[0]
        self._store(own[0], own[1], tokens.length)

    def _store(self, k: Tensor, v: Tensor, count: int) -> Keys:
        """Appends the rank's own of ``count`` more tokens of all ranks."""
        caller, start = type(self).__name__, self._length
        before = (None, None) if self._is_new else (self._parts[0].memory, self._parts[1].memory)
        self._check_append(k, v, *before)
        stop = start + count
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{caller}: capacity is {self.capacity} tokens; got {count} more than the {start} in the cache. "
                "Pass a larger capacity, or None to grow."
            )
        if not start:
            self._autocast = autocast_to(k)
        mark = self.mark()
        try:
            most = self._blocks.count(stop)
            capacity = max(2 * most, MIN_CAPACITY) if self.capacity is None else self._blocks.count(self.capacity)
            tokens = self._format.extend(self._parts, k, v, capacity)
        except BaseException:  # out of memory or interrupted, with one part grown
            self.restore(mark)
            raise
        self._dtype, self._length = k.dtype, stop
        return self._returned(tokens, start)

    def latest(self, count: int) -> Keys:
        """What `append` returned for the last ``count`` columns."""
        return self._returned(self._stored(), self._length - count)

    def _returned(self, tokens: list[Tensor], offset: int) -> Keys:
        return Keys.of(tokens, offset)._replace(shards=Shards(self._mesh.mesh, self._blocks, self._length))

    def _cut(self, length: int, rows: Rows | None = None) -> None:
        if rows is not None and len(set(rows.lengths.tolist())) > 1:
            raise ValueError(
                f"{type(self).__name__}: rows must keep one length, so that a position is on one rank; got "
                f"{rows.lengths.tolist()}. Crop all rows alike."
            )
        super()._cut(0)
        for part in self._parts:
            part.crop(self._blocks.count(length))
        self._length = length

    def mark(self) -> Any:
        """The state to which `restore` returns."""
        return self._parts, self._length, None

    def join(self, other: Self) -> NoReturn:
        """Refused: rows of other texts differ in length.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}: rows must have one length, so that a position is on one rank; join adds others. "
            "Make one cache for each text."
        )

    def replace(self, rows: Tensor, other: Self) -> NoReturn:
        """Refused, as `join`.

        Raises:
            ValueError: always.
        """
        self.join(other)

    def _more_state(self) -> dict[str, Tensor]:
        return {"layout": torch.tensor([self._length, *self._blocks])}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        caller, layout = type(self).__name__, state["layout"]
        length, *blocks = layout.tolist() if layout.shape == (4,) else (-1,)
        if tuple(blocks) != self._blocks or self._blocks.count(length) != self._parts[0].length:
            raise ValueError(
                f"{caller}: the state must be of block={self._blocks.block} and rank {self._blocks.rank} of "
                f"{self._blocks.ranks}, with the tokens of that rank; got layout {layout.tolist()} with "
                f"{self._parts[0].length} tokens. Load it on the same rank of as many."
            )
        self._length = length

    def _options(self) -> dict[str, Any]:
        return {
            "block": self._blocks.block,
            "rank": f"{self._blocks.rank} of {self._blocks.ranks}",
            **super()._options(),
        }


def _refuse_training(tensors: Sequence[Tensor], dropout: float) -> None:
    if dropout or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        got = f"dropout={dropout}" if dropout else "tensors that require a gradient"
        raise ValueError(
            f"ShardedKVCache: it is for decoding, without gradients and dropout; got {got}. Call the layer under "
            "torch.no_grad(), in eval mode; train with tokens=parallel.Tokens(...)."
        )


class _Kept:
    """A mesh, which copies of a cache share: process groups have no copies."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __deepcopy__(self, memo: object) -> "_Kept":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("ShardedKVCache: a pickle has no process group; got a cache to pickle. Store its state_dict().")
