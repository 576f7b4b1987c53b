"""Complaints of users of flash-attn."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from oracle import Rule, Scores, attend
from torch.nn.attention.bias import causal_lower_right

import qkv
from qkv import Mask, kernels
from qkv.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def test_flash_attention_1022_its_functions_run_on_cpu() -> None:
    """There is no build for CPUs, so that code differs from device to device (Dao-AILab/flash-attention#1022,
    Dao-AILab/flash-attention#185, Dao-AILab/flash-attention#59).
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 8, requires_grad=True) for length in (5, 9, 9))
    out = flash_attn_func(q, k, v, causal=True)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=causal_lower_right(5, 9)).transpose(1, 2)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, want)
    upstream = torch.randn_like(out)
    got, expected = (torch.autograd.grad(result, (q, k, v), upstream) for result in (out, want))
    torch.testing.assert_close(got, expected)
    starts_q, starts_k = torch.tensor([0, 5, 10]), torch.tensor([0, 9, 18])
    packed = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), starts_q, starts_k, 5, 9, causal=True)
    assert isinstance(packed, torch.Tensor)
    torch.testing.assert_close(packed.unflatten(0, (2, 5)), out)


def test_flash_attention_352_mask_bias_and_window_combine() -> None:
    """There is no mask and no bias beside a window (Dao-AILab/flash-attention#352, Dao-AILab/flash-attention#840,
    Dao-AILab/flash-attention#1179, Dao-AILab/flash-attention#17).
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 8)
    allow, keep = torch.rand(2, 4, 13, 13) < 0.7, torch.arange(13) < torch.tensor([[13], [9]])
    bias = torch.randn(4, 13, 13, requires_grad=True)
    mask = Mask.dense(allow) & Mask.padding(keep) & Mask.causal(window=5)
    out = qkv.attention(q, k, v, mask=mask, bias=bias)
    rule = Rule(left=4, right=0, keep=keep.tolist(), allow=allow)
    want = attend(q, k, v, rule, scores=Scores(bias=bias)).out
    seen = allow & keep[:, None, None] & torch.ones(13, 13, dtype=torch.bool).tril().triu(-4)
    dense = bias[None].expand(2, -1, -1, -1).masked_fill(~seen, -torch.inf)
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=dense.detach(), enable_gqa=True)
    assert_within_budget(out, want, peer, "out")
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert (grad[~seen.any(0)] == 0).all() and (grad[seen.any(0)] != 0).any()


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_transformers_39408_a_window_of_w_shows_w_keys_in_every_interface(window: int) -> None:
    """Whether a window counts the query's own key differs by one between backends (huggingface/transformers#39408,
    huggingface/transformers#40163, huggingface/transformers#29623, huggingface/transformers#29176,
    vllm-project/vllm#3385, zml/zml#763).
    """
    mask, length = Mask.causal(window=window), 13
    seen = mask.visible(length, length)[0, 0]
    assert seen.sum(1).tolist() == [min(window, i + 1) for i in range(length)]

    q = torch.randn(1, length, 2, 8)
    ours = qkv.attention(*[q.transpose(1, 2)] * 3, mask=mask).transpose(1, 2)
    assert torch.equal(flash_attn_func(q, q, q, window_size=(window - 1, 0)), ours)

    import transformers.masking_utils as masking

    from qkv.integrations.transformers.masks import recognise_mask

    function = masking.sliding_window_causal_mask_function(window)
    assert recognise_mask(function, range(length)) == mask
    theirs = masking.sdpa_mask(1, length, length, mask_function=function, allow_is_causal_skip=False)
    assert torch.equal(theirs[0, 0], seen)


def test_pytorch_187506_heads_packed_last_are_read_in_place(
    upstream: Callable[[Callable[[], bool]], None],
) -> None:
    """Queries, keys and values unpacked from a last dimension, whose widths are not contiguous, give wrong numbers
    (pytorch/pytorch#187506).
    """
    q, k, v = torch.randn(1, 20, 4, 16, 3).unbind(-1)
    want = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(flash_attn_func(q, k, v), want)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = want.transpose(1, 2)
    for backend in ("auto", "sdpa", "reference"):
        torch.testing.assert_close(qkv.attention_with_lse(q, k, v, backend=backend).out, want)
    sinks = torch.zeros(4)
    whole = [x.contiguous() for x in (q, k, v)]
    torch.testing.assert_close(
        qkv.attention(q, k, v, sink_logits=sinks, backend="sdpa"),
        qkv.attention(*whole, sink_logits=sinks, backend="reference"),
    )
    upstream(lambda: not torch.allclose(F.scaled_dot_product_attention(q, k, v), want, atol=1e-5))


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_flash_attention_828_small_pages_and_short_sequences_are_one_call() -> None:
    """Pages must have 256 tokens, where servers have 16, and many short sequences cost more than a padded batch
    (Dao-AILab/flash-attention#828, Dao-AILab/flash-attention#1171). What that gains: `benchmarks/sequences.py`.
    """
    torch.manual_seed(0)
    k_pages, v_pages = torch.randn(2, 300, 16, 2, 8)
    table = torch.randperm(300)[:256].view(1, 256).int()
    q, tokens = torch.randn(1, 1, 6, 8), torch.randn(64 * 16, 6, 8)
    starts = torch.arange(0, 64 * 16 + 1, 16, dtype=torch.int32)
    calls: list[str] = []
    library = kernels.loaded()

    def counted(name: str) -> Callable[..., int]:
        call = getattr(library, name)
        return lambda *arguments: calls.append(name) or call(*arguments)

    names = ("forward", "forward_sequences", "fast_forward")
    with kernels.use(library._replace(**{name: counted(name) for name in names if getattr(library, name)})):
        paged = flash_attn_with_kvcache(q, k_pages, v_pages, block_table=table, cache_seqlens=4090, causal=True)
        packed = flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, 16, 16)
    assert calls == ["forward_sequences", "forward_sequences"]
    keys, values = (pages[table.long()].flatten(1, 2)[:, :4090] for pages in (k_pages, v_pages))
    assert torch.equal(paged, flash_attn_func(q, keys, values, causal=True))
    batch = tokens.unflatten(0, (64, 16))
    assert torch.equal(packed.unflatten(0, (64, 16)), flash_attn_func(batch, batch, batch))
