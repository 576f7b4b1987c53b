"""`apply_rotary_pos_emb` beside transformers' function of that name."""

from collections.abc import Iterator

import pytest
import torch
from budget import assert_within_budget
from solver import library
from torch import Tensor
from transformers.models.llama import modeling_llama as theirs

from qkv import kernels
from qkv.integrations.transformers import apply_rotary_pos_emb

ISAS = kernels.supported_isas() if kernels.absence() is None else []


@pytest.fixture(params=["torch's operators", *ISAS], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the kernel, and its absence."""
    with kernels.use(library(request.param) if request.param in ISAS else "not used"):
        yield request.param


def inputs(dtype: torch.dtype, unsqueeze_dim: int = 1, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys, and tables in their dtype, as models make them."""
    q, k = torch.randn(2, 6, 5, 16).to(dtype), torch.randn(2, 2, 5, 16).to(dtype)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    rotary = theirs.LlamaRotaryEmbedding(theirs.LlamaConfig(head_dim=16))
    cos, sin = rotary(q, torch.tensor([[3, 4, 5, 6, 7], [90, 91, 92, 93, 94]])[:rows])
    return q, k, cos, sin


@pytest.mark.parametrize("unsqueeze_dim", [1, 2, -3])
@pytest.mark.parametrize("rows", [1, 2])
def test_fp32_has_the_bits_of_transformers(unsqueeze_dim: int, rows: int) -> None:
    given = inputs(torch.float32, 2 if unsqueeze_dim == 2 else 1, rows)
    if unsqueeze_dim == -3:
        unsqueeze_dim = 1
    copies = [one.clone() for one in given]
    got, want = apply_rotary_pos_emb(*given, unsqueeze_dim), theirs.apply_rotary_pos_emb(*given, unsqueeze_dim)
    assert all(map(torch.equal, got, want)) and all(map(torch.equal, given, copies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearer_than_transformers(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    want = theirs.apply_rotary_pos_emb(*(one.double() for one in given))
    pairs = zip(apply_rotary_pos_emb(*given), want, theirs.apply_rotary_pos_emb(*given), strict=True)
    for got, exact, peer in pairs:
        assert got.dtype is dtype
        assert_within_budget(got, exact, peer, "rotated")
        assert (got.double() - exact).abs().mean() <= (peer.double() - exact).abs().mean()


def test_any_tables_are_taken_as_by_transformers() -> None:
    """Two unequal halves, tables of rows only, without a batch, and those that need a gradient."""
    q, k, cos, sin = inputs(torch.float32)
    for tables in (
        (torch.randn_like(cos), torch.randn_like(sin)),
        (cos[:1], sin[:1]),
        (cos[:, :1], sin[:, :1]),
        (cos[0, 0], sin[0, 0]),
        (cos.clone().requires_grad_(), sin),
    ):
        dim = 1 if tables[0].dim() == 3 else 0
        got, want = apply_rotary_pos_emb(q, k, *tables, dim), theirs.apply_rotary_pos_emb(q, k, *tables, dim)
        assert all(map(torch.equal, got, want))


def test_channels_beyond_the_tables_are_unchanged() -> None:
    q, k, cos, sin = inputs(torch.float32)
    wide = torch.cat([q, q], dim=-1)
    got, _ = apply_rotary_pos_emb(wide, torch.cat([k, k], dim=-1), cos, sin)
    assert torch.equal(got[..., :16], theirs.apply_rotary_pos_emb(q, k, cos, sin)[0])
    assert torch.equal(got[..., 16:], q)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_gradients_are_those_of_transformers(unsqueeze_dim: int) -> None:
    q, k, cos, sin = inputs(torch.float32, unsqueeze_dim)
    q.requires_grad_(), k.requires_grad_()
    above = [torch.randn_like(one) for one in (q, k)]
    got = torch.autograd.grad(apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim), [q, k], above)
    want = torch.autograd.grad(theirs.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim), [q, k], above)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=4 * 2.0**-24 * other.abs().max().item())


def test_a_compiled_call_has_the_same_bits() -> None:
    torch._dynamo.reset()
    given = inputs(torch.bfloat16)
    compiled = torch.compile(apply_rotary_pos_emb, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*given), apply_rotary_pos_emb(*given)))
