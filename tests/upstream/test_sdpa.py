"""Complaints of users of ``torch.nn.functional.scaled_dot_product_attention``."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from oracle import Rule, Scores, attend
from test_sliding_window import counting
from torch import Tensor

import qkv
from qkv import Mask

BACKENDS = pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])


def draw(
    heads: int = 4, kv_heads: int = 2, lq: int = 11, lk: int = 11, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, heads, lq, width), torch.randn(2, kv_heads, lk, width), torch.randn(2, kv_heads, lk, width)


def test_pytorch_119653_a_window_needs_no_mask(upstream: Callable[..., None]) -> None:
    """There is no sliding window, so that one is written out as a square mask (pytorch/pytorch#119653)."""
    q, k, v = draw(lq=4096, lk=4096)
    mask = Mask.causal(window=32)
    with counting() as ours:
        out = qkv.attention(q, k, v, mask=mask)
    square = 4096**2
    assert ours.largest < square / 16
    assert 0 < ours.scores < 2 * 4 * square / 16
    seen = torch.ones(300, 300, dtype=torch.bool).tril().triu(-31)
    first = [x[:, :, :300] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*first, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out[:, :, :300], want)
    upstream(lambda: "window" not in (F.scaled_dot_product_attention.__doc__ or "").split("->")[0])


def test_pytorch_144858_a_query_behind_a_cache_sees_all_of_it(upstream: Callable[..., None]) -> None:
    """``is_causal`` aligns the only query of a step with the first key and returns the first value, step after step
    (pytorch/pytorch#144858, pytorch/pytorch#108108).
    """
    q, k, v = draw()
    whole = qkv.attention(q, k, v, mask=Mask.causal())
    for n in range(11):
        step = qkv.attention(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], mask=Mask.causal(), offset=n)
        torch.testing.assert_close(step, whole[:, :, n : n + 1])
    last = q[:, :, -1:]
    upstream(
        lambda: torch.allclose(
            F.scaled_dot_product_attention(last, k, v, is_causal=True, enable_gqa=True),
            v[:, :, :1].repeat_interleave(2, 1),
        )
    )


def test_mlx_2836_both_alignments_have_a_name() -> None:
    """Some align a causal mask top-left, some bottom-right, and nothing tells which (ml-explore/mlx#2836,
    onnx/onnx#8068, openvinotoolkit/openvino#36680, thu-ml/SageAttention#372).
    """
    q, k, v = draw(lq=3, lk=11)
    with pytest.raises(ValueError, match=r"(?s)offset=0 .*top-left.*offset=8 .*bottom-right"):
        qkv.attention(q, k, v, mask=Mask.causal())
    top_left = qkv.attention(q, k, v, mask=Mask.causal(), offset=0)
    torch.testing.assert_close(top_left, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    bottom_right = qkv.attention(q, k, v, mask=Mask.causal(), offset=8)
    torch.testing.assert_close(bottom_right, attend(q, k, v, Rule(right=0), offset=8).out.float())


@BACKENDS
def test_pytorch_103963_rows_without_keys_are_0(backend: str, upstream: Callable[..., None]) -> None:
    """Rows that see no key are NaN, or garbage, and so are gradients (pytorch/pytorch#103963, pytorch/pytorch#103749,
    pytorch/pytorch#41508, ml-explore/mlx#2395, iree-org/iree#24175).
    """
    q, k, v = (x.requires_grad_() for x in draw())
    mask = Mask.padding(torch.tensor([11, 0])) & Mask.causal()
    out, lse = qkv.attention_with_lse(q, k, v, mask=mask, backend=backend)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(lse[1], torch.full_like(lse[1], -torch.inf))
    assert torch.equal(qkv.attention_weights(q, k, mask=mask)[1], torch.zeros(4, 11, 11))
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad[0].abs().sum() > 0
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    hidden = torch.full((1, 1, 1, 11), -torch.inf)
    upstream(lambda: bool(F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True).isnan().any()))


@BACKENDS
def test_pytorch_101967_nan_in_padding_stays_there(backend: str, upstream: Callable[..., None]) -> None:
    """NaN in padded keys and values poisons the rows that do not see them (pytorch/pytorch#101967)."""
    q, k, v = draw()
    lengths = torch.tensor([7, 3])
    keep = torch.arange(11) < lengths[:, None]
    clean = qkv.attention(q, k, v, mask=Mask.padding(keep), backend=backend)
    k, v = (x.masked_fill(~keep[:, None, :, None], torch.nan).requires_grad_() for x in (k, v))
    out = qkv.attention(q, k, v, mask=Mask.padding(lengths), backend=backend)
    torch.testing.assert_close(out, clean)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert grad.isfinite().all()
    seen = keep[:, None, None]
    upstream(lambda: bool(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).isnan().any()))


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_transformers_46960_groups_keep_the_fused_kernel(backend: str) -> None:
    """``enable_gqa`` silently takes the unfused kernel, with all scores in memory (huggingface/transformers#46960,
    huggingface/transformers#48634, pytorch/pytorch#139586).
    """
    q, k, v = draw(heads=8, lq=256, lk=256)
    mask = Mask.causal() & Mask.padding(torch.tensor([256, 100]))
    with counting() as count:
        qkv.attention(q, k, v, mask=mask, backend=backend)
    assert count.largest < 8 * 256**2
    explained = qkv.explain(q, k, v, mask=mask)
    assert explained.chosen in ("native", "sdpa")
    assert all(explained.reasons[name] for name in ("native", "flex") if name != explained.chosen)


def test_transformers_46960_a_backend_that_was_asked_for_never_falls_back() -> None:
    """As above: no call ends in another kernel than the one demanded."""
    q, k, v = draw()
    with pytest.raises(qkv.BackendError, match=r"'sdpa' cannot solve this call: .*no softcap"):
        qkv.attention(q, k, v, softcap=30.0, backend="sdpa")


def test_pytorch_143993_weights_come_from_the_lse_of_the_fused_kernel() -> None:
    """Fused kernels return no weights, which dropping keys from a cache needs (pytorch/pytorch#143993,
    pytorch/pytorch#98505, pytorch/pytorch#119811).
    """
    q, k, v = draw(lq=1)
    out, lse = qkv.attention_with_lse(q, k, v)
    weights = qkv.attention_weights(q, k)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    torch.testing.assert_close(weights, (scores - lse[..., None]).exp())
    # Without the least of the keys, the result changes by no more than its share.
    mass = weights.sum((1, 2))
    kept = torch.ones_like(mass, dtype=torch.bool).scatter(1, mass.argmin(1, keepdim=True), False)
    moved = (qkv.attention(q, k, v, mask=Mask.padding(kept)) - out).abs().amax((1, 2, 3))
    share = weights.masked_fill(kept[:, None, None], 0).amax((1, 2, 3))
    assert (moved <= 2 * share / (1 - share) * v.abs().amax((1, 2, 3))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_transformers_34692_half_precision_is_computed_without_wide_copies(dtype: torch.dtype) -> None:
    """fp16 on a CPU takes ten times as long as fp32 (huggingface/transformers#34692).

    Speed is in the benchmarks. Here: the compiled kernel takes the call, nothing is widened in memory, and the error is
    that of fp32 sums.
    """
    q, k, v = (x.to(dtype) for x in draw(lq=1, lk=300))
    assert qkv.explain(q, k, v).chosen == "native"
    with counting() as count:
        out = qkv.attention(q, k, v)
    assert count.bytes <= 2 * out.nbytes + 4 * out.numel()
    want = attend(q, k, v, Rule()).out
    narrow = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True).to(dtype)
    assert_within_budget(out, want, narrow, "out")


def test_jax_30964_sink_logits_are_learned(upstream: Callable[..., None]) -> None:
    """There are no learned sinks, nor gradients for them (jax-ml/jax#30964, fla-org/flash-linear-attention#831,
    tenstorrent/tt-metal#31141).
    """
    q, k, v = draw()
    sinks = torch.randn(4, requires_grad=True)
    out = qkv.attention(q, k, v, mask=Mask.causal(), sink_logits=sinks)
    want = attend(q, k, v, Rule(right=0), scores=Scores(sink_logits=sinks.tolist())).out
    torch.testing.assert_close(out, want.float())
    (got,) = torch.autograd.grad(out.square().sum(), sinks)
    # A key of zeros whose score the bias lifts to the sink logit, and whose value is 0.
    bias = F.pad(torch.zeros(11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf), (0, 1)).expand(
        4, -1, -1
    )
    bias = torch.cat([bias[..., :11], sinks[:, None, None].expand(-1, 11, 1)], dim=-1)
    padded = (F.pad(x.repeat_interleave(2, 1), (0, 0, 0, 1)) for x in (k, v))
    explicit = F.scaled_dot_product_attention(q, *padded, attn_mask=bias[None])
    torch.testing.assert_close(got, torch.autograd.grad(explicit.square().sum(), sinks)[0])
    upstream(lambda: "sink" not in (F.scaled_dot_product_attention.__doc__ or "").split("->")[0])


def test_llamacpp_27086_every_backend_can_be_requested_and_explain_names_the_choice() -> None:
    """A fused kernel is not always the faster one, and nothing chooses by shape (ggml-org/llama.cpp#27086,
    pytorch/executorch#18648).

    The benchmarks compare their speed. Here: each backend can be requested, all agree, and `explain` names the
    chosen one.
    """
    q, k, v = draw()
    want = attend(q, k, v, Rule(right=0)).out
    peer = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    explained = qkv.explain(q, k, v, mask=Mask.causal())
    assert f"{explained.chosen} " in str(explained) and "chosen" in str(explained)
    usable = [name for name, reasons in explained.reasons.items() if not reasons]
    assert explained.chosen in usable and {"sdpa", "reference"} <= set(usable)
    for name in usable:
        assert_within_budget(qkv.attention(q, k, v, mask=Mask.causal(), backend=name), want, peer, name)
