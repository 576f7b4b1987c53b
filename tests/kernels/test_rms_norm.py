"""Norms by the kernel: the contract of `fast_rms_norm`."""

from collections.abc import Callable

import pytest
import torch
from solver import library
from torch import Tensor

from qkv import kernels
from qkv.kernels import Gain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 7, 8, 15, 16, 17, 33, 64, 96, 127, 576, 1000]
EPS = 1e-5

has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_rms_norm is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)
each_isa = pytest.mark.parametrize("isa", kernels.supported_isas() or ["none"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = has_fast_path


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(x: Tensor) -> Tensor:
    """The norm without gains, in fp32 by torch's operators."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


BY_TORCH: dict[Gain, Callable[[Tensor, Tensor], Tensor]] = {
    Gain.ROUNDED: lambda x, gains: gains * wide(x).to(x.dtype),
    Gain.WIDENED: lambda x, gains: (wide(x) * gains.float()).to(x.dtype),
    Gain.ONE_MORE: lambda x, gains: (wide(x) * (1.0 + gains.float())).to(x.dtype),
}


def normalised(x: Tensor, gains: Tensor | None, gain: Gain = Gain.WIDENED) -> Tensor:
    out = kernels.fast_rms_norm(x, gains, EPS, gain)
    assert out is not None
    return out


@each_isa
@each_dtype
@pytest.mark.parametrize("gain", Gain)
def test_bits_are_those_of_torchs_operators_where_squares_add_up_exactly(
    isa: str, dtype: torch.dtype, gain: Gain
) -> None:
    with kernels.use(library(isa)):
        for width in WIDTHS:
            x = torch.randint(-8, 9, (3, 2, width), generator=torch.Generator().manual_seed(width)).to(dtype)
            gains = numbers(width, dtype=dtype)
            assert torch.equal(normalised(x, gains, gain), BY_TORCH[gain](x, gains))
            assert torch.equal(normalised(x, None, gain), wide(x).to(dtype))


@each_isa
@each_dtype
@pytest.mark.parametrize("gain", Gain)
def test_norms_are_those_of_fp64_up_to_the_rounding_of_a_sum(isa: str, dtype: torch.dtype, gain: Gain) -> None:
    """Terms of the sum are positive, so each addition is off by at most a rounding of all, which a root halves."""
    with kernels.use(library(isa)):
        for width in WIDTHS:
            x, gains = numbers(5, width, dtype=dtype), numbers(width, dtype=dtype, seed=1)
            y = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
            want = y * (gains.double() + (gain is Gain.ONE_MORE))
            additions = width / 16 + 8 + 16  # in a lane, of lanes, of vectors
            in_f32 = (additions / 2 + 6) * 2.0**-24
            of_result = torch.finfo(dtype).eps / 2 * (2 if gain is Gain.ROUNDED else 1)
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (1 + gains.double().abs())
            error = (normalised(x, gains, gain).double() - want).abs()
            assert (error <= want.abs() * 1.01 * (in_f32 + of_result) + smallest).all(), width


@each_dtype
def test_a_row_has_the_same_bits_alone_in_any_layout_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for width in (7, 64, 1000):
        x, gains = numbers(40, 3, width, dtype=dtype), numbers(width, dtype=dtype)
        want = torch.stack([torch.stack([normalised(row, gains) for row in rows]) for rows in x])
        strided = torch.full((40, 3, width + 5), torch.nan, dtype=dtype)
        strided[..., 2:-3] = x
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), strided[..., 2:-3], x[:, None]):
            for count in (1, 3):
                torch.set_num_threads(count)
                try:
                    got = normalised(given, gains)
                finally:
                    torch.set_num_threads(threads)
                assert torch.equal(got.view(want.shape), want) and got.is_contiguous()


@each_dtype
@pytest.mark.parametrize("gain", Gain)
def test_numbers_that_are_not_finite_are_torchs(dtype: torch.dtype, gain: Gain) -> None:
    x, gains = numbers(6, 9, dtype=dtype), numbers(9, dtype=dtype)
    for row, number in enumerate((torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, 0.0)):
        x[row, row] = number
    x[4] = 0
    gains[7] = torch.inf
    got, want = normalised(x, gains, gain), BY_TORCH[gain](x, gains)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    x, gains = torch.randn(3, 8), torch.randn(8)
    freed = torch.randn(8)
    freed.untyped_storage().resize_(0)
    for one, other in (
        (x.double(), gains.double()),
        (x.bfloat16(), gains),
        (x, gains[:7]),
        (x, gains[:1]),
        (x, gains[None]),
        (x, torch.randn(8, 2)[:, 0]),
        (x, gains.to("meta")),
        (x.to("meta"), gains),
        (x, freed),
        (x[:0], gains),
        (torch.tensor(1.0), gains),
        (x.int(), gains.int()),
    ):
        assert kernels.fast_rms_norm(one, other, EPS, Gain.WIDENED) is None
    with kernels.use(kernels.loaded()._replace(fast_rms_norm=None)):
        assert kernels.fast_rms_norm(x, gains, EPS, Gain.WIDENED) is None
