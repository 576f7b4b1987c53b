"""Complaints of users of ``torch.nn.MultiheadAttention``."""

from collections.abc import Callable

import pytest
import torch
from test_sliding_window import counting
from torch import nn

import qkv
from qkv import Mask


def both(num_heads: int = 3, **options: bool) -> tuple[nn.MultiheadAttention, qkv.MultiHeadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, num_heads, batch_first=True, **options)
    return theirs, qkv.MultiHeadAttention.from_torch(theirs)


def test_pytorch_170415_true_means_attend_everywhere() -> None:
    """True hides a key here and shows it in ``scaled_dot_product_attention``: moving between them is silently wrong
    (pytorch/pytorch#170415, pytorch/pytorch#118972, pytorch/pytorch#21518, lucidrains/x-transformers#164).
    """
    theirs, ours = both()
    x, keep = torch.randn(2, 5, 24), torch.tensor([[True] * 5, [True, True, True, False, False]])
    want = theirs(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
    torch.testing.assert_close(ours(x, mask=Mask.padding(keep)), want)
    torch.testing.assert_close(ours(x, mask=Mask.padding(keep.sum(1))), want)
    torch.testing.assert_close(ours(x, mask=Mask.dense(keep[:, None, None])), want)
    assert ours.attention_weights(x, mask=Mask.padding(keep))[1, :, :, 3:].abs().max() == 0
    with pytest.raises(TypeError, match=r"mask must be a qkv\.Mask; got Tensor\. Use Mask\.dense\(allow\)"):
        qkv.attention(*torch.randn(3, 2, 3, 5, 8), mask=keep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"True where a query may attend; got torch\.float32.* pass it as bias="):
        Mask.dense(keep[:, None, None].float())


def test_pytorch_160064_weights_of_rows_without_keys_are_0(upstream: Callable[..., None]) -> None:
    """``need_weights=True`` makes NaN of a row of padding that ``need_weights=False`` does not
    (pytorch/pytorch#160064).
    """
    theirs, ours = both()
    x, keep = torch.randn(2, 5, 24), torch.tensor([[True] * 5, [False] * 5])
    weights = ours.attention_weights(x, mask=Mask.padding(keep))
    assert torch.equal(weights[1], torch.zeros(3, 5, 5))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 5))
    out = ours(x, mask=Mask.padding(keep))
    assert torch.equal(out[1], ours.out_proj.bias.expand(5, -1))
    upstream(lambda: bool(theirs(x, x, x, key_padding_mask=~keep, need_weights=True)[0].isnan().any()))


def test_pytorch_99282_causal_needs_no_mask_and_weights_are_causal_too(upstream: Callable[..., None]) -> None:
    """``is_causal`` wants a mask beside it, and is not honoured where weights are asked for (pytorch/pytorch#99282,
    pytorch/pytorch#172338, pytorch/pytorch#195660).
    """
    theirs, _ = both()
    ours, x = qkv.CausalAttention.from_torch(theirs), torch.randn(2, 5, 24)
    hidden = torch.ones(5, 5).triu(1).bool()
    want, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(ours(x), want)
    torch.testing.assert_close(ours.attention_weights(x), weights)
    assert ours.attention_weights(x).triu(1).abs().max() == 0
    upstream(lambda: not torch.allclose(theirs(x, x, x, is_causal=True, need_weights=True)[0], want, atol=1e-6))


def test_rtdetr_680_weights_are_not_made_unless_asked_for(upstream: Callable[..., None]) -> None:
    """``need_weights=True`` is the default and takes the unfused path, for weights that callers discard
    (lyuwenyu/RT-DETR#680).
    """
    theirs, ours = both()
    x = torch.randn(1, 512, 24, requires_grad=True)

    def largest(module: nn.Module, *inputs: torch.Tensor) -> int:
        with counting() as count:
            module(*inputs)
        return count.largest

    assert largest(ours, x) < 512**2
    upstream(lambda: largest(theirs, x, x, x) >= 512**2)


def test_pytorch_97128_training_and_inference_are_one_path(upstream: Callable[..., None]) -> None:
    """The fast path of inference crashes without biases, or with an odd number of heads, or differs
    (pytorch/pytorch#97128, pytorch/pytorch#97409, pytorch/pytorch#192651).
    """
    theirs, ours = both(bias=False)
    x, mask = torch.randn(2, 5, 24), Mask.padding(torch.tensor([5, 3]))
    training = ours.train()(x, mask=mask).detach()
    with torch.inference_mode():  # whose products, of few rows, are those of the kernel
        torch.testing.assert_close(ours.eval()(x, mask=mask), training, atol=1e-6, rtol=1e-6)

    def differs() -> bool:
        hidden = torch.arange(5) >= torch.tensor([[5], [3]])
        want = theirs.train()(x, x, x, key_padding_mask=hidden)[0]
        with torch.inference_mode():
            return not torch.equal(theirs.eval()(x, x, x, key_padding_mask=hidden)[0], want)

    upstream(differs)


def test_megatron_1814_cross_attention_has_groups() -> None:
    """Grouped queries are refused in cross-attention (NVIDIA/Megatron-LM#1814)."""
    layer = qkv.CrossAttention(24, 6, num_kv_heads=2, context_dim=16)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 16)
    theirs = layer.to_torch()
    torch.testing.assert_close(layer(x, context), theirs(x, context, context, need_weights=False)[0])
    assert layer.k_proj.weight.shape == (2 * 4, 16)
