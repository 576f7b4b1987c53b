"""`latent`: transformers' models with latent attention compute the same, and decode without expanding latents."""

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from budget import assert_within_budget
from families.shrink import shrink
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from qkv.integrations.transformers import QKVCache, latent
from qkv.integrations.transformers.cache import Int8Layer, LatentLayer
from qkv.integrations.transformers.lazy_tensor import LatentTensor
from qkv.layers.latent_heads import LatentHeads, beside

RANK, ROPE = 32, 16
IDS = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones(2, 30, dtype=torch.long)
KEEP[1, :4] = 0

FAMILIES = ("deepseek_v2", "deepseek_v3")
MORE = ("axk1", "axk2", "bailing_hybrid", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear")
MORE += ("longcat_flash", "minicpm3", "youtu")


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = shrink(transformers.AutoConfig.for_model(family))
    if family in FAMILIES:
        config.first_k_dense_replace = config.num_hidden_layers  # experts are chosen by comparing rounded numbers
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


@torch.no_grad()
def logits(model: Any, cache: Any, keep: Tensor = KEEP) -> Tensor:
    """Of a prompt, steps, and a draft of several tokens."""
    done, found = 0, []
    for part in IDS.split([24, 1, 1, 3, 1], dim=1):
        done += part.shape[1]
        found.append(model(part, attention_mask=keep[:, :done], past_key_values=cache).logits)
    return torch.cat(found, dim=1)[keep.bool()]


def theirs(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_within_the_budget(family: str) -> None:
    model, all_kept = build(family), torch.ones_like(IDS)  # with padding, eager in fp64 has NaN
    want, peer = logits(copy.deepcopy(model).double(), theirs(model), all_kept), logits(model, theirs(model), all_kept)
    latent(model)
    for cache in (QKVCache(model.config), theirs(model)):
        assert_within_budget(logits(model, cache, all_kept), want, peer, family)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)])
def test_padded_batches_and_beams_have_the_same_text(family: str) -> None:
    model, options = build(family), {"attention_mask": KEEP, "max_new_tokens": 8, "do_sample": False}
    want = logits(model, theirs(model))
    texts = {beams: model.generate(IDS, num_beams=beams, **options) for beams in (1, 3)}
    latent(model)
    with mock.patch.object(LatentHeads, "attend", autospec=True, side_effect=LatentHeads.attend) as called:
        torch.testing.assert_close(logits(model, QKVCache(model.config)), want, rtol=1e-4, atol=1e-5)
    assert called.call_count >= 5  # one layer, in hybrid models
    for beams, text in texts.items():
        again = model.generate(IDS, num_beams=beams, past_key_values=QKVCache(model.config), **options)
        assert torch.equal(again, text)


@torch.no_grad()
def test_a_step_reads_the_memory_of_the_cache_and_expands_nothing() -> None:
    model = latent(build("deepseek_v3"))
    cache = QKVCache(model.config)
    model(IDS[:, :28], past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, LatentLayer)
    numbers = 2 * (28 + 64) * (RANK + ROPE)  # with spare capacity
    assert layer._keys.memory.numel() == numbers and layer._values.memory is None
    with (
        mock.patch.object(LatentHeads, "expand", side_effect=AssertionError("expanded")),
        mock.patch.object(LatentHeads, "attend", autospec=True, side_effect=LatentHeads.attend) as called,
    ):
        model(IDS[:, 28:29], past_key_values=cache)
    _, _, latents = called.call_args_list[0].args
    assert latents.shape == (2, 1, 29, RANK + ROPE) and latents.data_ptr() == layer._keys.memory.data_ptr()


@torch.no_grad()
def test_a_cache_in_int8_is_read() -> None:
    model = build("deepseek_v3")
    exact = logits(model, theirs(model))
    latent(model)
    cache = QKVCache(model.config, dtype=torch.int8)
    rounded = logits(model, cache)
    assert isinstance(cache.layers[0], Int8Layer)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_attention_weights_are_returned() -> None:
    model = build("deepseek_v3")
    want = model(IDS, output_attentions=True).attentions
    got = latent(model)(IDS, output_attentions=True).attentions
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def stock() -> Any:
    """A context in which nothing but transformers' own expansion may run."""
    return mock.patch.object(LatentHeads, "attend", side_effect=AssertionError("not expanded by transformers"))


def test_training_hooks_and_other_implementations_keep_the_expansion_of_transformers() -> None:
    model = build("deepseek_v3")
    model(IDS, labels=IDS).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    latent(model)
    model.zero_grad()
    with stock():
        model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if grads[name] is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)
    want = logits(model, theirs(model))
    model.set_attn_implementation("sdpa")
    with stock():
        torch.testing.assert_close(logits(model, theirs(model)), want, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("qkv")
    handles = [layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: None) for layer in model.model.layers]
    with stock():
        torch.testing.assert_close(logits(model, theirs(model)), want, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    with pytest.raises(AssertionError, match="not expanded by transformers"), stock():
        logits(model, theirs(model))
    latent(model, enabled=False)
    with stock():
        torch.testing.assert_close(logits(model, theirs(model)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the tracer's own making
def test_a_traced_model_applies_padding() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = latent(build("deepseek_v3")).model

        def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
            found: Tensor = self.model(input_ids=ids, attention_mask=keep, use_cache=False).last_hidden_state
            return found

    with torch.no_grad():
        model = Hidden().eval()
        program = torch.jit.trace(model, (IDS, torch.ones_like(IDS)), strict=False, check_trace=False)
        got, want = program(IDS, KEEP), model(IDS, KEEP)
    torch.testing.assert_close(got[KEEP.bool()], want[KEEP.bool()], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("load", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_decode_from_latents_with_their_own_weights(load: Any) -> None:
    model = latent(build("deepseek_v3"))
    state = set(model.state_dict())
    assert state == set(build("deepseek_v3").state_dict())
    twin, want = load(model), logits(model, theirs(model))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with mock.patch.object(LatentHeads, "attend", autospec=True, side_effect=LatentHeads.attend) as called:
        assert torch.equal(logits(twin, theirs(twin)), want)
    assert called.called


def test_models_without_latents_are_refused() -> None:
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="got a LlamaForCausalLM with none that expands latents"):
        latent(transformers.LlamaForCausalLM(config))
    with pytest.raises(TypeError, match=r"latent: model must be an nn\.Module; got str"):
        latent("deepseek")  # type: ignore[type-var]
    model = build("deepseek_v3")
    kind = type(model.model.layers[0].self_attn)
    expand = kind.expand_kv
    with (
        mock.patch.object(kind, "expand_kv", lambda *args: tuple(x.flip(1) for x in expand(*args))),
        pytest.raises(ValueError, match="got a DeepseekV3ForCausalLM with DeepseekV3Attention"),
    ):
        latent(model)
    state = torch.get_rng_state()
    assert latent(latent(model)) is model
    assert torch.equal(torch.get_rng_state(), state)
    with (
        mock.patch.object(kind, "expand_kv", lambda *args: tuple(x.flip(1) for x in expand(*args))),
        pytest.raises(ValueError, match="got a DeepseekV3ForCausalLM"),
    ):
        latent(model)
    with pytest.raises(AssertionError, match="not expanded by transformers"), stock():  # as before the error
        logits(model, theirs(model))


def rows(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, length, 6), torch.randn(batch, 1, length, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.reset(),
        lambda layer: layer.offload() or layer.prefetch(),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_latent_layer_supports_every_operation_of_transformers(change: Any, grad: bool) -> None:
    mine, other = LatentLayer(), DynamicLayer()
    with torch.set_grad_enabled(grad):
        for turn in range(2):
            batch = other.keys.shape[0] if other.keys is not None else 2
            for length in (7, 1, 1, 3, 1, 70, 1):
                new = rows(length, batch)
                for got, want in zip(mine.update(*new), other.update(*new), strict=True):
                    assert torch.equal(got, want)
                assert mine.get_seq_length() == other.get_seq_length()
            if turn == 0:
                change(mine)
                change(other)


@torch.no_grad()
def test_a_latent_layer_appends_in_place_and_refuses_what_does_not_fit() -> None:
    layer, places = LatentLayer(), set()
    layer.update(*rows(20))
    for _ in range(10):
        keys, values = layer.update(*rows(1))
        assert beside(keys, values).data_ptr() == keys.data_ptr()
        places.add(keys.data_ptr())
    layer.crop(-4)
    places.add(layer.update(*rows(1))[0].data_ptr())
    assert len(places) == 1
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = layer.keys.clone()
        twin.update(*rows(1))
        assert torch.equal(layer.keys, before) and twin.get_seq_length() == layer.get_seq_length() + 1
    for new in (rows(1, batch=1), (rows(1)[1], rows(1)[1]), (rows(1)[0][0], rows(1)[1][0])):
        with pytest.raises(ValueError, match=r"QKVCache: keys must be \("):
            layer.update(*new)
    assert layer.get_seq_length() == 27


def test_columns_are_joined_without_a_copy_only_where_they_are_one_in_memory() -> None:
    memory = torch.randn(2, 1, 5, 10)
    left, right = memory.split([6, 4], dim=3)
    cases = [
        (left, right, True),
        (left[:, :, 1:], right[:, :, 1:], True),
        (left[:1], right[:1], True),
        (right, left, False),
        (left, right.clone(), False),
        (left[:, :, 1:], right[:, :, :-1], False),
        (left, right[:1].expand(2, -1, -1, -1), False),
        (left[..., :5], right, False),
        (left, right[..., 1:], False),
        (left.flip(3), right, False),
        (memory.view(2, 1, 10, 5)[..., :3], memory.view(2, 1, 10, 5)[..., 3:], True),
        (left.clone().requires_grad_(), right, False),
    ]
    for a, b, is_view in cases:
        joined = beside(a, b)
        assert torch.equal(joined, torch.cat([a, b], dim=3))
        assert (joined.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()) == is_view


def test_lazy_keys_are_expanded_for_other_readers() -> None:
    up = nn.Linear(6, 3 * (5 + 7), bias=False).requires_grad_(False)
    heads, latents = LatentHeads(up, 6, 5, 7), torch.randn(2, 1, 4, 10)
    k, v = (LatentTensor(latents, heads, part) for part in (0, 1))
    assert (k.shape, v.shape) == ((2, 3, 4, 9), (2, 3, 4, 7))
    for lazy, want in zip((k, v), heads.expand(latents), strict=True):
        assert torch.equal(lazy * 1, want) and torch.equal(copy.deepcopy(lazy) * 1, want)
    assert repr(k) == "LatentTensor(shape=(2, 3, 4, 9), dtype=torch.float32)"
