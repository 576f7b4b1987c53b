"""Paged keys give the bits of contiguous keys, whatever the rest of the pool and of the table contains."""

import itertools
from typing import Any

import pytest
import torch
from test_packed import DTYPES, HEADS, KV_HEADS, VALUE_WIDTH, WIDTH, draw, starts
from test_packed import backend as backend
from torch import Tensor

from qkv import kernels
from qkv.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from qkv.integrations.torch.varlen import varlen_attn

PAGE_SIZES = [1, 16, 17, 256, 1024]
KEY_LENGTHS = [0, 1, 7, 97, 0, 481, 1013]
GARBAGE = 2**31 - 1

ORDERS = ["shuffled", "reversed", "in order", "with one prefix"]

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (40, 0)},
    "scores": {"causal": True, "softcap": 2.0, "alibi_slopes": draw(len(KEY_LENGTHS), HEADS).abs()},
}


class Pool:
    """Sequences of keys and values in pages, with NaN in unused rows and invalid pages in unused table entries."""

    def __init__(self, lengths: list[int], page_size: int, order: str, dtype: torch.dtype, *, kv_heads: int = KV_HEADS):
        needed = [-(-length // page_size) for length in lengths]
        names = list(range(1, sum(needed) + 1))  # page 0 is unused
        if order == "shuffled":
            names = (torch.randperm(len(names), generator=torch.Generator().manual_seed(0)) + 1).tolist()
        elif order == "reversed":
            names.reverse()
        self.table = torch.full((len(lengths), max(needed) + 2), -1, dtype=torch.int32)
        self.table[::2, max(needed) :] = GARBAGE
        self.lengths = lengths
        used = torch.zeros(len(names) + 2, page_size, dtype=torch.bool)
        prefix: list[int] = []
        for n, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            mine = [names.pop() for _ in range(count)]
            if order == "with one prefix" and length >= page_size:
                prefix = prefix or mine[:1]
                mine[:1] = prefix
            self.table[n, :count] = torch.tensor(mine)
            self.table[n, count::2] = GARBAGE
            used[mine] |= torch.arange(count * page_size).view(count, page_size) < length
        self.k = draw(*used.shape, kv_heads, WIDTH, dtype=dtype, seed=3).masked_fill(~used[:, :, None, None], torch.nan)
        self.v = draw(*used.shape, kv_heads, VALUE_WIDTH, dtype=dtype, seed=4)
        self.v[~used] = torch.nan

    def gathered(self, pool: Tensor) -> list[Tensor]:
        """The keys of each sequence, contiguous."""
        pages = (-(-length // pool.shape[1]) for length in self.lengths)
        return [
            pool[entries[:count].long()].flatten(0, 1)[:length]
            for entries, count, length in zip(self.table, pages, self.lengths, strict=True)
        ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_paged_keys_give_the_bits_of_contiguous_keys(backend: str, page_size: int, order: str) -> None:
    queries = [1, 2, 1, 9, 4, 1, 70]
    dtypes = DTYPES if backend == "native" else (torch.bfloat16, torch.float64)
    for dtype, options, most in itertools.product(dtypes, OPTIONS, (1, 70)):
        pool = Pool(KEY_LENGTHS, page_size, order, dtype)
        lengths = [min(length, most) for length in queries]
        q = draw(sum(lengths), HEADS, WIDTH, dtype=dtype)
        where = (starts(lengths), starts(KEY_LENGTHS), 1, 1)
        more: dict[str, Any] = {"return_attn_probs": True, **OPTIONS[options]}
        got = flash_attn_varlen_func(q, pool.k, pool.v, *where, block_table=pool.table, **more)
        keys, values = (torch.cat(pool.gathered(x)) for x in (pool.k, pool.v))
        want = flash_attn_varlen_func(q, keys, values, *where, **more)
        assert all(map(torch.equal, got, want)), f"{options} in {dtype}"


@pytest.mark.parametrize("kv_heads, group", [(1, 1), (1, 8), (2, 3), (1, 12), (3, 40)])
@pytest.mark.parametrize("lq", [1, 2, 5, 33])
def test_native_pages_of_every_group_and_number_of_queries(lq: int, kv_heads: int, group: int) -> None:
    for dtype, page_size in itertools.product(DTYPES, (16, 256)):
        pool = Pool([700, 33], page_size, "shuffled", dtype, kv_heads=kv_heads)
        q = draw(2 * lq, kv_heads * group, WIDTH, dtype=dtype)
        where = (starts([lq, lq]), starts([700, 33]), 1, 1)
        got = flash_attn_varlen_func(q, pool.k, pool.v, *where, causal=True, block_table=pool.table)
        keys, values = (torch.cat(pool.gathered(x)) for x in (pool.k, pool.v))
        assert torch.equal(got, flash_attn_varlen_func(q, keys, values, *where, causal=True))


CALLS: dict[str, dict[str, Any]] = {
    "read": {"new": 0},
    "a step": {},
    "a chunk": {"lq": 5, "new": 5},
    "a long chunk": {"lq": 40, "new": 40},
    "in a window": {"lq": 2, "new": 2, "window_size": (9, 0)},
    "rotated": {"lq": 3, "new": 3, "rotary": True},
    "with scores": {"softcap": 1.5, "alibi_slopes": draw(4, HEADS).abs(), "softmax_scale": 0.2},
}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("call", CALLS)
def test_a_paged_cache_equals_a_contiguous_one(backend: str, call: str, page_size: int) -> None:
    options = {"causal": True, **CALLS[call]}
    lq, new, is_rotated = options.pop("lq", 1), options.pop("new", 1), options.pop("rotary", False)
    lengths, padding, capacity = [3, 0, 97, 530], [0, 0, 20, 530], 600
    for dtype, padded in itertools.product(DTYPES if backend == "native" else DTYPES[:1], (False, True)):
        pool = Pool([length + new for length in lengths], page_size, "shuffled", dtype)
        plain = [torch.full((6, capacity, *x.shape[2:]), torch.nan, dtype=dtype) for x in (pool.k, pool.v)]
        rows = [4, 0, 5, 2]
        for x, own in zip(plain, (pool.k, pool.v), strict=True):
            for row, keys, length in zip(rows, pool.gathered(own), lengths, strict=True):
                x[row, :length] = keys[:length]
                place = torch.arange(length, length + new)  # rows of new tokens are unused before
                own[pool.table[rows.index(row), place // page_size].long(), place % page_size] = torch.nan
        tokens = [draw(4, new, *x.shape[2:], dtype=dtype, seed=7) if new else None for x in (pool.k, pool.v)]
        q = draw(4, lq, HEADS, WIDTH, dtype=dtype, seed=8)
        more = dict(options, cache_seqlens=torch.tensor(lengths), return_softmax_lse=True)
        if padded:
            more["cache_leftpad"] = torch.tensor(padding)
        if is_rotated:
            angle = draw(capacity, 6, seed=9)
            more |= {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}
        got = flash_attn_with_kvcache(q, pool.k, pool.v, *tokens, block_table=pool.table, **more)
        want = flash_attn_with_kvcache(q, *plain, *tokens, cache_batch_idx=torch.tensor(rows), **more)
        assert all(map(torch.equal, got, want)), f"{dtype}, padded {padded}"
        for x, own in zip(plain, (pool.k, pool.v), strict=True):
            for row, keys in zip(rows, pool.gathered(own), strict=True):
                assert torch.equal(x[row, : len(keys)], keys), "other tokens were written"
            assert own[0].isnan().all() and own[-1].isnan().all(), "an unused page was written to"


def test_gradients_of_shared_pages_are_sums(backend: str) -> None:
    pool = Pool([40, 33, 16], 16, "with one prefix", torch.float32)
    q = draw(9, HEADS, WIDTH).requires_grad_()
    where = (starts([3, 5, 1]), starts([40, 33, 16]), 5, 40)
    found = []
    for k, v, gathers in ((pool.k, pool.v, False), (pool.k, pool.v, True)):
        leaves = [x.clone().requires_grad_() for x in (k, v)]
        if gathers:
            out = flash_attn_varlen_func(q, *(torch.cat(pool.gathered(x)) for x in leaves), *where, causal=True)
        else:
            out = flash_attn_varlen_func(q, *leaves, *where, causal=True, block_table=pool.table)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [q, *leaves])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_pools_of_any_layout(backend: str) -> None:
    """Heads outside of pages; pages that are slices of larger ones; widths that are not contiguous."""
    pool = Pool([40, 0, 97], 16, "shuffled", torch.float32)
    q, where = draw(4, HEADS, WIDTH), (starts([3, 0, 1]), starts([40, 0, 97]), 5, 40)
    call = lambda k, v: flash_attn_varlen_func(q, k, v, *where, causal=True, block_table=pool.table)
    want = call(pool.k, pool.v)
    layouts = {
        "heads outside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "slices": lambda x: torch.cat([x, x], 1)[:, :16],
        "width strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "tokens backwards": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    }
    for name, lay in layouts.items():
        torch.testing.assert_close(call(lay(pool.k), lay(pool.v)), want, rtol=1e-5, atol=1e-6, msg=name)


def test_memory_of_a_pool_is_not_copied() -> None:
    """A pool fills most of the memory of a server: a call may copy no more than it reads."""
    pool = torch.zeros(1, 16, 1, 64).expand(1 << 22, 16, 1, 64)  # 16 GB, if it were copied
    x, where = draw(1, 2, 64), (starts([1]), starts([40]), 1, 40)
    table = torch.tensor([[1 << 21, 5, (1 << 22) - 1, -1]])
    strided = torch.zeros(1, 16, 64, 1).expand(1 << 22, 16, 64, 2)[..., :1].transpose(2, 3)
    for k in (pool, strided):
        assert (flash_attn_varlen_func(x, k, k, *where, block_table=table) == 0).all()


ENTRIES = {
    "below the first": (-1, r"must contain pages 0 to 2; got -1 at \[1, 1\], which sequence 1 of 6 keys needs"),
    "beyond the last": (3, r"must contain pages 0 to 2; got 3 at \[1, 1\], which sequence 1 of 6 keys needs"),
    "far away": (GARBAGE, rf"must contain pages 0 to 2; got {GARBAGE} at \[1, 1\]"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_invalid_page_index_is_refused_before_anything_is_written(entry: str) -> None:
    page, message = ENTRIES[entry]
    pool, before = draw(3, 4, 2, 8), draw(3, 4, 2, 8)
    table, x = torch.tensor([[0, -1], [2, page]], dtype=torch.int32), draw(2, 1, 2, 8)
    with pytest.raises(ValueError, match=f"^flash_attn_with_kvcache: block_table {message}"):
        flash_attn_with_kvcache(x, pool, pool, x, x, cache_seqlens=torch.tensor([3, 5]), block_table=table)
    assert torch.equal(pool, before)
    where = (starts([1, 1]), starts([4, 6]), 1, 6)
    with pytest.raises(ValueError, match=f"^flash_attn_varlen_func: block_table {message}"):
        flash_attn_varlen_func(x[:, 0], pool, pool, *where, block_table=table)
    with pytest.raises(ValueError, match=f"^varlen_attn: block_table {message}"):
        varlen_attn(x[:, 0], pool, pool, where[0], None, 1, 6, block_table=table, seqused_k=torch.tensor([4, 6]))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another dtype": ({"q": draw(2, 1, 4, 8).double()}, ValueError, "q, k and v must have the same dtype"),
    "another width": ({"q": draw(2, 1, 4, 7)}, ValueError, "q and k must have the same width"),
    "indivisible heads": (
        {"q": draw(2, 1, 3, 8)},
        ValueError,
        "heads of q must be a multiple of that of k and v; got 3 and 2",
    ),
    "slopes of another batch": ({"alibi_slopes": draw(3, 4)}, ValueError, r"alibi_slopes must be \(4,\) or \(2, 4\)"),
    "a table of floats": ({"block_table": torch.zeros(2, 2)}, ValueError, "block_table must be integers"),
    "a table in a list": ({"block_table": [[0], [1]]}, TypeError, "block_table must be a tensor; got list"),
    "a table of one row": ({"block_table": torch.zeros(1, 2).int()}, ValueError, r"block_table must be \(2, pages"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_is_refused_before_anything_is_written(wrong: str) -> None:
    changes, error, message = WRONG[wrong]
    pool, before, new = draw(3, 4, 2, 8), draw(3, 4, 2, 8), draw(2, 1, 2, 8)
    call: dict[str, Any] = {
        "q": draw(2, 1, 4, 8),
        "block_table": torch.tensor([[0, -1], [2, 1]]),
        "cache_seqlens": torch.tensor([3, 5]),
        **changes,
    }
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(k_cache=pool, v_cache=pool, k=new, v=new, **call)
    assert torch.equal(pool, before)


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_native_pages_compile_as_one_graph() -> None:
    pool = Pool([40, 0, 97], 16, "shuffled", torch.float32)
    q, where = draw(4, HEADS, WIDTH), (starts([3, 0, 1]), starts([40, 0, 97]))
    attend = lambda q, k, table: flash_attn_varlen_func(q, k, k, *where, 5, 40, causal=True, block_table=table)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, pool.k, pool.table), attend(q, pool.k, pool.table))
    with pytest.raises(ValueError, match="sequences must lie within the 4 queries and the 12 pages of 16 keys; got"):
        compiled(q, pool.k, torch.full_like(pool.table, -1))
    k = pool.k.clone().requires_grad_()
    got, want = (torch.autograd.grad(run(q, k, pool.table).sin().sum(), k)[0] for run in (compiled, attend))
    assert torch.equal(got, want)
    with pytest.raises(IndexError):
        compiled(q, k, torch.full_like(pool.table, -1))
