"""Keys and values in int8: every backend computes with the dequantized numbers, and rounding has bounded errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from oracle import Rule, attend
from solver import SOLVERS, Solver

import qkv
from qkv import Mask, kernels
from qkv.backends import native
from qkv.cache import quantize
from qkv.cache.buffer import AppendBuffer

INT8 = [
    solver
    for solver in SOLVERS
    if solver.device == "cpu" and (solver.backend is not native or kernels.absence() is None)
]
HALF = [torch.float32, torch.bfloat16, torch.float16]
# Groups for each number of rows that decoding has a loop for, more rows than that, prefill, odd widths, one key.
SHAPES = [
    *((2, 2 * group, 2, 1, 101, 64, 64) for group in (1, 2, 3, 5, 8)),
    (1, 9, 1, 1, 40, 16, 16),
    (2, 4, 2, 5, 23, 33, 7),
    (1, 3, 1, 1, 500, 31, 5),
    (1, 2, 2, 1, 1, 8, 8),
]
MASKS = {
    "full": (Mask.full(), Rule()),
    "window": (Mask.causal(9, sink_tokens=1), Rule(left=8, right=0, sink_tokens=1)),
}


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    batch, heads, kv_heads, lq, lk, width, value_width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, heads, lq, width, generator=generator).to(dtype)
    k, v = (torch.randn(batch, kv_heads, lk, w, generator=generator) for w in (width, value_width))
    return q, *quantize(k), *quantize(v)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", INT8, ids=str)
def test_every_backend_reads_int8(solver: Solver, shape: tuple[int, ...], dtype: torch.dtype, mask: str) -> None:
    q, k, k_scale, v, v_scale = case(shape, dtype)
    (given, rule), offset = MASKS[mask], shape[4] - shape[3]
    options = {"k_scale": k_scale, "v_scale": v_scale, "mask": given, "offset": offset}
    wide_k, wide_v = k.double() * k_scale.double()[..., None], v.double() * v_scale.double()[..., None]
    want = attend(q, wide_k, wide_v, rule, offset)
    peer = torch.nn.functional.scaled_dot_product_attention(
        q, wide_k.to(dtype), wide_v.to(dtype), attn_mask=given.visible(shape[3], shape[4], offset), enable_gqa=True
    )
    got = qkv.attention(q, k, v, **options, backend=solver.backend.NAME)  # type: ignore[arg-type]
    assert got.dtype == dtype
    # A kernel may round weights as they are, or values, or both: each by half a unit of the dtype.
    allowance = torch.finfo(dtype).eps * wide_v.abs().max().item()
    assert_within_budget(got, want.out, peer, "out", allowance)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("solver", INT8, ids=str)
def test_masked_keys_and_scales_have_no_influence(solver: Solver, dtype: torch.dtype) -> None:
    q, k, k_scale, v, v_scale = case((2, 6, 2, 1, 101, 64, 64), dtype)
    options = {"k_scale": k_scale, "v_scale": v_scale, "mask": Mask.padding(torch.tensor([101, 40]))}
    want = qkv.attention(q, k, v, **options, backend=solver.backend.NAME)
    for tensor, poison in ((k, 100), (v, -100), (k_scale, torch.nan), (v_scale, torch.nan)):
        tensor[1, :, 40:] = poison
    assert torch.equal(qkv.attention(q, k, v, **options, backend=solver.backend.NAME), want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("solver", INT8, ids=str)
def test_a_visible_nan_scale_gives_nan(solver: Solver, group: int, dtype: torch.dtype) -> None:
    q, k, k_scale, v, v_scale = case((1, group, 1, 1, 33, 16, 16), dtype)
    options = {"k_scale": k_scale, "v_scale": v_scale, "mask": Mask.causal(32), "offset": 32}
    for j in (0, 1, 2, 7, 32):  # in whichever lane; the first is hidden
        for scale in (k_scale, v_scale):
            kept, scale[0, 0, j] = scale[0, 0, j].clone(), torch.nan
            out = qkv.attention(q, k, v, **options, backend=solver.backend.NAME)
            assert (out.isnan() == (j > 0)).all()
            scale[0, 0, j] = kept


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    q, k, k_scale, v, v_scale = case((2, 6, 2, 1, 101, 64, 64), torch.bfloat16)
    padded = torch.full((2, 2, 150, 64), 99, dtype=torch.int8)
    scales = torch.full((2, 2, 150, 3), torch.nan)
    padded[:, :, 7:108], scales[:, :, 7:108, 1] = k, k_scale
    want = qkv.attention(q, k, v, k_scale=k_scale, v_scale=v_scale)
    got = qkv.attention(q, padded[:, :, 7:108], v, k_scale=scales[:, :, 7:108, 1], v_scale=v_scale)
    assert torch.equal(got, want)


def test_queries_have_gradients_over_int8() -> None:
    q, k, k_scale, v, v_scale = case((1, 4, 2, 3, 9, 8, 8), torch.float32)
    wide = qkv.attention(q.requires_grad_(), k * k_scale[..., None], v * v_scale[..., None])
    (want,) = torch.autograd.grad(wide.sum(), q)
    (got,) = torch.autograd.grad(qkv.attention(q, k, v, k_scale=k_scale, v_scale=v_scale).sum(), q)
    torch.testing.assert_close(got, want)
    reasons = qkv.explain(q, k, v, k_scale=k_scale, v_scale=v_scale).reasons["native"]
    assert reasons == ["the kernel has no gradients over int8 keys and values"]


def test_the_quantization_error_is_at_most_half_a_step() -> None:
    x = torch.randn(3, 5, 7) * torch.logspace(-30, 30, 7)
    x[0, 0] = 0
    codes, scale = quantize(x)
    error = (codes.double() * scale.double()[..., None] - x.double()).abs()
    # A step is the scale; its own rounding moves a number of 127 steps by 127 half units of fp32.
    bound = scale.double() * (0.5 + 127 * torch.finfo(torch.float32).eps)
    assert codes.dtype == torch.int8 and codes.abs().max() == 127 and (error <= bound[..., None]).all()
    assert quantize(torch.tensor([torch.nan, 1.0]))[1].isnan()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_kernel_quantizes_to_the_same_bits_as_torch(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 37).to(dtype).transpose(1, 2)[..., :33]  # a view
    x[0, 0, 0], x[0, 0, 1, 5], x[0, 0, 2, 0] = 0, torch.nan, torch.inf
    assert x.stride(3) == 1
    for got, want in zip(quantize(x), quantize(x[None]), strict=True):
        torch.testing.assert_close(got, want[0], rtol=0, atol=0, equal_nan=True)


def test_an_int8_cache_gives_the_same_output_in_any_chunking() -> None:
    torch.manual_seed(0)
    layer = qkv.GroupedQueryAttention(48, 6, 2, mask=Mask.causal(), rotary=qkv.RotaryEmbedding(8)).eval()
    x = torch.randn(2, 23, 48)
    with torch.no_grad():
        exact, outs = layer(x), []
        for chunks in ([23], [1] * 23, [5, 1, 7, 10]):
            cache = qkv.Int8KVCache()
            outs.append(torch.cat([layer(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1))
            assert cache.length == 23
    for out in outs:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)
        error = (out - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.02  # It rounds, by a part of 127.


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sink_tokens", [0, 2])
@torch.no_grad()
def test_a_window_has_the_bits_of_the_same_tokens_in_a_cache_that_grows(sink_tokens: int, dtype: torch.dtype) -> None:
    growing, window = qkv.Int8KVCache(), qkv.SlidingKVCache(5, sink_tokens, dtype=torch.int8)
    q, (k, v) = torch.randn(2, 4, 43, 16).to(dtype), torch.randn(2, 2, 2, 43, 16).to(dtype)
    start = 0
    for count in (3, 1, 1, 14, 1, 2, 6, 1, 1, 1, 11, 1):
        part = slice(start, start + count)
        whole, seen = (cache.append(k[:, :, part], v[:, :, part]) for cache in (growing, window))
        kept = torch.arange(whole.lk)
        kept = torch.cat([kept[:sink_tokens], kept[sink_tokens - seen.lk :]]) if seen.lk < whole.lk else kept
        same = whole._replace(
            **{name: getattr(whole, name)[:, :, kept] for name in ("k", "v", "k_scale", "v_scale")}, offset=seen.offset
        )
        assert all(
            torch.equal(got, want) for got, want in zip(seen, same, strict=True) if isinstance(got, torch.Tensor)
        )
        mask = Mask.causal(5, sink_tokens)
        got, want = (qkv.attention(q[:, :, part], x.k, x.v, mask=mask, **x.options()) for x in (seen, same))
        assert torch.equal(got, want)
        start += count
    assert window.length == 43 and window.keys().lk < 12 + sink_tokens


CACHES_OF_100: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "growing": (lambda **options: qkv.Int8KVCache(100) if options else qkv.KVCache(100), {"dtype": "int8"}),
    "sliding": (lambda **options: qkv.SlidingKVCache(50, **options), {"dtype": "int8"}),
    "paged": (lambda **options: qkv.PagedKVCache(page_size=4, pages=25, **options), {"dtype": "int8"}),
}


@pytest.mark.parametrize("kind", CACHES_OF_100)
def test_a_cache_halves_the_bytes(kind: str) -> None:
    k, (make, int8) = torch.randn(1, 2, 100, 64).bfloat16(), CACHES_OF_100[kind]
    wide, narrow = make(), make(**int8)
    with torch.no_grad():
        wide.append(k, k)
        narrow.append(k, k)
    assert narrow.nbytes / wide.nbytes == (64 + 4) / 128 and wide.nbytes == 100 * 2 * 2 * 64 * 2


def test_the_cache_crops_and_selects() -> None:
    k = torch.randn(2, 2, 5, 8)
    cache = qkv.Int8KVCache()
    cache.append(k, k)
    cache.crop(3)
    cache.select(torch.tensor([1, 0, 1]))
    found = cache.append(k[[1, 0, 1], :, 3:4], k[[1, 0, 1], :, 3:4])
    codes, scale = quantize(k[[1, 0, 1], :, :4])
    assert found.offset == 3
    for got, want in zip((found.k, found.v, found.k_scale, found.v_scale), (codes, codes, scale, scale), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("make", [qkv.Int8KVCache, lambda: qkv.SlidingKVCache(9, dtype="int8")])
def test_an_empty_cache_takes_the_dtype_of_rows_that_join(make: Callable[[], Any]) -> None:
    k = torch.randn(2, 2, 5, 8).bfloat16()
    cache, other = make(), make()
    other.append(k, k)
    cache.join(other)
    with pytest.raises(ValueError, match="bfloat16"):
        cache.append(k.float(), k.float())
    assert torch.equal(cache.append(k, k).k, other.append(k, k).k)


@torch.no_grad()
def test_an_append_that_fails_halfway_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 2, 5, 8)
    makers: list[tuple[Callable[[], Any], int]] = [
        *((qkv.KVCache, 2), (qkv.Int8KVCache, 4)),
        *((lambda: qkv.SlidingKVCache(9), 2), (lambda: qkv.SlidingKVCache(9, dtype="int8"), 4)),
    ]
    for make, parts in makers:
        for successes in range(parts):
            cache, whole, left = make(), make(), [successes]
            cache.append(k, k)
            whole.append(k, k)

            def slots_for_some(self: AppendBuffer, *arguments: object, left: list[int] = left) -> torch.Tensor:
                if not left[0]:
                    raise MemoryError
                left[0] -= 1
                return slots_for_all(self, *arguments)  # type: ignore[arg-type]

            slots_for_all = AppendBuffer._slots_for
            monkeypatch.setattr(AppendBuffer, "_slots_for", slots_for_some)
            with pytest.raises(MemoryError):
                cache.append(*torch.randn(2, 2, 2, 20, 8))  # more than the capacity
            monkeypatch.undo()
            assert cache.length == 5
            got, want = cache.append(2 * k, 3 * k), whole.append(2 * k, 3 * k)
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True) if isinstance(pair[0], torch.Tensor))


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^SlidingKVCache: both caches must store keys in .*; got one .* in torch\.int8"
    ):
        qkv.SlidingKVCache(4).join(qkv.SlidingKVCache(4, dtype="int8"))
    q, k, k_scale, v, v_scale = case((1, 4, 2, 1, 9, 8, 8), torch.float32)
    with pytest.raises(
        ValueError, match=r"must be float32 of shape \(1, 2, 9\); got v in torch.int8 with v_scale None"
    ):
        qkv.attention(q, k, v, k_scale=k_scale)
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 2, 9\); got .*k_scale torch.float32 \(1, 2, 8\)"):
        qkv.attention(q, k, v, k_scale=k_scale[..., :8], v_scale=v_scale)
    with pytest.raises(ValueError, match=r"got k in torch\.float32"):
        qkv.attention(q, k.float(), v, k_scale=k_scale, v_scale=v_scale)
    need = r"same dtype; got torch\.float32, torch\.int8 and torch\.int8\. Keys and values in int8 need k_scale"
    with pytest.raises(ValueError, match=need):
        qkv.attention(q, k, v)
    with pytest.raises(ValueError, match="Int8KVCache: int8 has no gradient"):
        qkv.Int8KVCache().append(q.requires_grad_(), q)
    with pytest.raises(ValueError, match="SlidingKVCache: int8 has no gradient"):
        qkv.SlidingKVCache(4, dtype="int8").append(q.requires_grad_(), q)
    with pytest.raises(ValueError, match=r'^SlidingKVCache: dtype must be torch\.int8 or "int8", or None .*; got int4'):
        qkv.SlidingKVCache(4, dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be floating-point; got torch\.int8, torch\.int8"):
        qkv.Int8KVCache().append(k, v)
    cache = qkv.Int8KVCache()
    cache.append(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"Int8KVCache: k must be .* in torch\.float32"):
        cache.append(torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16())


@pytest.mark.parametrize(
    "make",
    [qkv.Int8KVCache, lambda: qkv.SlidingKVCache(4, dtype="int8"), lambda: qkv.PagedKVCache(dtype="int8")],
    ids=["growing", "sliding", "paged"],
)
def test_a_state_of_other_numbers_is_refused(make: Callable[[], qkv.cache.Cache]) -> None:
    cache = make()
    with torch.no_grad():
        cache.append(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    state, before = cache.state_dict(), repr(cache)
    both = {name: state[name].float() for name in ("keys", "values")}
    for wrong in (both, {"keys": both["keys"]}, {"key_scales": state["key_scales"].double()}):
        with pytest.raises(
            ValueError, match=r"of the state must be of torch.int8, torch.int8, torch.float32, torch.float32;"
        ):
            cache.load_state_dict({**state, **wrong})
        assert repr(cache) == before
