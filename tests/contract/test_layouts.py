"""Results and gradients of every backend do not depend on the memory layout of tensors."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import ANY, LAYOUTS, Layout
from solver import DEVICES, Solver
from torch import Tensor

import qkv
from qkv import Mask
from qkv.backends import BACKENDS, flex
from qkv.integrations.flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from qkv.integrations.torch.varlen import varlen_attn
from qkv.problem import make_problem

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": Mask.causal()},
    "window": {"mask": Mask.causal(3, sink_tokens=1)},
    "padding": {"mask": Mask.padding(torch.tensor([7, 4]))},
    "sinks": {"mask": Mask.causal(), "sink_logits": torch.tensor([0.3, -0.2, 0.1, 0.0])},
    "softcap": {"softcap": 2.0},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = [*(backend.NAME for backend in BACKENDS), "auto"]


def call(name: str, wants_lse: bool, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    with Solver(flex, tensors[0].device.type).at_work():
        if wants_lse:
            return [*qkv.attention_with_lse(*tensors, **options, backend=name)]
        return [qkv.attention(*tensors, **options, backend=name)]


def solves(name: str, wants_lse: bool, tensors: list[Tensor], options: dict[str, Any]) -> bool:
    if name == "flex" and (tensors[0].dtype is not torch.float32 or not wants_lse):
        return False  # It can, but recompiles at each call.
    problem = make_problem("test", *tensors, **options, wants_lse=wants_lse)
    return name == "auto" or not next(backend for backend in BACKENDS if name == backend.NAME).why_not(problem)


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor | Mask) else x for name, x in options.items()}


def rounding(want: Tensor, length: int) -> float:
    """Bound of the difference of two sums of n terms in different orders: n roundings of each."""
    return 2 * length * torch.finfo(want.dtype).eps * max(1.0, want.abs().max().item())


def assert_near(got: Tensor, want: Tensor, length: int) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=rounding(want, length))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(OPTIONS[key], name, id=f"{key}-{name}")
        for key in OPTIONS
        for name in NAMES
        if name != "flex" or key == "sinks"
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_q_k_and_v(layout: Layout, options: dict[str, Any], name: str, device: str) -> None:
    options = on(device, options)
    torch.manual_seed(0)
    shapes = [(2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)]
    for dtype in DTYPES:
        views = [layout(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
        plain = [view.contiguous() for view in views]
        for wants_lse in (False, True):
            want = call("reference", wants_lse, plain, options)
            for laid_out in ([0], [1], [2], [0, 1, 2]):
                given = [(views if n in laid_out else plain)[n] for n in range(3)]
                if not solves(name, wants_lse, given, options) or (name == "flex" and len(laid_out) == 1):
                    continue
                for got, wanted in zip(call(name, wants_lse, given, options), want, strict=True):
                    assert_near(got, wanted, 16)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flex"])  # which has no backward on CPU
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_any_layout(layout: Layout, options: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        views = [layout(torch.randn(shape).to(dtype)) for shape in [(2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8)]]
        given = [x.detach().requires_grad_() for x in views]
        plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
        for wants_lse in (False, True):
            if not solves(name, wants_lse, given, options):
                continue
            want = call("reference", wants_lse, plain, options)
            above = [layout(torch.randn_like(want[0].contiguous()))]
            above += [torch.randn(7, *x.shape[:2], dtype=x.dtype).permute(1, 2, 0) for x in want[1:]]
            got = torch.autograd.grad(call(name, wants_lse, given, options), given, above)
            for mine, theirs in zip(got, torch.autograd.grad(want, plain, above), strict=True):
                assert_near(mine, theirs, 64)


SMALL_TENSORS: dict[str, Callable[[Layout], dict[str, Any]]] = {
    "bias": lambda layout: {"bias": layout(torch.randn(2, 4, 7, 7))},
    "bias, causal": lambda layout: {"bias": layout(torch.randn(2, 4, 7, 7)), "mask": Mask.causal()},
    "bias of keys": lambda layout: {"bias": layout(torch.randn(2, 4, 1, 7))},
    "bias of queries": lambda layout: {"bias": layout(torch.randn(1, 1, 7, 1))},
    "dense": lambda layout: {"mask": Mask.dense(layout(torch.rand(2, 4, 7, 7) < 0.6))},
    "dense, bias": lambda layout: {
        "mask": Mask.dense(layout(torch.rand(2, 4, 7, 7) < 0.6)),
        "bias": layout(torch.randn(2, 4, 7, 7)),
    },
    "keep": lambda layout: {"mask": Mask.padding(layout(torch.rand(2, 7) < 0.6))},
    "documents": lambda layout: {"mask": Mask.documents(layout(torch.arange(14).view(2, 7) // 3))},
    "lengths": lambda layout: {"mask": Mask.padding(layout(torch.tensor([[6, 3]]))[0])},
    "sinks and slopes": lambda layout: {
        "sink_logits": layout(torch.randn(1, 4))[0],
        "alibi": layout(torch.rand(1, 4))[0],
    },
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", SMALL_TENSORS.values(), ids=SMALL_TENSORS)
@pytest.mark.parametrize("layout", ANY.values(), ids=ANY)
def test_any_layout_of_masks_and_scores(layout: Layout, make: Callable[[Layout], dict[str, Any]], name: str) -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    torch.manual_seed(1)
    options = make(layout)
    torch.manual_seed(1)
    plain = make(lambda x: x)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = [x.to(dtype) for x in (q, k, v)]
        for wants_lse in (False, True):
            if solves(name, wants_lse, tensors, options):
                want = call("reference", wants_lse, tensors, plain)
                for got, wanted in zip(call(name, wants_lse, tensors, options), want, strict=True):
                    assert_near(got, wanted, 16)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flex"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_int8_and_its_scales(layout: Layout, name: str) -> None:
    q = torch.randn(2, 4, 7, 8)
    k, v = (layout(torch.randint(-127, 127, (2, 2, 9, 8), dtype=torch.int8)) for _ in range(2))
    k_scale, v_scale = (layout(torch.rand(2, 2, 9, 1).expand(-1, -1, -1, 8) / 100)[..., 0] for _ in range(2))
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    for mask in (Mask.full(), Mask.causal()):
        options = {"mask": mask, "offset": 2}
        for wants_lse in (False, True):
            if not solves(name, wants_lse, [q, k, v], {**options, **scales}):
                continue
            plain = [q, *(x.float() * scale[..., None] for x, scale in ((k, k_scale), (v, v_scale)))]
            for got, want in zip(
                call(name, wants_lse, [q, k, v], {**options, **scales}),
                call("reference", wants_lse, plain, options),
                strict=True,
            ):
                # Queries and weights meet int8 in 16 bits.
                torch.testing.assert_close(got, want, rtol=0, atol=9 * 2**-14 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("layout", ANY.values(), ids=ANY)
def test_any_layout_of_tokens_for_flash_attn_and_varlen(layout: Layout) -> None:
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    views = [layout(x) for x in (q, k, v)]
    found = (flash_attn_func(*x, causal=True, return_attn_probs=True)[:2] for x in (views, (q, k, v)))
    for got, want in zip(*found, strict=True):
        assert_near(got, want, 16)
    packed = torch.randn(2, 7, 3, 4, 8)
    assert_near(flash_attn_qkvpacked_func(layout(packed)), flash_attn_qkvpacked_func(packed), 16)
    starts = torch.tensor([0, 3, 7, 14], dtype=torch.int32)
    flat, flat_views = ([x.flatten(0, 1) for x in (q, k, v)], [layout(x.flatten(0, 1)) for x in (q, k, v)])
    grouped = functools.partial(varlen_attn, enable_gqa=True)
    for function in (flash_attn_varlen_func, grouped):
        assert_near(function(*flat_views, starts, starts, 7, 7), function(*flat, starts, starts, 7, 7), 16)


@pytest.mark.parametrize("layout", ANY.values(), ids=ANY)
def test_any_layout_of_pieces_that_are_merged_and_of_weights(layout: Layout) -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    pieces = [qkv.attention_with_lse(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 4), slice(4, 9))]
    views = [(layout(out), layout(lse[..., None].expand(-1, -1, -1, 8))[..., 0]) for out, lse in pieces]
    for got, want in zip(qkv.merge(views), qkv.merge(pieces), strict=True):
        assert torch.equal(got, want)
    assert_near(qkv.attention_weights(layout(q), layout(k)), qkv.attention_weights(q, k), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_tokens_that_a_cache_appends(layout: Layout, dtype: torch.dtype) -> None:
    for make in (qkv.Int8KVCache,) if dtype is torch.int8 else (qkv.KVCache, lambda: qkv.SlidingKVCache(window=5)):
        views, plain = make(), make()
        with torch.no_grad():
            for length in (3, 1, 1, 4):
                k, v = (layout(torch.randn(2, 2, length, 8)) for _ in range(2))
                found = [views.append(k, v), plain.append(k.contiguous(), v.contiguous())]
                for got, want in zip(*found, strict=True):
                    assert torch.equal(got, want) if isinstance(got, Tensor) else got == want
