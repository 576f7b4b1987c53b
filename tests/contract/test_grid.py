"""One contract for all backends, and for the kernel with every instruction set that the machine has.

A new backend joins by being listed in `qkv.backends.BACKENDS`.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from budget import assert_within_budget
from cases import CASES, LONG_WINDOWS, Case, answer
from peer import compute, formula, gradient_terms, peer, visible
from solver import SOLVERS, Solver, solvable
from torch import Tensor

from qkv import kernels
from qkv.backends import flex, native
from qkv.problem import DTYPES, make_problem, trim


def hides_the_middle_key(case: Case) -> bool:
    """Whether the mask hides a key from some query. A bias of -inf hides nothing: it is a weight of 0."""
    return not visible(case)[..., case.lk // 2].all() and case.bias_shape is None


def hidden_from_all(case: Case) -> Tensor:
    """Keys (B, Lk) that padding hides, or that lie outside of what the interval shows to any query."""
    hidden = torch.ones(case.batch, case.lk, dtype=torch.bool)
    for b in range(case.batch):
        start, stop = case.mask().key_range(case.lq, case.lk, case.offset_of(b))
        hidden[b, start:stop] = False
    keep = case.rule().keep
    return hidden if keep is None else hidden | ~keep


def rows_to_fill_with_nan(solver: Solver, case: Case, j: int) -> Tensor:
    """The rows of the batch (B,) in which key j may be NaN. On a GPU, NaN spreads if any query sees the key."""
    return hidden_from_all(case)[:, j] | (solver.device == "cpu")


LSE = "sink logits need the lse, which torch's kernels"
NO_SOFTCAP = "scaled_dot_product_attention has no softcap"
NO_FP64 = "the kernel has no fp64"
NOT_EMPTY = "FlexAttention takes no empty tensors"
UNSOLVED = {
    ("native", "cpu", "forward"): {NO_FP64},
    ("sdpa", "cpu", "forward"): {NO_SOFTCAP},
    ("flex", "cpu", "forward"): {NOT_EMPTY},
    ("reference", "cpu", "forward"): set(),
    ("native", "cpu", "backward"): {NO_FP64},
    ("sdpa", "cpu", "backward"): {
        NO_SOFTCAP,
        f"{LSE} do not return with a bias that needs a gradient",
    },
    ("flex", "cpu", "backward"): {NOT_EMPTY, "FlexAttention has no backward on CPU"},
    ("reference", "cpu", "backward"): set(),
    ("native", "cuda", "forward"): {NO_FP64, "the kernel runs on CPU"},
    ("sdpa", "cuda", "forward"): {NO_SOFTCAP, f"{LSE} return on CPU only"},
    ("flex", "cuda", "forward"): {NOT_EMPTY, "FlexAttention's kernels have no fp64"},
    ("reference", "cuda", "forward"): set(),
    ("native", "cuda", "backward"): {NO_FP64, "the kernel runs on CPU"},
    ("sdpa", "cuda", "backward"): {
        NO_SOFTCAP,
        f"{LSE} return on CPU only",
        f"{LSE} do not return with a bias that needs a gradient",
    },
    ("flex", "cuda", "backward"): {NOT_EMPTY, "FlexAttention's kernels have no fp64"},
    ("reference", "cuda", "backward"): set(),
}


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_unsolved_cases_have_one_of_the_listed_reasons(solver: Solver, direction: str) -> None:
    found = {
        reason
        for dtype in DTYPES
        for case in CASES
        for reason in solver.reasons(case, dtype, needs_grad=direction == "backward")
    }
    if solver.backend is native and kernels.absence() is not None:
        found -= {kernels.absence()}
    assert found == UNSOLVED.get((solver.backend.NAME, solver.device, direction), set())


@solvable(CASES, DTYPES)
def test_output_is_as_near_the_oracle_as_torch(solver: Solver, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    out = solver.attention(case, inputs)
    assert out.dtype == dtype
    assert_within_budget(out, answer(case, dtype).out, peer(case, dtype).out, case.name)


OF_FLEX = [case for case in CASES if not Solver(flex).reasons(case)]
TRACED = [case.name for case in OF_FLEX[::10]]
"""cases traced in `make test`, in fp32, half a second each; `make test-all` traces the others"""


@pytest.mark.parametrize(
    ("case", "dtype", "wants_lse"),
    [
        pytest.param(
            *(case, dtype, wants_lse),
            marks=() if case.name in TRACED and dtype == torch.float32 and not wants_lse else pytest.mark.long,
            id=f"{case}-{str(dtype)[6:]}{'-lse' * wants_lse}",
        )
        for case in OF_FLEX
        for dtype in DTYPES
        for wants_lse in (False, True)
    ],
)
def test_flex_attention_gives_the_same_bits_as_dynamo_traces_it(
    case: Case, dtype: torch.dtype, wants_lse: bool
) -> None:
    """On a CPU as users call it, with Dynamo, unlike in all other tests (solver.py)."""
    solver, inputs = Solver(flex), case.inputs(dtype)
    solve = solver.attention_with_lse if wants_lse else solver.attention
    got = solve(case, inputs)
    with solver.at_work():
        want = solve(case, inputs)
    assert all(map(torch.equal, got, want))


@solvable(CASES, [torch.float32, torch.bfloat16], wants_lse=True)
def test_lse_is_as_near_the_oracle_as_torch(solver: Solver, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    out, lse = solver.attention_with_lse(case, inputs)
    assert lse.dtype == torch.float32
    assert_within_budget(out, answer(case, dtype).out, peer(case, dtype).out, case.name)
    assert_within_budget(lse, answer(case, dtype).lse, peer(case, dtype).lse, case.name)


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
    error = (peer(case, dtype).out.double() - out).abs().max() / out.abs().max().clamp(min=1e-300)
    relative = max(torch.finfo(dtype).eps, float(error))
    return GradientOracle(
        upstream,
        exact=gradients(lambda leaves: formula(case, leaves)[0], wide, upstream.double()),
        torch=gradients(lambda leaves: compute(case, leaves), inputs, upstream),
        rounding={
            name: relative * float(terms.abs().max()) for name, terms in gradient_terms(case, inputs, upstream).items()
        },
    )


@solvable(CASES, DTYPES, needs_grad=True)
def test_gradients_are_as_near_the_oracle_as_torch(solver: Solver, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    oracle = gradient_oracle(case, dtype)
    for name, grad in gradients(lambda leaves: solver.attention(case, leaves), inputs, oracle.upstream).items():
        what = f"{case.name}, gradient of {name}"
        assert_within_budget(grad, oracle.exact[name], oracle.torch[name], what, oracle.rounding[name])


@solvable(CASES, [torch.float32, torch.bfloat16])
def test_views_between_poisoned_neighbours_are_as_near_the_oracle(
    solver: Solver, dtype: torch.dtype, case: Case
) -> None:
    views = case.inputs(dtype, views=True)
    out = solver.attention(case, views)
    assert_within_budget(out, answer(case, dtype).out, peer(case, dtype).out, case.name)


@solvable(CASES, [torch.float32, torch.bfloat16])
def test_masked_keys_have_no_influence_even_if_they_are_nan(solver: Solver, dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    weights = answer(case, dtype).weights.unflatten(1, (case.kv_heads, -1))
    clean = solver.attention(case, inputs)
    for j in (0, case.lk // 2, case.lk - 1):
        poisoned = {**inputs, "k": inputs["k"].clone(), "v": inputs["v"].clone()}
        rows = rows_to_fill_with_nan(solver, case, j)
        poisoned["k"][rows, :, j] = torch.nan
        poisoned["v"][rows, :, j] = torch.inf
        out = solver.attention(case, poisoned)
        sees = (weights[..., j] > 0).flatten(1, 2)
        if "bias" in inputs:
            sees = sees | (inputs["bias"] == -torch.inf).expand(case.batch, case.heads, case.lq, case.lk)[..., j]
        sees = sees & rows[:, None, None]
        assert torch.equal(out[~sees], clean[~sees])
        assert not out[sees].isfinite().any()


@solvable([case for case in CASES if hides_the_middle_key(case)], [torch.float32], needs_grad=True)
def test_masked_keys_get_exactly_no_gradient_even_if_they_are_nan(
    solver: Solver, dtype: torch.dtype, case: Case
) -> None:
    inputs = case.inputs(dtype)
    weights = answer(case, dtype).weights.unflatten(1, (case.kv_heads, -1))
    j = case.lk // 2
    masked_rows = ~(weights[..., j] > 0).flatten(1, 2)
    rows = rows_to_fill_with_nan(solver, case, j)
    inputs["k"][rows, :, j] = torch.nan
    inputs["v"][rows, :, j] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = solver.attention(case, leaves)
    grads = torch.autograd.grad(out[masked_rows].sum(), [leaves["q"], leaves["k"], leaves["v"]], allow_unused=True)
    for grad in grads:
        assert grad is None or grad.isfinite().all()
    for grad in grads[1:]:
        assert grad is None or not grad[:, :, j].any()


@pytest.mark.parametrize("case", LONG_WINDOWS, ids=str)
def test_long_windows_are_computed_in_blocks(case: Case) -> None:
    from qkv.backends import blocks

    assert blocks.plan(trim(make_problem("test", **case.inputs(torch.float32), **case.options()))) is not None
