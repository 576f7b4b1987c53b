"""`accelerate` on models of transformers: what it gives, to which model, and that it takes all of it back."""

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families.one_line import state
from integrations.transformers.one_line import DECODERS, IDS, LEFT, STEPS, generated, model
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import qkv
from qkv.integrations.transformers import latent
from qkv.integrations.transformers.steps import rotated_forward
from qkv.integrations.transformers.steps.rotated_forward import RotatedForward
from qkv.layers.projection import ProjectedForward

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    qkv.register(cache=True)


def forwards(of: nn.Module, kind: type) -> int:
    return sum(isinstance(vars(module).get("forward"), kind) for module in of.modules())


QUICK = ("llama", "gemma3_text", "gpt2", "t5")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.long) for kind in DECODERS]
)
def test_a_model_generates_the_same_text_on_our_attention_and_cache_and_goes_back(kind: str) -> None:
    ours = model(kind)
    before, want = state(ours), generated(ours)
    assert qkv.accelerate(ours) is ours
    got = generated(ours)
    assert torch.equal(got.sequences, want.sequences)
    cache = got.past_key_values
    assert type(cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache) is qkv.QKVCache
    linear = sum(type(module) is nn.Linear for module in ours.modules())
    assert forwards(ours, ProjectedForward) == linear > 0
    assert qkv.report(ours).routed > 0
    qkv.accelerate(ours, enabled=False)
    assert state(ours) == before
    again = generated(ours)
    assert torch.equal(again.sequences, want.sequences)
    assert not isinstance(again.past_key_values, qkv.QKVCache)


def test_an_encoder_is_packed_if_asked_for() -> None:
    ours = model("bert")
    before, keep = state(ours), LEFT.flip(1)
    with torch.no_grad():
        want = ours(IDS, attention_mask=keep).logits
        qkv.accelerate(ours, unpad=True)
        got = ours(IDS, attention_mask=keep).logits
    torch.testing.assert_close(got[keep.bool()], want[keep.bool()], atol=1e-4, rtol=1e-4)
    assert any(by == "without padding" for _, by in qkv.report(ours).calls)
    qkv.accelerate(ours, enabled=False)
    assert state(ours) == before


def test_latents_are_read_as_they_are_cached() -> None:
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    ours = model("deepseek_v3", **sizes, **experts, num_experts_per_tok=2, num_key_value_heads=4)
    before, want = state(ours), generated(ours).sequences
    assert torch.equal(generated(qkv.accelerate(ours)).sequences, want)
    assert "latents        2 modules" in str(qkv.report(ours))
    qkv.accelerate(ours, enabled=False)
    assert state(ours) == before
    latent(ours)
    qkv.accelerate(qkv.accelerate(ours), enabled=False)
    assert sum("expand_kv" in vars(module) for module in ours.modules()) == 2  # what was there before stays


def test_an_unpadding_of_your_own_stays() -> None:
    ours = qkv.unpad(model("bert"))
    before = state(ours)
    qkv.accelerate(qkv.accelerate(ours, unpad=True), enabled=False)
    assert state(ours) == before


def test_what_cannot_be_packed_is_refused_before_anything_changes() -> None:
    for refused in (model("t5"), nn.Linear(3, 3)):
        before = state(refused)
        with pytest.raises(ValueError, match=r"accelerate: model must .* only in attention, for unpad=True; got"):
            qkv.accelerate(refused, unpad=True)
        assert state(refused) == before


def test_twice_is_once_and_back_without_forth_is_nothing() -> None:
    ours = model()
    before = state(ours)
    assert qkv.accelerate(ours, enabled=False) is ours
    assert state(ours) == before
    qkv.accelerate(qkv.accelerate(ours))
    qkv.accelerate(ours, enabled=False)
    assert state(ours) == before


def test_other_models_see_no_difference() -> None:
    ours, other = qkv.accelerate(model()), model()
    before = state(other)
    assert type(generated(other).past_key_values) is type(other(IDS).past_key_values) is DynamicCache
    assert type(generated(ours).past_key_values) is type(ours(IDS).past_key_values) is qkv.QKVCache
    assert state(other) == before and not qkv.report(other).taken
    assert type(ours.model(IDS, use_cache=True).past_key_values) is qkv.QKVCache  # a part of it
    assert ours(IDS, use_cache=False).past_key_values is None


def test_a_model_of_the_same_configuration_sees_no_difference() -> None:
    config = model().config
    ours, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    qkv.accelerate(ours)
    assert other.config is config and config._attn_implementation == "sdpa"
    assert ours.config is ours.model.config is ours.model.layers[0].self_attn.config
    assert (type(made(other)), type(made(ours))) == (DynamicCache, qkv.QKVCache)
    qkv.accelerate(ours, enabled=False)
    assert ours.config is ours.model.config is ours.model.layers[0].self_attn.config is config
    qkv.accelerate(ours).config.use_cache = False
    qkv.accelerate(ours, enabled=False)
    assert ours.config.use_cache is False and ours.config._attn_implementation == "sdpa" and config.use_cache


def made(of: Any) -> Any:
    return generated(of).past_key_values


class Wrapper(nn.Module):
    """A model within a module of somebody else, as adapters, sentence-transformers and trainers have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(97, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.inner(ids).logits)
        return found


def test_a_model_within_another_module() -> None:
    wrapped = Wrapper(model())
    before, want = state(wrapped), wrapped(IDS)
    torch.testing.assert_close(qkv.accelerate(wrapped)(IDS), want, atol=1e-4, rtol=1e-4)
    assert qkv.report(wrapped).routed == 2 and type(vars(wrapped.head)["forward"]) is ProjectedForward
    assert type(qkv.QKVCache(wrapped)) is qkv.QKVCache
    qkv.accelerate(wrapped, enabled=False)
    assert state(wrapped) == before


def test_what_is_changed_afterwards_stays() -> None:
    ours = qkv.accelerate(model())
    ours.set_attn_implementation("eager")
    ours.lm_head.forward = own = lambda x: x
    assert type(generated_cache(ours)) is DynamicCache
    qkv.accelerate(ours, enabled=False)
    assert ours.config._attn_implementation == "eager" and ours.lm_head.forward is own


def generated_cache(of: Any) -> Any:
    return of.model(IDS, use_cache=True).past_key_values


def test_a_model_that_was_on_qkv_stays_on_it() -> None:
    qkv.register()
    ours = model()
    ours.set_attn_implementation("qkv")
    before = state(ours)
    qkv.accelerate(qkv.accelerate(ours), enabled=False)
    assert state(ours) == before and ours.config._attn_implementation == "qkv"


def test_copies_and_pickles_are_accelerated_also_where_nothing_is_registered() -> None:
    ours = qkv.accelerate(model(), unpad=True)
    want = generated(ours).sequences
    pickled = pickle.dumps(ours)
    qkv.unregister()
    for twin in (pickle.loads(pickled), copy.deepcopy(ours)):
        got = generated(twin)
        assert torch.equal(got.sequences, want) and type(got.past_key_values) is qkv.QKVCache
        assert vars(twin.lm_head)["forward"].module is twin.lm_head
        qkv.accelerate(twin, enabled=False)
        assert twin.config._attn_implementation == "sdpa" and forwards(twin, object) == forwards(twin, type(None))
    assert ours.config._attn_implementation == "qkv"


def test_a_saved_model_knows_nothing_of_it(tmp_path: Path) -> None:
    ours, theirs = qkv.accelerate(model()), model()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("ours", "theirs")]
    assert texts[0] == texts[1] and "qkv" not in texts[0]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="qkv")
    assert type(generated(loaded).past_key_values) is qkv.QKVCache
    assert torch.equal(generated(loaded).sequences, generated(theirs).sequences)


def test_a_cast_model_runs() -> None:
    ours = qkv.accelerate(model()).to(torch.bfloat16)
    assert ours(IDS).logits.dtype is torch.bfloat16 and generated(ours).sequences.shape == (2, 9 + STEPS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing: bool) -> None:
    theirs, slopes = model().train(), []
    ours = qkv.accelerate(copy.deepcopy(theirs))
    for each in (theirs, ours):
        if checkpointing:
            each.gradient_checkpointing_enable()
        each(IDS, labels=IDS).loss.backward()
        slopes.append([parameter.grad for parameter in each.parameters()])
    for got, want in zip(*slopes, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)


@pytest.mark.long
def test_a_compiled_model_computes_the_same() -> None:
    ours = qkv.accelerate(model())
    with torch.no_grad():
        want = ours(IDS, attention_mask=LEFT)
        got = torch.compile(ours, backend="eager")(IDS, attention_mask=LEFT)
    torch.testing.assert_close(got.logits[:1], want.logits[:1], atol=1e-4, rtol=1e-4)


def test_threads_share_a_model_and_its_counts() -> None:
    ours = qkv.accelerate(model())
    want, found = generated(ours).sequences, []
    counted = qkv.report(ours).routed
    threads = [threading.Thread(target=lambda: found.append(generated(ours).sequences)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(each, want) for each in found)
    assert qkv.report(ours).routed == 3 * counted


class Adapted(nn.Module):
    """An adapter of low rank around a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.low = base_layer, nn.Linear(base_layer.in_features, 2, bias=False)
        self.high = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x) + self.high(self.low(x))
        return found


@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_adapters(first: str) -> None:
    torch.manual_seed(1)
    ours = model()
    theirs = copy.deepcopy(ours)
    for each in (ours, theirs):
        torch.manual_seed(1)
        if each is ours and first == "accelerate":
            qkv.accelerate(each)
        for layer in each.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        if each is ours and first == "adapter":
            qkv.accelerate(each)
    assert torch.equal(generated(ours).sequences, generated(theirs).sequences)


def test_hooks_and_changes_of_linear_layers_are_in_effect() -> None:
    ours, seen = model(), []
    ours.lm_head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    qkv.accelerate(ours)
    ours.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    want = model()
    torch.testing.assert_close(ours(IDS).logits, want(IDS).logits + 1, atol=1e-4, rtol=1e-4)
    assert seen == ["before"]
    for each in (ours, want):
        nn.utils.parametrizations.weight_norm(each.model.layers[0].mlp.up_proj)
        each.model.layers[1].mlp.up_proj.weight.data *= 2
    torch.testing.assert_close(ours(IDS).logits, want(IDS).logits + 1, atol=1e-4, rtol=1e-4)


def test_linear_layers_that_are_not_plain_are_left_alone() -> None:
    class Quantised(nn.Linear):
        pass

    ours = model()
    ours.lm_head.forward = own = ours.lm_head.forward
    ours.model.layers[0].mlp.up_proj = Quantised(32, 48)
    qkv.accelerate(ours)
    assert vars(ours.lm_head)["forward"] is own
    assert "forward" not in vars(ours.model.layers[0].mlp.up_proj)
    (part,) = (part for part in qkv.report(ours).left if part.subject == "linear layers")
    assert part.detail == "called as they are: 1 Quantised, 1 nn.Linear with another forward"


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_rotation_is_replaced_in_one_model_and_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, want = model(kind), generated(model(kind)).sequences
    before, seen = state(ours), []
    rotate = rotated_forward.apply_rotary_pos_emb
    monkeypatch.setattr(
        rotated_forward, "apply_rotary_pos_emb", lambda q, *args: seen.append(len(q)) or rotate(q, *args)
    )
    assert forwards(qkv.accelerate(ours), RotatedForward) == 2
    seen.clear()
    got = [generated(each).sequences for each in (ours, copy.deepcopy(ours), model(kind))]
    rotated = 1 if kind == "llama" else STEPS  # of the prompt alone, where steps rotate in the one call that they are
    assert all(torch.equal(each, want) for each in got) and seen.count(2) == 2 * 2 * rotated
    qkv.report(ours)
    qkv.accelerate(ours, enabled=False)
    assert state(ours) == before


def test_another_rotation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    ours, want = qkv.accelerate(model()), model()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (-q, 2 * k))
    torch.testing.assert_close(ours(IDS).logits, want(IDS).logits, atol=1e-4, rtol=1e-4)
    assert forwards(qkv.accelerate(model()), RotatedForward) == 0
    assert forwards(qkv.accelerate(model("cohere")), RotatedForward) == 0  # pairs of neighbours


def test_a_pipeline() -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w3"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    texts = []
    for each in (model(), qkv.accelerate(model())):
        writer = transformers.pipeline("text-generation", model=each, tokenizer=tokenizer, device="cpu")
        texts.append(writer("w5", max_new_tokens=5, do_sample=False))
    assert texts[0] == texts[1]


def test_another_attention_in_between_does_not_stay_ours() -> None:
    ours = qkv.accelerate(model())
    ours.set_attn_implementation("sdpa")
    qkv.accelerate(qkv.accelerate(ours), enabled=False)
    assert ours.config._attn_implementation == ours.model.config._attn_implementation == "sdpa"


def test_linear_layers_take_their_input_by_name() -> None:
    linear = nn.Linear(8, 4)
    want = linear(torch.ones(2, 8))
    assert torch.equal(qkv.accelerate(linear)(input=torch.ones(2, 8)), want)


def test_arguments_of_accelerate_are_checked() -> None:
    with pytest.raises(TypeError, match=r"^accelerate: enabled must be True or False; got 'no'"):
        qkv.accelerate(model(), enabled="no")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^accelerate: unpad must be"):
        qkv.accelerate(model(), unpad=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^accelerate: enabled=False and unpad=True need a model"):
        qkv.accelerate(enabled=False)  # type: ignore[call-overload]
