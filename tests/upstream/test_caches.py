"""Complaints of users of caches, mostly those of transformers."""

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_sliding_window import counting
from torch import Tensor

import qkv
from qkv import Mask


def layer_with(mask: Mask) -> qkv.Attention:
    torch.manual_seed(0)
    return qkv.Attention(24, 6, num_kv_heads=2, mask=mask, rotary=qkv.RotaryEmbedding(4)).eval()


def in_chunks(layer: qkv.Attention, x: Tensor, chunks: Sequence[int], cache: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([layer(chunk, cache=cache) for chunk in x.split(list(chunks), dim=1)], dim=1)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [17, 1, 1, 20, 1], [3, 30, 7]], ids=str)
def test_executorch_21749_a_later_chunk_sees_the_earlier_ones(chunks: list[int]) -> None:
    """A chunk of a prompt, or a second turn, does not see what came before it (pytorch/executorch#21749,
    pytorch/pytorch#103082).
    """
    layer, x = layer_with(Mask.causal()), torch.randn(2, 40, 24)
    torch.testing.assert_close(in_chunks(layer, x, chunks, qkv.KVCache()), layer(x))


@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("chunks", [[1] * 40, [5, 1, 1, 6, 7, 20], [25, 1, 14], [7, 7, 7, 7, 7, 5], [40]], ids=str)
def test_transformers_37574_a_window_with_a_cache_is_the_window_without(chunks: list[int], sink_tokens: int) -> None:
    """Caches of windows go wrong where the window is full, past its length, or for chunks longer than it
    (huggingface/transformers#37574, huggingface/transformers#38046, huggingface/transformers#31786,
    huggingface/transformers#35924, huggingface/transformers#46629, fla-org/flash-linear-attention#431,
    EricLBuehler/mistral.rs#246).
    """
    layer, x = layer_with(Mask.causal(7, sink_tokens)), torch.randn(2, 40, 24)
    cache = qkv.SlidingKVCache(7, sink_tokens)
    torch.testing.assert_close(in_chunks(layer, x, chunks, cache), layer(x))
    assert cache.length == 40


def test_transformers_30862_capacity_costs_memory_and_no_time(upstream: Callable[..., None]) -> None:
    """A static cache computes attention over its whole capacity at every step (huggingface/transformers#30862,
    huggingface/transformers#40328).
    """
    layer, x = layer_with(Mask.causal()), torch.randn(1, 6, 24)

    def cost(cache: qkv.KVCache) -> tuple[int, int]:
        in_chunks(layer, x[:, :5], [5], cache)
        with torch.no_grad(), counting() as count:
            layer(x[:, 5:], cache=cache)
        return count.scores, count.largest

    assert cost(qkv.KVCache(capacity=4096)) == cost(qkv.KVCache())
    k = torch.randn(1, 2, 5, 4)
    assert qkv.KVCache(capacity=4096).append(k, k).k.shape[2] == 5

    def attends_to_capacity() -> bool:
        from transformers import LlamaConfig, StaticCache

        config = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
        return StaticCache(config, max_cache_len=64).update(k, k, 0)[0].shape[2] == 64

    upstream(attends_to_capacity)


def test_transformers_37908_appending_copies_only_new_tokens(upstream: Callable[..., None]) -> None:
    """A dynamic cache is concatenated for each token (huggingface/transformers#37908). That decoding does not compile
    again and again is held by tests/test_interoperability.py.
    """
    token = torch.randn(1, 2, 1, 8)

    def moves(append: Any) -> int:
        """How often the keys lie elsewhere after one more token."""
        kept = [append(token) for _ in range(1000)]  # all of them alive, so that no memory is used twice
        places = [keys.untyped_storage().data_ptr() for keys in kept]
        return sum(here != there for here, there in pairwise(places))

    cache = qkv.KVCache()
    with torch.no_grad():
        assert moves(lambda token: cache.append(token, token).k) <= 7, "16, 32, 64, ..., 1024"
    assert cache.length == 1000

    def copies() -> bool:
        from transformers import DynamicCache

        theirs = DynamicCache()
        return moves(lambda token: theirs.update(token, token, 0)[0]) > 100

    upstream(copies)


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_transformers_39412_keys_are_not_repeated_for_their_group_where_there_is_a_mask(
    upstream: Callable[..., None],
) -> None:
    """Keys and values are written out for every query head as soon as there is a mask
    (huggingface/transformers#39412, vllm-project/vllm#1880).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from qkv.integrations.transformers.attention import attend

    module = torch.nn.Module()
    module.num_key_value_groups = 8
    q, k, v = torch.randn(2, 8, 3, 16), torch.randn(2, 1, 500, 16), torch.randn(2, 1, 500, 16)
    keep = (torch.arange(500) < torch.tensor([[500], [300]]))[:, None, None].expand(-1, -1, 3, -1)

    def largest(attention: Any) -> tuple[Tensor, int]:
        with counting() as count:
            out = attention(module, q, k, v, keep)[0]
        return out, count.largest

    (ours, written), (theirs, _) = largest(attend), largest(sdpa_attention_forward)
    torch.testing.assert_close(ours, theirs)
    assert written < k.numel()
    upstream(lambda: largest(sdpa_attention_forward)[1] >= 8 * k.numel())


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_torchtune_2883_groups_rotary_and_a_cache_in_one_layer() -> None:
    """No maintained layer of PyTorch has grouped queries, rotary positions and a cache (meta-pytorch/torchtune#2883,
    google/flax#5259): one must be copied out of a model.
    """
    import transformers.models.llama.modeling_llama as llama

    config = llama.LlamaConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=4, attn_implementation="eager"
    )
    theirs, rotary = llama.LlamaAttention(config, 0).eval(), llama.LlamaRotaryEmbedding(config)
    ours = qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4), bias=False).eval()
    state = {name.replace("o_proj", "out_proj"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(2, 9, 24)
    hidden = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    want = theirs(x, rotary(x, torch.arange(9)[None]), hidden)[0]
    torch.testing.assert_close(ours(x), want)
    torch.testing.assert_close(in_chunks(ours, x, [4, 1, 1, 3], qkv.KVCache()), want)


def small_llama() -> Any:
    import transformers

    from qkv.integrations.transformers import attention as integration

    integration.register()
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("qkv")
    return model


@pytest.mark.parametrize("dtype", [None, torch.int8])
@torch.no_grad()
def test_llama_recipes_33_a_prompt_is_copied_for_each_question(dtype: torch.dtype | None) -> None:
    """The cache of a prompt cannot be copied, or its copies share memory (huggingface/huggingface-llama-recipes#33,
    huggingface/transformers#32681).
    """
    model = small_llama()
    from qkv.integrations.transformers.cache import QKVCache

    prompt, questions = torch.randint(3, 97, (1, 7)), torch.randint(3, 97, (4, 1, 3))

    def answer(question: Tensor, cache: Any) -> Tensor:
        return torch.cat([model(token, past_key_values=cache).logits for token in question.split(1, dim=1)], dim=1)

    cache, want = QKVCache(model.config, dtype), []
    for question in questions:
        alone = QKVCache(model.config, dtype)
        model(prompt, past_key_values=alone)
        want.append(answer(question, alone))
    model(prompt, past_key_values=cache)
    light = copy.copy(cache)
    light.layers = [copy.copy(layer) for layer in cache.layers]
    copies = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), light]
    steps: list[list[Tensor]] = [[] for _ in copies]
    for i in range(3):  # in turns
        for question, each, found in zip(questions, copies, steps, strict=True):
            found.append(answer(question[:, i : i + 1], each))
    for found, expected in zip(steps, want, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=1), expected)
    torch.testing.assert_close(answer(questions[0], cache), want[0])


@pytest.mark.parametrize("cached", ["kv", "int8", "sliding", "transformers"])
def test_vllm_1968_a_prompt_under_inference_mode_and_the_rest_outside(cached: str) -> None:
    """Memory of inference_mode cannot be written to outside of it (vllm-project/vllm#1968)."""
    layer, x = layer_with(Mask.causal(7)).requires_grad_(False), torch.randn(2, 12, 24)
    model = small_llama().requires_grad_(False) if cached == "transformers" else None
    if model is None:
        make = {"kv": qkv.KVCache, "int8": qkv.Int8KVCache, "sliding": lambda: qkv.SlidingKVCache(7)}[cached]
        call = lambda part, cache: layer(part, cache=cache)
    else:
        from qkv.integrations.transformers.cache import QKVCache

        make, x = lambda: QKVCache(model.config), torch.randint(3, 97, (2, 12))
        call = lambda part, cache: model(part, past_key_values=cache).logits
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for order in itertools.permutations(modes):
        cache, plain, found, want = make(), make(), [], []
        for part, mode in zip(x.split(4, dim=1), order, strict=True):
            with mode():
                found.append(call(part, cache))
            with torch.no_grad():
                want.append(call(part, plain))
        torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(want, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_of", ["AppendLayer", "Int8Layer"])
def test_transformers_35648_a_training_step_fills_a_cache(layer_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``use_cache`` stays True while training, so that every forward pass fills a cache
    (huggingface/transformers#35648, huggingface/transformers#28056).
    """
    model = small_llama()
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

    from qkv.integrations.transformers import cache

    ids = torch.randint(3, 97, (2, 12))

    def step() -> list[Tensor]:
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    want = step()
    monkeypatch.setitem(DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", getattr(cache, layer_of))
    for got, expected in zip(step(), want, strict=True):
        torch.testing.assert_close(got, expected)
    cache = model(ids).past_key_values  # computed with gradients, and gone on with without
    with torch.no_grad():
        later = model.eval()(ids[:, :1], past_key_values=cache).logits
    assert type(cache.layers[0]).__name__ == layer_of and cache.get_seq_length() == 13 and later.isfinite().all()
