"""One contract for all backends. A new backend joins by being listed in `qkv.backends.BACKENDS`."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from budget import assert_within_budget
from cases import CASES, LONG_WINDOWS, Case, answer
from peer import compute, formula, gradient_terms
from torch import Tensor

import qkv
from qkv.backends import BACKENDS, Backend
from qkv.problem import DTYPES, pose, trim

WITHOUT_NATIVE = [backend for backend in BACKENDS if backend.NAME != "native"]
each_backend = pytest.mark.parametrize("backend", WITHOUT_NATIVE, ids=lambda backend: backend.NAME)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def require(backend: Backend, case: Case, inputs: dict[str, Tensor], **wants: bool) -> None:
    """Skips with the backend's own words where it cannot solve the case."""
    reasons = backend.why_not(trim(pose("test", **inputs, **case.options(), **wants)))
    if reasons:
        pytest.skip("; ".join(reasons))


@each_case
@each_dtype
@each_backend
def test_output_is_as_near_the_oracle_as_torch(backend: Backend, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    require(backend, case, inputs)
    out = qkv.attention(**inputs, **case.options(), backend=backend.NAME)
    assert out.dtype == dtype
    assert_within_budget(out, answer(case, dtype).out, compute(case, inputs), case.name)


@each_case
@each_backend
def test_lse_is_as_near_the_oracle_as_torch(backend: Backend, case: Case) -> None:
    inputs = case.inputs(torch.float32)
    require(backend, case, inputs, wants_lse=True)
    out, lse = qkv.attention_with_lse(**inputs, **case.options(), backend=backend.NAME)
    assert_within_budget(out, answer(case, torch.float32).out, compute(case, inputs), case.name)
    assert_within_budget(lse, answer(case, torch.float32).lse, formula(case, inputs)[1], case.name)


def gradients(
    run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    found = torch.autograd.grad(run(leaves), list(leaves.values()), upstream, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


class GradientOracle(NamedTuple):
    upstream: Tensor
    exact: dict[str, Tensor]
    torch: dict[str, Tensor]
    rounding: dict[str, float]
    """Bound of the rounding error: the terms of each gradient, times the relative error that torch's output has."""


@cache
def gradient_oracle(case: Case, dtype: torch.dtype) -> GradientOracle:
    inputs = case.inputs(dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(case.batch, case.heads, case.lq, case.value_width, generator=generator).to(dtype)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    out = answer(case, dtype).out
    error = (compute(case, inputs).double() - out).abs().max() / out.abs().max().clamp(min=1e-300)
    relative = max(torch.finfo(dtype).eps, float(error))
    return GradientOracle(
        upstream,
        exact=gradients(lambda leaves: formula(case, leaves)[0], wide, upstream.double()),
        torch=gradients(lambda leaves: compute(case, leaves), inputs, upstream),
        rounding={
            name: relative * float(terms.abs().max()) for name, terms in gradient_terms(case, inputs, upstream).items()
        },
    )


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@each_backend
def test_gradients_are_as_near_the_oracle_as_torch(backend: Backend, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    require(backend, case, {name: tensor.requires_grad_() for name, tensor in case.inputs(dtype).items()})
    oracle = gradient_oracle(case, dtype)
    run = partial(qkv.attention, **case.options(), backend=backend.NAME)
    for name, grad in gradients(lambda leaves: run(**leaves), inputs, oracle.upstream).items():
        what = f"{case.name}, gradient of {name}"
        assert_within_budget(grad, oracle.exact[name], oracle.torch[name], what, oracle.rounding[name])


@each_case
@each_backend
def test_views_between_poisoned_neighbours_give_the_same_bits(backend: Backend, case: Case) -> None:
    plain, views = case.inputs(torch.float32), case.inputs(torch.float32, views=True)
    require(backend, case, plain)
    options = {**case.options(), "backend": backend.NAME}
    torch.testing.assert_close(qkv.attention(**views, **options), qkv.attention(**plain, **options), rtol=0, atol=1e-6)


@each_case
@each_backend
def test_masked_keys_have_no_influence_even_where_they_hold_nan(backend: Backend, case: Case) -> None:
    inputs = case.inputs(torch.float32)
    require(backend, case, inputs)
    weights = answer(case, torch.float32).weights.unflatten(1, (case.kv_heads, -1))
    options = {**case.options(), "backend": backend.NAME}
    clean = qkv.attention(**inputs, **options)
    for j in (0, case.lk // 2, case.lk - 1):
        poisoned = {**inputs, "k": inputs["k"].clone(), "v": inputs["v"].clone()}
        poisoned["k"][:, :, j] = torch.nan
        poisoned["v"][:, :, j] = torch.inf
        out = qkv.attention(**poisoned, **options)
        sees = (weights[..., j] > 0).flatten(1, 2)
        if "bias" in inputs:
            sees = sees | (inputs["bias"] == -torch.inf).expand(case.batch, case.heads, case.lq, case.lk)[..., j]
        torch.testing.assert_close(out[~sees], clean[~sees], rtol=0, atol=1e-6)
        assert not out[sees].isfinite().any()


@each_case
@each_backend
def test_masked_keys_get_exactly_no_gradient_even_where_they_hold_nan(backend: Backend, case: Case) -> None:
    inputs = case.inputs(torch.float32)
    weights = answer(case, torch.float32).weights.unflatten(1, (case.kv_heads, -1))
    j = case.lk // 2
    blind = ~(weights[..., j] > 0).flatten(1, 2)
    if not blind.any():
        pytest.skip("every query sees the key")
    inputs["k"][:, :, j] = torch.nan
    inputs["v"][:, :, j] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    require(backend, case, leaves)
    if "bias" in inputs:
        pytest.skip("a bias hides nothing: its keys take part, with weight 0")
    out = qkv.attention(**leaves, **case.options(), backend=backend.NAME)
    grads = torch.autograd.grad(out[blind].sum(), [leaves["q"], leaves["k"], leaves["v"]], allow_unused=True)
    for grad in grads:
        assert grad is None or grad.isfinite().all()
    for grad in grads[1:]:
        assert grad is None or not grad[:, :, j].any()


@each_backend
def test_backend_solves_some_cases(backend: Backend) -> None:
    solved = [
        case for case in CASES if not backend.why_not(trim(pose("t", **case.inputs(torch.float32), **case.options())))
    ]
    assert len(solved) > len(CASES) // 2


@pytest.mark.parametrize("case", LONG_WINDOWS, ids=str)
def test_long_windows_take_the_path_in_blocks(case: Case) -> None:
    from qkv.backends import blocks

    assert blocks.plan(trim(pose("test", **case.inputs(torch.float32), **case.options()))) is not None
