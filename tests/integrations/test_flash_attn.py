"""flash-attn's functions, compared with a reimplementation in fp64 of its reference, `attention_ref`."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from qkv.integrations import flash_attn
from qkv.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BATCH, HEADS, KV_HEADS, WIDTH = 2, 6, 2, 8


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) from (B, L, H, D), with dense scores in the dtype of q."""
    lq, lk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    left, right = window_size[0], 0 if causal else window_size[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale), k)
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    distance = torch.arange(lq)[:, None] + lk - lq - torch.arange(lk)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype).view(-1, q.shape[2], 1, 1) * distance.abs()
    hidden = torch.zeros(lq, lk, dtype=torch.bool)
    if right >= 0:
        hidden |= distance < -right
    if left >= 0:
        hidden |= distance > left
    # Rows without keys get a score of a dummy key, so that nothing is 0 / 0.
    nothing = hidden.all(1)
    stand_in = torch.zeros(lq, dtype=q.dtype).masked_fill(~nothing, -torch.inf).expand(scores.shape[:3])
    scores = torch.cat([scores.masked_fill(hidden, -torch.inf), stand_in[..., None]], dim=3)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(3)[..., :lk], v)
    return out, scores.logsumexp(3).masked_fill(nothing, -torch.inf)


def packed_ref(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    """`attention_ref` of each sequence: (T, H, D) and (H, T)."""
    slopes = options.pop("alibi_slopes", None)
    parts = [
        attention_ref(
            q[None],
            k[None],
            v[None],
            alibi_slopes=slopes[n] if slopes is not None and slopes.dim() == 2 else slopes,
            **options,
        )
        for n, (q, k, v) in enumerate(zip(queries, keys, values, strict=True))
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def slopes_for(kind: str) -> Tensor:
    return draw(BATCH, HEADS).abs() if kind == "one per batch row" else draw(HEADS).abs()


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "window to the left": {"window_size": (2, -1)},
    "window to the right": {"window_size": (-1, 1)},
    "causal window, whose right is ignored": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": slopes_for("one per head")},
    "alibi, one per batch row, causal": {"alibi_slopes": slopes_for("one per batch row"), "causal": True},
    "all": {
        "alibi_slopes": slopes_for("one per batch row"),
        "softcap": 2.0,
        "window_size": (4, 1),
        "softmax_scale": 0.3,
    },
}
LENGTHS = [(7, 7), (5, 9), (9, 5), (1, 9), (9, 1), (1, 1), (4, 0), (0, 4)]


def check(
    run: Callable[..., tuple[Tensor, ...]], ref: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], what: str
) -> None:
    """Outputs and gradients of ``run`` against ``ref`` in fp64, as near as ``ref`` in the dtype of the tensors is.

    Gradients may also differ by the rounding, in fp32, of the terms that they sum, which may cancel. A score has terms
    ``P (|dO| |V| + |dO| |O| + |dlse|)``, where weights P sum to 1 in a row, scales are at most 1 and so is dlse.
    """
    found = []
    for compute, dtype in ((run, tensors[0].dtype), (ref, torch.float64), (ref, tensors[0].dtype)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out, lse = compute(*leaves)[:2]
        d_out = draw(*out.shape)
        loss = (out * d_out.to(dtype)).sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        found.append([out.detach(), lse.detach(), *gradients])
    assert found[0][1].dtype == torch.float32
    most = lambda x: x.abs().max().item() if x.numel() else 0.0
    q, k, v = map(most, tensors)
    score = 2 * most(d_out.abs().sum(-1)) * v + 1
    rows = tensors[0].numel() // WIDTH // KV_HEADS
    terms = [0.0, 0.0, score * k, rows * score * q, rows * most(d_out)]
    for name, got, want, peer, term in zip(("out", "lse", "dq", "dk", "dv"), *found, terms, strict=True):
        assert_within_budget(got, want, peer, f"{what}: {name}", torch.finfo(torch.float32).eps * term)


@DTYPES
@pytest.mark.parametrize("lq, lk", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_and_gradients_are_those_of_the_reference(
    options: dict[str, Any], lq: int, lk: int, dtype: torch.dtype
) -> None:
    q = draw(BATCH, lq, HEADS, WIDTH, dtype=dtype)
    k, v = draw(BATCH, lk, KV_HEADS, WIDTH, dtype=dtype), draw(BATCH, lk, KV_HEADS, WIDTH - 3, dtype=dtype)
    run = lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check(run, lambda q, k, v: attention_ref(q, k, v, **options), [q, k, v], f"{options}, {lq} x {lk}")
    out, lse, pattern = run(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    assert lse.shape == (BATCH, HEADS, lq) and pattern.numel() == 0


def test_rows_without_keys_are_0() -> None:
    q = draw(1, 5, HEADS, WIDTH)
    out, lse, _ = flash_attn_func(q, *draw(2, 1, 2, HEADS, WIDTH), causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -torch.inf).all()
    assert (out[:, 3:] != 0).all() and lse[..., 3:].isfinite().all()


def test_packed_tensors_are_the_same_attention_and_get_their_gradients() -> None:
    options = {"causal": True, "window_size": (3, -1), "softcap": 2.0, "alibi_slopes": slopes_for("one per batch row")}
    qkv = draw(BATCH, 7, 3, HEADS, WIDTH).requires_grad_()
    kv, q = draw(BATCH, 9, 2, KV_HEADS, WIDTH).requires_grad_(), draw(BATCH, 7, HEADS, WIDTH)
    got, want = flash_attn_qkvpacked_func(qkv, **options), flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (got, want)))
    got, want = flash_attn_kvpacked_func(q, kv, **options), flash_attn_func(q, *kv.unbind(2), **options)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.sin().sum(), kv)[0] for x in (got, want)))


def test_dropout_zeroes_weights_and_scales_the_others() -> None:
    q, k = draw(1, 40, 2, 16), draw(1, 40, 2, 16)
    v = torch.eye(40).view(1, 40, 1, 40).expand(1, 40, 2, 40)  # The output is the weights.
    weights, dropped = flash_attn_func(q, k, v, causal=True), flash_attn_func(q, k, v, 0.25, causal=True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    share = kept.sum() / (weights != 0).sum()
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / (weights != 0).sum()) ** 0.5


QUERY_LENGTHS, KEY_LENGTHS = [3, 0, 1, 9, 4, 1], [5, 4, 1, 2, 0, 9]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(dtype: torch.dtype) -> list[Tensor]:
    return [
        draw(sum(QUERY_LENGTHS), HEADS, WIDTH, dtype=dtype),
        draw(sum(KEY_LENGTHS), KV_HEADS, WIDTH, dtype=dtype),
        draw(sum(KEY_LENGTHS), KV_HEADS, WIDTH - 3, dtype=dtype),
    ]


def for_each_sequence(options: dict[str, Any]) -> dict[str, Any]:
    slopes = options.get("alibi_slopes")
    if slopes is None or slopes.dim() == 1:
        return options
    return {**options, "alibi_slopes": draw(len(QUERY_LENGTHS), HEADS).abs()}


@DTYPES
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_sequences_and_gradients_are_those_of_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    options = for_each_sequence(options)
    where = (starts(QUERY_LENGTHS), starts(KEY_LENGTHS), 9, 9)
    run = lambda q, k, v: flash_attn_varlen_func(q, k, v, *where, return_attn_probs=True, **options)
    ref = lambda q, k, v: packed_ref(q.split(QUERY_LENGTHS), k.split(KEY_LENGTHS), v.split(KEY_LENGTHS), **options)
    tensors = packed(dtype)
    check(run, ref, tensors, str(options))
    assert torch.equal(flash_attn_varlen_func(*tensors, *where, **options), run(*tensors)[0])


def test_a_packed_sequence_has_the_bits_of_a_call_of_its_own() -> None:
    q, k, v = packed(torch.float32)
    out = flash_attn_varlen_func(q, k, v, starts(QUERY_LENGTHS), starts(KEY_LENGTHS), 9, 9, causal=True)
    alone = zip(q.split(QUERY_LENGTHS), k.split(KEY_LENGTHS), v.split(KEY_LENGTHS), strict=True)
    alone = [flash_attn_func(*(x[None] for x in sequence), causal=True)[0] for sequence in alone]
    assert torch.equal(out, torch.cat(alone))


def paged(sequences: list[Tensor], page_size: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    """A pool of shuffled pages with NaN in unused slots, and its table with -1 in unused entries."""
    needed = [-(-(len(x) + spare) // page_size) for x in sequences]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    pool = torch.full((sum(needed), page_size, *sequences[0].shape[1:]), torch.nan, dtype=sequences[0].dtype)
    table = torch.full((len(sequences), max(needed)), -1, dtype=torch.int32)
    for n, x in enumerate(sequences):
        for position, token in enumerate(x):
            pool[order[sum(needed[:n]) + position // page_size], position % page_size] = token
        table[n, : needed[n]] = torch.tensor(order[sum(needed[:n]) : sum(needed[: n + 1])])
    return pool, table


@DTYPES
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_keys_in_pages_are_read_in_order(options: dict[str, Any], page_size: int, dtype: torch.dtype) -> None:
    options = for_each_sequence(options)
    q, k, v = packed(dtype)
    (k_pool, table), (v_pool, _) = (paged(x.split(KEY_LENGTHS), page_size) for x in (k, v))
    where = (starts(QUERY_LENGTHS), starts(KEY_LENGTHS), 9, 9)
    got = flash_attn_varlen_func(q, k_pool, v_pool, *where, return_attn_probs=True, block_table=table, **options)
    refs = []
    for kind in (torch.float64, dtype):
        sequences = (x.to(kind).split(n) for x, n in ((q, QUERY_LENGTHS), (k, KEY_LENGTHS), (v, KEY_LENGTHS)))
        refs.append(packed_ref(*sequences, **options))
    for what, ours, want, peer in zip(("out", "lse"), got, *refs, strict=False):
        assert_within_budget(ours, want, peer, what)


def test_gradients_flow_into_pages() -> None:
    q, k, v = packed(torch.float32)
    where = (starts(QUERY_LENGTHS), starts(KEY_LENGTHS), 9, 9)
    k.requires_grad_()
    (pool, table), (v_pool, _) = (paged(x.detach().split(KEY_LENGTHS), 4) for x in (k, v))
    pool.requires_grad_()
    flash_attn_varlen_func(q, pool, v_pool, *where, causal=True, block_table=table).sum().backward()
    flash_attn_varlen_func(q, k, v, *where, causal=True).sum().backward()
    want, _ = paged(k.grad.split(KEY_LENGTHS), 4)
    torch.testing.assert_close(pool.grad, want.nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def rotate_ref(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(L, H, D): channels paired into complex numbers, in fp64, rounded once."""
    half = cos.shape[1]
    rotation = torch.complex(cos.double(), sin.double())[positions][:, None]
    rotated = x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    z = torch.complex(rotated[..., first], rotated[..., second]) * rotation
    rotated[..., first], rotated[..., second] = z.real, z.imag
    return rotated.to(x.dtype)


CAPACITY, CACHED_LENGTHS = 16, [3, 0, 11]

CACHE_CALLS: dict[str, dict[str, Any]] = {
    "read alone": {"new": 0},
    "a decoding step": {"causal": True},
    "a chunk": {"lq": 3, "new": 3, "causal": True},
    "more queries than new keys": {"lq": 5, "new": 2, "causal": True},
    "fewer queries than new keys": {"lq": 2, "new": 4, "window_size": (3, 1)},
    "no mask": {"lq": 3, "new": 3},
    "softcap and scale": {"softcap": 1.5, "softmax_scale": 0.4},
    "alibi": {"lq": 3, "new": 3, "alibi_slopes": draw(HEADS).abs()},
    "alibi, one per batch row": {"lq": 2, "alibi_slopes": draw(len(CACHED_LENGTHS), HEADS).abs(), "causal": True},
    "rotary": {"lq": 3, "new": 3, "causal": True, "rotary_dim": WIDTH},
    "rotary of halves": {"lq": 3, "new": 2, "causal": True, "rotary_dim": WIDTH, "rotary_interleaved": False},
    "rotary of some channels, in a window": {"lq": 2, "new": 2, "window_size": (5, 5), "rotary_dim": 4},
    "rotary without a mask": {"lq": 3, "new": 3, "rotary_dim": 4},
}


@DTYPES
@pytest.mark.parametrize("place", ["first rows", "rows by index", "padded on the left", "pages", "padded pages"])
@pytest.mark.parametrize("call", CACHE_CALLS.values(), ids=CACHE_CALLS)
def test_a_cache_equals_the_reference(call: dict[str, Any], place: str, dtype: torch.dtype) -> None:
    options = dict(call)
    lq, new, rotary_dim = options.pop("lq", 1), options.pop("new", 1), options.pop("rotary_dim", 0)
    q = draw(3, lq, HEADS, WIDTH, dtype=dtype)
    k, v = draw(3, new, KV_HEADS, WIDTH, dtype=dtype), draw(3, new, KV_HEADS, WIDTH - 3, dtype=dtype)
    old_k, old_v = (draw(sum(CACHED_LENGTHS), KV_HEADS, x.shape[3], dtype=dtype).split(CACHED_LENGTHS) for x in (k, v))
    padding = [2, 0, 11] if place.startswith("padded") else [0, 0, 0]
    more: dict[str, Any] = {"rotary_interleaved": options.pop("rotary_interleaved", True)}
    if place.endswith("pages"):
        (k_cache, more["block_table"]), (v_cache, _) = (paged(x, 4, spare=5) for x in (old_k, old_v))
        address = lambda b, position: (int(more["block_table"][b, position // 4]), position % 4)
    else:
        rows = [4, 0, 2] if place == "rows by index" else [0, 1, 2]
        k_cache, v_cache = (torch.full((5, CAPACITY, *x[0].shape[1:]), torch.nan, dtype=dtype) for x in (old_k, old_v))
        for cache, old in ((k_cache, old_k), (v_cache, old_v)):
            for row, x in zip(rows, old, strict=True):
                cache[row, : len(x)] = x
        address = lambda b, position: (rows[b], position)
        more["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32) if place == "rows by index" else None
    if place.startswith("padded"):
        more["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
    rotated_q, rotated_k = list(q), list(k)
    if rotary_dim:
        angle = draw(CAPACITY, rotary_dim // 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        more |= {"rotary_cos": cos, "rotary_sin": sin}
        ahead = torch.arange(lq) * ("causal" in options or "window_size" in options)
        for b, length in enumerate(CACHED_LENGTHS):
            rotated_q[b] = rotate_ref(q[b], length + ahead, cos, sin, more["rotary_interleaved"])
            rotated_k[b] = rotate_ref(k[b], length + torch.arange(new), cos, sin, more["rotary_interleaved"])
    before = [cache.clone() for cache in (k_cache, v_cache)]

    got = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        *((k, v) if new else (None, None)),
        cache_seqlens=torch.tensor(CACHED_LENGTHS, dtype=torch.int32),
        num_splits=3,
        return_softmax_lse=True,
        **more,
        **options,
    )

    for cache, old, added in zip((k_cache, v_cache), before, (rotated_k, list(v)), strict=True):
        for b, length in enumerate(CACHED_LENGTHS):
            for n in range(new):
                written = address(b, length + n)
                torch.testing.assert_close(cache[written], added[b][n], rtol=torch.finfo(dtype).eps, atol=1e-6)
                cache[written] = old[written] = 0
        assert torch.equal(cache.nan_to_num(9.0), old.nan_to_num(9.0)), "more than the new tokens was written"
    refs = []
    for kind in (torch.float64, dtype):
        keys, values = (
            [torch.cat(pair)[pad:].to(kind) for *pair, pad in zip(old, added, padding, strict=True)]
            for old, added in ((old_k, rotated_k), (old_v, list(v)))
        )
        out, lse = packed_ref([x.to(kind) for x in rotated_q], keys, values, **options)
        refs.append((out.unflatten(0, (3, lq)), lse.unflatten(1, (3, lq)).transpose(0, 1)))
    # Rotated queries and keys are rounded by us and by the reference from sums in another order.
    allowance = 4 * torch.finfo(dtype).eps if rotary_dim else 0.0
    for what, ours, want, peer in zip(("out", "lse"), got, *refs, strict=True):
        assert_within_budget(ours, want, peer, what, allowance * want.masked_fill(want.isinf(), 0).abs().max().item())


def test_cache_seqlens_may_be_an_int_a_tensor_or_none() -> None:
    q, k_cache, v_cache = draw(2, 1, HEADS, WIDTH), draw(2, 7, KV_HEADS, WIDTH), draw(2, 7, KV_HEADS, WIDTH)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache), flash_attn_func(q, k_cache, v_cache))
    want = flash_attn_func(q, k_cache[:, :4], v_cache[:, :4])
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4), want)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor([4, 4])), want)


def test_decoding_step_by_step_equals_one_call() -> None:
    q, k, v = draw(2, 12, HEADS, WIDTH), draw(2, 12, KV_HEADS, WIDTH), draw(2, 12, KV_HEADS, WIDTH)
    k_cache, v_cache = torch.zeros(2, 2, 16, KV_HEADS, WIDTH).unbind()
    outs = []
    for start, stop in itertools.pairwise([0, 5, 6, 7, 12]):
        chunk = (q[:, start:stop], k_cache, v_cache, k[:, start:stop], v[:, start:stop])
        outs.append(flash_attn_with_kvcache(*chunk, cache_seqlens=start, causal=True, window_size=(4, 0)))
    whole = flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-6)


def test_a_cache_has_no_gradients() -> None:
    q, k = draw(1, 1, HEADS, WIDTH).requires_grad_(), draw(1, 1, KV_HEADS, WIDTH).requires_grad_()
    cache = torch.zeros(1, 4, KV_HEADS, WIDTH)
    assert not flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=0).requires_grad
    assert not cache.requires_grad


SCORING = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {SCORING}deterministic=False, return_attn_probs=False",
    "flash_attn_qkvpacked_func": f"qkv, {SCORING}deterministic=False, return_attn_probs=False",
    "flash_attn_kvpacked_func": f"q, kv, {SCORING}deterministic=False, return_attn_probs=False",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"{SCORING}deterministic=False, return_attn_probs=False, block_table=None",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert ", ".join(map(str, bare)) == SIGNATURES[name]


Q, K = torch.randn(2, 3, 6, 8), torch.randn(2, 5, 2, 8)
T, POOL = torch.randn(7, 2, 8), torch.randn(3, 4, 2, 8)
STARTS, TABLE = torch.tensor([0, 3, 7]), torch.tensor([[0, 1], [2, -1]])


def varlen(q: Tensor = T, k: Tensor = T, v: Tensor = T, a: Tensor = STARTS, b: Tensor = STARTS, **options: Any) -> Any:
    return flash_attn_varlen_func(q, k, v, a, b, 4, 4, **options)


def cached(
    q: Tensor = Q, k_cache: Tensor = K, v_cache: Tensor = K, k: Any = None, v: Any = None, **options: Any
) -> Any:
    return flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, **options)


NEW, ANGLES = torch.randn(2, 1, 2, 8), torch.ones(5, 4)
ERRORS = [
    (lambda: flash_attn_func(Q[0], K, K), "q must be (batch, length, heads, width); got shape (3, 6, 8)"),
    (
        lambda: flash_attn_func(Q, K, K, window_size=(1,)),
        "window_size must be (left, right), -1 for no bound; got (1,)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.ones(5)),
        "flash_attn_func: alibi_slopes must be (6,) or (2, 6), one per query head; got shape (5,)",
    ),
    (
        lambda: flash_attn_func(Q, K[:, :, :1].expand(2, 5, 4, 8), K),
        "k and v must have the same heads and length; got 4 and 2 heads, lengths 5 and 5",
    ),
    (
        lambda: flash_attn_qkvpacked_func(torch.ones(2, 5, 2, 6, 8)),
        "qkv must be (batch, length, 3, heads, width); got shape (2, 5, 2, 6, 8)",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, torch.ones(2, 5, 3, 2, 8)),
        "kv must be (batch, length, 2, heads, width); got shape (2, 5, 3, 2, 8)",
    ),
    (lambda: varlen(q=T[None]), "q must be (T, heads, width); got shape (1, 7, 2, 8)"),
    (lambda: varlen(v=T[:6]), "k and v must have the same shape except for the width; got (7, 2, 8) and (6, 2, 8)"),
    (
        lambda: varlen(a=STARTS[:2]),
        "cu_seqlens_q must be (N + 1,) integers that start at 0, never decrease and end at 7, the number of tokens; "
        "got tensor([0, 3])",
    ),
    (
        lambda: varlen(b=torch.tensor([0, 8, 7])),
        "cu_seqlens_k must be (N + 1,) integers that start at 0, never decrease",
    ),
    (lambda: varlen(b=torch.tensor([1, 3, 7])), "cu_seqlens_k must be (N + 1,) integers that start at 0"),
    (lambda: varlen(b=STARTS.float()), "cu_seqlens_k must be integers; got torch.float32"),
    (lambda: varlen(a=torch.tensor([0])), "cu_seqlens_q must be (N + 1,) integers"),
    (
        lambda: varlen(b=torch.tensor([0, 7])),
        "queries and keys must have the same number of sequences, at least 1; got 2 and 1",
    ),
    (
        lambda: varlen(alibi_slopes=torch.ones(3, 2)),
        "flash_attn_varlen_func: alibi_slopes must be (2,) or (2, 2), one per query head; got shape (3, 2)",
    ),
    (lambda: varlen(k=T, v=T, block_table=TABLE), "k must be (pages, page_size, heads, width); got shape (7, 2, 8)"),
    (
        lambda: varlen(k=POOL, v=POOL, block_table=TABLE[:1]),
        "block_table must be (2, pages of a sequence); got shape (1, 2)",
    ),
    (
        lambda: varlen(k=POOL, v=POOL, b=torch.tensor([0, 9, 9]), block_table=TABLE),
        "block_table must have pages for 9 keys; got 2 of 4 keys for each sequence",
    ),
    (
        lambda: varlen(k=POOL, v=POOL, b=torch.tensor([0, 3, 9]), block_table=TABLE),
        "block_table must contain pages 0 to 2; got -1 at [1, 1], which sequence 1 of 6 keys needs",
    ),
    (lambda: cached(k_cache=K[0]), "k_cache must be (batch, length, heads, width); got shape (5, 2, 8)"),
    (lambda: cached(v_cache=K[:1]), "k_cache and v_cache must have the same shape except for the width"),
    (lambda: cached(k=NEW), "k and v must be given together; got None for v"),
    (
        lambda: cached(k=NEW, v=NEW),
        "cache_seqlens plus 1 new tokens must be at most the capacity of 5; got None",
    ),
    (lambda: cached(cache_seqlens=6), "cache_seqlens plus 0 new tokens must be at most the capacity of 5; got 6"),
    (lambda: cached(cache_seqlens=-1), "must be at most the capacity of 5; got -1"),
    (lambda: cached(cache_seqlens=torch.tensor([1])), "cache_seqlens must be (2,) integers, at least 0"),
    (lambda: cached(cache_seqlens=torch.tensor([1, -1])), "cache_seqlens must be (2,) integers, at least 0"),
    (
        lambda: cached(cache_seqlens=3, cache_leftpad=torch.tensor([0, 4])),
        "cache_leftpad must be at most cache_seqlens, [3, 3]; got [0, 4]",
    ),
    (
        lambda: cached(k=NEW[:, :, :1], v=NEW, cache_seqlens=0),
        "k and v must have the same shape except for the width; got (2, 1, 1, 8) and (2, 1, 2, 8)",
    ),
    (
        lambda: cached(k=NEW[:, :, :1], v=NEW[:, :, :1], cache_seqlens=0),
        "k must be (2, new tokens, 2, 8) of torch.float32, as the cache; got (2, 1, 1, 8) of torch.float32",
    ),
    (lambda: cached(k=NEW.double(), v=NEW, cache_seqlens=0), "as the cache; got (2, 1, 2, 8) of torch.float64"),
    (
        lambda: cached(cache_batch_idx=torch.tensor([0, 2])),
        "cache_batch_idx must be less than the 2 rows of the cache; got [0, 2]",
    ),
    (
        lambda: cached(k_cache=POOL, v_cache=POOL, cache_seqlens=1, block_table=TABLE, cache_batch_idx=STARTS[:2]),
        "cache_batch_idx has no meaning with a block_table",
    ),
    (lambda: cached(rotary_cos=ANGLES), "rotary_cos, rotary_sin and k must be given together"),
    (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=0, rotary_cos=ANGLES, rotary_sin=ANGLES[:, :2]),
        "with rotary_dim at most 8; got shapes (5, 4) and (5, 2)",
    ),
    (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=3, causal=True, rotary_cos=ANGLES, rotary_sin=ANGLES),
        "rotary_cos and rotary_sin must have position 5; got 5 positions",
    ),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[message[:60] for _, message in ERRORS])
def test_errors_name_what_was_required_and_given(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


WRONG_TYPES = [
    (lambda: flash_attn_func(None, K, K), "flash_attn_func: q must be a tensor; got NoneType"),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=[1.0] * 6),
        "flash_attn_func: alibi_slopes must be a tensor; got list",
    ),
    (lambda: flash_attn_func(Q, K, K, softcap=None), "flash_attn_func: softcap must be a finite number; got None"),
    (lambda: flash_attn_func(Q, K, K, dropout_p=None), "dropout_p must be a probability in [0, 1); got None"),
    (lambda: flash_attn_qkvpacked_func([Q, K, K]), "flash_attn_qkvpacked_func: qkv must be a tensor; got list"),
    (lambda: flash_attn_kvpacked_func(Q, (K, K)), "flash_attn_kvpacked_func: kv must be a tensor; got tuple"),
    (lambda: varlen(alibi_slopes=[1.0, 2.0]), "flash_attn_varlen_func: alibi_slopes must be a tensor; got list"),
    (lambda: varlen(softcap="50"), "flash_attn_varlen_func: softcap must be a finite number; got '50'"),
    (
        lambda: cached(cache_seqlens=[3, 3]),
        "cache_seqlens must be an int, or a tensor with one per sequence; got [3, 3]",
    ),
    (lambda: cached(cache_seqlens=3.0), "cache_seqlens must be an int, or a tensor with one per sequence; got 3.0"),
    (
        lambda: cached(k=NEW, v=NEW, cache_seqlens=0, rotary_cos=ANGLES, rotary_sin=0.5),
        "flash_attn_with_kvcache: rotary_sin must be a tensor; got float",
    ),
]


@pytest.mark.parametrize("call, message", WRONG_TYPES, ids=[message[:60] for _, message in WRONG_TYPES])
def test_arguments_of_other_types_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert message in str(caught.value)


def test_a_softcap_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attn_func: softcap must be a finite number; got nan"):
        flash_attn_func(Q, K, K, softcap=float("nan"))


WRONG_DTYPES = {
    "flash_attn_func": lambda: flash_attn_func(Q.double(), K, K),
    "flash_attn_func with slopes": lambda: flash_attn_func(Q.double(), K, K, alibi_slopes=torch.ones(2, 6)),
    "flash_attn_kvpacked_func": lambda: flash_attn_kvpacked_func(Q.double(), torch.stack([K, K], 2)),
    "flash_attn_qkvpacked_func": lambda: flash_attn_qkvpacked_func(torch.stack([K, K, K], 2).long()),
    "flash_attn_varlen_func": lambda: varlen(T.double()),
    "flash_attn_with_kvcache": lambda: cached(Q.double()),
}


@pytest.mark.parametrize("name", WRONG_DTYPES)
def test_errors_of_attention_name_the_function_that_was_called(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name.split()[0]}: q, k and v must "):
        WRONG_DTYPES[name]()


def test_the_pattern_of_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"flash_attn_func: return_attn_probs .*dropout_p=0\.1"):
        flash_attn_func(Q, K, K, 0.1, return_attn_probs=True)
    with pytest.raises(NotImplementedError, match=r"flash_attn_varlen_func: return_attn_probs .*dropout_p=0\.1"):
        varlen(dropout_p=0.1, return_attn_probs=True)


@pytest.mark.parametrize("slopes", [(3,), (0, 3)])
def test_an_empty_batch(slopes: tuple[int, ...]) -> None:
    q = torch.zeros(0, 5, 3, 8)
    assert flash_attn_func(q, q, q, causal=True, alibi_slopes=torch.ones(slopes)).shape == (0, 5, 3, 8)
