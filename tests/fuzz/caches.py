"""Every cache in every order of operations and modes of gradients, against plain concatenation.

    PYTHONPATH=tests python -m fuzz.caches --steps 100000 --seed 0

Each world is one kind of cache in several copies that go on separately, each beside the tokens that it was given,
joined by torch. After every step all copies are compared with these, and no tensor that was given may have changed;
losses of earlier steps are differentiated later on.
"""

import argparse
import copy
import io
import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv import CrossKVCache, Int8KVCache, KVCache, LatentKVCache, PagedKVCache, SlidingKVCache
from qkv.cache import Cache, Keys
from qkv.cache.pool import PagePool
from qkv.integrations.transformers.cache import AppendLayer, Int8Layer, Int8SlidingLayer, LatentLayer, SlidingLayer
from qkv.integrations.transformers.lazy_tensor import Int8Tensor

Pick = Callable[[int], int]
"""A number from 0 to n - 1, of chance's or of hypothesis'."""


class Kind(NamedTuple):
    make: Callable[[], Any]
    window: int | None = None
    sinks: int = 0
    is_rounded: bool = False
    capacity: int | None = None
    heads: int = 2


KINDS = {
    "kv": Kind(KVCache),
    "reserved": Kind(lambda: KVCache(capacity=24), capacity=24),
    "int8": Kind(Int8KVCache, is_rounded=True),
    "sliding": Kind(lambda: SlidingKVCache(4), window=4),
    "sliding, sinks": Kind(lambda: SlidingKVCache(3, 2), window=3, sinks=2),
    "sliding, int8": Kind(lambda: SlidingKVCache(3, 2, dtype="int8"), window=3, sinks=2, is_rounded=True),
    "cross": Kind(CrossKVCache),
    "latent": Kind(LatentKVCache, heads=1),
    "paged": Kind(lambda: PagedKVCache(page_size=3)),
    "paged, one token a page": Kind(lambda: PagedKVCache(page_size=1)),
    "paged, int8": Kind(lambda: PagedKVCache(page_size=3, dtype="int8"), is_rounded=True),
    "transformers, appending": Kind(AppendLayer),
    "transformers, latent": Kind(LatentLayer, heads=1),
    "transformers, sliding": Kind(lambda: SlidingLayer(4), window=4),
    "transformers, int8": Kind(Int8Layer, is_rounded=True),
    "transformers, sliding, int8": Kind(lambda: Int8SlidingLayer(4), window=4, is_rounded=True),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "frozen": torch.enable_grad,
    "trained": torch.enable_grad,
}
UNUSED_IS_ZERO: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
CUTS = ("no_grad", "inference_mode")
"""Modes in which what is computed has no gradient."""

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": lambda cache: saved(cache, weights_only=True),
    "state dict": lambda cache: reloaded(cache),
}


def reloaded(cache: Any) -> Any:
    twin = copy.deepcopy(cache)
    if isinstance(cache, Cache):
        twin.load_state_dict(cache.state_dict())
    return twin


def saved(cache: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class Loss(NamedTuple):
    """What is to be differentiated later, and what its gradients must be."""

    out: Tensor
    leaves: list[Tensor]
    want: tuple[Tensor, ...]
    may_refuse: bool
    """Whether it is of views that later appends may write over; then torch must say so."""


class Line:
    """One copy of a cache, and all tokens appended to it, those that a sliding one has dropped included."""

    def __init__(self, kind: Kind, cache: Any, tokens: list[Tensor]) -> None:
        self.kind = kind
        self.cache = cache
        self.tokens = tokens
        """Keys and values so far, joined by torch."""

    @property
    def length(self) -> int:
        return self.tokens[0].shape[2]

    def append(self, k: Tensor, v: Tensor) -> list[Tensor]:
        found = self.cache.append(k, v) if isinstance(self.cache, Cache) else self.cache.update(k, v)
        if isinstance(self.cache, Cache):
            assert found.offset == (None if isinstance(self.cache, CrossKVCache) else found.lk - k.shape[2])
            if not isinstance(self.cache, CrossKVCache):
                self.check_latest(found, k.shape[2])
        return self.dense(found)

    def check_latest(self, found: Any, count: int) -> None:
        """That another layer can read what the append returned, unless a prompt of several windows was cut."""
        try:
            latest = self.cache.latest(count)
        except ValueError:
            assert self.kind.window is not None and count > self.kind.window + 1
            return
        assert latest.offset == found.offset
        assert all(torch.equal(got, want) for got, want in zip(latest, found, strict=True) if isinstance(got, Tensor))

    def dense(self, found: Any) -> list[Tensor]:
        if isinstance(self.cache, LatentKVCache):
            assert torch.equal(found.v, found.k[..., :8]) and found.v.data_ptr() == found.k.data_ptr()
            return list(found.k.split([8, 5], dim=3))
        if isinstance(self.cache, PagedKVCache):
            found = found.gathered()
        if isinstance(found, Keys) and found.k_scale is not None:
            return [codes * scale[..., None] for codes, scale in ((found.k, found.k_scale), (found.v, found.v_scale))]
        return [x.materialize() if isinstance(x, Int8Tensor) else x for x in found[:2]]

    def cached(self) -> list[Tensor]:
        """The keys and values in the cache now."""
        if isinstance(self.cache, PagedKVCache) or (isinstance(self.cache, Cache) and self.kind.is_rounded):
            return self.dense(self.cache.keys()) if self.length else []
        if isinstance(self.cache, Cache):
            parts = [part.tensor for part in self.cache._parts if part.tensor is not None]
            return [x for part in parts for x in part.split([8, 5], dim=3)] if self.kind.heads == 1 else parts
        cached = self.dense((self.cache.keys, self.cache.values)) if self.cache.is_initialized else []
        return cached if self.length else []

    def among(self, count: int, x: Tensor) -> Tensor:
        """The sinks and the last of all tokens, ``count`` of them."""
        sinks = min(self.kind.sinks, count)
        return torch.cat([x[:, :, :sinks], x[:, :, x.shape[2] - (count - sinks) :]], dim=2)

    def check(self, found: list[Tensor], new: int | None = None) -> None:
        """That these are the tokens, all that queries of the last ``new`` may see."""
        if not self.length:
            assert not any(x.shape[2] for x in found)
            return
        if self.kind.window is not None and new is not None:
            least = min(self.length, self.kind.sinks + self.kind.window - 1 + new)
            assert found[0].shape[2] >= least, f"{found[0].shape[2]} tokens of the {least} that are seen"
        for got, want in zip(found, self.tokens, strict=False):
            if self.kind.window is None:
                assert got.shape == want.shape, f"{tuple(got.shape)} for {tuple(want.shape)}"
            want = self.among(got.shape[2], want)
            if self.kind.is_rounded:
                # Half a step of the row, and what fp32 rounds of 127 of them.
                step = want.abs().amax(dim=-1, keepdim=True) / 127
                assert ((got - want).abs() <= step * (0.5 + 127 * torch.finfo(torch.float32).eps)).all()
            else:
                assert torch.equal(got, want)


class World:
    """Copies of one cache, whatever happens to them."""

    OPERATIONS = ("append", "append", "append", "append", "crop", "select", "fork", "reset", "refuse", "differentiate")

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind = KINDS[kind]
        self.generator = torch.Generator().manual_seed(seed)
        self.lines = [Line(self.kind, self.kind.make(), self.nothing(2))]
        self.leaves: list[Tensor] = []
        self.losses: list[Loss] = []
        self.given: list[tuple[Tensor, Tensor]] = []
        self.history: list[str] = []

    def step(self, operation: str, pick: Pick) -> None:
        try:
            getattr(self, operation)(self.lines[pick(len(self.lines))], pick)
            for each in self.lines:
                each.check(each.cached())
            check_pools([each.cache for each in self.lines])
            for now, before in self.given:
                assert torch.equal(now, before), "a tensor that was given has changed"
        except Exception as error:
            raise AssertionError("; ".join(self.history)) from error

    def tell(self, line: Line, *words: object) -> None:
        self.history.append(f"{self.lines.index(line)}: {' '.join(map(str, words))}")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def leaf(self, layout: int, count: int, width: int, batch: int) -> Tensor:
        heads = self.kind.heads
        shapes = ((batch, heads, count, width), (batch, heads, count + 4, width), (batch, count, heads, width))
        return self.random(*shapes[layout])

    @staticmethod
    def tokens_of(leaf: Tensor, layout: int) -> Tensor:
        """The leaf itself, a slice of it, or a view of it with heads inside."""
        return (leaf, leaf[:, :, 3:-1], leaf.transpose(1, 2))[layout]

    def append(self, line: Line, pick: Pick) -> None:
        mode, layout, count = list(MODES)[pick(len(MODES))], pick(3), (1, 1, 1, 2, 5, 13)[pick(6)]
        self.tell(line, "append", count, mode, "layout", layout)
        batch = line.tokens[0].shape[0]
        leaves = [self.leaf(layout, count, width, batch).requires_grad_(mode == "trained") for width in (8, 5)]
        with MODES[mode]():
            new = [self.tokens_of(leaf, layout) for leaf in leaves]
            given = [x.clone() for x in new] if mode == "inference_mode" else new
            if self.must_refuse(line, mode, count):
                assert_refused(lambda: line.append(*given))
                return
            found = line.append(*given)
        with torch.set_grad_enabled(mode not in CUTS):
            line.tokens = [torch.cat(pair, dim=2) for pair in zip(line.tokens, new, strict=True)]
        line.check(found, count)
        with torch.no_grad():
            for leaf in leaves:
                leaf.add_(1)  # The caller goes on with what is his.
        self.given += [(leaf.detach(), leaf.detach().clone()) for leaf in leaves]
        self.leaves += leaves if mode == "trained" else []
        if pick(2) and not self.kind.is_rounded and not any(x.is_inference() for x in found):
            self.lose(line, found, mode in CUTS)

    def must_refuse(self, line: Line, mode: str, count: int) -> bool:
        if isinstance(line.cache, CrossKVCache):
            return line.length > 0
        too_many = self.kind.capacity is not None and line.length + count > self.kind.capacity
        return too_many or (isinstance(line.cache, Cache) and self.kind.is_rounded and mode == "trained")

    def lose(self, line: Line, found: list[Tensor], may_refuse: bool) -> None:
        """Keeps a loss over what was returned, as attention saves it, to be differentiated later."""
        queries = [self.random(*x.shape).requires_grad_() for x in found]
        wanted = [line.among(x.shape[2], y) for x, y in zip(found, line.tokens, strict=True)]
        with torch.enable_grad():
            out, plain = (
                sum((x * q).sum() + x.sin().sum() for x, q in zip(tokens, queries, strict=True))
                for tokens in (found, wanted)
            )
        leaves = [*queries, *self.leaves[-8:]]
        want = torch.autograd.grad(plain, leaves, retain_graph=True, **UNUSED_IS_ZERO)
        self.losses.append(Loss(out, leaves, want, may_refuse))

    def differentiate(self, line: Line, pick: Pick) -> None:
        if not self.losses:
            return
        loss = self.losses.pop(pick(len(self.losses)))
        self.tell(line, "differentiate")
        try:
            got = torch.autograd.grad(loss.out, loss.leaves, retain_graph=True, **UNUSED_IS_ZERO)
        except RuntimeError as error:
            if loss.may_refuse and "modified by an inplace operation" in str(error):
                return
            raise
        for found, want in zip(got, loss.want, strict=True):
            assert torch.allclose(found, want, atol=1e-6)

    def crop(self, line: Line, pick: Pick) -> None:
        count = pick(line.length + 3) - 1
        cache = line.cache
        self.tell(line, "crop", count)
        if isinstance(cache, Cache):
            possible = 0 <= count <= line.length
            if isinstance(cache, SlidingKVCache) and possible and count < line.length:
                dropped = line.length - cache._parts[0].length
                possible = not dropped or count - dropped >= self.kind.sinks + self.kind.window - 1
            if not possible:
                assert_refused(lambda: cache.crop(count))
                return
            cache.crop(count)
        else:
            count = min(max(count, 0), line.length)
            if isinstance(cache, SlidingLayer | Int8SlidingLayer) and line.length >= 4:
                assert_refused(lambda: cache.crop(count - line.length))
                return
            if count == 0:  # theirs hold an empty tensor then, whose batch they compare
                return
            cache.crop(count - line.length)
        line.tokens = [x[:, :, :count] for x in line.tokens]

    def select(self, line: Line, pick: Pick) -> None:
        batch = line.tokens[0].shape[0]
        rows, mode = torch.tensor([pick(batch) for _ in range(1 + pick(3))]), list(MODES)[pick(2)]
        self.tell(line, "select", rows.tolist(), mode)
        if not line.length:
            return
        with MODES[mode]():
            if isinstance(line.cache, Cache):
                line.cache.select(rows)
            else:
                line.cache.reorder_cache(rows)
        with torch.no_grad():
            line.tokens = [x[rows] for x in line.tokens]

    def fork(self, line: Line, pick: Pick) -> None:
        name = list(COPIES)[pick(len(COPIES))]
        self.tell(line, "fork", name)
        if name != "copy" and any(x is not None and x.requires_grad for x in line.cached()):
            assert_refused(lambda: COPIES[name](line.cache))
            return
        self.lines.append(Line(self.kind, COPIES[name](line.cache), list(line.tokens)))
        if len(self.lines) > 4:
            del self.lines[pick(4)]

    def reset(self, line: Line, pick: Pick) -> None:
        self.tell(line, "reset")
        line.cache.reset()
        line.tokens = self.nothing(1 + pick(3))

    def refuse(self, line: Line, pick: Pick) -> None:
        """Tokens that do not fit."""
        if not line.length or isinstance(line.cache, CrossKVCache):
            return
        self.tell(line, "refuse")
        batch, heads, *_ = line.tokens[0].shape
        k, v, other = torch.zeros(batch, heads, 1, 8), torch.zeros(batch, heads, 1, 5), torch.zeros(batch, 3, 1, 8)
        more = torch.zeros(batch + 1, heads, 1, 8)
        pairs = [(k[..., :7], v), (k, v[..., :4]), (other, other[..., :5]), (more, more[..., :5]), (k[0], v[0])]
        wrong = pairs[pick(5)]
        with MODES[list(MODES)[pick(2)]]():
            assert_refused(lambda: line.append(*wrong))

    def nothing(self, batch: int) -> list[Tensor]:
        return [torch.zeros(batch, self.kind.heads, 0, width) for width in (8, 5)]


def check_pools(caches: list[Any]) -> None:
    """That pages in use are those which rows of the caches hold, each counted once for every row."""
    tables: dict[PagePool, list[list[int]]] = {}
    for cache in caches:
        if isinstance(cache, PagedKVCache):
            lengths, size = cache.lengths.tolist(), cache.pool.page_size
            assert [len(row) for row in cache._table.rows] == [-(-length // size) for length in lengths]
            assert cache.nbytes == len(cache._table.pages()) * cache.pool.page_nbytes
            tables.setdefault(cache.pool, []).extend(cache._table.rows)
    for pool, rows in tables.items():
        held = Counter(page for row in rows for page in row)
        assert pool.used == len(held)
        holders = {page: pool.holders(page) for page in range(pool.allocated) if pool.holders(page)}
        assert holders == held, f"{holders} for {dict(held)}"


def assert_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except (ValueError, RuntimeError):
        return
    raise AssertionError("it was not refused")


def play(world_of: Any, kinds: Sequence[str], description: str | None, summary: str) -> None:
    """Steps of random worlds, as the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps, world = 0, 0
    while steps < arguments.steps:
        chance = random.Random(f"{arguments.seed} {world}")
        kind = chance.choice(kinds)
        try:
            there = world_of(kind, world)
            for _ in range(chance.randint(5, 60)):
                there.step(chance.choice(world_of.OPERATIONS), chance.randrange)
                steps += 1
        except AssertionError as error:
            raise SystemExit(f"world {world}, seed {arguments.seed}, {kind}: {error}: {error.__cause__!r}") from error
        world += 1
    print(f"{steps} steps in {world} worlds: {summary}")


if __name__ == "__main__":
    play(World, list(KINDS), __doc__, "as plain concatenation")
