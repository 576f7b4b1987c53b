"""Multi-head attention: projections per head, attention in parallel, concatenation, output projection."""

import pytest
import torch
from torch import nn

import qkv
from qkv import Mask


def test_equals_separate_single_heads_computed_one_by_one() -> None:
    embed_dim, heads, width = 21, 3, 7
    layer = qkv.MultiHeadAttention(embed_dim, heads)
    x = torch.randn(2, 5, embed_dim)
    contexts = []
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        q, k, v = (
            nn.functional.linear(x, proj.weight[rows], proj.bias[rows])
            for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        weights = (q @ k.mT / width**0.5).softmax(-1)
        contexts.append(weights @ v)
    want = nn.functional.linear(torch.cat(contexts, -1), layer.out_proj.weight, layer.out_proj.bias)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "boolean", "causal"])
@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
def test_equals_torch_in_both_directions_with_gradients(direction: str, masked: str, bias: bool) -> None:
    if direction == "from_torch":
        theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True)
        if bias:
            nn.init.normal_(theirs.in_proj_bias)
        ours = qkv.MultiHeadAttention.from_torch(theirs)
    else:
        ours = qkv.MultiHeadAttention(24, 3, bias=bias)
        if bias:
            nn.init.normal_(ours.k_proj.bias)
        theirs = ours.to_torch()
    x = torch.randn(2, 7, 24, requires_grad=True)
    keep, allow = torch.arange(7) < torch.tensor([[7], [4]]), torch.rand(7, 7) < 0.7
    allow |= torch.eye(7, dtype=torch.bool)
    mask, arguments = {
        "": (None, {}),
        "padding": (Mask.padding(keep), {"key_padding_mask": ~keep}),
        "boolean": (Mask.dense(allow), {"attn_mask": ~allow}),
        "causal": (Mask.causal(), {"attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1)}),
    }[masked]
    want, want_weights = theirs(x, x, x, average_attn_weights=False, **arguments)
    got = ours(x, mask=mask)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.attention_weights(x, mask=mask), want_weights)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_in_cross_attention_of_another_width(bias: bool) -> None:
    theirs = nn.MultiheadAttention(24, 4, kdim=10, vdim=10, bias=bias, batch_first=True)
    ours = qkv.CrossAttention.from_torch(theirs)
    assert ours.context_dim == 10
    x, context = torch.randn(2, 5, 24), torch.randn(2, 9, 10)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0])
    again = ours.to_torch()
    torch.testing.assert_close(again(x, context, context)[0], theirs(x, context, context)[0])


def test_a_module_of_equal_widths_becomes_self_or_cross_attention() -> None:
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    torch.testing.assert_close(qkv.CrossAttention.from_torch(theirs)(x, context), theirs(x, context, context)[0])
    torch.testing.assert_close(qkv.Attention.from_torch(theirs)(x), theirs(x, x, x)[0])


def test_options_beside_those_of_the_module() -> None:
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    x = torch.randn(2, 9, 24)
    hidden = torch.ones(9, 9, dtype=torch.bool)
    windowed = qkv.SlidingWindowAttention.from_torch(theirs, window=4)
    hidden = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 2
    torch.testing.assert_close(windowed(x), theirs(x, x, x, attn_mask=hidden)[0])


def test_grouped_heads_become_repeated_ones_in_torch() -> None:
    ours = qkv.GroupedQueryAttention(24, 6, 2)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours.to_torch()(x, x, x)[0], ours(x))


def test_conversion_keeps_training_mode_dropout_and_dtype() -> None:
    theirs = nn.MultiheadAttention(24, 4, dropout=0.25, batch_first=True, dtype=torch.float64).eval()
    ours = qkv.MultiHeadAttention.from_torch(theirs)
    assert (ours.dropout, ours.training, ours.q_proj.weight.dtype) == (0.25, False, torch.float64)
    back = ours.to_torch()
    assert (back.dropout, back.training, back.in_proj_weight.dtype) == (0.25, False, torch.float64)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.MultiheadAttention(24, 4, kdim=10, vdim=12), r"kdim and vdim must be equal.*kdim=10 and vdim=12"),
        (nn.MultiheadAttention(24, 4, add_bias_kv=True), r"add_bias_kv=True, add_zero_attn=False"),
        (nn.MultiheadAttention(24, 4, add_zero_attn=True), r"add_bias_kv=False, add_zero_attn=True"),
    ],
)
def test_from_torch_refuses_unsupported_modules(module: nn.MultiheadAttention, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qkv.Attention.from_torch(module)


def test_only_modules_of_torch_are_converted() -> None:
    with pytest.raises(TypeError, match=r"from_torch: module must be an nn\.MultiheadAttention; got Linear"):
        qkv.MultiHeadAttention.from_torch(nn.Linear(24, 24))  # type: ignore[arg-type]


def test_fewer_kv_heads_than_the_module_has_are_refused() -> None:
    with pytest.raises(ValueError, match="4 query heads on 4 KV heads; got a MultiQueryAttention with 4 on 1"):
        qkv.MultiQueryAttention.from_torch(nn.MultiheadAttention(24, 4))


def test_to_torch_lists_every_unsupported_option() -> None:
    layer = qkv.Attention(
        24,
        4,
        head_dim=8,
        mask=Mask.causal(),
        rotary=qkv.RotaryEmbedding(8),
        qk_norm=True,
        gate=True,
        softcap=3.0,
        scale=0.5,
        sink_logits=True,
        alibi=torch.ones(4),
        out_bias=False,
    )
    with pytest.raises(ValueError) as error:
        layer.to_torch()
    for word in (
        "Mask.causal()",
        "head_dim=8",
        "bias for some",
        "rotary",
        "qk_norm",
        "gate",
        "scale",
        "softcap",
        "sink_logits",
        "alibi",
    ):
        assert word in str(error.value)
