"""`PagedKVCache`: the bits of a `KVCache`, pages that rows and caches share, and full pools."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.caches import check_pools
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.cache import Keys, Pages, quantize

SIZES = [1, 7, 16]
X = torch.randn(3, 60, 32, generator=torch.Generator().manual_seed(0))
CHUNKS = [7, 1, 1, 40, 2, 1, 8]
LAYERS: dict[str, Callable[[], qkv.Attention]] = {
    "multi-head": lambda: qkv.CausalAttention(32, 4),
    "multi-query": lambda: qkv.CausalAttention(32, 4, num_kv_heads=1, rotary=qkv.RotaryEmbedding(8)),
    "grouped, wider values": lambda: qkv.CausalAttention(32, 4, num_kv_heads=2, value_dim=12),
    "window": lambda: qkv.CausalAttention(32, 4, mask=Mask.causal(5)),
    "window with sinks": lambda: qkv.CausalAttention(32, 4, mask=Mask.causal(5, sink_tokens=2)),
    "alibi, softcap, sinks": lambda: qkv.CausalAttention(
        32, 4, alibi=[0.5, 0.25, 0.1, 0.0], softcap=3.0, sink_logits=True
    ),
    "position bias": lambda: qkv.CausalAttention(32, 4, position_bias=qkv.RelativePositionBias(4)),
}


def made(name: str) -> qkv.Attention:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


def pair(page_size: int = 3, rounded: Any = None) -> tuple[qkv.KVCache, qkv.PagedKVCache]:
    whole = qkv.KVCache() if rounded is None else qkv.Int8KVCache()
    return whole, qkv.PagedKVCache(page_size=page_size, dtype=rounded)


each_format = pytest.mark.parametrize("rounded", [None, "int8"])


@each_format
@pytest.mark.parametrize("page_size", SIZES)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_chunks_have_the_bits_of_a_cache_without_pages(name: str, page_size: int, rounded: Any) -> None:
    layer, caches = made(name), pair(page_size, rounded)
    for x in X.split(CHUNKS, dim=1):
        want, got = (layer(x, cache=cache) for cache in caches)
        assert torch.equal(got, want)
    for cache in caches:
        cache.crop(50)
    want, got = (layer.attention_weights(X[:, :3], cache=cache) for cache in caches)
    assert torch.equal(got, want)
    assert_same_state(*caches)


def assert_same_state(*caches: qkv.cache.Cache) -> None:
    """That either could load what the other has saved."""
    want, got = (cache.state_dict() for cache in caches)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@each_format
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rows_in_any_order_have_the_bits_of_a_cache_without_pages(
    dtype: torch.dtype, page_size: int, rounded: Any
) -> None:
    """Rows of their own lengths, scattered over the pool, longer than a split of the kernel."""
    layer, caches = made("grouped, wider values").to(dtype), pair(page_size, rounded)
    x = torch.randn(3, 700, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    keep = torch.arange(600) >= torch.tensor([[0], [50], [599]])
    steps: list[Callable[[Any], Any]] = [
        lambda cache: layer(x[:, :600], mask=Mask.padding(keep), cache=cache),
        *[lambda cache: layer(x[:, 600:601], cache=cache)] * 3,
        lambda cache: cache.select(torch.tensor([2, 0, 1])),
        lambda cache: layer(x[:, 601:620], cache=cache),
        lambda cache: cache.crop(torch.tensor([20, 500, 17])),
        lambda cache: layer(x[:, 620:700], cache=cache),
        lambda cache: layer(x[:, :1], mask=Mask.padding(torch.tensor([[True], [False], [True]])), cache=cache),
        lambda cache: layer(x[:, :1], cache=cache),
        lambda cache: cache.load_state_dict(cache.state_dict()),
        lambda cache: layer(x[:, 1:30], cache=cache),
        lambda cache: cache.replace(torch.tensor([2, 1]), pickle.loads(pickle.dumps(head(cache, 2)))),
        lambda cache: layer(x[:, 30:31], cache=cache),
        lambda cache: cache.reset(),
        lambda cache: layer(x[:2, :5], cache=cache),
    ]
    for step in steps:
        want, got = (step(cache) for cache in caches)
        assert want is None or torch.equal(got, want)
        check_pools([caches[1]])
    assert_same_state(*caches)


def head(cache: Any, count: int) -> Any:
    """The first rows of a cache."""
    rows = copy.deepcopy(cache)
    rows.select(torch.arange(count))
    return rows


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "dense": lambda lq, lk: {"mask": Mask.dense(torch.arange(lk) % 3 != 0 * torch.ones(lq, 1))},
    "documents": lambda lq, lk: {"mask": Mask.documents(torch.arange(lk)[None] // 4)},
    "padding, all columns": lambda lq, lk: {"mask": Mask.padding((torch.arange(lk) > 1)[None].expand(3, -1))},
    "bias": lambda lq, lk: {"bias": torch.linspace(-1, 1, 4 * lq * lk).view(1, 4, lq, lk)},
}


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_masks_of_tensors_and_biases_cover_the_columns(name: str) -> None:
    layer, caches = made("multi-head"), pair()
    for lq, lk in ((7, 7), (1, 8), (5, 13)):
        options = MASKS[name](lq, lk)
        want, got = (layer(X[:, lk - lq : lk], cache=cache, **options) for cache in caches)
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@torch.no_grad()
def test_every_backend_reads_pages(backend: str) -> None:
    q, table = X[:, :2].view(3, 2, 4, 8).transpose(1, 2), torch.tensor([[2, 0], [1, 1], [4, 3]])
    k, v = torch.randn(2, 5, 4, 3, 8, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"mask": Mask.causal(), "offset": torch.tensor([3, 2, 0]), "backend": backend}
    pages = Pages(table, 5)
    want = qkv.attention(q, pages.gather(k), pages.gather(v), **options)
    assert torch.equal(qkv.attention(q, k, v, pages=pages, **options), want)
    partial = qkv.attention_with_lse(q, k, v, pages=pages, **options)
    assert torch.equal(partial.out, want)


def heads_first(x: Tensor) -> Tensor:
    """The same pages, of which those of a head follow each other in memory, as in a `PagePool`."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("lay_scales", [heads_first, Tensor.contiguous])
@pytest.mark.parametrize("lay_tokens", [heads_first, Tensor.contiguous])
@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
@torch.no_grad()
def test_every_backend_reads_int8_in_pages(backend: str, lay_tokens: Any, lay_scales: Any) -> None:
    """In order or not, wherever their scales lie."""
    numbers = torch.Generator().manual_seed(3)
    pairs = [quantize(torch.randn(6, 2, 7, 8, generator=numbers)) for _ in "kv"]
    pool = [*(lay_tokens(codes) for codes, _ in pairs), *(lay_scales(scale) for _, scale in pairs)]
    for table in ([[0, 1], [2, 3], [4, 5]], [[2, 0], [1, 1], [5, 3]]):
        for lq, length in ((1, 14), (1, 9), (3, 9), (40, 14)):
            q, pages = torch.randn(3, 4, lq, 8, generator=numbers), Pages(torch.tensor(table), length)
            keys = Keys.of(pool, torch.tensor([length - lq, 3, 0]), pages=pages)
            for amp in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    got, want = (
                        qkv.attention(q, x.k, x.v, mask=Mask.causal(), **x.options(), backend=backend)
                        for x in (keys, keys.gathered())
                    )
                assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_are_those_of_a_cache_without_pages(mode: str) -> None:
    found = []
    for cache in pair():
        layer = made("grouped, wider values").train(mode == "train")
        layer.dropout = 0.25
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        parts = [layer(part, cache=cache) for part in x[:, :12].split([7, 1, 4], dim=1)]
        cache.repeat(2)
        parts.append(layer(x[:, 12:14].repeat_interleave(2, 0), cache=cache))
        sum((part.sin().sum() for part in parts), torch.zeros(())).backward()
        assert x.grad is not None
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        found.append([x.grad, *gradients, *parts])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_no_tokens_of_rows_are_gathered_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = made("window"), qkv.PagedKVCache(page_size=3)
    monkeypatch.setattr(Pages, "gather", None)
    keep = torch.arange(9) >= torch.tensor([[0], [4], [8]])
    with torch.no_grad():
        layer(X[:, :9], mask=Mask.padding(keep), cache=cache)
        cache.select(torch.tensor([2, 1, 1, 0]))
        layer(X[:1, 9:10].expand(4, -1, -1), cache=cache)


def tokens(batch: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, count, 8), torch.randn(batch, 2, count, 5)


@torch.no_grad()
def test_rows_share_full_pages_and_copy_the_last_one_when_they_write() -> None:
    pool = qkv.PagePool(page_size=4)
    prompt = qkv.PagedKVCache(pool)
    prompt.append(*tokens(1, 10))
    page = 4 * 2 * (8 + 5) * 4
    assert (pool.used, pool.page_nbytes, prompt.nbytes) == (3, page, 3 * page)
    answers = qkv.PagedKVCache(pool)
    answers.join(prompt)
    answers.repeat(4)
    assert (pool.used, answers.nbytes) == (3, 3 * page)
    answers.append(*tokens(4, 1))
    assert pool.used == 2 + 1 + 4
    twin = copy.copy(answers)
    assert pool.used == 7
    twin.append(*tokens(4, 1))
    assert pool.used == 7 + 4
    prompt.append(*tokens(1, 2))  # nobody else holds its last page any longer
    assert pool.used == 11
    del twin
    assert pool.used == 7
    answers.crop(8)
    assert pool.used == 3
    answers.replace(torch.tensor([1]), prompt)
    assert pool.used == 3
    prompt.reset()
    assert pool.used == 3
    answers.select(torch.tensor([0, 2]))
    assert pool.used == 2
    answers.reset()
    assert pool.used == 0
    check_pools([prompt, answers])


@each_format
@torch.no_grad()
def test_caches_that_part_within_a_page_have_tokens_of_their_own(rounded: Any) -> None:
    pool = qkv.PagePool(page_size=4, dtype=rounded)
    pairs = [(qkv.PagedKVCache(pool), pair(4, rounded)[0])]

    def append(count: int) -> None:
        for both in pairs:
            new = tokens(2, count)
            for cache in both:
                cache.append(*new)

    append(9)
    append(1)  # in place
    pairs += [(copy.copy(paged), copy.copy(plain)) for paged, plain in pairs]
    for _ in range(3):  # within the page that was shared, to its end, and into the next one
        append(1)
        for paged, plain in pairs:
            assert_same_state(paged, plain)
    assert pool.used == 2 * (2 + 2 * 2)
    check_pools([paged for paged, _ in pairs])


@each_format
@torch.no_grad()
def test_a_table_that_is_gone_holds_no_pages(rounded: Any) -> None:
    pool = qkv.PagePool(page_size=2, dtype=rounded)
    cache = qkv.PagedKVCache(pool)
    cache.append(*tokens(3, 5))
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.pool is not pool
        assert copied.pool.used == 9
        assert repr(copied) == repr(cache)
        assert_same_state(copied, cache)
    del cache
    gc.collect()
    assert pool.used == 0


@each_format
@torch.no_grad()
def test_a_full_pool_refuses_and_changes_nothing(rounded: Any) -> None:
    pool = qkv.PagePool(page_size=4, pages=6, dtype=rounded)
    cache, other = qkv.PagedKVCache(pool), qkv.PagedKVCache(pool)
    cache.append(*tokens(2, 7))
    other.append(*tokens(1, 4))
    assert (pool.used, pool.allocated) == (5, 6)
    want, memory = copy.deepcopy(cache), pool.nbytes
    message = (
        r"^PagedKVCache: the pool has 6 pages of 4 tokens, 5 of them in use; got 2 more pages to write to for rows of "
        r"\[7, 7\] tokens\. Free rows by reset, select or replace, or make a pool of more pages, or of pages=None"
    )
    with pytest.raises(ValueError, match=message):
        cache.append(*tokens(2, 2))
    cache.append(*tokens(2, 1))
    cache.crop(7)
    cache.repeat(2)
    with pytest.raises(ValueError, match="5 of them in use; got 2 more pages"):
        cache.append(*tokens(4, 1))
    cache.select(torch.tensor([0, 2]))
    more = filled(9, rounded)
    for refused in (lambda: other.join(more), lambda: other.load_state_dict(more.state_dict())):
        with pytest.raises(ValueError, match=r"^PagedKVCache: the pool has 6 .* 5 of them in use; got 3 more pages"):
            refused()
    assert (pool.used, pool.nbytes, other.length) == (5, memory, 4)
    cache.crop(7)
    assert_same_state(cache, want)
    check_pools([cache, other])
    other.reset()
    cache.append(*tokens(2, 5))


def filled(count: int, rounded: Any = None) -> qkv.PagedKVCache:
    cache = qkv.PagedKVCache(page_size=4, dtype=rounded)
    cache.append(*tokens(1, count))
    return cache


@each_format
@torch.no_grad()
def test_tokens_and_states_of_another_form_are_refused_and_change_nothing(rounded: Any) -> None:
    cache, (k, v) = filled(6, rounded), tokens(1, 1)
    others = [filled(6, None if rounded else "int8"), *(qkv.PagedKVCache(dtype=rounded) for _ in range(2))]
    others[1].append(torch.randn(1, 2, 3, 9), v.expand(1, 2, 3, 5))
    others[2].append(k.half(), v.half())
    other_format, wide, half = (other.state_dict() for other in others)
    want = copy.deepcopy(cache)
    for make in (lambda: cache, lambda: qkv.PagedKVCache(cache.pool)):  # in turns: a new cache ends appends in place
        one, used = make(), cache.pool.used
        before = repr(one)
        calls: list[tuple[Callable[[], Any], str]] = [
            (lambda: one.append(k, v.half()), "k and v must agree in dtype and device"),
            (lambda: one.append(k.half(), v.half()), r"k must be \(1, 2, L, 8\) in torch\.float32"),
            (lambda: one.append(k.char(), v.char()), r"k must be \(1, 2, L, 8\) in torch\.float32"),
            (lambda: one.append(k.to("meta"), v.to("meta")), r"in torch\.float32 on cpu, .*; got .* on meta"),
            (lambda: one.load_state_dict(other_format), r"the state must have (dtype, key_scales, )?keys, .*; got"),
            (lambda: one.load_state_dict(wide), r"k must be \(1, 2, L, 8\) .*; got \(1, 2, 3, 9\)"),
            (lambda: one.load_state_dict(half), r"k must be \(1, 2, L, 8\) in torch\.float32"),
        ]
        for call, message in calls:
            with pytest.raises(ValueError, match=f"^PagedKVCache: .*{message}"):
                call()
            assert (repr(one), cache.pool.used) == (before, used)
    assert_same_state(cache, want)
    check_pools([cache])


@torch.no_grad()
def test_integers_are_not_rounded_again() -> None:
    with pytest.raises(
        ValueError, match=r"^PagedKVCache: k and v must be floating-point; got torch\.int8, torch\.int8"
    ):
        qkv.PagedKVCache(dtype="int8").append(*(x.char() for x in tokens(1, 1)))


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^PagePool: page_size must be at least 1; got 0"):
        qkv.PagePool(0)
    with pytest.raises(
        ValueError, match=r"^PagePool: page_size must be at most 1048576 tokens; got 1099511627776\. Rows"
    ):
        qkv.PagedKVCache(page_size=2**40)
    assert qkv.PagePool(2**20).page_size == 2**20
    with pytest.raises(TypeError, match=r"^PagePool: pages must be an int, or None to grow; got 2.5"):
        qkv.PagePool(pages=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^PagedKVCache: pool must be a qkv\.PagePool or None; got int"):
        qkv.PagedKVCache(16)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^PagedKVCache: page_size, pages and dtype are those of the pool, 4, None and None; got 8"
    ):
        qkv.PagedKVCache(qkv.PagePool(4), page_size=8)
    with pytest.raises(ValueError, match=r"those of the pool, 4, None and torch.int8; got None, None and int8\. Pass"):
        qkv.PagedKVCache(qkv.PagePool(4, dtype=torch.int8), dtype="int8")
    for kind in (qkv.PagePool, qkv.PagedKVCache):
        with pytest.raises(
            ValueError, match=rf'^{kind.__name__}: dtype must be torch\.int8 or "int8", or None .*; got int4'
        ):
            kind(dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^PagedKVCache: int8 has no gradient"):
        qkv.PagedKVCache(dtype="int8").append(*(x.requires_grad_() for x in tokens(1, 1)))
    with pytest.raises(ValueError, match=r"it is empty; append keys and values first"):
        qkv.PagedKVCache().keys()
    with pytest.raises(TypeError, match=r"a pool has neither copies nor pickles; copy the caches"):
        copy.deepcopy(qkv.PagePool())
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"both caches must have pages of 16 tokens; got 4"):
            qkv.PagedKVCache().join(filled(3))
        with pytest.raises(ValueError, match=r"must store keys in torch\.int8; got one that does in the dtype of"):
            qkv.PagedKVCache(page_size=4, dtype="int8").join(filled(3))
        wide = qkv.PagedKVCache(page_size=4)
        wide.append(torch.randn(1, 2, 3, 9), torch.randn(1, 2, 3, 5))
        with pytest.raises(
            ValueError, match=r"heads, width, dtype and device of both caches must be the same; got 2, 9"
        ):
            wide.join(filled(3))
        shared = qkv.PagedKVCache(wide.pool)
        with pytest.raises(ValueError, match=r"k must be \(1, 2, L, 9\) in torch\.float32"):
            shared.append(*tokens(1, 1))
    q, k = torch.randn(2, 4, 1, 8), torch.randn(5, 2, 3, 8)
    for pages, error, message in (
        (Pages(torch.tensor([[0, 5], [1, 2]]), 4), ValueError, r"must name pages 0 to 4 for all 4 keys"),
        (Pages(torch.tensor([[0, -1], [1, 2]]), 4), ValueError, r"must name pages 0 to 4 for all 4 keys"),
        (
            Pages(torch.tensor([[0, 1], [1, 2]]), 7),
            ValueError,
            r"must be between 0 and 6, those of 2 pages of 3; got 7",
        ),
        (Pages(torch.tensor([0, 1]), 4), ValueError, r"the table of pages must be integer \(B, entries\)"),
        (Pages(torch.tensor([[0, 1]]), 4), ValueError, r"must have the same batch; got 2, 1 and 1"),
        (torch.tensor([[0, 1]]), TypeError, r"pages must be a qkv\.cache\.Pages or None; got Tensor"),
    ):
        with pytest.raises(error, match=message):
            qkv.attention(q, k, k, pages=pages)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_pool_of_another_layer_and_an_interrupted_call() -> None:
    layer, cache = made("multi-head"), qkv.PagedKVCache(page_size=4)
    layer(X[:, :6], cache=cache)
    used, want = cache.pool.used, cache.keys().gathered().k
    with pytest.raises(ValueError, match="keep"):
        layer(X[:, 6:20], mask=Mask.padding(torch.ones(3, 99, dtype=torch.bool)), cache=cache)
    hook = layer.out_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        layer(X[:, 6:20], cache=cache)
    hook.remove()
    assert (cache.length, cache.pool.used) == (6, used)
    assert torch.equal(cache.keys().gathered().k, want)
    check_pools([cache])


def interrupt(module: nn.Module, inputs: Any, output: Any) -> None:
    raise KeyboardInterrupt


@torch.no_grad()
def test_rows_that_grow_together_lie_in_runs_that_the_kernel_reads_in_place() -> None:
    cache = qkv.PagedKVCache()
    for _ in range(1200):
        cache.append(*tokens(2, 1))
    run = 480 // 16
    for row in cache._table.rows:
        for start in range(run, len(row), run):  # the first pages may lie between those of others
            pages = row[start : start + run]
            assert pages == list(range(pages[0], pages[0] + len(pages)))
    assert cache.pool.allocated <= 2 * cache.pool.used + run


@torch.no_grad()
def test_an_empty_batch_is_one_of_no_rows() -> None:
    layer, caches = made("grouped, wider values"), pair()
    for count in (2, 0, 1, 5):
        for cache in caches:
            assert layer(X[:0, :count], cache=cache).shape == (0, count, 32)
    for cache in caches:
        cache.crop(7)
        cache.select(torch.tensor([], dtype=torch.int64))
        assert (cache.length, cache.columns, cache.lengths.shape) == (7, 7, (0,))
        assert layer(X[:0, :1], cache=pickle.loads(pickle.dumps(cache))).shape == (0, 1, 32)
    keys = caches[1].keys().gathered()
    assert (keys.k.shape, keys.v.shape, caches[1].pool.used) == ((0, 2, 7, 8), (0, 2, 7, 12), 0)
    with pytest.raises(ValueError, match=r"^PagedKVCache: k must be \(0, 2, L, 8\) in torch\.float32 on cpu"):
        layer(X[:, :1], cache=caches[1])
    assert caches[1].length == 7
    prompts = pair()
    for cache in prompts:
        layer(X[:, :4], cache=cache)
    caches[1].join(prompts[1])
    want, got = (layer(X[:, 4:6], cache=cache) for cache in (prompts[0], caches[1]))
    assert torch.equal(got, want)


@pytest.mark.parametrize("is_token", [None, torch.tensor([[True, True, False]] * 2)])
@torch.no_grad()
def test_appends_are_compiled_in_parts_or_refused_by_name(is_token: Tensor | None) -> None:
    cache, (k, v) = qkv.PagedKVCache(page_size=2), tokens(2, 3)

    def append() -> int | Tensor | None:
        return cache.append(k, v, is_token).offset

    torch.compiler.reset()
    with pytest.raises(Exception, match=r"PagedKVCache: append must run eagerly.*Compile without fullgraph, or use"):
        torch.compile(append, fullgraph=True, backend="eager")()
    assert (cache.length, cache.pool.used) == (0, 0)
    torch.compiler.reset()
    torch.compile(append, backend="eager")()
    count = 3 if is_token is None else 2
    assert torch.equal(cache.keys().gathered().k, k[:, :, :count])


@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
@pytest.mark.parametrize("page", [-1, 2])
def test_a_table_that_names_other_pages_is_refused_by_every_backend(backend: str, page: int) -> None:
    pool, pages = torch.randn(2, 2, 4, 8), qkv.cache.Pages(torch.tensor([[0, page]]), 8)
    with pytest.raises(ValueError, match="the table of pages must name pages 0 to 1 for all 8 keys"):
        qkv.attention(torch.randn(1, 2, 3, 8), pool, pool, pages=pages, backend=backend)
