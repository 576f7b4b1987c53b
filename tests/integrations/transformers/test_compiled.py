"""Decoding by compiled models of transformers: tokens are appended in place, and a step is compiled once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import qkv
from qkv import QKVCache
from qkv.integrations.transformers.cache import AppendLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own making

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones_like(IDS)
KEEP[0, :3] = 0


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield


def llama(**options: Any) -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, eos_token_id=None, **options))
    return qkv.accelerate(model.eval())


def program_of(model: Any) -> Any:
    return torch.compile(model.forward, backend="eager")


def graphs() -> int:
    """The number of graphs compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def generate(model: Any, ids: torch.Tensor = IDS, keep: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    keep = torch.ones_like(ids) if keep is None else keep
    tokens: torch.Tensor = model.generate(ids, attention_mask=keep, do_sample=False, **options)
    return tokens


@pytest.mark.long
def test_a_step_is_compiled_once_in_generate() -> None:
    model = llama()
    want = generate(model, max_new_tokens=64), generate(model, keep=KEEP, max_new_tokens=8, num_beams=2)
    model.forward = program_of(model)
    cache = QKVCache(model)
    assert torch.equal(generate(model, max_new_tokens=64, past_key_values=cache), want[0])
    assert graphs() <= 3  # a prompt; a step, once more for lengths that change
    assert torch.equal(generate(model, max_new_tokens=64), want[0])
    assert graphs() <= 3
    assert torch.equal(generate(model, keep=KEEP, max_new_tokens=8, num_beams=2), want[1])
    assert not counters["graph_break"]


def test_tokens_are_appended_in_place_and_found_by_eager_code() -> None:
    model = llama()
    program, cache, eager = program_of(model), QKVCache(model), QKVCache(model)
    runs = ((program, cache), (model.forward, eager))

    def step(start: int, stop: int) -> None:
        got, want = (run(IDS[:, start:stop], past_key_values=each, use_cache=True).logits for run, each in runs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    step(0, 3)
    memory = [layer._keys.memory for layer in cache.layers]
    step(3, 4)
    step(4, 5)
    assert all(layer._keys.memory is one for layer, one in zip(cache.layers, memory, strict=True))
    for mine, theirs in zip(cache.layers, eager.layers, strict=True):
        assert isinstance(mine, AppendLayer)
        assert mine.get_seq_length() == theirs.get_seq_length() == 5
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    for each in (cache, eager):
        each.crop(-1)
    step(4, 5)
    for each in (cache, eager):
        each.reorder_cache(torch.tensor([1, 0]))
        each.reorder_cache(torch.tensor([1, 0]))
    step(5, 6)
    for mine, theirs in zip(cache.layers, eager.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_steps_compiled_and_not_take_turns() -> None:
    model = llama()
    program, cache = program_of(model), QKVCache(model)
    want = model(IDS, use_cache=False).logits
    parts = [
        run(IDS[:, start:stop], past_key_values=cache, use_cache=True).logits
        for run, start, stop in ((model.forward, 0, 3), (program, 3, 4), (program, 4, 5), (model.forward, 5, 6))
    ]
    parts += [program(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_gradients_concatenate() -> None:
    model = llama().requires_grad_(True)
    program, cache = program_of(model), QKVCache(model)
    with torch.enable_grad():
        first = program(IDS[:, :5], past_key_values=cache, use_cache=True).logits
        second = program(IDS[:, 5:6], past_key_values=cache, use_cache=True).logits
        weight = model.model.layers[0].self_attn.k_proj.weight
        got = torch.autograd.grad(first.sum() + second.sum(), weight)[0]
        want = torch.autograd.grad(model(IDS[:, :6], use_cache=False).logits.sum(), weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_two_models_in_one_process() -> None:
    one, two = llama(), llama(rope_theta=500.0)
    for model in (one, two):
        want = generate(model, max_new_tokens=5)
        model.forward = program_of(model)
        assert torch.equal(generate(model, max_new_tokens=5), want)
