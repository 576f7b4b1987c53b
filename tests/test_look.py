"""`qkv.look`, compared with numbers from the weights of the oracle, over the contract grid."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, answer
from oracle import Rule
from peer import visible
from torch import Tensor

import qkv
from qkv import Mask, look
from qkv.cache import quantize

GRID = [case for case in CASES if case.lq * case.lk <= 2000]
every_case = pytest.mark.parametrize("case", GRID, ids=str)
some_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.long if n % 4 and not case.sinks else ()) for n, case in enumerate(GRID)],
    ids=str,
)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str
)


@cache
def weights(case: Case, dtype: torch.dtype, *, with_sinks: bool = True) -> Tensor:
    """(B, H, Lq, Lk) of the oracle, which sum to 1 over the keys unless a sink logit has a share."""
    found = answer(case, dtype).weights
    if with_sinks or not case.sinks:
        return found
    total = found.sum(-1, keepdim=True)
    return torch.where(total > 0, found / total, 0)


@cache
def relative(case: Case, dtype: torch.dtype) -> float:
    """How far a weight may be off: twice the error of its score, and the roundings of the softmax.

    A score is a sum of products; softcap, bias and alibi add a few roundings of its size. A sum over all keys takes as
    many roundings.
    """
    unit = torch.finfo(dtype).eps / 2
    inputs = case.inputs(torch.float64)
    scale = case.width**-0.5 if case.scale is None else abs(case.scale)
    q, k = (inputs[name].abs().amax((0, 1)).max(0).values for name in "qk")
    size = scale * (q * k).sum().item()
    bias = inputs["bias"] if "bias" in inputs else torch.zeros(1)
    size += bias.masked_fill(bias == -torch.inf, 0).abs().max().item()
    if case.alibi:
        size += inputs["alibi"].max().item() * case.distance().max().item()
    return (2 * (case.width + 8) * size + case.lk + 64) * unit


def calls(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, object]]:
    """q, k, v, and the keywords."""
    inputs = case.inputs(dtype)
    return [inputs.pop(name) for name in "qkv"], {**inputs, **case.options()}


def close(got: Tensor, want: Tensor, error: float | Tensor) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    off = (got.double() - want).abs().nan_to_num()
    assert (off <= error).all(), f"off by {off.max()}, {(off / error).max()} of what is allowed"


@each_dtype
@every_case
@pytest.mark.parametrize("sink_tokens", [pytest.param(0, marks=pytest.mark.long), 2])
def test_windows_cut_the_weight_of_the_keys_that_they_hide(case: Case, dtype: torch.dtype, sink_tokens: int) -> None:
    (q, k, v), options = calls(case, dtype)
    windows = [4, 1, case.lk + 40, 9, 4]
    found = look.window_cut(q, k, v, windows, sink_tokens=sink_tokens, **options)
    p, values = weights(case, dtype), v.double().repeat_interleave(case.heads // case.kv_heads, dim=1)
    old, logits = p @ values, answer(case, dtype).lse
    for n, window in enumerate(windows):
        rule = Rule(left=window - 1, sink_tokens=sink_tokens)
        shown = visible(replace(case, name=f"{case.name}, window", mask=Mask.full, rule=lambda rule=rule: rule))
        mass = (p * ~shown).sum(-1)
        close(found.mass[n], mass, relative(case, dtype))
        rest = 1 - mass if not case.sinks else torch.ones_like(mass) - mass  # the sink logit stays
        new = ((p * shown) @ values) / rest[..., None].clamp(min=1e-300)
        new = torch.where((p * shown).sum(-1, keepdim=True) > 0, new, 0)
        size = old.norm(dim=-1)
        sure = (size > 0.05) & (rest > 1e-3) & logits.isfinite()
        change = torch.where(sure, (new - old).norm(dim=-1) / size, 0)
        largest = values.abs().amax().item() * values.shape[-1] ** 0.5
        error = 8 * relative(case, dtype) * largest / size.clamp(min=0.05) * (1 + change) / rest.clamp(min=1e-3)
        close(torch.where(sure, found.change[n].double(), 0), change, error)


@each_dtype
@some_cases
def test_keys_in_effect_are_the_exponential_of_the_entropy(case: Case, dtype: torch.dtype) -> None:
    (q, k, _), options = calls(case, dtype)
    p = weights(case, dtype, with_sinks=False)
    entropy = torch.special.entr(p).sum(-1)
    want = torch.where(p.sum(-1) > 0, entropy.exp(), 0)
    # A logarithm of a weight is as long as the range of the scores.
    lse = answer(case, dtype).lse.nan_to_num(neginf=0)
    range_of = 2 + lse.abs().max().item() - torch.where(p > 0, p, 1).log().min().item()
    close(look.keys_in_effect(q, k, **options), want, relative(case, dtype) * range_of * want.clamp(min=1))


@each_dtype
@some_cases
def test_distance_is_mean_and_deviation(case: Case, dtype: torch.dtype) -> None:
    (q, k, _), options = calls(case, dtype)
    p = weights(case, dtype, with_sinks=False)
    first = torch.tensor([case.offset_of(b) for b in range(case.batch)])
    back = (first[:, None] + torch.arange(case.lq))[:, None, :, None] - torch.arange(case.lk)
    mean = (p * back).sum(-1)
    spread = (p * (back - mean[..., None]).square()).sum(-1).sqrt()
    empty = p.sum(-1) == 0
    error = 4 * relative(case, dtype)
    for found in (look.distance(q, k, **options), look.overview(q, k, **options).distance):
        close(found.mean, mean.masked_fill(empty, torch.nan), error * (case.lk + 1))
        # A variance is a difference of numbers up to the square of half the keys, so that its root is off by a root.
        close(found.spread, spread.masked_fill(empty, torch.nan), case.lk * error**0.5)
        assert torch.allclose(found.spread.double().nan_to_num() ** 2, spread**2, atol=case.lk**2 * error, rtol=0)


@each_dtype
@some_cases
@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.long), 5, 64])
def test_block_maps_are_means_and_maxima(case: Case, dtype: torch.dtype, blocks: int) -> None:
    (q, k, _), options = calls(case, dtype)
    p = weights(case, dtype)
    of_queries, of_keys = (torch.arange(n) * min(blocks, n) // max(n, 1) for n in (case.lq, case.lk))
    sizes = min(blocks, case.lq), min(blocks, case.lk)
    mean, most = (torch.zeros(*p.shape[:2], *sizes, dtype=torch.float64) for _ in range(2))
    for a in range(sizes[0]):
        for b in range(sizes[1]):
            part = p[:, :, of_queries == a][..., of_keys == b]
            mean[:, :, a, b], most[:, :, a, b] = part.sum(-1).mean(-1), part.amax((2, 3))
    found = look.block_map(q, k, blocks=blocks, maxima=True, **options)
    assert found.most is not None
    close(found.mean, mean, relative(case, dtype))
    close(found.most, most, relative(case, dtype))
    assert look.block_map(q, k, blocks=blocks, **options).most is None
    close(look.overview(q, k, blocks=blocks, **options).map.mean, mean, 2 * relative(case, dtype))


@each_dtype
@some_cases
def test_received_is_the_sum_over_queries(case: Case, dtype: torch.dtype) -> None:
    (q, k, _), options = calls(case, dtype)
    close(look.received(q, k, **options), weights(case, dtype).sum(2), relative(case, dtype) * (case.lq + 1))


@each_dtype
@some_cases
def test_sink_share_is_that_of_the_first_keys_and_of_the_logit(case: Case, dtype: torch.dtype) -> None:
    (q, k, _), options = calls(case, dtype)
    p, error = weights(case, dtype), relative(case, dtype)
    for first in (0, 1, 3):
        learned = 1 - p.sum(-1) if case.sinks else torch.zeros(p.shape[:3]).double()
        for found in (look.sink_share(q, k, first=first, **options), look.overview(q, k, first=first, **options).sinks):
            close(found.first, p[..., :first].sum(-1), 2 * error)
            close(found.learned, learned, 2 * error)


@each_dtype
@some_cases
def test_top_keys_suffice_and_none_is_spare(case: Case, dtype: torch.dtype) -> None:
    (q, k, _), options = calls(case, dtype)
    p, error = weights(case, dtype), relative(case, dtype)
    for coverage, most in ((0.9, 32), (0.5, 2), (0.0, 3)):
        found = look.top_keys(q, k, coverage=coverage, most=most, **options)
        used = found.keys >= 0
        assert found.keys.shape[-1] == min(most, case.lk)
        of_found = p.gather(3, found.keys.clamp(min=0)) * used
        close(found.weights, of_found, error)
        close(found.covered, of_found.sum(-1), error)
        assert (found.weights.diff(dim=-1) <= 0).all()
        counts, ordered = used.sum(-1), p.sort(dim=-1, descending=True).values
        close(of_found.sum(-1), (ordered * (torch.arange(case.lk) < counts[..., None])).sum(-1), 2 * error)
        short = of_found.sum(-1) < coverage - error
        assert (counts[short] == torch.minimum((p > 0).sum(-1), torch.tensor(most))[short]).all()
        last = found.weights.gather(3, (counts - 1).clamp(min=0)[..., None])[..., 0]
        assert (found.covered - last < coverage + error)[counts > 0].all() if coverage else not used.any()


@some_cases
def test_top_keys_of_some_queries_are_those_of_all(case: Case) -> None:
    (q, k, _), options = calls(case, torch.float32)
    if case.lq == 0:
        return
    all_of, last = look.top_keys(q, k, most=5, **options), case.lq - 1
    for places in ([0], [-1, 0], [last, last // 2, last]):
        found = look.top_keys(q, k, most=5, queries=places, **options)
        for some, every in zip(found, all_of, strict=True):
            torch.testing.assert_close(some, every[:, :, places], rtol=1e-5, atol=1e-6, equal_nan=True)
    assert look.top_keys(q, k, most=5, queries=[], **options).keys.shape[2] == 0


@pytest.mark.parametrize("place", [9, -10])
def test_top_keys_of_queries_that_are_not_there(place: int) -> None:
    q, k, _ = qkv_of()
    message = rf"top_keys: each of queries must be from -9 to 8, for 9 queries; got {place}\."
    with pytest.raises(ValueError, match=message):
        look.top_keys(q, k, queries=[0, place])
    with pytest.raises(TypeError, match=r"each of queries must be an int; got 1\.5"):
        look.top_keys(q, k, queries=[1.5])  # type: ignore[list-item]


CAUSAL = Mask.causal()
NUMBERS = {
    "window_cut": lambda q, k, v, **options: look.window_cut(q, k, v, [3], sink_tokens=1, **options),
    "keys_in_effect": lambda q, k, v, **options: [look.keys_in_effect(q, k, **options)],
    "distance": lambda q, k, v, **options: look.distance(q, k, **options),
    "block_map": lambda q, k, v, **options: look.block_map(q, k, blocks=4, maxima=True, **options),
    "received": lambda q, k, v, **options: [look.received(q, k, **options)],
    "sink_share": lambda q, k, v, **options: look.sink_share(q, k, **options),
    "top_keys": lambda q, k, v, **options: look.top_keys(q, k, **options),
    "overview": lambda q, k, v, **options: [number for part in look.overview(q, k, **options)[:2] for number in part],
}
each_number = pytest.mark.parametrize("name", NUMBERS)


def qkv_of(lq: int = 9, lk: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, lq), (2, lk), (2, lk)))  # type: ignore[return-value]


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, equal_nan=True)


@each_number
def test_rows_at_a_time_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are written out, and masks have no complement."""
    for options in (
        {"softcap": 2.0},
        {"mask": Mask.causal(5, sink_tokens=2)},
        {"mask": Mask.causal() & Mask.dense(ALLOW)},
    ):
        q, k, v = qkv_of()
        want = NUMBERS[name](q, k, v, **options)
        monkeypatch.setattr(look, "WEIGHTS_AT_ONCE", 2 * 4 * 9 * 2)  # two rows
        same(NUMBERS[name](q, k, v, **options), want)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "mask",
    [Mask.full(), Mask.causal(), Mask.causal(31), Mask.causal(31, sink_tokens=3), Mask.sliding(window=40)],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 37, -37])
def test_keys_that_no_row_sees_are_left_out(mask: Mask, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "WEIGHTS_AT_ONCE", 2 * 4 * 211 * 7)  # seven rows
    q, k, _ = qkv_of(150, 211)
    p = qkv.attention_weights(q, k, mask=mask, offset=offset)
    found = look.top_keys(q, k, coverage=0.999, most=5, mask=mask, offset=offset)
    largest = p.topk(5, dim=-1).values
    torch.testing.assert_close(found.weights, largest.masked_fill(found.keys < 0, 0), rtol=1e-4, atol=1e-6)
    assert ((found.keys >= 0) == (largest > 0)).sum() > 0.9 * largest.numel()
    used = found.keys >= 0
    torch.testing.assert_close(p.gather(3, found.keys.clamp(min=0)) * used, found.weights, rtol=1e-4, atol=1e-6)
    assert all(len({*keys}) == len(keys) for keys in (row[row >= 0].tolist() for row in found.keys.flatten(0, 2)))
    most = look.block_map(q, k, blocks=13, maxima=True, mask=mask, offset=offset).most
    assert most is not None
    of_queries, of_keys = (torch.arange(n) * 13 // n for n in (150, 211))
    for a in range(13):
        for b in range(13):
            want = p[:, :, of_queries == a][..., of_keys == b].amax((2, 3))
            torch.testing.assert_close(most[:, :, a, b], want, rtol=1e-4, atol=1e-6)


ALLOW = torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.7


WITH: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "bias": lambda: {"bias": BIAS.clone()},
    "slopes and sinks": lambda: {"alibi": torch.arange(4) / 8, "sink_logits": torch.ones(4)},
    "padding": lambda: {"mask": CAUSAL & Mask.padding(torch.tensor([6, 9]))},
    "documents": lambda: {"mask": CAUSAL & Mask.documents(torch.arange(9)[None] // 4)},
    "dense": lambda: {"mask": Mask.dense(ALLOW.clone())},
    "rows": lambda: {"mask": CAUSAL, "offset": torch.tensor([0, -3])},
}
BIAS = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2))


@each_number
@pytest.mark.parametrize("options", WITH)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_numbers_have_no_gradient_and_leave_their_inputs_alone(name: str, options: str, mode: Any) -> None:
    want = NUMBERS[name](*qkv_of(), **WITH[options]())
    with mode():
        given, others = [*qkv_of()], WITH[options]()
        tensors = [*given, *(x for x in others.values() if isinstance(x, Tensor) and x.is_floating_point())]
        if mode is torch.enable_grad:
            for x in tensors:
                x.requires_grad_()
        found = NUMBERS[name](*given, **others)
    same(found, want)
    assert not any(x.requires_grad for x in found) and all(x.grad is None for x in tensors)
    with mode():
        assert all(torch.equal(x, y) for x, y in zip(given, qkv_of(), strict=True))


@each_number
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_computed_with_in_fp32(name: str, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in qkv_of()]
    found, want = NUMBERS[name](*given, mask=CAUSAL), NUMBERS[name](*(x.float() for x in given), mask=CAUSAL)
    same(found, want)
    assert all(one.dtype is two.dtype for one, two in zip(found, want, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as attention itself is given them
        rounded = NUMBERS[name](*qkv_of(), mask=CAUSAL)
    same(rounded, NUMBERS[name](*(x.bfloat16() for x in qkv_of()), mask=CAUSAL))


@each_number
def test_views_between_poisoned_neighbours_and_hidden_nan(name: str) -> None:
    q, k, v = qkv_of()
    want = NUMBERS[name](q, k[:, :, :7], v[:, :, :7], mask=CAUSAL, offset=-2)
    views = []
    for x in (q, k, v):
        buffer = torch.full((4, 13, 8, 14), torch.nan)
        view = buffer[1:3, 2:11, 1 : 1 + x.shape[1], 3:11].transpose(1, 2)
        view.copy_(x)
        views.append(view)
    q, k, v = views
    same(NUMBERS[name](q, k[:, :, :7], v[:, :, :7], mask=CAUSAL, offset=-2), want)
    k[:, :, 7:] = v[:, :, 7:] = torch.nan
    found = NUMBERS[name](q, k, v, mask=CAUSAL & Mask.padding(torch.tensor([7, 7])), offset=-2)
    if name not in ("received", "block_map", "top_keys"):  # which are as long as the keys
        same(found, want)
    elif name == "received":
        same([found[0][:, :, :7]], want)
        assert not found[0][:, :, 7:].any()


@each_number
def test_a_visible_nan_is_seen_in_its_rows_alone(name: str) -> None:
    q, k, v = qkv_of()
    want = NUMBERS[name](q, k, v, mask=CAUSAL)
    q[:, :, 5] = torch.nan
    found = NUMBERS[name](q, k, v, mask=CAUSAL)
    if name in ("received", "block_map"):  # sums over queries
        assert found[0].isnan().any()
        return
    for one, two in zip(found, want, strict=True):
        rows = one if one.dim() == 3 or name == "top_keys" else one[0]
        of_clean = two if rows.dim() == one.dim() else two[0]
        keep = torch.arange(9) != 5
        torch.testing.assert_close(rows[:, :, keep], of_clean[:, :, keep], equal_nan=True)


@each_number
def test_int8_and_pages_are_read(name: str) -> None:
    q, k, v = qkv_of()
    (codes, k_scale), (of_values, v_scale) = quantize(k), quantize(v)
    wide = codes * k_scale[..., None], of_values * v_scale[..., None]
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    same(NUMBERS[name](q, codes, of_values, mask=CAUSAL, **scales), NUMBERS[name](q, *wide, mask=CAUSAL))
    cache = qkv.PagedKVCache(page_size=4)
    found = cache.append(k, v)
    options = {"mask": CAUSAL, "offset": 0, "pages": found.pages}
    same(NUMBERS[name](q, found.k, found.v, **options), NUMBERS[name](q, k, v, mask=CAUSAL))


@each_number
def test_offsets_by_row_are_those_of_each_row(name: str) -> None:
    q, k, v = qkv_of(lq=3)
    found = NUMBERS[name](q, k, v, mask=CAUSAL, offset=torch.tensor([6, 1]))
    for row, offset in enumerate((6, 1)):
        one = NUMBERS[name](*(x[row : row + 1] for x in (q, k, v)), mask=CAUSAL, offset=offset)
        for whole, alone in zip(found, one, strict=True):
            batch = 1 if name == "window_cut" else 0
            torch.testing.assert_close(whole.narrow(batch, row, 1), alone, rtol=1e-5, atol=1e-6)


@each_number
@pytest.mark.parametrize(("lq", "lk"), [(0, 5), (3, 0), (1, 1)])
def test_no_tokens_and_one(name: str, lq: int, lk: int) -> None:
    found = NUMBERS[name](*qkv_of(lq, lk), offset=0)
    for x in found:
        assert x.shape[-1] == {"received": lk, "block_map": min(lk, 4), "top_keys": x.shape[-1]}.get(name, lq)


@each_number
def test_wrong_calls_name_the_function(name: str) -> None:
    q, k, v = qkv_of()
    for error, given, options in (
        (ValueError, (q, k[:, :, :, :3], v), {}),
        (TypeError, (q, k, v), {"mask": torch.ones(9, 9).bool()}),
        (TypeError, (q, k, v), {"scales": 2.0}),
        (ValueError, (q[:, :, :4], k, v), {"mask": CAUSAL}),
        (TypeError, (None, k, v), {}),
    ):
        with pytest.raises(error, match=name):
            NUMBERS[name](*given, **options)


def test_wrong_counts_are_named() -> None:
    q, k, v = qkv_of()
    for call, error, message in (
        (lambda: look.window_cut(q, k, v, [0]), ValueError, "each of windows must be at least 1, or a mask; got 0"),
        (lambda: look.window_cut(q, k, v, [2.5]), TypeError, "each of windows must be an int, or a mask"),
        (lambda: look.window_cut(q, k, v, 3), TypeError, "windows must be a sequence of counts and masks; got int"),
        (lambda: look.window_cut(q, k, v, [3], sink_tokens=-1), ValueError, "sink_tokens must be at least 0"),
        (lambda: look.window_cut(q[:, :, :2], k, v, [3]), ValueError, "need an offset"),
        (lambda: look.distance(q[:, :, :2], k), ValueError, "need an offset"),
        (lambda: look.block_map(q, k, blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: look.top_keys(q, k, most=0), ValueError, "most must be at least 1"),
        (lambda: look.top_keys(q, k, coverage=1.5), ValueError, "coverage must be"),
        (lambda: look.sink_share(q, k, first=-1), ValueError, "first must be at least 0"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_planted_head_that_looks_100_back_loses_all_by_a_window_of_100() -> None:
    n, back = 257, 100
    keys = torch.randn(n, 32, generator=torch.Generator().manual_seed(0)).sign()
    q = 4 * keys.roll(back, 0)  # query i is key i - 100
    found = look.window_cut(*(x[None, None] for x in (q, keys, keys)), [100, 101, n], mask=CAUSAL)
    assert (found.mass[0, 0, 0, back:] > 0.999).all()
    assert (found.mass[1, 0, 0, back:] < 0.001).all()
    assert not found.mass[2].any() and not found.change[2].any()
    assert not found.mass[:, 0, 0, :back].any()


def test_windows_may_be_masks() -> None:
    q, k, v = qkv_of()
    p, shown = qkv.attention_weights(q, k), Mask.causal(3) & Mask.documents(torch.arange(9)[None] // 4)
    for window in (Mask.sliding(4), Mask.causal(3), shown, Mask.dense(ALLOW), Mask.full()):
        (mass,), _ = look.window_cut(q, k, v, [window])
        torch.testing.assert_close(mass, (p * ~window.visible(9, 9)).sum(-1), rtol=1e-5, atol=1e-6)
    assert look.window_cut(q, k, v, []).mass.shape == (0, 2, 4, 9)
    assert torch.equal(look.window_cut(q, k, v, [np.int64(3)]).mass, look.window_cut(q, k, v, [3]).mass)


def test_changes_do_not_depend_on_the_size_of_values() -> None:
    q, k, v = qkv_of()
    want = look.window_cut(q, k, v, [3], mask=CAUSAL).change
    for size in (1e-30, 1e-20, 1e20, 1e30):
        torch.testing.assert_close(look.window_cut(q, k, v * size, [3], mask=CAUSAL).change, want, rtol=1e-4, atol=1e-5)
    assert not look.window_cut(q, k, 0 * v, [3], mask=CAUSAL).change.any()


def test_no_more_keys_are_in_effect_than_there_are() -> None:
    q, k = torch.full((1, 1, 4, 8), 100.0), torch.full((1, 1, 4096, 8), 100.0)
    torch.testing.assert_close(look.keys_in_effect(q, k, scale=1.0), torch.full((1, 1, 4), 4096.0))


def test_the_least_share_of_a_sink_logit_is_exact() -> None:
    q, k, _ = qkv_of()
    share = look.sink_share(q, k, sink_logits=torch.full((4,), -20.0)).learned
    lse = qkv.attention_with_lse(q.double(), k.double(), k.double()).lse
    torch.testing.assert_close(share.double(), (-20 - lse).exp(), rtol=1e-4, atol=0)
    nothing = look.sink_share(q, k, mask=CAUSAL, offset=-20, sink_logits=torch.full((4,), -torch.inf))
    assert not nothing.learned.any()
