"""`accelerate` on parts and wholes in any order, with copies and pickles in between: each module is as it was told
last, and at the end all of them are as at the start.
"""

import copy
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families.one_line import state
from integrations.transformers.one_line import IDS, generated, model
from torch import nn

import qkv
from qkv.layers.instance_forward import InstanceForward

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making


class Wrapper(nn.Module):
    """Two models of one configuration, and a linear layer, in a module of somebody else."""

    def __init__(self) -> None:
        super().__init__()
        config = model().config
        torch.manual_seed(0)
        self.first, self.second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
        self.head = nn.Linear(97, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.first(ids).logits + self.second(ids).logits)
        return found


def vision_and_text() -> Any:
    """A model whose parts have configurations of their own, within its own."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = transformers.LlamaConfig(**sizes, vocab_size=97)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


WHOLES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (model, ("", "model", "model.layers", "model.layers.0", "model.layers.1.self_attn", "lm_head")),
    "two of one configuration": (Wrapper, ("", "first", "second", "second.model", "first.model.layers.0.mlp", "head")),
    "vision and text": (
        vision_and_text,
        ("", "model", "model.language_model", "model.vision_tower", "model.vision_tower.encoder.layers.1"),
    ),
}


def sharing(of: nn.Module) -> list[int]:
    """Which configurations of a model are one object: for each place, the first with the same."""
    places = [value for each in of.modules() for value in vars(each).values() if is_configuration(value)]
    return [next(index for index, other in enumerate(places) if other is place) for place in places]


def is_configuration(value: object) -> bool:
    return isinstance(value, transformers.PreTrainedConfig)


def configurations(of: nn.Module) -> list[Any]:
    return [value for each in of.modules() for value in vars(each).values() if is_configuration(value)]


def is_on(of: nn.Module) -> bool:
    """Whether anything of `accelerate` is left in a module."""
    on_ours = any(value._attn_implementation == "qkv" for value in configurations(of))
    values = (value for each in of.modules() for value in vars(each).values())
    return on_ours or any(isinstance(value, InstanceForward) for value in values)


@pytest.mark.parametrize("name", WHOLES)
def test_after_any_order_all_is_as_at_the_start(name: str) -> None:
    make, parts = WHOLES[name]
    whole, draw = make(), random.Random(name)
    before, had, shared = state(whole), configurations(whole), sharing(whole)
    pixels = {} if name != "vision and text" else {"pixel_values": None}
    with torch.no_grad():
        want = whole(IDS, **pixels)
        for _ in range(6):
            on: dict[str, bool] = dict.fromkeys(parts, False)
            for _ in range(draw.randrange(1, 6)):
                part, enabled = draw.choice(parts), draw.random() < 0.6
                qkv.accelerate(whole.get_submodule(part), enabled=enabled)
                on |= {each: enabled for each in parts if is_within(each, part)}
                for each in parts:
                    if all(on[other] is on[each] for other in parts if is_within(other, each)):
                        assert on[each] or not is_on(whole.get_submodule(each))
                if all(on.values()):
                    assert sharing(whole) == shared
            got = whole(IDS, **pixels)
            for ours, theirs in zip(tensors(got), tensors(want), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
                qkv.accelerate(twin, enabled=False)
                assert not is_on(twin) and sharing(twin) == shared
            for part in draw.sample(parts, len(parts)):
                qkv.accelerate(whole.get_submodule(part), enabled=False)
            assert state(whole) == before and not is_on(whole)
            assert all(now is then for now, then in zip(configurations(whole), had, strict=True))


def is_within(part: str, other: str) -> bool:
    return not other or part == other or part.startswith(f"{other}.")


def tensors(result: Any) -> list[torch.Tensor]:
    return [result if isinstance(result, torch.Tensor) else result.logits]


def test_a_part_and_its_whole_share_their_configuration_in_either_order() -> None:
    for order in (("", "model"), ("model", "")):
        whole = model()
        for part in order:
            qkv.accelerate(whole.get_submodule(part))
        assert len({id(config) for config in configurations(whole)}) == 1
        whole.config.use_cache = False
        assert whole.model(IDS).past_key_values is None


def test_a_part_is_taken_back_alone_and_joins_again() -> None:
    whole = qkv.accelerate(model())
    want, layer = generated(whole).sequences, whole.model.layers[0]
    qkv.accelerate(whole.model, enabled=False)
    assert not is_on(whole.model) and is_on(whole) and torch.equal(generated(whole).sequences, want)
    qkv.accelerate(whole.model)
    assert whole.config is whole.model.config and torch.equal(generated(whole).sequences, want)
    qkv.accelerate(layer, enabled=False)
    assert not is_on(layer) and is_on(whole.model.layers[1]) and torch.equal(generated(whole).sequences, want)


def test_a_copy_of_a_part_stays_accelerated_and_is_taken_back_by_itself() -> None:
    whole = qkv.accelerate(model())
    layer, popped = copy.deepcopy(whole.model.layers[0]), whole.model.layers.pop(1)
    attention = pickle.loads(pickle.dumps(whole.model.layers[0].self_attn))
    qkv.accelerate(whole, enabled=False)
    assert not is_on(whole)
    for part in (layer, popped, attention):
        assert is_on(part)
        qkv.accelerate(part, enabled=False)
        assert not is_on(part) and all(each._attn_implementation == "sdpa" for each in configurations(part))


def test_what_a_configuration_was_changed_to_stays() -> None:
    whole = vision_and_text()
    before, had = whole.config, whole.config.vision_config
    qkv.accelerate(whole)
    whole.config.text_config.use_cache = False
    qkv.accelerate(whole, enabled=False)
    assert whole.config is whole.model.config is not before
    assert whole.config.text_config is whole.model.language_model.config and not whole.config.text_config.use_cache
    assert whole.config.vision_config is whole.model.vision_tower.config is had
    assert before.text_config.use_cache and not is_on(whole)
    one = model()
    before = one.config
    qkv.accelerate(one)
    before.use_cache = False  # of the object that is given back
    qkv.accelerate(one, enabled=False)
    assert one.config is before and not one.config.use_cache


def test_a_changed_copy_is_not_given_to_another_model() -> None:
    config = model().config
    first, second = (transformers.LlamaForCausalLM(config) for _ in range(2))
    qkv.accelerate(first).config.use_cache = False
    assert qkv.accelerate(second).config.use_cache
    third, fourth = (transformers.LlamaForCausalLM(config) for _ in range(2))
    qkv.accelerate(third)
    config.use_cache = False
    assert not qkv.accelerate(fourth).config.use_cache


def test_nothing_is_taken_if_a_model_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Wrapper()
    had = configurations(whole)

    def refuse(*args: Any) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(whole.second, "set_attn_implementation", refuse)
    before = state(whole)
    with pytest.raises(ValueError, match="refused"):
        qkv.accelerate(whole)
    assert state(whole) == before and list(map(id, configurations(whole))) == list(map(id, had))


DEEPSEEK = {
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("n_routed_experts", "num_key_value_heads"), 4),
    "num_experts_per_tok": 2,
}


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "bert"])
def test_a_model_is_freed_when_it_is_deleted(kind: str) -> None:
    for take in (lambda each: each, lambda each: qkv.accelerate(each, unpad=kind != "deepseek_v3")):
        each = take(model(kind, **(DEEPSEEK if kind == "deepseek_v3" else {})))
        with torch.no_grad():
            each(IDS, attention_mask=torch.ones_like(IDS).triu(-3))
        found = [weakref.ref(next(each.parameters())), weakref.ref(each.config)]
        del each
        assert [reference() for reference in found] == [None, None]
