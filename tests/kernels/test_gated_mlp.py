"""Gated MLPs by the kernel: the contract of `fast_gated_mlp`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from solver import library
from torch import Tensor

from qkv import kernels
from qkv.kernels import Projection
from qkv.kernels.linear import MOST_ROWS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (3, 8, 5), (2, 40, 33), (5, 64, 64), (16, 33, 300), (9, 70, 17)]
"""rows, width, features"""
BY_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

pytestmark = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_gated_mlp is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)
each_isa = pytest.mark.parametrize("isa", kernels.supported_isas() or ["none"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(
    rows: int, width: int, features: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Projection, Projection, Projection]:
    """x, gate, up and down."""

    def projection(out: int, into: int, seed: int) -> Projection:
        weight = numbers(out, into, dtype=dtype, seed=seed) / into**0.5
        return weight, numbers(out, dtype=dtype, seed=seed + 1) if bias else None

    x = numbers(rows, width, dtype=dtype, seed=0)
    return x, projection(features, width, 1), projection(features, width, 3), projection(width, features, 5)


def product(x: Tensor, projection: Projection) -> Tensor:
    out = kernels.fast_linear(x, *projection)
    assert out is not None
    return out


def composed(x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    return product(BY_TORCH[activation](product(x, gate)) * product(x, up), down)


def mlp(*arguments: Any) -> Tensor:
    out = kernels.fast_gated_mlp(*arguments)
    assert out is not None
    return out


def joined(gate: Projection, up: Projection) -> Projection:
    bias = None if gate[1] is None or up[1] is None else torch.cat([gate[1], up[1]])
    return torch.cat([gate[0], up[0]]), bias


@each_isa
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_its_bits_are_those_of_its_parts(isa: str, dtype: torch.dtype, bias: bool) -> None:
    """With an activation that needs no rounding."""
    with kernels.use(library(isa)):
        for sizes in SIZES:
            x, gate, up, down = made(*sizes, dtype, bias)
            want = composed(x, gate, up, down, "relu")
            assert torch.equal(mlp(x, gate, up, down, "relu"), want)
            assert torch.equal(mlp(x, joined(gate, up), None, down, "relu"), want)


@each_isa
@each_dtype
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations_are_as_near_to_fp64_as_torchs(isa: str, dtype: torch.dtype, activation: str) -> None:
    """Of numbers from -30 to 30, one at a time, and where they are not finite."""
    x = torch.cat([torch.linspace(-30, 30, 901), torch.linspace(-1, 1, 123)]).to(dtype)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 88.5, -88.5, 104, -104, 0]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    with kernels.use(library(isa)):
        got = torch.cat([one_by_one(part, one, activation) for part in x.split(128)])
        assert_within_budget(got, BY_TORCH[activation](x.double()), BY_TORCH[activation](x), activation)
        small = x.abs() <= 1
        assert_within_budget(
            got[small], BY_TORCH[activation](x[small].double()), BY_TORCH[activation](x[small]), activation
        )
        found = torch.cat([one_by_one(number[None], one, activation) for number in special])
        want = BY_TORCH[activation](special.double()).to(dtype)  # in fp32, torch's gelu of inf is NaN on some CPUs
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-5, atol=1e-30)


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_are_rounded_before_they_are_multiplied(isa: str, dtype: torch.dtype) -> None:
    """As by torch's operators. Ours are 2^-22 off at most, which another rounding shows less than once in 1000."""
    gate, up = numbers(1000, dtype=dtype, seed=0), numbers(1000, dtype=dtype, seed=1)
    one, identity = torch.ones(1, 1, dtype=dtype), torch.eye(1000, dtype=dtype)
    with kernels.use(library(isa)):
        got = mlp(one, (gate[:, None], None), (up[:, None], None), (identity, None), "silu")
    assert (got[0] != F.silu(gate) * up).sum() <= 5


def one_by_one(x: Tensor, one: Tensor, activation: str) -> Tensor:
    """The activation of each number, as an MLP of one input whose features are the outputs."""
    count = len(x)
    identity: Projection = torch.eye(count, dtype=x.dtype), None
    out = mlp(one, (x[:, None], None), (one.expand(count, 1).contiguous(), None), identity, activation)
    return out[0]


@each_isa
@each_dtype
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    x, gate, up, down = made(MOST_ROWS, 70, 700, dtype)
    with kernels.use(library(isa)):
        alone = torch.cat([mlp(row[None], gate, up, down, "silu") for row in x])
        for rows in (1, 3, MOST_ROWS):
            for count in (1, 3):
                torch.set_num_threads(count)
                try:
                    assert torch.equal(mlp(x[-rows:], gate, up, down, "silu"), alone[-rows:])
                finally:
                    torch.set_num_threads(threads)
        assert torch.equal(mlp(x.view(2, 8, 70), gate, up, down, "silu"), alone.view(2, 8, 70))
        assert torch.equal(mlp(x[:, None].expand(-1, 1, -1), gate, up, down, "silu")[:, 0], alone)
        apart = torch.full((MOST_ROWS, 80), torch.nan, dtype=dtype)
        apart[:, 3:73] = x
        assert torch.equal(mlp(apart[:, 3:73], gate, up, down, "silu"), alone)
        wider = torch.full((700, 90), torch.nan, dtype=dtype)
        wider[:, 7:77] = gate[0]
        assert torch.equal(mlp(x, (wider[:, 7:77], gate[1]), up, down, "silu"), alone)


def test_results_may_have_another_width() -> None:
    x, gate, up, _ = made(3, 8, 5, torch.float32)
    down = (torch.randn(11, 5), None)
    assert torch.equal(mlp(x, gate, up, down, "relu"), composed(x, gate, up, down, "relu"))
    assert mlp(x[0], gate, up, down, "relu").shape == (11,)


def test_what_does_not_fit_is_refused() -> None:
    x, gate, up, down = made(3, 8, 6, torch.float32)
    halves = (gate[0][:5], None)
    for arguments in (
        (torch.randn(17, 8), gate, up, down),
        (x[:0], gate, up, down),
        (x[:, :7], gate, up, down),
        (x.bfloat16(), gate, up, down),
        (x.double(), gate, up, down),
        (x, (gate[0].bfloat16(), None), up, down),
        (x, gate, (up[0][:5], None), down),
        (x, gate, up, (down[0][:, :5], None)),
        (x, halves, None, (down[0][:, :2], None)),
        (x, gate, None, down),
        (x, (gate[0], gate[1].double()), up, down),  # type: ignore[union-attr]
        (x, gate, up, (down[0], down[1][:3])),  # type: ignore[index]
        (x, (gate[0].mT.contiguous().mT, None), up, down),
        (x.to("meta"), gate, up, down),
        (x, (gate[0].to("meta"), None), up, down),
    ):
        assert kernels.fast_gated_mlp(*arguments, "relu") is None
    with kernels.use(kernels.loaded()._replace(fast_gated_mlp=None)):
        assert kernels.fast_gated_mlp(x, gate, up, down, "relu") is None


def test_without_scratch_memory_it_is_an_error_of_the_call() -> None:
    x, gate, up, down = made(3, 8, 6, torch.float32)
    with (
        kernels.use(kernels.loaded()._replace(fast_gated_mlp=lambda *_: 1)),
        pytest.raises(MemoryError, match=r"not enough scratch memory for \(3, 8\) rows; pass fewer"),
    ):
        kernels.fast_gated_mlp(x, gate, up, down, "relu")
