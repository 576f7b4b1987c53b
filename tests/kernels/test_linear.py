"""Products of few rows by the kernel: the contract of `fast_linear` and of the operator ``qkv::linear``."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from solver import library
from torch import Tensor

from qkv import kernels
from qkv.kernels.linear import MOST_ROWS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 7, 8, 15, 17, 31, 32, 33, 64, 97, 255, 256, 257, 512, 577]
"""in_features: primes, and one more or less than vectors, lines and chains of sums."""
FEATURES = [1, 5, 6, 7, 12, 31]
"""out_features: one more or less than what a thread takes."""

has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_project is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)
each_isa = pytest.mark.parametrize("isa", kernels.supported_isas() or ["none"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.qkv.linear(x, weight, bias)
    return out


def by_fast_path(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = kernels.fast_linear(x, weight, bias)
    assert out is not None
    return out


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {"operator": operator, "fast path": by_fast_path}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp64, by multiplying and adding up."""
    out = (x.double()[..., None, :] * weight.double()).sum(-1)
    return out if bias is None else out + bias.double()


def rounding_of_sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """What fp32 sums of these terms are off at most, in any order: a rounding of all terms for each addition.

    Additions follow each other in chains of 256 columns, 64 at most in a lane, one for each chain, and those of lanes.
    """
    additions = 64 + x.shape[-1] / 256 + 5
    terms = exact(x.abs(), weight.abs(), None if bias is None else bias.abs()).max().item()
    return additions * torch.finfo(torch.float32).eps / 2 * terms


@has_fast_path
@each_isa
@each_dtype
@pytest.mark.parametrize("way", WAYS)
def test_products_are_those_of_fp64(isa: str, dtype: torch.dtype, way: str) -> None:
    with kernels.use(library(isa)):
        for index, width in enumerate(WIDTHS):
            for features in FEATURES[index % 3 :: 3]:
                rows = 1 + (width + features) % MOST_ROWS
                x, weight = numbers(rows, width, dtype=dtype), numbers(features, width, dtype=dtype, seed=1)
                for bias in (None, numbers(features, dtype=dtype, seed=2)):
                    got, want = WAYS[way](x, weight, bias), exact(x, weight, bias)
                    assert got.dtype == dtype
                    # No peer: torch's own product in 16 bits rounds as it likes.
                    allowance = rounding_of_sums(x, weight, bias)
                    assert_within_budget(got, want, want, f"{rows}x{width}x{features}", allowance)


@has_fast_path
@each_isa
@each_dtype
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    with kernels.use(library(isa)):
        for width in (5, 300, 1100):
            weight, bias = numbers(133, width, dtype=dtype), numbers(133, dtype=dtype)
            x = numbers(MOST_ROWS, width, dtype=dtype, seed=1)
            alone = torch.cat([by_fast_path(row, weight, bias)[None] for row in x])
            for rows in range(1, MOST_ROWS + 1):
                for count in (1, 3):
                    torch.set_num_threads(count)
                    try:
                        got = by_fast_path(x[-rows:], weight, bias)
                    finally:
                        torch.set_num_threads(threads)
                    assert torch.equal(got, alone[-rows:]), (rows, count)
            # Nor do they depend on the other features.
            assert torch.equal(by_fast_path(x, weight[40:71], bias[40:71]), alone[:, 40:71])


@has_fast_path
@each_isa
@pytest.mark.parametrize("way", WAYS)
def test_rows_may_be_strided_and_neighbours_are_neither_read_nor_written(isa: str, way: str) -> None:
    for dtype in DTYPES:
        for width in (3, 32, 70):
            poisoned = [
                torch.full(shape, torch.nan, dtype=dtype) for shape in ((4, 3, width + 5), (11, width + 9), (40,))
            ]
            x, weight, bias = poisoned[0][:, 1, 2:-3], poisoned[1][2:9, 4:-5], poisoned[2][8:15]
            for seed, tensor in enumerate((x, weight, bias)):
                tensor.copy_(numbers(*tensor.shape, dtype=dtype, seed=seed))
            with kernels.use(library(isa)):
                got = WAYS[way](x, weight, bias)
                assert torch.equal(got, WAYS[way](x.contiguous(), weight.contiguous(), bias.contiguous()))
                assert torch.equal(WAYS[way](x[:, None], weight, bias), got[:, None])
                assert torch.equal(WAYS[way](x[2], weight, bias), got[2])
                assert torch.equal(WAYS[way](x[None].expand(3, 4, width)[:, 1], weight, bias), got[1].expand(3, 7))
            assert all(int(tensor.isnan().sum()) for tensor in poisoned) and not got.isnan().any()


@has_fast_path
@each_isa
def test_results_are_written_within_their_rows(isa: str) -> None:
    call = library(isa).fast_project
    assert call is not None
    for dtype in DTYPES:
        for out_dtype in (dtype, torch.float32):
            x, weight = numbers(5, 40, dtype=dtype), numbers(19, 40, dtype=dtype)
            memory = torch.full((7, 30), torch.nan, dtype=out_dtype)
            out = memory[1:6, 4:23]
            assert call(x, weight, None, out, 2) == 0
            assert int(memory.isnan().sum()) == memory.numel() - out.numel()
            with kernels.use(library(isa)):
                assert torch.equal(out.to(dtype), by_fast_path(x, weight, None))


@has_fast_path
@each_isa
@each_dtype
def test_nan_and_inf_pass_through_as_in_torch(isa: str, dtype: torch.dtype) -> None:
    inf = torch.inf
    with kernels.use(library(isa)):
        for width in (3, 40, 600):
            for value in (torch.nan, inf, -inf):
                for where in ("x", "weight", "bias"):
                    x, weight = numbers(4, width, dtype=dtype), numbers(9, width, dtype=dtype, seed=1)
                    bias = numbers(9, dtype=dtype, seed=2)
                    {"x": x[2], "weight": weight[3], "bias": bias}[where][width // 2 if where != "bias" else 5] = value
                    got, want = by_fast_path(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
                    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
                    assert torch.equal(got[got.isinf()].double(), want[want.isinf()])
            ones, zeros = torch.full((2, width), inf, dtype=dtype), torch.zeros(3, width, dtype=dtype)
            assert by_fast_path(ones, zeros, None).isnan().all()


@has_fast_path
def test_tensors_that_do_not_fit_are_refused() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    for strided in (torch.randn(8, 3).mT, torch.randn(2, 2, 3, 8).transpose(0, 1)):
        got = kernels.fast_linear(strided, weight, bias)
        assert got is not None and torch.equal(got, kernels.fast_linear(strided.contiguous(), weight, bias))
    freed = torch.randn(5, 8)
    freed.untyped_storage().resize_(0)
    for other in (
        (torch.randn(3, 7), weight, bias),
        (x, weight, torch.randn(4)),
        (x, weight, torch.randn(5, 1)),
        (x, weight.double(), bias),
        (x.double(), weight.double(), bias.double()),
        (x.bfloat16(), weight, bias),
        (x, weight.bfloat16(), bias),
        (x, weight, bias.bfloat16()),
        (x, torch.randn(8, 5).mT, bias),
        (torch.randn(0, 8), weight, bias),
        (torch.randn(3, 0), torch.randn(5, 0), bias),
        (x, torch.randn(1, 5, 8), bias),
        (x.to(torch.int32), weight, bias),
        (x.to(torch.complex64), weight, bias),
        (x.to("meta"), weight, bias),
        (x, weight.to_sparse(), bias),
        (x, freed, bias),
    ):
        assert kernels.fast_linear(*other) is None


def test_the_operator_takes_what_torchs_product_takes() -> None:
    for x, weight, bias in (
        (torch.randn(3, 8), torch.randn(8, 5).mT, torch.randn(5)),
        (torch.randn(8, 3).mT, torch.randn(5, 8), None),
        (torch.randn(2, 2, 3, 8).transpose(0, 1), torch.randn(5, 8), torch.randn(10)[::2]),
        (torch.randn(40, 8), torch.randn(5, 8), torch.randn(5)),
        (torch.randn(0, 8), torch.randn(5, 8), torch.randn(5)),
        (torch.randn(3, 0), torch.randn(5, 0), torch.randn(5)),
        (torch.randn(3, 8), torch.randn(0, 8), None),
        (torch.randn(3, 8).double(), torch.randn(5, 8).double(), None),
        (torch.randn(3, 8).to("meta"), torch.randn(5, 8).to("meta"), None),
        (torch.view_as_complex(torch.randn(3, 8, 2)).conj().imag, torch.randn(5, 8), None),
    ):
        got, want = operator(x, weight, bias), F.linear(x, weight, bias)
        assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
        if not x.is_meta:
            torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        operator(torch.randn(3, 8), torch.randn(5, 7), None)


def test_the_operator_has_gradients_shapes_and_autocast() -> None:
    for x_shape, bias in (((2, 2, 5), None), ((40, 5), torch.randn(7, requires_grad=True))):
        arguments = (torch.randn(x_shape, requires_grad=True), torch.randn(7, 5, requires_grad=True), bias)
        torch.library.opcheck(torch.ops.qkv.linear.default, arguments)
    wide = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), (7, 5), (7,))]
    assert torch.autograd.gradcheck(operator, wide) and torch.autograd.gradgradcheck(operator, wide)
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = operator(x, weight, bias)
        assert got.dtype == torch.bfloat16 and torch.equal(got, F.linear(x, weight, bias))


def test_programs_with_the_operator_are_compiled_and_exported() -> None:
    class Projected(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return operator(x, weight, None)

    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(Projected(), (x, weight), dynamic_shapes=({0: rows}, None)).module()
    compiled = torch.compile(Projected(), backend="aot_eager", fullgraph=True)
    for many in (x, torch.randn(33, 5)):
        torch.testing.assert_close(program(many, weight), F.linear(many, weight))
        torch.testing.assert_close(compiled(many, weight), F.linear(many, weight))


def test_without_the_kernel_the_operator_is_torchs_product() -> None:
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    with kernels.use("no kernel"):
        assert torch.equal(operator(x, weight, None), F.linear(x, weight))


def test_crossovers_are_by_rows_dtype_and_size() -> None:
    weight = torch.empty(1024, 1024, dtype=torch.bfloat16)
    with kernels.use(kernels.loaded()._replace(isa="avx2")):
        assert kernels.is_faster(torch.empty(1024, dtype=torch.bfloat16), weight)
        assert kernels.is_faster(torch.empty(2, 8, 1024, dtype=torch.bfloat16), weight)
        assert kernels.is_faster(torch.empty(2, 1024), weight.float())
        for x, other in (
            (torch.empty(17, 1024), weight.float()),
            (torch.empty(0, 1024, dtype=torch.bfloat16), weight),
            (torch.empty(1, 64, dtype=torch.bfloat16), weight[:64, :64]),
            (torch.empty(1, 256), weight[:256, :256].float()),
            (torch.empty(2, 64), torch.empty(16384, 64)),
            (torch.empty(2, 1024).double(), weight.double()),
            (torch.empty(1, 1024, dtype=torch.bfloat16, device="meta"), weight.to("meta")),
            (torch.tensor(1.0), weight),
            (torch.empty(3, 0), torch.empty(5, 0)),
        ):
            assert not kernels.is_faster(x, other)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):  # torch alone reads fp32 at the speed of memory with one thread
                torch.set_num_threads(count)
                assert kernels.is_faster(torch.empty(1, 1024), weight.float()) == (count > 1)
        finally:
            torch.set_num_threads(threads)
    for other_library in (kernels.loaded()._replace(isa="generic"), "no kernel"):
        with kernels.use(other_library):
            assert not kernels.is_faster(torch.empty(1, 1024, dtype=torch.bfloat16), weight)


@has_fast_path
@each_isa
@each_dtype
def test_many_rows_have_the_bits_of_few(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 17, 40), (23, 40), (23,)))
    with kernels.use(library(isa)):
        whole = kernels.fast_linear(x, weight, bias)
        assert whole is not None
        for i in range(3):
            for j in range(17):
                assert torch.equal(whole[i, j : j + 1], kernels.fast_linear(x[i, j : j + 1], weight, bias))


@has_fast_path
def test_any_number_of_rows_goes_by_the_kernel_where_torch_has_no_product_of_the_dtype() -> None:
    x = torch.randn(2, 30, 512)
    for dtype in DTYPES:
        for isa in kernels.supported_isas():
            with kernels.use(library(isa)):
                takes = isa == "avx2" and dtype is not torch.float32
                assert kernels.has_few_rows(x.to(dtype)) == takes
                assert kernels.is_faster(x.to(dtype), torch.randn(64, 512).to(dtype)) == takes
    with kernels.use("no kernel"):
        assert not kernels.has_few_rows(x[0, :1])
