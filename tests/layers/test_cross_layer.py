"""`CrossLayerAttention` reads what another layer has put into its cache, in training and in decoding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qkv
from qkv import Mask
from qkv.convert import convert_layer, prune_heads

X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
CACHES: dict[str, tuple[Callable[[], Any], Mask]] = {
    "KVCache": (qkv.KVCache, Mask.causal()),
    "Int8KVCache": (qkv.Int8KVCache, Mask.causal()),
    "SlidingKVCache": (lambda: qkv.SlidingKVCache(window=4), Mask.causal(4)),
    "SlidingKVCache in int8": (lambda: qkv.SlidingKVCache(window=4, dtype="int8"), Mask.causal(4)),
    "SlidingKVCache with sinks": (lambda: qkv.SlidingKVCache(window=4, sink_tokens=2), Mask.causal(4, 2)),
}


CAUSAL = Mask.causal()


def build(mask: Mask = CAUSAL, **options: Any) -> tuple[qkv.Attention, qkv.CrossLayerAttention, qkv.Attention]:
    """A layer, one that reads its keys, and one with the queries of the second and the keys of the first."""
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "mask": mask, "rotary": qkv.RotaryEmbedding(8), **options}
    first, second = qkv.Attention(32, 4, **options), qkv.CrossLayerAttention(32, 4, **options)
    for parameter in [*first.parameters(), *second.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    both = qkv.Attention(32, 4, **options)
    both.load_state_dict({**first.state_dict(), **second.state_dict()})
    return first.eval(), second.eval(), both.eval()


def test_it_has_no_parameters_of_keys_and_values() -> None:
    _, second, both = build(qk_norm=True, gate=True)
    keys = {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight"}
    assert set(second.state_dict()) == set(both.state_dict()) - keys
    again = qkv.CrossLayerAttention(**second.options())
    again.load_state_dict(second.state_dict())
    assert repr(again) == repr(second)
    with torch.device("meta"):
        empty = qkv.CrossLayerAttention(32, 4)
    empty.to_empty(device="cpu").reset_parameters()
    assert all(parameter.isfinite().all() for parameter in empty.parameters())


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"rotary": None, "value_dim": 5, "gate": True}], ids=str)
def test_in_training_it_equals_a_layer_with_those_keys_and_their_gradients(options: dict[str, Any]) -> None:
    first, second, both = build(**options)
    cache = qkv.KVCache()
    first(X, cache=cache)
    got, want = second(X, cache=cache), both(X)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(second.attention_weights(X, cache=cache), both.attention_weights(X))
    upstream = torch.randn_like(got)
    for name in ("k_proj", "v_proj"):
        ours, theirs = getattr(first, name).weight, getattr(both, name).weight
        torch.testing.assert_close(
            torch.autograd.grad(got, ours, upstream, retain_graph=True),
            torch.autograd.grad(want, theirs, upstream, retain_graph=True),
        )


@pytest.mark.parametrize("sizes", [[5, 1, 1, 5], [1] * 12, [12]], ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_decoding_equals_a_layer_with_those_keys(name: str, sizes: list[int]) -> None:
    make, mask = CACHES[name]
    first, second, both = build(mask)
    cache, own = make(), make()
    if sizes == [12] and name.startswith("Sliding"):
        with torch.no_grad():
            first(X, cache=cache)
        with pytest.raises(
            ValueError, match=r"all keys that the last 12 tokens see .*; got [35] of 12 .* at most 5 at once"
        ):
            second(X, cache=cache)
        return
    with torch.no_grad():
        for part in X.split(sizes, dim=1):
            first(part, cache=cache)
            torch.testing.assert_close(second(part, cache=cache), both(part, cache=own))
            torch.testing.assert_close(second(part, cache=cache), second(part, cache=cache))  # and any number of them
    assert cache.length == 12


def test_cropped_and_selected_caches_are_read_as_they_are() -> None:
    first, second, both = build()
    cache, own = qkv.KVCache(), qkv.KVCache()
    with torch.no_grad():
        for layer, kept in ((first, cache), (both, own)):
            layer(X, cache=kept)
            kept.crop(7)
            kept.select(torch.tensor([1, 1, 0]))
            layer(X[[0, 1, 0], :2], cache=kept)
        own.crop(7)
        torch.testing.assert_close(second(X[[0, 1, 0], :2], cache=cache), both(X[[0, 1, 0], :2], cache=own))


KEEP = torch.ones(2, 8, dtype=torch.bool)
KEEP[1, :3] = False  # padding before, as generation has it
KEEP[0, 5:] = False  # and after


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_rows_of_different_lengths(name: str, bias: bool) -> None:
    make, mask = CACHES[name]
    relative = qkv.RelativePositionBias(4, bidirectional=False) if bias else None
    first, second, both = build(mask, position_bias=relative)
    cache, own = make(), make()
    with torch.no_grad():
        parts = X[:, :8].split([5, 3], dim=1) if name.startswith("Sliding") else [X[:, :8]]
        for part, keep in zip(parts, KEEP.split([part.shape[1] for part in parts], dim=1), strict=True):
            first(part, mask=Mask.padding(keep), cache=cache)
            got = second(part, mask=Mask.padding(keep), cache=cache)
            want = both(part, mask=Mask.padding(keep), cache=own)
            torch.testing.assert_close(got[keep], want[keep])
        for part in X[:, 8:].split([1, 3], dim=1):
            first(part, cache=cache)
            torch.testing.assert_close(second(part, cache=cache), both(part, cache=own))
    assert torch.equal(cache.lengths, torch.tensor([9, 9]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    first, second, both = build()
    cache, own = qkv.KVCache(), qkv.KVCache()
    with torch.no_grad():
        for lengths in ((3, 7), (2, 1), (1, 4)):
            texts = [X[row, :length] for row, length in enumerate(lengths)]
            x = torch.nested.as_nested_tensor(texts, layout=torch.jagged)
            first(x, cache=cache)
            got, want = second(x, cache=cache), both(x, cache=own)
            torch.testing.assert_close(got.values(), want.values())
    assert cache.lengths.tolist() == [6, 12]


def test_padding_and_biases_of_the_call() -> None:
    first, second, both = build()
    mask, cache, bias = Mask.padding(torch.tensor([12, 5])), qkv.KVCache(), torch.randn(12, 12)
    first(X, mask=mask, cache=cache)
    got = second(X, mask=mask, bias=bias, cache=cache)
    keep = mask.keep_keys(12)
    torch.testing.assert_close(got[keep], both(X, mask=mask, bias=bias)[keep])


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_equals_a_layer_of_gemma3n_that_reuses_keys() -> None:
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40}
    config = Gemma3nTextConfig(**sizes, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["full_attention"] * 4)
    config._attn_implementation = "eager"
    theirs = Gemma3nTextAttention(config, 3).eval()
    assert theirs.is_kv_shared_layer
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    first, second, _ = build(qk_norm=True, scale=1.0, bias=False)
    second.load_state_dict(theirs.state_dict())
    cache = qkv.KVCache()
    with torch.no_grad():
        first(X, cache=cache)
        angles = torch.arange(12.0)[:, None] * qkv.RotaryEmbedding(8).frequencies.repeat(2)
        hidden = torch.ones(12, 12).triu(1) * torch.finfo(torch.float32).min
        want, _ = theirs(
            X,
            position_embeddings=(angles.cos()[None], angles.sin()[None]),
            attention_mask=hidden[None, None],
            shared_kv_states={"full_attention": cache.latest(12)[:2]},
        )
        torch.testing.assert_close(second(X, cache=cache), want)


def test_wrong_caches_are_refused_and_stay_as_they_are() -> None:
    _, second, _ = build()
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            None,
            TypeError,
            "cache must be the KVCache, PagedKVCache, Int8KVCache or SlidingKVCache of the layer .*; got NoneType",
        ),
        (qkv.CrossKVCache(), TypeError, r"whose keys are read; got CrossKVCache\."),
        (qkv.KVCache(), ValueError, r"the keys of the 12 tokens of x; got one of 0\. Call the layer that they belong"),
    ]
    for cache, error, message in cases:
        with pytest.raises(error, match=f"^CrossLayerAttention: .*{message}"):
            second(X, cache=cache)
    other = qkv.CausalAttention(32, 4)
    cache = qkv.KVCache()
    other(X, cache=cache)
    with pytest.raises(
        ValueError, match="must be of 2 KV heads, head_dim=8 and value_dim=8, as the layer's; got 4, 8 and"
    ):
        second(X, cache=cache)
    with pytest.raises(ValueError, match="context must be None in self-attention"):
        second(X, X, cache=cache)
    with pytest.raises(ValueError, match="the mask must not show keys after the query"):
        qkv.CrossLayerAttention(32, 4)(X[:, :1], cache=cache)
    assert cache.length == 12
    other(X, cache=cache)  # still its owner
    with pytest.raises(TypeError, match=r"whose keys are read; got NoneType\."):
        second(torch.nested.as_nested_tensor([X[0]], layout=torch.jagged))


def test_conversions_are_refused_by_name() -> None:
    layer = build()[1]
    with pytest.raises(ValueError, match=r"^CrossLayerAttention: context_dim must be None, .*; got 3\."):
        qkv.CrossLayerAttention(32, 4, context_dim=3)
    with pytest.raises(ValueError, match=r"^to_torch: .* has keys of its own; got a CrossLayerAttention\."):
        layer.to_torch()
    with pytest.raises(ValueError, match=r"^from_torch: .* has keys of its own; got a CrossLayerAttention\."):
        qkv.CrossLayerAttention.from_torch(nn.MultiheadAttention(32, 4))
    with pytest.raises(ValueError, match=r"^from_transformers: .* keys of their own; got CrossLayerAttention\."):
        qkv.CrossLayerAttention.from_transformers(nn.Linear(2, 2))
    for convert in (lambda: convert_layer(layer, 1), lambda: prune_heads(layer, [0])):
        with pytest.raises(
            TypeError, match=r"layer must have one map and keys of its own .*; got a CrossLayerAttention"
        ):
            convert()
