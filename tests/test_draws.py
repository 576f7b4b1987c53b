"""Dropout that is drawn by place: pieces of a call drop what the whole drops, and the kernel what the formula does."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from solver import SOLVERS, Solver
from torch import Tensor

import qkv
from qkv import Mask
from qkv.scores import Draw, new_seed

SEED = torch.tensor([2**62 + 12345])
BATCH, HEADS, KV_HEADS, LQ, LK = 3, 6, 2, 75, 150


def kept(backend: str, heads: slice, queries: slice, keys: slice, offset: Any = 75, seed: Tensor = SEED) -> Tensor:
    """The weights of a part of a call, of equal scores: 0 where they are dropped."""
    count = keys.stop - keys.start
    groups = slice(heads.start * KV_HEADS // HEADS, (heads.stop - 1) * KV_HEADS // HEADS + 1)
    q = torch.zeros(BATCH, heads.stop - heads.start, queries.stop - queries.start, 8)
    k, v = torch.zeros(BATCH, groups.stop - groups.start, count, 8), torch.eye(count)
    return qkv.attention(
        q,
        k,
        v.expand(*k.shape[:2], -1, -1),
        offset=offset + queries.start - keys.start,
        dropout=0.3,
        draw=Draw(seed, heads.start, keys.start),
        backend=backend,
    )


def parts() -> Iterator[tuple[slice, slice, slice]]:
    heads = [slice(0, 6), slice(0, 3), slice(3, 6), slice(4, 5)]
    queries = [slice(0, 75), slice(0, 2), slice(40, 41), slice(30, 75)]
    keys = [slice(0, 150), slice(0, 1), slice(37, 150), slice(96, 110)]
    return product(heads, queries, keys)


@pytest.mark.parametrize("offset", [0, 75, torch.tensor([0, 75, 31])], ids=str)
@pytest.mark.parametrize("solver", [one for one in SOLVERS if one.backend.NAME in ("native", "reference")], ids=str)
def test_the_kernel_drops_what_the_formula_does_and_a_part_what_the_whole_does(solver: Solver, offset: Any) -> None:
    whole = kept("reference", slice(0, 6), slice(0, 75), slice(0, 150), offset) > 0
    assert abs(whole.float().mean() - 0.7) < 5 * (0.21 / whole.numel()) ** 0.5
    for heads, queries, keys in parts():
        got = kept(solver.backend.NAME, heads, queries, keys, offset)
        assert torch.equal(got > 0, whole[:, heads, queries, keys]), (heads, queries, keys)
        want = 1 / 0.7 / (keys.stop - keys.start)
        torch.testing.assert_close(got, torch.where(got > 0, want, 0.0))


def test_seeds_rows_heads_and_queries_draw_apart() -> None:
    whole = slice(0, 6), slice(0, 75), slice(0, 150)
    one, other = (kept("native", *whole, seed=seed) > 0 for seed in (SEED, SEED + 1))
    shifted = [one.roll(1, dim) for dim in range(4)]
    for second in (other, *shifted):
        both = (one & second).float().mean()
        assert abs(both - 0.49) < 5 * (0.49 * 0.51 / one.numel()) ** 0.5


@pytest.mark.parametrize("mask", [Mask.causal(), Mask.causal(20), Mask.sliding(16)], ids=str)
def test_gradients_go_through_the_weights_that_are_kept(mask: Mask) -> None:
    """The reference reads fewer keys than it is given, and draws by their places all the same."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 90, 8, requires_grad=True) for heads in (4, 2, 2)]
    direction = torch.randn(2, 4, 20, 8)

    def run(backend: str) -> list[Tensor]:
        q, k, v = inputs
        options: Any = {"mask": mask, "offset": 40, "dropout": 0.4, "draw": Draw(SEED, 3, 1000), "backend": backend}
        out = qkv.attention(q[:, :, 40:60], k, v, **options)
        return [out, *torch.autograd.grad(out, inputs, direction)]

    for got, want in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_backends_whose_draws_are_torchs_refuse_one() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    found = qkv.explain(q, q, q, dropout=0.5, draw=Draw(new_seed()))
    assert found.chosen == "reference"
    assert found.reasons["sdpa"] == ["scaled_dot_product_attention has no draw"]
    assert qkv.explain(q, q, q, draw=Draw(new_seed())).chosen == "sdpa"  # of no dropout, it says nothing


def test_a_draw_has_a_seed() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(
        TypeError,
        match=r"attention: draw must be a qkv.scores.Draw with a seed, .* got one with seed None. Use Draw\(qkv",
    ):
        qkv.attention(q, q, q, dropout=0.5, draw=Draw(None))
    with pytest.raises(TypeError, match=r"got int"):
        qkv.attention(q, q, q, dropout=0.5, draw=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"int64 of shape \(1,\) on the CPU; got torch.float32 of shape \(2,\)"):
        qkv.attention(q, q, q, dropout=0.5, draw=Draw(torch.zeros(2)))
