"""`plan_conversion`: the tensors and the configuration of a conversion, from configuration and headers alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.latent_decoder import LATENT_DECODERS, configure, latent_outputs
from qkv.convert.families.registry import FAMILIES, convert_tensors, find_family
from qkv.convert.files.safetensors import TensorSpec
from qkv.convert.heads.latents import LatentWidths
from qkv.convert.heads.pooling import ConversionMethod, divisors
from qkv.integrations.transformers.latent_decoders import MODEL_TYPES


class ConversionPlan(NamedTuple):
    """The result of a conversion before it is computed."""

    config: dict[str, Any]
    """The new ``config.json``."""
    outputs: dict[str, Output]
    """The new tensors, by name."""


def plan_conversion(
    where: str,
    config: dict[str, Any],
    tensors: Mapping[str, TensorSpec],
    num_kv_heads: int,
    *,
    how: ConversionMethod = "mean",
    seed: int = 0,
    window: int | None = None,
) -> ConversionPlan:
    """Plans the conversion of the model that ``config`` and ``tensors`` describe. ``where`` names it in errors.

    Args:
        how, seed, window: as in `convert_checkpoint`.

    Raises:
        CheckpointError: for a family that is not supported or cannot express the result or the window, a
            ``num_kv_heads`` that does not divide the model's, and a configuration that does not match the tensors.
    """
    family = find_family(where, config)
    hf_config = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, hf_config, tensors)
    heads = transformers_schema.heads(where, hf_config)
    if config["model_type"] in LATENT_DECODERS:
        raise CheckpointError(f"{where}: latent attention has no KV heads to pool. Convert the model it was made of.")
    if num_kv_heads < 1 or heads.num_kv_heads % num_kv_heads:
        possible = ", ".join(map(str, divisors(heads.num_kv_heads)))
        raise CheckpointError(
            f"{where}: num_kv_heads must divide the model's {heads.num_kv_heads} KV heads ({possible}); "
            f"got {num_kv_heads}."
        )
    pooling = Pooling(heads, num_kv_heads, "mean" if how == "aligned" else how, seed)
    outputs = convert_tensors(where, family, hf_config, tensors, pooling, aligned=how == "aligned")
    try:
        new = family.configure(config, hf_config, pooling)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if window is not None:
        new = _with_window(where, family, new, window)
    specs = {name: output.spec for name, output in outputs.items()}
    result = f"the result of converting {where}"
    converted = transformers_schema.read_config(result, new, len(specs))
    transformers_schema.check_tensors(result, converted, specs)
    if transformers_schema.heads(result, converted) != heads._replace(num_kv_heads=num_kv_heads):
        raise AssertionError(f"{result}: transformers reads {transformers_schema.heads(result, converted)} from it")
    if window is not None and set(transformers_schema.windows(converted)) != {window}:
        raise AssertionError(f"{result}: transformers reads windows {transformers_schema.windows(converted)} from it")
    return ConversionPlan(new, outputs)


def plan_latent_conversion(
    where: str, config: dict[str, Any], tensors: Mapping[str, TensorSpec], rank: int, *, rope_heads: int | None = None
) -> ConversionPlan:
    """Plans the conversion of a model to latent attention. ``where`` names it in errors.

    Args:
        rank, rope_heads: as in `convert_to_latent`.

    Raises:
        CheckpointError: for a family that is not supported, a rank or rope_heads out of range, and a configuration that
            does not match the tensors.
    """
    family = find_family(where, config)
    if config["model_type"] not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(MODEL_TYPES)} for latent attention; "
            f"got {config['model_type']}."
        )
    hf_config = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, hf_config, tensors)
    heads, rotary_dim = transformers_schema.heads(where, hf_config), transformers_schema.rotary_dim(where, hf_config)
    if rotary_dim != heads.head_dim:
        raise CheckpointError(
            f"{where}: all {heads.head_dim} channels of a head must rotate; got a rotary embedding of {rotary_dim}."
        )
    groups = heads.num_kv_heads
    rope_heads = groups if rope_heads is None else rope_heads
    if not 1 <= rope_heads <= groups:
        raise CheckpointError(f"{where}: rope_heads must be from 1 to {groups}, the KV heads; got {rope_heads}.")
    widths = LatentWidths(groups, heads.head_dim, heads.head_dim, rotary_dim, rank, rope_heads)
    has_bias = any(family.is_kv(name) and name.endswith("bias") for name in tensors)
    full = widths.full_rank(hf_config.hidden_size + has_bias)
    if not 1 <= rank <= full:
        raise CheckpointError(f"{where}: rank must be from 1 to {full}, the full one; got {rank}.")
    outputs = latent_outputs(where, family, tensors, heads, widths)
    new = configure(config, heads, widths)
    result, specs = f"the result of converting {where}", {name: output.spec for name, output in outputs.items()}
    transformers_schema.check_tensors(result, transformers_schema.read_config(result, new, len(specs)), specs)
    return ConversionPlan(new, outputs)


def _with_window(where: str, family: Family, config: dict[str, Any], window: int) -> dict[str, Any]:
    """The configuration with a sliding window in every layer; raises where it cannot express one."""
    if family.set_window is None:
        supported = ", ".join(name for name, other in FAMILIES.items() if other.set_window is not None)
        raise CheckpointError(
            f"{where}: the configuration of a {config['model_type']} model cannot express a window in every layer; "
            f"those of {supported} can."
        )
    if window < 1:
        raise CheckpointError(f"{where}: window must be at least 1 (the query's own key); got {window}.")
    return family.set_window(config, window)
