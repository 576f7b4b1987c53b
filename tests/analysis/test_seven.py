"""`seven`: the rows of the mechanisms, compared with softmax of the q and k of a model's own projections, by hand."""

import math
from typing import Any

import pytest
import torch
from families.small import build
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qkv.analysis import record, seven

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

IDS = torch.randint(3, 96, (1, 23), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.1.self_attn"


def q_and_k(model: Any) -> tuple[Tensor, Tensor]:
    """Of layer 1 of a Llama, with its rotations, (H, L, D) and (Hkv, L, D)."""
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[1]
        block = model.model.layers[1]
        x = block.input_layernorm(hidden)
        q, k = (
            proj(x).unflatten(2, (-1, 8)).transpose(1, 2) for proj in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        cos, sin = model.model.rotary_emb(x, torch.arange(23)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q[0].double(), k[0].double()


@pytest.mark.parametrize(("query", "window"), [(-1, None), (9, 4), (1, 30)])
def test_rows_are_softmax_over_what_each_mechanism_sees(query: int, window: int | None) -> None:
    model = build("llama")
    q, k = q_and_k(model)
    heads, n, d = q.shape
    at, wide = query % n, min(n, window or n // 8)
    found = seven(model, IDS, layer=LAYER, query=query, window=window)
    assert (found.layer, found.query, found.window) == (LAYER, at, wide)
    assert (found.heads, found.kv_heads, found.groups) == (heads, len(k), len(k)) == (6, 2, 2)

    def rows(keys: Tensor, first: int, stop: int) -> Tensor:
        scores = [q[h, at] @ keys[h * len(keys) // heads, first:stop].T / math.sqrt(d) for h in range(heads)]
        return torch.stack(scores).softmax(-1)

    first, mean = max(0, at + 1 - wide), k.mean(0, keepdim=True)
    lower, size = n * (n + 1) // 2, 2 * d
    near = sum(min(i + 1, wide) for i in range(n))
    expected = {
        "scaled dot-product": (0, n, rows(k, 0, n), n * n, n * size),
        "multi-head": (0, n, rows(k, 0, n).mean(0)[None], 6 * n * n, 6 * n * size),
        "cross": (0, 11, rows(k, 0, 11), 6 * n * 11, 6 * 11 * size),
        "causal": (0, at + 1, rows(k, 0, at + 1), 6 * lower, 6 * n * size),
        "sliding-window": (first, at + 1, rows(k, first, at + 1), 6 * near, 6 * wide * size),
        "multi-query": (0, at + 1, rows(mean, 0, at + 1), 6 * lower, n * size),
        "grouped-query": (0, at + 1, rows(k, 0, at + 1), 6 * lower, 2 * n * size),
    }
    assert [one.name for one in found.mechanisms] == list(expected)
    for one in found.mechanisms:
        start, stop, weights, scores, numbers = expected[one.name]
        assert (one.first, one.stop, one.scores, one.cache_numbers) == (start, stop, scores, numbers)
        torch.testing.assert_close(one.weights.double(), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral"])
def test_the_models_own_mechanism_has_its_own_weights(name: str) -> None:
    """With a softcap, sink logits and windows."""
    model = build(name)
    layers = record(model, IDS).layers
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(IDS, output_attentions=True, use_cache=False).attentions
    for layer, weights in zip(layers, eager, strict=True):
        found = seven(model, IDS, layer=layer.name, query=15, window=layer.window)
        own = found.mechanisms[3 if layer.window is None else 4]
        torch.testing.assert_close(own.weights, weights[0, :, 15, own.first : own.stop], rtol=1e-3, atol=1e-5)


def test_heads_that_share_nothing_are_pooled() -> None:
    found = seven(build("bert"), IDS, layer="encoder.layer.0.attention.self", query=3)
    assert (found.heads, found.kv_heads) == (6, 6) and found.groups == 3
    grouped, causal = found.mechanisms[6], found.mechanisms[3]
    assert grouped.cache_numbers * 2 == causal.cache_numbers
    assert not torch.allclose(grouped.weights, causal.weights, atol=1e-3)


def test_calls_that_are_refused() -> None:
    model = build("llama")
    for options, error, message in (
        ({"layer": "x"}, ValueError, r"layer must be one of model\.layers\.0\.self_attn, .*; got 'x'"),
        ({"layer": LAYER, "query": 23}, ValueError, "query must be from -23 to 22 .*; got 23 with 23 queries"),
        ({"layer": LAYER, "query": "3"}, TypeError, "query must be an int"),
        ({"layer": LAYER, "window": 0}, ValueError, "window must be at least 1; got 0"),
    ):
        with pytest.raises(error, match=message):
            seven(model, IDS, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \(1, L\)"):
        seven(model, IDS.expand(2, -1), layer=LAYER)
