"""`RotaryEmbedding.from_config` and the scalings, compared with transformers: the same bits.

Given the same sines, which are torch's here. The kernel's own differ from these in the last bit, at the same angles:
tests/layers/test_rotation.py compares the two.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qkv
from qkv import kernels
from qkv.layers.rotary_config import MULTIMODAL, rope_parameters


@pytest.fixture(autouse=True)
def torchs_sines() -> Iterator[None]:
    with kernels.use("bits are compared with torch's"):
        yield


TRAINED, LONGEST = 64, 256
DIVISORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn with a factor of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 0.9,
    },
    "yarn, nothing between": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 1e-3,
        "beta_slow": 1e-3,
    },
    "longrope": {"rope_type": "longrope", **DIVISORS, "original_max_position_embeddings": TRAINED},
    "longrope with factors": {
        "rope_type": "longrope",
        **DIVISORS,
        "original_max_position_embeddings": TRAINED,
        "factor": 16.0,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}
BY_LENGTH = [name for name in SETTINGS if name.startswith(("dynamic", "longrope"))]


def config_of(name: str, settings: dict[str, Any], **others: Any) -> Any:
    """A configuration of transformers, by the module and prefix of its name."""
    module, cls = CONFIGS[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    config = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), cls)
    return config(**{**sizes, "max_position_embeddings": LONGEST, "rope_parameters": settings, **others})


CONFIGS = {
    "llama": ("llama", "LlamaConfig"),
    "phi3": ("phi3", "Phi3Config"),
    "qwen2": ("qwen2", "Qwen2Config"),
    "phi": ("phi", "PhiConfig"),
    "glm": ("glm", "GlmConfig"),
    "cohere": ("cohere", "CohereConfig"),
    "ernie4_5": ("ernie4_5", "Ernie4_5Config"),
    "gemma3": ("gemma3", "Gemma3TextConfig"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLTextConfig"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLTextConfig"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLTextConfig"),
}


def theirs(config: Any, x: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """x, rotated by transformers' modules for the configuration, as far as they rotate it."""
    name = config.model_type.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    cls = next(cls for key, cls in vars(modeling).items() if key.endswith("RotaryEmbedding") and "Vision" not in key)
    cos, sin = cls(config)(x, positions, **options)
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if name == "glm":
        rest = rest[..., :0]  # its function splits by itself
        rotated = x
    return torch.cat([modeling.apply_rotary_pos_emb(rotated, rotated, cos, sin)[0], rest], dim=-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_scaling_has_the_bits_of_rope_init_functions(name: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_theta": 500.0, **SETTINGS[name]}
    config = config_of("llama", dict(settings))
    rotary, kind = qkv.RotaryEmbedding.from_config(config), settings["rope_type"]
    if kind == "default":
        assert rotary.scaling is None
        return
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(rotary.frequencies, want)
    assert rotary.scaling is not None and rotary.scaling.attention_factor == factor


@pytest.mark.parametrize("positions", ["short", "at the limit", "long", "one row of many"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_rotation_has_the_bits_of_llama(name: str, positions: str) -> None:
    config = config_of("llama", {"rope_theta": 500.0, **SETTINGS[name]})
    starts = {"short": [3], "at the limit": [TRAINED - 5], "long": [LONGEST + 30], "one row of many": [3, 900, 0, 70]}
    where = torch.tensor(starts[positions])[:, None] + torch.arange(5)
    x = torch.randn(len(where), 3, 5, 16)
    want = torch.cat([theirs(config, row[None], each[None]) for row, each in zip(x, where, strict=True)])
    rotary = qkv.RotaryEmbedding.from_config(config)
    assert torch.equal(rotary(x, positions=where), want)
    assert torch.equal(rotary(x, where[:, 0]), want)
    if len(where) == 1:
        assert torch.equal(rotary(x, int(where[0, 0])), want)
        assert torch.equal(rotary(x, positions=where[0]), want)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_decoding_past_the_trained_length_goes_as_in_transformers(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = config_of("llama", {"rope_theta": 500.0, **SETTINGS[name]})
    rotary, module = qkv.RotaryEmbedding.from_config(config), LlamaRotaryEmbedding(config)
    x = torch.randn(1, 2, LONGEST + 3, 16)
    for start, stop in [(0, TRAINED - 1), (TRAINED - 1, TRAINED), (TRAINED, LONGEST + 1), (LONGEST + 1, LONGEST + 3)]:
        part = x[:, :, start:stop]
        want = apply_rotary_pos_emb(part, part, *module(part, torch.arange(start, stop)[None]))[0]
        assert torch.equal(rotary(part, start), want), f"tokens {start} to {stop}"


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_row_depends_neither_on_other_rows_nor_on_earlier_calls(name: str) -> None:
    rotary = qkv.RotaryEmbedding.from_config(config_of("llama", {"rope_theta": 500.0, **SETTINGS[name]}))
    x, starts = torch.randn(3, 2, 4, 16), torch.tensor([1000, 0, 300])
    together = rotary(x, starts)
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(together[row], rotary(x[row : row + 1], start)[0])


@pytest.mark.parametrize("name", BY_LENGTH)
def test_length_chooses_the_frequencies(name: str) -> None:
    rotary = qkv.RotaryEmbedding.from_config(config_of("llama", {"rope_theta": 500.0, **SETTINGS[name]}))
    x = torch.randn(1, 2, LONGEST + 3, 16)
    want, tokens = rotary(x), torch.arange(LONGEST + 3)
    assert torch.equal(rotary(x[:, :, :7], length=LONGEST + 3), want[:, :, :7])
    assert torch.equal(rotary(x[:, :, :7], length=torch.tensor(LONGEST + 3)), want[:, :, :7])
    # Two sequences, packed: each token goes by the length of its own.
    packed, lengths = torch.cat([x[:, :, :9], x], dim=2), torch.tensor([9] * 9 + [LONGEST + 3] * (LONGEST + 3))
    got = rotary(packed, positions=torch.cat([tokens[:9], tokens]), length=lengths)
    assert torch.equal(got, torch.cat([rotary(x[:, :, :9]), want], dim=2))


MODELS: dict[str, Callable[[], Any]] = {
    "phi3 longrope": lambda: config_of(
        "phi3",
        {"rope_type": "longrope", **DIVISORS, "rope_theta": 1e4},
        original_max_position_embeddings=TRAINED,
        pad_token_id=0,
    ),
    "qwen2 yarn": lambda: config_of("qwen2", {"rope_theta": 1e6, **SETTINGS["yarn"]}),
    "phi, half of the channels": lambda: config_of("phi", {"rope_theta": 1e4}, partial_rotary_factor=0.5),
    "glm, half, interleaved": lambda: config_of("glm", {"rope_theta": 1e4}, head_dim=16, pad_token_id=0),
    "cohere, interleaved": lambda: config_of("cohere", {"rope_theta": 1e4}),
    "ernie, interleaved": lambda: config_of("ernie4_5", {"rope_theta": 5e5}, head_dim=16),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [0, 700])
def test_from_config_equals_the_modules_of_models(name: str, start: int) -> None:
    config, x, positions = MODELS[name](), torch.randn(2, 3, 7, 16), start + torch.arange(7)[None]
    got = qkv.RotaryEmbedding.from_config(config)(x, start)
    assert torch.equal(got, theirs(config, x, positions))


LAYER_TYPES = {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 16}


def gemma3() -> Any:
    by_type = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    return config_of("gemma3", by_type, **LAYER_TYPES)


@pytest.mark.parametrize("layer_type", LAYER_TYPES["layer_types"])
def test_each_layer_type_of_gemma3(layer_type: str) -> None:
    config, x = gemma3(), torch.randn(1, 3, 7, 16)
    want = theirs(config, x, torch.arange(90, 97)[None], layer_type=layer_type)
    assert torch.equal(qkv.RotaryEmbedding.from_config(config, layer_type)(x, 90), want)
    assert torch.equal(qkv.RotaryEmbedding.from_config(config.to_dict(), layer_type)(x, 90), want)
    before = {"head_dim": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4}  # a config.json of that time
    before["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert torch.equal(qkv.RotaryEmbedding.from_config(before, layer_type)(x, 90), want)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("kind", ["default", "yarn", "dynamic"])
def test_multimodal_positions(name: str, kind: str) -> None:
    config = config_of(name, {"rope_theta": 1e4, **SETTINGS[kind], "mrope_section": [4, 2, 2]}, head_dim=16)
    rotary, x = qkv.RotaryEmbedding.from_config(config), torch.randn(2, 3, 7, 16)
    positions = torch.randint(0, 500, (3, 2, 7))
    positions[:, :, -1] = 600  # the same length for both rows
    assert torch.equal(rotary(x, positions=positions), theirs(config, x, positions))
    text = torch.arange(5, 12)
    want = theirs(config, x, text.expand(3, 2, 7))
    assert torch.equal(rotary(x, 5), want)
    assert torch.equal(rotary(x, positions=text), want)
    assert torch.equal(rotary(x, positions=text.expand(2, 7)), want)
    assert torch.equal(rotary(x, positions=text.expand(3, 1, 7)), want)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_sections_that_a_configuration_leaves_out_are_those_of_the_model(name: str) -> None:
    config, x = config_of(name, {"rope_theta": 1e4}, head_dim=128), torch.randn(1, 2, 7, 128)
    positions = torch.randint(0, 500, (3, 1, 7))
    got = qkv.RotaryEmbedding.from_config(config)(x, positions=positions)
    assert torch.equal(got, theirs(config, x, positions))


TOWERS = {
    "qwen2_vl": ("Qwen2VLVisionConfig", "Qwen2VLVisionRotaryEmbedding", {"embed_dim": 64, "num_heads": 4}),
    "qwen2_5_vl": ("Qwen2_5_VLVisionConfig", "Qwen2_5_VLVisionRotaryEmbedding", {"hidden_size": 64, "num_heads": 4}),
    "pixtral": ("PixtralVisionConfig", "PixtralVisionRotaryEmbedding", {"hidden_size": 64, "num_attention_heads": 4}),
}


@pytest.mark.parametrize("name", TOWERS)
def test_rows_and_columns_of_vision_towers(name: str) -> None:
    config_cls, rotary_cls, sizes = TOWERS[name]
    config = getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), config_cls)(**sizes)
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    x, grid = torch.randn(1, 4, 35, 16), qkv.RotaryEmbedding2d.grid(5, 7)
    assert torch.equal(grid.T, torch.cartesian_prod(torch.arange(5), torch.arange(7)))
    cos, sin = getattr(modeling, rotary_cls)(config)(x, grid.T)
    if name == "pixtral":
        want = modeling.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)[0]
    else:
        tokens_first = x[0].transpose(0, 1)
        want = modeling.apply_rotary_pos_emb_vision(tokens_first, tokens_first, cos, sin)[0].transpose(0, 1)[None]
    for source in (config, config.to_dict()):
        assert torch.equal(qkv.RotaryEmbedding2d.from_config(source)(x, positions=grid), want)


def test_the_sections_of_qwen3_are_those_in_turns() -> None:
    assert {name for name in MULTIMODAL if "qwen3" in name} == {
        name for name, (_, turns) in MULTIMODAL.items() if turns
    }


def test_a_dict_with_earlier_names_is_the_configuration_that_transformers_reads() -> None:
    from transformers import LlamaConfig, Qwen2VLTextConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LONGEST}
    earlier = {**sizes, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    rotary = qkv.RotaryEmbedding.from_config(earlier)
    again = qkv.RotaryEmbedding.from_config(LlamaConfig.from_dict(dict(earlier)))
    assert repr(rotary) == repr(again) and rotary.scaling == again.scaling
    assert rotary.base == 5e5

    mrope = {**sizes, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}
    again = qkv.RotaryEmbedding.from_config(Qwen2VLTextConfig.from_dict(dict(mrope)))
    assert repr(qkv.RotaryEmbedding.from_config(mrope)) == repr(again)
    assert again.sections == (4, 2, 2)
    assert not rope_parameters({"hidden_size": 64})


FLAT = {"head_dim": 16, "rope_theta": 1e4, "max_position_embeddings": 64}
REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "no rotary": (
        {"hidden_size": 64},
        None,
        "config must have rope_parameters, rope_scaling or rope_theta; got a dict",
    ),
    "a model of parts": ({"text_config": FLAT}, None, r"without\. Pass its text_config\."),
    "no width": ({"rope_theta": 1e4}, None, "must have head_dim, or hidden_size and num_attention_heads; got a dict"),
    "another type": (
        {**FLAT, "rope_scaling": {"rope_type": "alibi"}},
        None,
        "must be one of 'default', 'linear', 'dynamic', 'yarn', 'longrope', 'llama3'; got 'alibi'",
    ),
    "no factor": ({**FLAT, "rope_scaling": {"rope_type": "linear"}}, None, "'linear' must have factor; got {"),
    "no layer type": (
        {**FLAT, "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "none": None}},
        None,
        "layer_type must be one with rotary embedding, 'full_attention'; got None",
    ),
    "a layer type without": (
        {**FLAT, "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "none": None}},
        "none",
        "layer_type must be one with rotary embedding, 'full_attention'; got 'none'",
    ),
    "sections of another model": (
        {**FLAT, "model_type": "hunyuan_vl", "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        None,
        "mrope_section must belong to a model_type whose layout is known, .*qwen2_vl, .* got 'hunyuan_vl'",
    ),
    "an odd width": ({**FLAT, "partial_rotary_factor": 0.45}, None, "rotary_dim must be even .* got 7"),
}


OF_ANOTHER_TYPE: dict[str, Any] = {
    "rope_scaling": "linear",
    "rope_parameters": [1e4],
    "model_type": ["llama"],
    "head_dim": "16",
    "max_position_embeddings": "64",
    "partial_rotary_factor": "0.5",
    "rope_theta": "1e4",
}


@pytest.mark.parametrize("name", OF_ANOTHER_TYPE)
def test_from_config_refuses_fields_of_another_type(name: str) -> None:
    value = OF_ANOTHER_TYPE[name]
    named = "base" if name == "rope_theta" else f"{name} of config"
    message = rf"^RotaryEmbedding.*: {named} must be .*; got {re.escape(repr(value))}\."
    with pytest.raises(TypeError, match=message):
        qkv.RotaryEmbedding.from_config({**FLAT, name: value})


def test_from_config_refuses_settings_of_another_type() -> None:
    nested = {**FLAT, "rope_parameters": {"full_attention": {"partial_rotary_factor": "0.5"}}}
    with pytest.raises(TypeError, match=r"partial_rotary_factor of config must be a number; got '0\.5'\."):
        qkv.RotaryEmbedding.from_config(nested, "full_attention")
    with pytest.raises(TypeError, match=r"from_config: rope_type of config must be a string; got \['linear'\]\."):
        qkv.RotaryEmbedding.from_config({**FLAT, "rope_scaling": {"rope_type": ["linear"]}})
    with pytest.raises(ValueError, match=r"^RotaryEmbedding: base must be a positive number; got 0\."):
        qkv.RotaryEmbedding.from_config({**FLAT, "rope_theta": 0})


@pytest.mark.parametrize("name", REFUSED)
def test_from_config_refuses(name: str) -> None:
    config, layer_type, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^RotaryEmbedding.*{message}"):
        qkv.RotaryEmbedding.from_config(config, layer_type)


def test_from_config_of_a_tower_refuses_scalings() -> None:
    with pytest.raises(ValueError, match=r"2d\.from_config: rope_type must be 'axial' or 'default'; got 'linear'"):
        qkv.RotaryEmbedding2d.from_config({**FLAT, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
