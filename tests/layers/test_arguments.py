"""Arguments that no layer can take are refused where they are given, by every layer, with a message that says which."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.layers import torch_arguments

X, CONTEXT = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
ALLOW = torch.ones(5, 5, dtype=torch.bool)

LAYERS: dict[str, Callable[..., qkv.Attention]] = {
    "Attention": lambda **options: qkv.Attention(**{"embed_dim": 24, "num_heads": 6, **options}),
    "MultiHeadAttention": lambda **options: qkv.MultiHeadAttention(**{"embed_dim": 24, "num_heads": 6, **options}),
    "CausalAttention": lambda **options: qkv.CausalAttention(**{"embed_dim": 24, "num_heads": 6, **options}),
    "CrossAttention": lambda **options: qkv.CrossAttention(**{"embed_dim": 24, "num_heads": 6, **options}),
    "MultiQueryAttention": lambda **options: qkv.MultiQueryAttention(**{"embed_dim": 24, "num_heads": 6, **options}),
    "GroupedQueryAttention": lambda **options: qkv.GroupedQueryAttention(
        **{"embed_dim": 24, "num_heads": 6, "num_kv_heads": 2, **options}
    ),
    "SlidingWindowAttention": lambda **options: qkv.SlidingWindowAttention(
        **{"embed_dim": 24, "num_heads": 6, "window": 4, **options}
    ),
    "ScaledDotProductAttention": lambda **options: qkv.ScaledDotProductAttention(**{"embed_dim": 24, **options}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class NoRotation:
    head_dim = 4


def at_construction() -> list[tuple[str, Any, type[Exception], str]]:
    whole = [True, 8.0, "8", None, torch.tensor(8), -1, 0]
    mask = "mask must be a qkv.Mask; got "
    cases: list[tuple[str, Any, type[Exception], str]] = [
        ("mask", ALLOW, TypeError, mask + "Tensor. Use Mask.dense(allow)."),
        ("mask", "causal", TypeError, mask + "str. Use Mask.causal(), "),
        ("mask", lambda q, k: q >= k, TypeError, mask + "function. Use Mask.causal(), "),
        ("mask", True, TypeError, mask + "bool"),
        ("rotary", True, TypeError, "rotary must be a qkv.RotaryEmbedding, or a module with the same head_dim"),
        ("rotary", 10000.0, TypeError, "with the same head_dim and forward; got float. Use RotaryEmbedding("),
        ("rotary", NoRotation(), TypeError, "got NoRotation"),
        ("rotary", nn.Identity(), TypeError, "got Identity"),
        ("rotary", qkv.RotaryEmbedding, TypeError, "rotary must be a qkv.RotaryEmbedding"),
        ("rotary", qkv.RotaryEmbedding(2), ValueError, "rotary must be for head_dim="),
        ("alibi", True, TypeError, "alibi must be floating-point of shape ("),
        ("alibi", 0.5, TypeError, "one per query head; got 0.5"),
        ("alibi", "123456", TypeError, "one per query head; got '123456'"),
        ("alibi", [1.0] * 5, ValueError, "one per query head; got [1.0, 1.0, 1.0, 1.0, 1.0]"),
        ("alibi", torch.ones(5), ValueError, "one per query head; got torch.float32 (5,)"),
        ("alibi", torch.ones(6, dtype=torch.int64), ValueError, "one per query head; got torch.int64 (6,)"),
        ("alibi", torch.ones(6, 1), ValueError, "one per query head; got torch.float32 (6, 1)"),
        ("embed_dim", True, TypeError, "embed_dim must be an int; got True"),
        ("embed_dim", 24.0, TypeError, "embed_dim must be an int; got 24.0"),
        ("embed_dim", 0, ValueError, "embed_dim must be at least 1; got 0"),
    ]
    for option in ("head_dim", "value_dim"):
        cases += [
            (option, value, TypeError, f"{option} must be an int; got {value!r}")
            for value in whole
            if value is not None and not (isinstance(value, int) and value is not True)
        ]
        cases += [(option, value, ValueError, f"{option} must be at least 1; got {value}") for value in (0, -3)]
    scale = "scale must be a finite number, or None for 1 / sqrt(head_dim); got "
    for value in (True, "1", torch.tensor(0.5), [1.0]):
        cases.append(("scale", value, TypeError, f"{scale}{value!r}"))
        cases.append(("softcap", value, TypeError, f"softcap must be a positive number or None; got {value!r}"))
        cases.append(("dropout", value, TypeError, f"dropout must be a probability in [0, 1); got {value!r}"))
    for value in (float("nan"), float("inf"), -float("inf")):
        cases.append(("scale", value, ValueError, f"{scale}{value!r}"))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        cases.append(("softcap", value, ValueError, f"softcap must be a positive number or None; got {value!r}"))
    for value in (1.0, -0.1, float("nan"), 2):
        cases.append(("dropout", value, ValueError, f"dropout must be a probability in [0, 1); got {value!r}"))
    cases.append(("dropout", None, TypeError, "dropout must be a probability in [0, 1); got None"))
    for flag in ("qk_norm", "gate", "bias", "out_bias", "sink_logits"):
        cases.append((flag, 1, TypeError, f"{flag} must be True or False; got 1"))
        cases.append((flag, "no", TypeError, f"{flag} must be True or False; got 'no'"))
        cases.append((flag, torch.zeros(6), TypeError, f"{flag} must be True or False; got a tensor of shape (6,)"))
    for value in ("float32", float, torch.zeros(())):
        cases.append(("dtype", value, TypeError, f"dtype must be a torch.dtype or None; got {value!r}"))
    for value in (torch.int32, torch.complex64, torch.float8_e5m2):
        cases.append(("dtype", value, ValueError, "dtype must be one of torch.float32, torch.bfloat16, torch.float16,"))
    for value in (True, "1", torch.tensor(0.5), None):
        cases.append(("qk_norm_eps", value, TypeError, f"qk_norm_eps must be a positive number; got {value!r}"))
    cases.append(("qk_norm_eps", 0.0, ValueError, "qk_norm_eps must be a positive number; got 0.0"))
    of_torch = ", an argument of nn.MultiheadAttention. "
    for name in ("kdim", "vdim"):
        cases.append((name, 10, TypeError, f"got {name}{of_torch}Use context_dim="))
    cases.append(("add_bias_kv", True, TypeError, f"got add_bias_kv{of_torch}Layers add no keys; sink_logits=True"))
    cases.append(("add_zero_attn", True, TypeError, f"got add_zero_attn{of_torch}Use sink_logits=True"))
    cases.append(("batch_first", True, TypeError, f"got batch_first{of_torch}Leave it out: inputs are (B, L, embed_"))
    cases.append(("dropuot", 0.1, TypeError, "got an unexpected argument 'dropuot'. Did you mean dropout?"))
    cases.append(("flavour", 0.1, TypeError, "got an unexpected argument 'flavour'. help(qkv.Attention) lists the op"))
    for backend in ("fast", None, True):
        cases.append(
            ("backend", backend, ValueError, "backend must be 'auto' or one of 'native', 'sdpa', 'flex', 'refe")
        )
    return cases


def test_every_layer_refuses_invalid_options() -> None:
    for name, make in LAYERS.items():
        for option, value, error, message in at_construction():
            with pytest.raises(error) as raised:
                make(**{option: value})
            text = str(raised.value)
            heads = 1 if name.startswith("Scaled") else 6
            assert text.startswith(f"{name}: "), (name, option, value, text)
            assert message in text or (option == "alibi" and f"({heads},)" in text), (name, option, value, text)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("Scaled")])
@pytest.mark.parametrize("value", [True, 6.0, "6", None, torch.tensor(6)])
def test_num_heads_must_be_an_int(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: num_heads must be an int; got"):
        LAYERS[name](num_heads=value)
    with pytest.raises(ValueError, match=f"{name}: num_heads must be a multiple of num_kv_heads, both at least 1"):
        LAYERS[name](num_heads=0)


@pytest.mark.parametrize("value", [True, 2.0, "2"])
def test_num_kv_heads_context_dim_and_window_must_be_ints(value: Any) -> None:
    with pytest.raises(TypeError, match="GroupedQueryAttention: num_kv_heads must be an int"):
        qkv.GroupedQueryAttention(24, 6, value)
    with pytest.raises(TypeError, match="CrossAttention: context_dim must be an int"):
        qkv.CrossAttention(24, 6, context_dim=value)
    with pytest.raises(TypeError, match="window must be an int"):
        qkv.SlidingWindowAttention(24, 6, value)
    with pytest.raises(TypeError, match="causal must be True or False"):
        qkv.SlidingWindowAttention(24, 6, 4, causal="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_dim": True}, TypeError, "head_dim must be an int; got True"),
        ({"head_dim": 8.0}, TypeError, "head_dim must be an int; got 8.0"),
        ({"rotary_dim": 4.0}, TypeError, "rotary_dim must be an int; got 4.0"),
        ({"base": "10000"}, TypeError, "base must be a positive number; got '10000'"),
        ({"base": 0.0}, ValueError, "base must be a positive number; got 0.0"),
        ({"base": float("inf")}, ValueError, "base must be a positive number; got inf"),
        ({"position_scale": None}, TypeError, "position_scale must be a finite number; got None"),
        ({"position_scale": float("nan")}, ValueError, "position_scale must be a finite number; got nan"),
        ({"interleaved": "yes"}, TypeError, "interleaved must be True or False; got 'yes'"),
        ({"frequencies": 1.0}, TypeError, r"frequencies must be floating-point of shape \(4,\), .* got 1.0"),
        ({"frequencies": [1.0, 2.0, 3.0, float("nan")]}, ValueError, "frequencies must be finite"),
        ({"frequencies": torch.ones(4, 1)}, ValueError, r"frequencies must .* got torch\.float32 \(4, 1\)"),
    ],
)
def test_a_rotary_embedding_refuses_invalid_arguments(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"RotaryEmbedding: {message}"):
        qkv.RotaryEmbedding(**{"head_dim": 8, **options})


AT_CALL: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("a boolean mask", {"mask": ALLOW}, TypeError, "mask must be a qkv.Mask; got Tensor. Use Mask.dense(allow)."),
    ("a name", {"mask": "causal"}, TypeError, "mask must be a qkv.Mask; got str. Use Mask.causal(), "),
    ("a function", {"mask": lambda q, k: q >= k}, TypeError, "mask must be a qkv.Mask; got function"),
    ("a flag", {"mask": True}, TypeError, "mask must be a qkv.Mask; got bool"),
    ("a dictionary for a cache", {"cache": {}}, TypeError, "cache must be a "),
    ("the class of a cache", {"cache": qkv.KVCache}, TypeError, "cache must be a "),
    ("no tensor", {"x": X.tolist()}, TypeError, "x must be a tensor (B, L, 24); got list"),
    ("nothing", {"x": None}, TypeError, "x must be a tensor (B, L, 24); got NoneType"),
    ("an array", {"x": X.numpy()}, TypeError, "x must be a tensor (B, L, 24); got ndarray"),
    ("two dimensions", {"x": X[0]}, ValueError, "x must be (B, L, 24); got shape (5, 24)"),
    ("another width", {"x": X[..., :3]}, ValueError, "x must be (B, L, 24); got shape (2, 5, 3)"),
    ("integers", {"x": X.int()}, ValueError, "x must be torch.float32, as the layer's weights are; got torch.int32"),
    ("complex", {"x": X + 0j}, ValueError, "x must be torch.float32, as the layer's weights are; got torch.complex64"),
    ("fp64", {"x": X.double()}, ValueError, "weights are (or torch.autocast enabled); got torch.float64"),
    ("bf16", {"x": X.bfloat16()}, ValueError, "weights are (or torch.autocast enabled); got torch.bfloat16"),
    ("meta", {"x": X.to("meta")}, ValueError, "x must be on the device of the layer's weights, cpu; got meta"),
]


of_torch = ", an argument of nn.MultiheadAttention. "
sequences = "Call layer(x) for self-attention and layer(x, context) for cross-attention"
CALLS_OF_TORCH: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
    ((X, X, X), {}, f"at most two positional arguments, x and context; got 3. {sequences}"),
    ((X, X, X, ALLOW), {}, "got 4. "),
    ((X, X, X), {"need_weights": False}, f"got need_weights{of_torch}Leave it out: the result is the output alone."),
    ((), {"query": X, "key": X, "value": X}, f"got query{of_torch}{sequences}"),
    ((X,), {"key": X, "value": X}, f"got key{of_torch}{sequences}"),
    ((X,), {"value": X}, f"got value{of_torch}{sequences}"),
    ((X,), {"key_padding_mask": ALLOW}, f"got key_padding_mask{of_torch}Use mask=Mask.padding(~key_padding_mask): T"),
    ((X,), {"attn_mask": ALLOW}, f"got attn_mask{of_torch}Use mask=Mask.dense(~attn_mask): True means may attend."),
    ((X,), {"average_attn_weights": False}, f"got average_attn_weights{of_torch}Use layer.attention_weights(x).mean("),
    ((X,), {"is_causal": True}, f"got is_causal{of_torch}Use CausalAttention, or mask=Mask.causal()."),
]


@each_layer
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
def test_calls_in_the_way_of_torch_are_answered_by_name(name: str, method: str) -> None:
    for args, options, message in CALLS_OF_TORCH:
        with pytest.raises(TypeError) as raised:
            getattr(LAYERS[name](), method)(*args, **options)
        assert str(raised.value).startswith(f"{name}: ") and message in str(raised.value), (options, raised.value)


def test_the_answers_cover_every_argument_of_torch() -> None:
    """So that an argument which torch adds is not forgotten."""
    own = {"embed_dim", "num_heads", "dropout", "bias", "device", "dtype"}
    assert set(inspect.signature(nn.MultiheadAttention).parameters) - own == set(torch_arguments.OPTIONS)
    call = set(inspect.signature(nn.MultiheadAttention.forward).parameters) - {"self"}
    assert call == set(torch_arguments.CALL)


@pytest.mark.parametrize("given", [{}, {"mask": None}, {"mask": Mask.full()}])
def test_a_mask_of_none_is_the_full_one(given: dict[str, Any]) -> None:
    assert qkv.Attention(24, 6, **given).mask == Mask.full()
    assert qkv.CausalAttention(24, 6, **given).mask == Mask.causal()
    assert qkv.SlidingWindowAttention(24, 6, 4, **given).mask == Mask.sliding(4)


@each_layer
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
def test_every_layer_refuses_invalid_calls(name: str, method: str) -> None:
    layer = LAYERS[name]()
    context = () if layer.context_dim is None else (CONTEXT,)
    for case, options, error, message in AT_CALL:
        x, rest = options.get("x", X), {key: value for key, value in options.items() if key != "x"}
        with pytest.raises(error) as raised:
            getattr(layer, method)(x, *context, **rest)
        text = str(raised.value)
        assert text.startswith(f"{name}: ") and message in text, (case, text)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (CONTEXT.tolist(), TypeError, "context must be a tensor (2, Lk, 24); got list"),
        (CONTEXT[0], ValueError, "context must be (2, Lk, 24); got shape (7, 24)"),
        (CONTEXT[:1], ValueError, "context must be (2, Lk, 24); got shape (1, 7, 24)"),
        (CONTEXT.long(), ValueError, "context must be torch.float32, as the layer's weights are; got torch.int64"),
        (CONTEXT.half(), ValueError, "context must be torch.float32, as the layer's weights are (or torch.autocast"),
        (CONTEXT.to("meta"), ValueError, "context must be on the device of the layer's weights, cpu; got meta"),
    ],
)
def test_an_invalid_context_is_refused(context: Any, error: type[Exception], message: str) -> None:
    cache = qkv.CrossKVCache()
    with pytest.raises(error) as raised:
        qkv.CrossAttention(24, 6)(X, context, cache=cache)
    assert str(raised.value).startswith(f"CrossAttention: {message}")
    assert cache.length == 0


@pytest.mark.parametrize(
    "wrong",
    [{"x": X.double()}, {"mask": ALLOW}, {"context": X}, {"x": X[0]}],
    ids=["dtype", "mask", "context", "dimensions"],
)
def test_a_refused_call_changes_nothing(wrong: dict[str, Any]) -> None:
    layer, cache = qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4)), qkv.KVCache()
    with torch.no_grad():
        layer(X, cache=cache)
        want = layer(X, cache=qkv.KVCache())
        options = dict(wrong)
        with pytest.raises((TypeError, ValueError)):
            layer(options.pop("x", X), cache=cache, **options)
        assert cache.length == 5
        cache.crop(0)
        assert torch.equal(layer(X, cache=cache), want)


def test_a_mask_passed_as_context_is_explained() -> None:
    with pytest.raises(ValueError, match=r"context must be None .* Pass a mask by keyword, mask=\."):
        qkv.CausalAttention(24, 6)(X, Mask.causal())  # type: ignore[arg-type]


def test_errors_of_other_causes_are_not_replaced() -> None:
    layer = qkv.MultiHeadAttention(24, 6)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("from a hook")

    layer.k_proj.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="from a hook"):
        layer(X)


def test_numpy_numbers_are_accepted() -> None:
    layer = qkv.Attention(
        np.int64(24), np.int64(6), scale=np.float32(0.5), softcap=np.float64(3), alibi=np.ones(6), dropout=0
    )
    want = qkv.Attention(24, 6, scale=0.5, softcap=3, alibi=[1] * 6)
    want.load_state_dict(layer.state_dict())
    assert torch.equal(layer(X), want(X))
