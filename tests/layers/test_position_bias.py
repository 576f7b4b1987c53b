"""Relative position biases, compared with transformers' T5, Swin and Swin v2, and as biases of attention."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import Mask

HEADS = 3
MODULES: dict[str, Callable[..., nn.Module]] = {
    "encoder": lambda **options: qkv.RelativePositionBias(HEADS, **options),
    "decoder": lambda **options: qkv.RelativePositionBias(HEADS, bidirectional=False, **options),
    "few buckets": lambda **options: qkv.RelativePositionBias(HEADS, num_buckets=4, max_distance=2, **options),
    "window": lambda **options: qkv.WindowPositionBias(HEADS, window=(2, 3), **options),
    "continuous window": lambda **options: qkv.ContinuousWindowPositionBias(
        HEADS, window=(2, 3), pretrained_window=4, hidden_dim=16, **options
    ),
}
BY_DISTANCE = [name for name in MODULES if "window" not in name]


def of_t5(lq: int, lk: int, past: int, *, decoder: bool, num_buckets: int, max_distance: int) -> tuple[Tensor, Tensor]:
    """The weight of a T5 attention, and its bias."""
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    config = T5Config(
        d_model=12, d_kv=4, num_heads=HEADS, d_ff=4, num_layers=1, is_decoder=decoder,
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance,
    )  # fmt: skip
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    return attention.relative_attention_bias.weight, attention.compute_bias(lq, lk, past_seen_tokens=past)


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("buckets", [(32, 128), (8, 20), (10, 6)], ids=str)
@pytest.mark.parametrize("lq, lk, past", [(5, 5, 0), (1, 300, 299), (7, 300, 50), (300, 4, 0), (3, 2, -9), (0, 4, 2)])
def test_buckets_are_those_of_t5(lq: int, lk: int, past: int, decoder: bool, buckets: tuple[int, int]) -> None:
    num_buckets, max_distance = buckets
    sizes = {"num_buckets": num_buckets, "max_distance": max_distance}
    weight, want = of_t5(lq, lk, past, decoder=decoder, **sizes)
    bias = qkv.RelativePositionBias(HEADS, bidirectional=not decoder, **sizes)
    bias.load_state_dict({"relative_attention_bias.weight": weight})
    got = bias(lq, lk, past)
    assert torch.equal(got, want)
    assert got.is_contiguous()


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_an_offset_for_each_row_is_that_of_the_row(name: str) -> None:
    bias, offsets = MODULES[name](), [0, 40, 7]
    for integers in (torch.int64, torch.int32, torch.uint8):
        got = bias(4, 50, torch.tensor(offsets, dtype=integers))
        assert torch.equal(got, torch.cat([bias(4, 50, offset) for offset in offsets]))
    assert torch.equal(bias(4, 50, torch.tensor(7)), bias(4, 50, 7))
    assert bias(4, 50, torch.tensor([], dtype=torch.int64)).shape == (0, HEADS, 4, 50)
    for lq, lk in ((0, 5), (5, 0), (0, 0)):
        assert bias(lq, lk, torch.tensor(offsets)).shape == (3, HEADS, lq, lk)


def test_a_self_attention_of_t5() -> None:
    """Its layer is `MultiHeadAttention` without biases and scale; the bias is given to `qkv.attention` here."""
    from transformers.models.t5.modeling_t5 import T5Attention, T5Config

    config = T5Config(d_model=12, d_kv=4, num_heads=HEADS, d_ff=4, num_layers=1, dropout_rate=0.0)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval()
    bias, x = qkv.RelativePositionBias(HEADS), torch.randn(2, 9, 12)
    bias.relative_attention_bias.load_state_dict(theirs.relative_attention_bias.state_dict())
    q, k, v = (layer(x).view(2, 9, HEADS, 4).transpose(1, 2) for layer in (theirs.q, theirs.k, theirs.v))
    out = theirs.o(qkv.attention(q, k, v, bias=bias(9, 9), scale=1.0).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, theirs(x)[0])


def test_a_window_has_the_table_of_swin() -> None:
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    theirs, ours = SwinRelativePositionBias(HEADS, (3, 4)), qkv.WindowPositionBias(HEADS, (3, 4))
    nn.init.normal_(theirs.relative_position_bias_table)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(12, 12), theirs())
    assert ours(12, 12).is_contiguous()


@pytest.mark.parametrize("pretrained", [0, 6])
def test_a_continuous_window_has_the_network_of_swin_v2(pretrained: int) -> None:
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Config, Swinv2SelfAttention

    window = (4, 4)
    theirs = Swinv2SelfAttention(Swinv2Config(), 12, HEADS, window, [pretrained, pretrained])
    ours = qkv.ContinuousWindowPositionBias(HEADS, 4, pretrained_window=pretrained or None)
    weights = {name: value for name, value in theirs.state_dict().items() if name.startswith("continuous")}
    ours.load_state_dict(weights)
    table = theirs.continuous_position_bias_mlp(theirs.relative_coords_table).view(-1, HEADS)
    want = 16 * table[theirs.relative_position_index.view(-1)].view(16, 16, HEADS).permute(2, 0, 1).sigmoid()
    torch.testing.assert_close(ours(16, 16), want[None])


@pytest.mark.parametrize("name", ["few buckets", "window"])
def test_the_gradient_of_a_bias(name: str) -> None:
    bias, key = MODULES[name](dtype=torch.float64), next(iter(MODULES[name]().state_dict()))
    weight = next(bias.parameters()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: torch.func.functional_call(bias, {key: weight}, (6, 6)), weight)


@pytest.mark.parametrize("name", MODULES)
def test_a_bias_is_learned(name: str) -> None:
    bias = MODULES[name]()
    q, k, v = (torch.randn(2, HEADS, 6, 4) for _ in range(3))
    qkv.attention(q, k, v, bias=bias(6, 6)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in bias.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_copies_pickles_casts_meta_and_empty(name: str) -> None:
    bias = MODULES[name]()
    want = bias(6, 6)
    assert want.shape == (1, HEADS, 6, 6)
    for other in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(other(6, 6), want)
        assert repr(other) == repr(bias)
    assert copy.deepcopy(bias).bfloat16()(6, 6).dtype is torch.bfloat16
    meta = MODULES[name](device="meta")
    assert meta(6, 6).device.type == "meta"
    empty = meta.to_empty(device="cpu")
    empty.reset_parameters()
    assert empty(6, 6).isfinite().all()
    empty.load_state_dict(bias.state_dict())
    assert torch.equal(empty(6, 6), want)
    assert not list(bias.buffers())


LONG = ("decoder", "few buckets", "window")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in MODULES])
def test_compiled_and_exported_biases(name: str) -> None:
    torch._dynamo.reset()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = MODULES[name]()

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            tokens = x.shape[2]
            if name not in BY_DISTANCE:
                return self.bias(tokens, tokens)
            return self.bias(tokens, tokens) + self.bias(tokens, tokens, 3) + self.bias(tokens, tokens, offset)

    call, x, offset = Call(), torch.randn(2, HEADS, 6, 4), torch.tensor([3, 0])
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x, offset), call(x, offset))
    dims = {2: torch.export.Dim("tokens", min=2, max=100)} if name in BY_DISTANCE else None
    program = torch.export.export(call, (x, offset), dynamic_shapes=(dims, None), strict=False).module()
    assert torch.equal(program(x, offset), call(x, offset))
    longer = torch.randn(2, HEADS, 60 if name in BY_DISTANCE else 6, 4)
    assert torch.equal(program(longer, offset), call(longer, offset))


@pytest.mark.parametrize("name", MODULES)
def test_mapped_weights(name: str) -> None:
    """As of an ensemble of models."""
    biases = [MODULES[name]() for _ in range(3)]
    weights, _ = torch.func.stack_module_state(biases)
    offset = () if name not in BY_DISTANCE else (torch.tensor([4, 0]),)
    got = torch.vmap(lambda weights: torch.func.functional_call(biases[0], weights, (6, 6, *offset)))(weights)
    torch.testing.assert_close(got, torch.stack([bias(6, 6, *offset) for bias in biases]))


def test_decoding_has_the_rows_of_the_whole_bias() -> None:
    bias = qkv.RelativePositionBias(HEADS, bidirectional=False)
    whole = bias(9, 9)
    for step in range(9):
        assert torch.equal(bias(1, 9, step), whole[:, :, step : step + 1])
    q, k, v = (torch.randn(2, HEADS, 9, 4) for _ in range(3))
    want = qkv.attention(q, k, v, mask=Mask.causal(), bias=whole)
    got = [
        qkv.attention(q[:, :, step : step + 1], k, v, mask=Mask.causal(), bias=bias(1, 9, step), offset=step)
        for step in range(9)
    ]
    torch.testing.assert_close(torch.cat(got, dim=2), want)


BIAS, WINDOW = qkv.RelativePositionBias(2), qkv.WindowPositionBias(2, (2, 3))
CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no heads": (lambda: qkv.RelativePositionBias(0), ValueError, "num_heads must be at least 1; got 0"),
    "odd buckets": (
        lambda: qkv.RelativePositionBias(2, num_buckets=33),
        ValueError,
        "num_buckets must be even if bidirectional; got 33",
    ),
    "few buckets": (
        lambda: qkv.RelativePositionBias(2, num_buckets=2),
        ValueError,
        "num_buckets must be at least 4; got",
    ),
    "a short distance": (
        lambda: qkv.RelativePositionBias(2, num_buckets=32, max_distance=8),
        ValueError,
        "max_distance must be at least 9, more than the 8 exact distances; got 8",
    ),
    "direction": (
        lambda: qkv.RelativePositionBias(2, bidirectional=1),
        TypeError,
        "bidirectional must be True or False; got 1",
    ),
    "negative length": (lambda: BIAS(-1, 3), ValueError, "RelativePositionBias: lq must be at least 0; got -1"),
    "a float offset": (lambda: BIAS(1, 3, 1.0), TypeError, r"offset must be an int, or integers \(B,\); got 1\.0"),
    "float offsets": (
        lambda: BIAS(1, 3, torch.zeros(2)),
        TypeError,
        r"offset must be an int, or a tensor of integers; got a tensor of torch\.float32",
    ),
    "an offset of two dimensions": (
        lambda: BIAS(1, 3, torch.zeros(2, 3, dtype=torch.int64)),
        ValueError,
        r"offset must be an int, or integers of shape \(\) or \(2,\); got \(2, 3\)",
    ),
    "another device": (
        lambda: BIAS(1, 3, torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "offset must be on the device of the weights, cpu; got meta",
    ),
    "three sides": (
        lambda: qkv.WindowPositionBias(2, (2, 3, 4)),
        ValueError,
        r"\(height, width\) or an int; got \(2, 3, 4\)",
    ),
    "an empty side": (lambda: qkv.WindowPositionBias(2, (2, 0)), ValueError, "each side of window must be at least 1"),
    "pretrained": (
        lambda: qkv.ContinuousWindowPositionBias(2, 4, pretrained_window=0.5),
        TypeError,
        r"each side of pretrained_window must be an int; got 0\.5",
    ),
    "part of a window": (
        lambda: WINDOW(6, 5),
        ValueError,
        "must be the 6 patches of a 2 x 3 window, without an offset; got lq=6, lk=5 and offset=0",
    ),
    "a window with an offset": (lambda: WINDOW(6, 6, 1), ValueError, "without an offset; got lq=6, lk=6 and offset=1"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()
