"""`attention_with_lse`, `attention_weights`, `merge` and `explain`, and their relation to `attention`."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkv
from qkv import Mask, kernels


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, 22)), st.sampled_from([None, 5]), st.booleans())
def test_merged_pieces_equal_the_whole(cuts: set[int], window: int | None, sinks: bool) -> None:
    q, k, v, mask = draw(2, 4, 9, 8), draw(2, 2, 23, 8), draw(2, 2, 23, 5), Mask.causal(window)
    logits = draw(4) if sinks else None
    edges = [0, *sorted(cuts), 23]
    pieces = [
        qkv.attention_with_lse(
            q, k[:, :, a:b], v[:, :, a:b], mask=mask, offset=11 - a, sink_logits=logits if a == 0 else None
        )
        for a, b in itertools.pairwise(edges)
    ]
    out, lse = qkv.merge(pieces)
    want = qkv.attention_with_lse(q, k, v, mask=mask, offset=11, sink_logits=logits)
    torch.testing.assert_close(out, want.out)
    torch.testing.assert_close(lse, want.lse)


def test_merging_is_differentiable_through_out_and_lse() -> None:
    q, k, v = (draw(1, 2, 5, 4).requires_grad_() for _ in range(3))

    def halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return qkv.merge(
            [qkv.attention_with_lse(q, *part) for part in zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)]
        ).out

    assert torch.autograd.gradcheck(halves, (q, k, v))
    for got, want in zip(
        torch.autograd.grad(halves(q, k, v).square().sum(), (q, k, v)),
        torch.autograd.grad(qkv.attention(q, k, v).square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode in torch
def test_merging_has_forward_batched_and_second_derivatives() -> None:
    outs, lses = draw(3, 1, 2, 4, 5).requires_grad_(), draw(3, 1, 2, 4).requires_grad_()

    def merged(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(qkv.merge(list(zip(outs, lses, strict=True))))

    assert torch.autograd.gradcheck(merged, (outs, lses), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(merged, (outs, lses))
    hessian = torch.func.jacfwd(torch.func.grad(lambda outs: merged(outs, lses.detach())[0].square().sum()))
    assert hessian(outs.detach()).isfinite().all()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_of_out_and_lse_agree_with_finite_differences(backend: str) -> None:
    q, k, v, sinks, bias = draw(1, 2, 5, 4), draw(1, 1, 7, 4), draw(1, 1, 7, 3), draw(2), draw(2, 1, 7)
    mask = Mask.causal(4, sink_tokens=1)

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, sinks = tensors[:4]
        extra = {"bias": tensors[4]} if len(tensors) > 4 else {}
        return qkv.attention_with_lse(q, k, v, mask=mask, offset=2, sink_logits=sinks, backend=backend, **extra)

    leaves = [q, k, v, sinks, bias] if backend == "reference" else [q, k, v, sinks]
    assert torch.autograd.gradcheck(both, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_lse_of_rows_without_visible_keys_is_minus_infinity_with_zero_gradient(backend: str) -> None:
    q, k, v = (draw(1, 2, 5, 4).requires_grad_() for _ in range(3))
    out, lse = qkv.attention_with_lse(q, k, v, mask=Mask.causal(), offset=-2, backend=backend)
    assert (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()
    assert not out[:, :, :2].any()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][:, :, :2].any()


@pytest.mark.parametrize("backend", ["sdpa", "flex", "reference"])
def test_slopes_in_single_precision_are_multiplied_in_double_precision(backend: str) -> None:
    q, slopes = draw(1, 2, 9, 8), torch.tensor([1 / 3, 1 / 7])
    found = [qkv.attention(q, q, q, alibi=alibi, backend=backend) for alibi in (slopes, slopes.double())]
    torch.testing.assert_close(*found, rtol=0, atol=1e-14)


def test_heads_permute_with_their_outputs() -> None:
    q, k, v, order = draw(2, 6, 7, 8), draw(2, 3, 9, 8), draw(2, 3, 9, 8), torch.tensor([2, 0, 1])
    query_order = (order[:, None] * 2 + torch.arange(2)).flatten()
    got = qkv.attention(q[:, query_order], k[:, order], v[:, order])
    assert torch.equal(got, qkv.attention(q, k, v)[:, query_order])


def test_weights_are_those_of_the_output_under_every_option() -> None:
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 11, 8), draw(2, 2, 11, 5)
    options = {
        "mask": Mask.causal(5, sink_tokens=1) & Mask.padding(torch.tensor([11, 6])),
        "offset": 4,
        "scale": 0.3,
        "softcap": 2.0,
        "bias": draw(4, 1, 11),
        "alibi": torch.rand(4),
        "sink_logits": draw(4),
    }
    weights = qkv.attention_weights(q, k, **options)
    assert weights.shape == (2, 4, 7, 11)
    assert (weights.sum(-1) < 1).all()
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), qkv.attention(q, k, v, **options))


def test_weights_ignore_masked_nan() -> None:
    q, k = draw(1, 1, 4, 8), draw(1, 1, 4, 8)
    k[:, :, 2] = torch.nan
    weights = qkv.attention_weights(q, k, mask=Mask.causal())[0, 0]
    assert weights[:2].isfinite().all() and weights[2:].isnan().all()


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("mask", [Mask.full(), Mask.causal(), Mask.causal(3)], ids=repr)
def test_dropout_is_reproducible_unbiased_and_drops_whole_weights(backend: str, mask: Mask) -> None:
    dtype = torch.float32 if backend == "native" else torch.float64
    batch = 80  # copies of one sequence, with independent dropout
    q, k = (draw(1, 2, 7, 8).to(dtype).expand(batch, 2, 7, 8) for _ in "qk")
    v = torch.eye(7, dtype=dtype).expand(batch, 2, 7, 7)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return qkv.attention(q, k, v, mask=mask, dropout=0.25, backend=backend)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    weights = qkv.attention_weights(q, k, mask=mask)
    dropped = run(1)  # values of one each: the output is the dropped weights themselves
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    mean = torch.cat([run(seed) for seed in range(10)]).mean(0)
    # Each mean of 800 has a standard deviation of weight * sqrt(0.25 / 0.75 / 800) = 0.0204 * weight.
    assert ((mean - weights).abs() <= 6 * 0.0204 * weights + torch.finfo(dtype).eps).all()


def test_dropout_in_blocks_is_reproducible() -> None:
    q = draw(1, 2, 300, 8)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return qkv.attention(q, q, q, mask=Mask.sliding(8), dropout=0.5)

    assert torch.equal(run(), run())
    assert not torch.allclose(run(), qkv.attention(q, q, q, mask=Mask.sliding(8)))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4)])
def test_empty_batches_and_queries_give_empty_results(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape)
    for mask in (Mask.full(), Mask.causal()):
        assert qkv.attention(q, q, q, mask=mask).shape == shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_and_heads_of_width_0_work(backend: str) -> None:
    q, k, v = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 0)
    out = qkv.attention(q, k, v, backend=backend)
    assert out.shape == (1, 2, 3, 0)
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    mean = qkv.attention(q[..., :0], k[..., :0], k, scale=1.0, backend=backend)
    torch.testing.assert_close(mean, k.mean(2, keepdim=True).expand_as(mean))


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_zero_keys_give_zero(backend: str) -> None:
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 0, 4)
    out = qkv.attention(q, k, k, backend=backend)
    assert out.shape == (1, 2, 3, 4) and not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


def test_zero_keys_give_an_lse_of_minus_infinity() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    assert (qkv.attention_with_lse(q, k, k).lse == -torch.inf).all()


def test_explain_names_the_chosen_backend_and_why_not_the_others() -> None:
    q = torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=True)
    found = qkv.explain(q, q, q, softcap=3.0, dropout=0.5, sink_logits=torch.zeros(2))
    assert found.chosen == "reference"
    assert found.reasons["native"] == ["the kernel has no fp64"]
    assert found.reasons["sdpa"] == [
        "scaled_dot_product_attention has no softcap",
        "sink logits need the lse, which torch's kernels do not return with dropout",
    ]
    assert found.reasons["flex"] == [
        "FlexAttention has no dropout",
        "FlexAttention has no backward on CPU",
        "FlexAttention runs uncompiled on cpu, with all scores in memory",
    ]
    assert qkv.explain(q, q, q).chosen == "sdpa"
    assert "reference  comes later in the order" in str(qkv.explain(q, q, q))


def test_explain_names_the_instruction_set_and_the_build_of_the_kernel() -> None:
    q = torch.randn(1, 2, 64, 8)
    library = kernels.loaded()._replace(isa="z80", compiler="GCC 99.1.2")
    with kernels.use(library):
        found = str(qkv.explain(q, q, q))
    assert found.splitlines()[0] == "native     chosen: z80, built by GCC 99.1.2"


def test_an_explicit_backend_never_falls_back() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(qkv.BackendError, match=r"attention: backend 'sdpa' cannot .*has no softcap\."):
        qkv.attention(q, q, q, softcap=3.0, backend="sdpa")
    with pytest.raises(qkv.BackendError, match=r"backend 'flex' cannot .*has no dropout"):
        qkv.attention(q, q, q, dropout=0.5, backend="flex")
    with pytest.raises(ValueError, match=r"one of 'native', 'sdpa', 'flex', 'reference'; got 'fast'"):
        qkv.attention(q, q, q, backend="fast")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("length", [37, 300])
def test_bits_do_not_depend_on_run_threads_or_batch(backend: str, length: int) -> None:
    q, k, v = (torch.randn(3, heads, length, 16) for heads in (4, 2, 2))
    mask = Mask.causal(window=20)
    want = qkv.attention(q, k, v, mask=mask, backend=backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(qkv.attention(q, k, v, mask=mask, backend=backend), want)
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        alone = qkv.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask=mask, backend=backend)
        assert torch.equal(alone, want[b : b + 1])


def test_merge_has_the_dtype_of_the_first_piece() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    assert qkv.merge([(out.bfloat16(), lse), (out, lse)]).out.dtype is torch.bfloat16
    assert qkv.merge([(out, lse), (out.bfloat16(), lse)]).out.dtype is torch.float32


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_lazily_negated_tensors(backend: str) -> None:
    """``z.conj().imag`` is a view whose memory contains the negated numbers."""
    q, k, v, d_out = torch.randn(4, 1, 2, 5, 8)
    bias = torch.randn(1, 2, 5, 5, dtype=torch.complex64).conj().imag
    tensors = [q, k, v, bias]
    assert bias.is_neg()
    want, got = [], []
    for found, lazy in ((want, False), (got, True)):
        leaves = [(torch._neg_view(-x) if lazy else x.clone()).detach().requires_grad_() for x in tensors]
        assert all(x.is_neg() is lazy for x in leaves)
        out = qkv.attention(*leaves[:3], bias=leaves[3], backend=backend)
        found += [out, *torch.autograd.grad(out, leaves, torch._neg_view(-d_out) if lazy else d_out)]
        with torch.no_grad():
            found.append(qkv.attention(*leaves[:3], backend=backend))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.resolve_neg(), theirs.resolve_neg())
