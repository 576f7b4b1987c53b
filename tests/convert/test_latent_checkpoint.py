"""Conversion of checkpoints to latent attention: exact at full rank, planned from headers, in model types of ours."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from convert import models
from transformers import DynamicCache

from qkv.convert import (
    CheckpointError,
    convert_checkpoint,
    inspect_checkpoint,
    plan_latent_checkpoint,
    write_checkpoint,
)
from qkv.convert.families import latent_decoder
from qkv.convert.heads import latents
from qkv.integrations.transformers import QKVCache, latent, latent_decoders
from qkv.integrations.transformers.cache import LatentLayer
from qkv.layers.latent_heads import LatentHeads

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2}


def convert(source: Path, out: Path, rank: int, **options: Any) -> Any:
    """The converted model."""
    write_checkpoint(plan_latent_checkpoint(source, rank, **options), out)
    return models.load(out)


def assert_equal_up_to_rounding(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Three layers of some ten products each, of weights that are rounded once."""
    assert (got - want).norm() / want.norm() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", latent_decoders.MODEL_TYPES)
@torch.no_grad()
def test_all_components_and_full_rank_are_exact(family: str, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", family, shards="60KB", **SIZES)
    original = models.load(source)
    model = convert(source, tmp_path / "out", 16)
    assert type(model).__name__ == f"Latent{type(original).__name__}"
    want = models.logits(original)
    for implementation in ("qkv", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_equal_up_to_rounding(models.logits(model), want)
    text = original.generate(models.IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(models.IDS, max_new_tokens=12, do_sample=False), text)
    latent(model)
    for make in (QKVCache, lambda config: DynamicCache(config=config)):
        with mock.patch.object(LatentHeads, "attend", autospec=True, side_effect=LatentHeads.attend) as called:
            cache = make(model.config)
            assert torch.equal(
                model.generate(models.IDS, max_new_tokens=12, do_sample=False, past_key_values=cache), text
            )
        assert called.call_count == 3 * 12
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("rope_heads", [1, 2])
@torch.no_grad()
def test_a_cache_has_as_many_numbers_as_the_configuration_says(rope_heads: int, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", **SIZES)
    model = convert(source, tmp_path / "out", 12, rope_heads=rope_heads)
    config = model.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (
        *(12, 8 * rope_heads),
        *(0 if rope_heads == 2 else 8, 8),
    )
    cache = QKVCache(config)
    model(models.IDS, past_key_values=cache)
    assert isinstance(cache.layers[0], LatentLayer)
    assert (cache.layers[0].keys.shape, cache.layers[0].values.shape) == ((1, 1, 12, 12), (1, 1, 12, 8 * rope_heads))
    found = inspect_checkpoint(tmp_path / "out").layers[0]
    assert (found.latent, found.cached_widths, found.num_kv_heads) == ((12, 8 * rope_heads), (12, 8 * rope_heads), 1)


@torch.no_grad()
def test_without_rotation_a_single_component_is_exact(tmp_path: Path) -> None:
    """Of the first token alone, whose scores no rotation changes."""
    source = models.save(tmp_path / "source", "llama", **SIZES)
    model, first = convert(source, tmp_path / "out", 24, rope_heads=1), models.IDS[:, :1]
    assert_equal_up_to_rounding(model(first).logits, models.load(source)(first).logits)


@torch.no_grad()
def test_less_rank_diverges_more(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", **SIZES)
    want = models.logits(models.load(source))
    distances = [
        float((models.logits(convert(source, tmp_path / str(rank), rank)) - want).norm()) for rank in (2, 8, 16)
    ]
    assert distances == sorted(distances, reverse=True) and distances[1] > 1e3 * distances[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", dtype=dtype, **SIZES)
    model = convert(source, tmp_path / "out", 16).float()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert_equal_up_to_rounding(models.logits(model), models.logits(models.load(source).float()), dtype)


def test_a_plan_reads_no_weights_and_each_layer_is_factorised_once(tmp_path: Path) -> None:
    source = models.save(tmp_path / "source", "llama", shards="60KB", **SIZES)
    with mock.patch.object(latent_decoder, "factorise", wraps=latents.factorise) as called:
        plan = plan_latent_checkpoint(source, 8)
        assert not called.called
        write_checkpoint(plan, tmp_path / "out")
    assert called.call_count == 3
    changed = [name for name, output in plan.conversion.outputs.items() if output.compute is not None]
    assert len(changed) == 3 * 5 and not any("k_proj" in name or "v_proj" in name for name in plan.tensors)
    assert plan.num_bytes == sum(
        tensor.nbytes for name, tensor in models.load(tmp_path / "out").state_dict().items() if name in plan.tensors
    )


def test_a_converted_model_trains_and_has_copies(tmp_path: Path) -> None:
    model = convert(models.save(tmp_path / "source", "qwen2", **SIZES), tmp_path / "out", 8, rope_heads=1)
    want = models.logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(models.logits(twin), want)
    model.train()(models.IDS, labels=models.IDS).loss.backward()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
        assert getattr(attention, name).weight.grad.norm() > 0
    for implementation in ("eager", "qkv"):
        model.eval().set_attn_implementation(implementation)
        weights = model(models.IDS, output_attentions=True).attentions
        assert [one.shape for one in weights] == [(1, 8, 12, 12)] * 3
    model.save_pretrained(tmp_path / "saved")
    assert type(models.load(tmp_path / "saved")) is type(model)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("gemma", {}, {}, "model_type must be one of llama, mistral, qwen2 for latent attention; got gemma"),
    ("gpt2", {}, {}, "model_type must be one of llama, mistral, qwen2 for latent attention; got gpt2"),
    ("llama", SIZES, {"rank": 0}, "rank must be from 1 to 16, the full one; got 0"),
    ("llama", SIZES, {"rank": 17}, "rank must be from 1 to 16, the full one; got 17"),
    ("llama", SIZES, {"rank": 25, "rope_heads": 1}, "rank must be from 1 to 24, the full one; got 25"),
    ("llama", SIZES, {"rope_heads": 3}, "rope_heads must be from 1 to 2, the KV heads; got 3"),
    ("llama", SIZES, {"rope_heads": 0}, "rope_heads must be from 1 to 2, the KV heads; got 0"),
]


@pytest.mark.parametrize(("family", "changes", "arguments", "message"), REFUSED)
def test_what_cannot_be_converted_is_refused(
    family: str, changes: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = models.save(tmp_path / "source", family, **changes)
    with pytest.raises(CheckpointError, match=message):
        plan_latent_checkpoint(source, **{"rank": 4, **arguments})


def test_a_result_is_not_converted_again(tmp_path: Path) -> None:
    convert(models.save(tmp_path / "source", "llama", **SIZES), tmp_path / "out", 8)
    with pytest.raises(CheckpointError, match=r"latent attention has no KV heads to pool\. Convert the model it"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", 1)
    with pytest.raises(CheckpointError, match="for latent attention; got qkv_latent_llama"):
        plan_latent_checkpoint(tmp_path / "out", 4)


def test_unknown_classes_of_the_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'LatentGemmaModel'"):
        latent_decoders.LatentGemmaModel  # noqa: B018
