"""The tables of model types, compared with the sources of transformers: a release cannot add to them silently."""

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import qkv
from qkv import kernels
from qkv.layers.rotary_config import INTERLEAVED, PARTIAL, UNMATCHED, given_parameters

MODELS = Path(transformers.__file__).parent / "models"
NEIGHBOURS = re.compile(r", 0?::2\]|view_as_complex|-1, 2\)|repeat_interleave\(2|rearrange\(")
"""What functions of rotary embedding contain if they pair neighbouring channels."""


class Derived(NamedTuple):
    """Configurations of transformers, by what the code of their models does."""

    neighbours: set[Any]  # pairs neighbouring channels
    partial: set[Any]  # takes partial_rotary_factor if the rope_type is "default"


def functions_of(text: str, indent: str) -> dict[str, str]:
    """The sources of the functions at an indentation, by name."""
    parts = re.split(rf"^{indent}(?=def )", text, flags=re.MULTILINE)[1:]
    ends = re.compile(rf"^{indent}(?=[@c])", re.MULTILINE)  # a decorator or a class
    return {part[4 : part.index("(")]: ends.split(part)[0] for part in parts}


def called(text: str) -> set[str]:
    return set(re.findall(r"(\w+)\(", text.partition(":\n")[2]))


def pairing_of(functions: dict[str, str]) -> set[str]:
    return {name for name, text in functions.items() if re.search("rot|rope", name) and NEIGHBOURS.search(text)}


def configs_of(module: str, methods: dict[str, str]) -> set[Any]:
    """The configuration that a class is built from, and its parts apart from vision towers."""
    given = re.findall(r"\bconfig: [\"']?(\w+)", methods.get("__init__", ""))
    path = f"transformers.models.{module}.configuration_{module}"
    configs = {getattr(importlib.import_module(path), name) for name in given}
    parts = {part for config in configs for part in config.sub_configs.values() if hasattr(part, "sub_configs")}
    return configs | {part for part in parts if part.model_type and "vision" not in part.model_type}


@cache
def derived() -> Derived:
    found = Derived(set(), set())
    for path in MODELS.glob("*/modeling_*.py"):
        text, module = path.read_text(), path.parent.name
        if not NEIGHBOURS.search(text) and "partial_rotary_factor" not in text:
            continue
        functions = functions_of(text, "")
        pairing = pairing_of(functions)
        while pairing and (more := {name for name, source in functions.items() if called(source) & pairing} - pairing):
            pairing |= more
        for source in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            methods = functions_of(re.split(r"^(?=def |@)", source, flags=re.MULTILINE)[0], "    ")
            if called(source) & (pairing | pairing_of(methods)):
                found.neighbours.update(configs_of(module, methods))
            if "partial_rotary_factor" in methods.get("compute_default_rope_parameters", ""):
                found.partial.update(configs_of(module, methods))
    return found


def refusal(config: Any) -> str | None:
    """Why `RotaryEmbedding.from_config` refuses a configuration, for the first type of layer that it has."""
    try:
        qkv.RotaryEmbedding.from_config(config, next(iter(given_parameters(config)), None))
    except ValueError as error:
        return str(error)
    return None


def test_each_model_type_that_pairs_neighbours_is_known_or_refused() -> None:
    types = {config.model_type for config in derived().neighbours}
    assert types >= INTERLEAVED
    unknown = [config for config in derived().neighbours if config.model_type not in INTERLEAVED]
    assert [config.model_type for config in unknown if refusal(config()) is None] == []


def test_each_model_type_that_takes_a_partial_factor_is_known_or_refused() -> None:
    types = {config.model_type for config in derived().partial}
    assert types >= PARTIAL
    unknown = {config.model_type: refusal(config()) for config in derived().partial if config.model_type not in PARTIAL}
    assert [name for name, why in unknown.items() if why is None or "partial_rotary_factor" in why] == []


def test_no_model_type_is_in_two_tables_or_gone() -> None:
    assert not (INTERLEAVED | PARTIAL) & UNMATCHED.keys()
    assert INTERLEAVED | PARTIAL | UNMATCHED.keys() <= set(CONFIG_MAPPING)
    assert all(given_parameters(CONFIG_MAPPING[name]()) for name in UNMATCHED)


@pytest.mark.parametrize("name", UNMATCHED)
@pytest.mark.parametrize("source", ["configuration", "dict"])
def test_what_cannot_be_matched_is_refused_by_name(name: str, source: str) -> None:
    config: Any = CONFIG_MAPPING[name]() if source == "configuration" else {"model_type": name, "rope_theta": 1e4}
    message = rf"^RotaryEmbedding\.from_config: model_type must be .*; got '{name}', whose code in transformers"
    with pytest.raises(ValueError, match=f"{message} {UNMATCHED[name]}"):
        qkv.RotaryEmbedding.from_config(config, interleaved=True)


MODULES = {
    **dict.fromkeys(("blt_global_transformer", "blt_local_decoder", "blt_local_encoder", "blt_patcher"), "blt"),
    **{name: name.removesuffix("_text") for name in ("glm4v_text", "glm_ocr_text", "llama4_text")},
}
SIZES = {"glm4v_text": {"head_dim": 64}}  # its default sections fit no other width


def apply(modeling: Any, q: Tensor, k: Tensor, cos_sin: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(B, H, L, D)``, rotated by the function of a model."""
    if isinstance(cos_sin, Tensor):  # complex
        name, swap = "apply_rotary_emb", modeling.__name__.endswith("llama4")
        q, k = (x.transpose(1, 2) if swap else x for x in (q, k))
        q, k = getattr(modeling, name)(q, k, cos_sin)
        return (q.transpose(1, 2), k.transpose(1, 2)) if swap else (q, k)
    names = ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb")
    rotate = next(getattr(modeling, name) for name in names if hasattr(modeling, name))
    q, k = rotate(q, k, *cos_sin)
    return q, k


@pytest.mark.parametrize("name", sorted(INTERLEAVED))
def test_scores_of_neighbouring_pairs_are_those_of_the_model(name: str) -> None:
    """Some models also move the channels of a pair apart, which no score shows."""
    module = MODULES.get(name, name)
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = CONFIG_MAPPING[name](**SIZES.get(name, {}))
    rotary = qkv.RotaryEmbedding.from_config(config)
    rotary_cls = next(cls for key, cls in vars(modeling).items() if re.fullmatch("(?!.*Vision).*RotaryEmbedding", key))
    q, k = torch.randn(2, 1, 2, 5, rotary.head_dim, generator=torch.Generator().manual_seed(0))
    if name == "mistral4":  # its head_dim is of all channels, and the others come apart
        q, k = q[..., : rotary.rotary_dim], k[..., : rotary.rotary_dim]
        rotary = qkv.RotaryEmbedding(rotary.rotary_dim, interleaved=rotary.interleaved, scaling=rotary.scaling)
    positions = torch.arange(3, 8)[None]
    theirs_q, theirs_k = apply(modeling, q, k, rotary_cls(config)(q, positions))
    got, want = rotary(q, 3) @ rotary(k, 3).mT, theirs_q @ theirs_k.mT
    bound = q.abs().max() * k.abs().max() * rotary.head_dim  # of a score, and of its roundings
    torch.testing.assert_close(got, want, rtol=0, atol=float(4 * bound * torch.finfo(torch.float32).eps))
    assert rotary.interleaved
    if name in MODULES and name.startswith("glm"):
        where = torch.randint(0, 500, (3, 1, 5))
        theirs_q, theirs_k = apply(modeling, q, k, rotary_cls(config)(q, where))
        with kernels.use("bits are compared with torch's"):
            assert torch.equal(rotary(q, positions=where), theirs_q)


def test_rope_interleave_of_a_configuration_is_kept_where_it_is_given() -> None:
    config = {"model_type": "deepseek_v3", "head_dim": 8, "rope_theta": 1e4}  # as in the config.json of DeepSeek-V3
    assert qkv.RotaryEmbedding.from_config(config).interleaved
    assert not qkv.RotaryEmbedding.from_config({**config, "rope_interleave": False}).interleaved
    assert qkv.RotaryEmbedding.from_config({**config, "model_type": "other", "rope_interleave": True}).interleaved


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "cohere", "deepseek_v3", "other"])
def test_a_partial_factor_that_the_model_does_not_take_is_refused(name: str) -> None:
    config = {"model_type": name, "head_dim": 16, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    message = rf"partial_rotary_factor must be 1 or None for model_type '{name}', .*; got 0\.5\. Remove it, or build"
    with pytest.raises(ValueError, match=rf"^RotaryEmbedding\.from_config: {message}"):
        qkv.RotaryEmbedding.from_config(config)
    assert qkv.RotaryEmbedding.from_config({**config, "partial_rotary_factor": 1.0}).rotary_dim == 16
    assert qkv.RotaryEmbedding.from_config({**config, "model_type": None}).rotary_dim == 8
    assert qkv.RotaryEmbedding.from_config({**config, "model_type": "phi"}).rotary_dim == 8


def test_llama_ignores_a_partial_factor() -> None:
    """Why it is refused: its own frequencies are those of all channels."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    assert LlamaRotaryEmbedding(config).inv_freq.shape == (8,)
    with pytest.raises(ValueError, match="partial_rotary_factor must be 1 or None for model_type 'llama'"):
        qkv.RotaryEmbedding.from_config(config)
