"""Calls of other kinds than those of the grid: dtypes, backends, keys of another length, one rank, and `explain`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel import sharded
from parallel.ranks import Ranks, mesh
from parallel.sharded import joined, ragged
from torch import Tensor

import qkv
from qkv import Mask, parallel
from qkv.cache import quantize
from qkv.parallel.runs import even, zigzag

Of = Callable[[int], Ranks]
SCHEMES = ("gather", "heads", "merge")
N = 61


def _int8(layout: Any, scheme: str) -> Tensor:
    q, k, v, _ = sharded.long_inputs(torch.float32, N)
    tokens = parallel.Tokens(layout, mesh())
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    own = {"q": q, "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    taken = {name: tokens.take(x, dim=2) for name, x in own.items()}
    return parallel.attention(**taken, tokens=tokens, mask=Mask.causal(), scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keys_in_int8_travel_as_they_are(ranks: Of, scheme: str) -> None:
    q, k, v, _ = sharded.long_inputs(torch.float32, N)
    (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
    want = qkv.attention(q, k, v, k_scale=k_scale, v_scale=v_scale, mask=Mask.causal())
    layout = ragged(N, 3)
    torch.testing.assert_close(joined(ranks(3).run(_int8, layout, scheme), layout), want)


def _autocast(layout: Any, scheme: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return sharded.solve_long(Mask.causal(), layout, torch.float32, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_casts_before_anything_is_sent(ranks: Of, scheme: str) -> None:
    layout = zigzag(N, 3)
    results = ranks(3).run(_autocast, layout, scheme)
    *inputs, _ = sharded.long_inputs(torch.float32, N)
    got = joined([one["out"] for one in results], layout)
    assert got.dtype is torch.bfloat16
    if scheme == "merge":  # partial results stay in fp32: the output alone is rounded
        want = qkv.attention(*(x.bfloat16().float() for x in inputs), mask=Mask.causal())
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-5)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(got, qkv.attention(*inputs, mask=Mask.causal()))
    assert results[0]["d_k"].dtype is torch.float32


def _of_16_bits(layout: Any, dtype: torch.dtype) -> Tensor:
    return sharded.solve_long(Mask.causal(), layout, dtype, "merge")["out"]


@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_partial_results_are_not_rounded(ranks: Of, dtype: torch.dtype, half: float) -> None:
    """What is left is that of the result, half a unit in the last place; results of 16 bits would add theirs."""
    layout = zigzag(N, 3)
    *inputs, _ = sharded.long_inputs(dtype, N)
    want = qkv.attention(*(x.float() for x in inputs), mask=Mask.causal())
    got = joined(ranks(3).run(_of_16_bits, layout, dtype), layout)
    torch.testing.assert_close(got.float(), want, rtol=1.001 * half, atol=2e-6)


def _backend(layout: Any, scheme: str, backend: str) -> dict[str, Tensor]:
    return sharded.solve_long(Mask.causal(window=9), layout, torch.float64, scheme, backend=backend)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_backend_in_fp64(ranks: Of, scheme: str, backend: str) -> None:
    layout = ragged(N, 3)
    results = ranks(3).run(_backend, layout, scheme, backend)
    *inputs, towards = sharded.long_inputs(torch.float64, N)
    leaves = [x.requires_grad_() for x in inputs]
    out = qkv.attention(*leaves, mask=Mask.causal(window=9), backend="reference")
    wanted = (out.detach(), *torch.autograd.grad(out, leaves, towards))
    for name, want in zip(("out", "d_q", "d_k", "d_v"), wanted, strict=True):
        torch.testing.assert_close(joined([one[name] for one in results], layout), want)


def _of_other_keys(queries: Any, keys: Any, scheme: str, whole: bool) -> Tensor:
    q, _, _, _ = sharded.long_inputs(torch.float32, 20)
    _, k, v, _ = sharded.long_inputs(torch.float32, N)
    tokens, key_tokens = parallel.Tokens(queries, mesh()), parallel.Tokens(keys, mesh())
    own = (k, v) if whole else [key_tokens.take(x, dim=2) for x in (k, v)]
    ids = torch.arange(N)[None] // 30
    options = {"mask": Mask.causal(window=25) & Mask.documents(ids), "offset": N - 20, "scheme": scheme}
    given = parallel.WHOLE if whole else key_tokens
    return parallel.attention(tokens.take(q, dim=2), *own, tokens, key_tokens=given, **options)


@pytest.mark.parametrize("scheme", [*SCHEMES, "whole"])
def test_queries_of_a_longer_text_see_their_documents(ranks: Of, scheme: str) -> None:
    """A chunk of a prompt, by its offset; in ``merge``, the keys of a rank are not those at the queries' positions."""
    q, _, _, _ = sharded.long_inputs(torch.float32, 20)
    _, k, v, _ = sharded.long_inputs(torch.float32, N)
    mask = Mask.causal(window=25) & Mask.documents(torch.arange(N)[None] // 30)
    want = qkv.attention(q, k, v, mask=mask, offset=N - 20)
    queries, keys = ragged(20, 3), even(N, 3)
    whole = scheme == "whole"
    results = ranks(3).run(_of_other_keys, queries, keys, "gather" if whole else scheme, whole)
    torch.testing.assert_close(joined(results, queries), want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_rank_is_one_process(ranks: Of, scheme: str) -> None:
    (found,) = ranks(1).run(sharded.solve_long, Mask.causal(), even(N, 1), torch.float32, scheme)
    *inputs, towards = sharded.long_inputs(torch.float32, N)
    leaves = [x.requires_grad_() for x in inputs]
    out = qkv.attention(*leaves, mask=Mask.causal())
    for name, want in zip(("out", "d_q", "d_k", "d_v"), (out, *torch.autograd.grad(out, leaves, towards)), strict=True):
        assert torch.equal(found[name], want)
    (found,) = ranks(1).run(sharded.count_bytes, Mask.causal(), even(N, 1), scheme)
    assert found == {"forward": [], "backward": [], "explained": 0, "chosen": scheme}


def _explain(heads: tuple[int, int], mask: Mask, queries: Any, keys: Any, scheme: str) -> Any:
    lengths = [sum(stop - start for runs in layout for start, stop in runs) for layout in (queries, keys)]
    tokens, key_tokens = parallel.Tokens(queries, mesh()), parallel.Tokens(keys, mesh())
    q = tokens.take(torch.zeros(1, heads[0], lengths[0], 8), dim=2)
    k = key_tokens.take(torch.zeros(1, heads[1], lengths[1], 8), dim=2)
    offset = lengths[1] - lengths[0]
    return parallel.explain(q, k, k, tokens, key_tokens=key_tokens, mask=mask, offset=offset, scheme=scheme)


def test_auto_sends_the_fewest_bytes(ranks: Of) -> None:
    """Windows and few KV heads go by gather, many KV heads by heads, few queries over many keys by merge."""
    n = 120
    for heads, mask, count, want in (
        ((8, 8), Mask.full(), n, "heads"),
        ((8, 1), Mask.full(), n, "gather"),
        ((8, 8), Mask.causal(window=5), n, "gather"),
        ((8, 8), Mask.full(), 2, "merge"),
    ):
        found = ranks(3).run(_explain, heads, mask, even(count, 3), even(n, 3), "auto")
        assert [one.chosen for one in found] == [want] * 3
        assert found[0] == found[1] == found[2]
        assert sum(found[0].sent[want]) == min(map(sum, found[0].sent.values()))


def test_explain_counts_scores_and_says_why_not(ranks: Of) -> None:
    found = ranks(3).run(_explain, (4, 2), Mask.causal(), zigzag(12, 3), zigzag(12, 3), "auto")[0]
    assert found.scores == {"gather": (104, 104, 104), "heads": (78, 78, 156), "merge": (104, 104, 104)}
    assert found.reasons == {"heads": "sends more", "merge": "sends more"}
    assert str(found).splitlines()[0] == (
        "gather  chosen: sends 2,304 bytes, 1,024 of them by one rank; computes 312 scores, 104 of them on one rank"
    )
    asked = ranks(3).run(_explain, (4, 2), Mask.causal(), zigzag(12, 3), zigzag(12, 3), "merge")[0]
    assert asked.chosen == "merge" and asked.reasons == {"gather": "not asked for", "heads": "not asked for"}


def _explain_whole() -> Any:
    tokens = parallel.Tokens.even(12, mesh())
    q, k = tokens.take(torch.zeros(1, 4, 12, 8), dim=2), torch.zeros(1, 2, 30, 8)
    return parallel.explain(q, k, k, tokens, key_tokens=parallel.WHOLE)


def test_keys_that_each_rank_has_are_not_sent(ranks: Of) -> None:
    found = ranks(3).run(_explain_whole)[0]
    assert found.chosen == "gather" and found.sent == {"gather": (0, 0, 0)}
    assert found.scores == {"gather": (480, 480, 480)}
    assert "heads   not for keys that each rank has whole" in str(found)


def _of_lse(layout: Any, scheme: str) -> Tensor:
    """The gradient of q, k and v alike, of a loss of the lse alone."""
    tokens = parallel.Tokens(layout, mesh())
    x = tokens.take(sharded.long_inputs(torch.float32, N)[0], dim=2).requires_grad_()
    lse = parallel.attention_with_lse(x, x, x, tokens, mask=Mask.causal(), scheme=scheme).lse
    (gradient,) = torch.autograd.grad(lse.sin().sum(), x)
    return gradient


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loss_of_the_lse_alone_reaches_the_keys_of_a_rank_without_queries(ranks: Of, scheme: str) -> None:
    x = sharded.long_inputs(torch.float32, N)[0].requires_grad_()
    (want,) = torch.autograd.grad(qkv.attention_with_lse(x, x, x, mask=Mask.causal()).lse.sin().sum(), x)
    layout = ((), *even(N, 2))
    torch.testing.assert_close(joined(ranks(3).run(_of_lse, layout, scheme), layout), want, rtol=1e-4, atol=1e-5)
