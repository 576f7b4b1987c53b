"""`plan_conversion`: the tensors and the configuration of a conversion, from configuration and headers alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.family import Output, Pooling
from qkv.convert.families.latent_decoder import LATENT_DECODERS, configure, latent_outputs
from qkv.convert.families.registry import convert_tensors, find_family
from qkv.convert.families.windows import require_windows, with_windows
from qkv.convert.files.json_document import short_repr
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
    pooling: ConversionMethod | None = None
    """How heads are pooled; None if none are."""


def plan_conversion(
    where: str,
    config: dict[str, Any],
    tensors: Mapping[str, TensorSpec],
    num_kv_heads: int | None,
    *,
    how: ConversionMethod | None = "mean",
    seed: int = 0,
    window: int | None = None,
    layers: Sequence[int] | None = None,
) -> ConversionPlan:
    """Plans the conversion of the model that ``config`` and ``tensors`` describe. ``where`` names it in errors.

    Args:
        num_kv_heads, how, seed, window, layers: as in `convert_checkpoint`.

    Raises:
        CheckpointError: for a family that is not supported or cannot express the result or the windows, a
            ``num_kv_heads`` that does not divide the model's, layers that do not exist, and a configuration that does
            not match the tensors.
    """
    if window is None and (num_kv_heads is None or layers is not None):
        raise CheckpointError(
            f"{where}: a conversion needs num_kv_heads, window or both, and layers belong to a window; "
            f"got num_kv_heads={num_kv_heads}, window=None, layers={short_repr(layers)}."
        )
    family = find_family(where, config)
    if window is not None:
        require_windows(where, family, config["model_type"])
    hf_config = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, hf_config, tensors)
    heads = transformers_schema.heads(where, hf_config)
    num_kv_heads = heads.num_kv_heads if num_kv_heads is None else num_kv_heads
    if config["model_type"] in LATENT_DECODERS:
        raise CheckpointError(f"{where}: latent attention has no KV heads to pool. Convert the model it was made of.")
    if num_kv_heads < 1 or heads.num_kv_heads % num_kv_heads:
        possible = ", ".join(map(str, divisors(heads.num_kv_heads)))
        raise CheckpointError(
            f"{where}: num_kv_heads must divide the model's {heads.num_kv_heads} KV heads ({possible}); "
            f"got {num_kv_heads}."
        )
    if how is None:  # aligned costs least (studies/grouped_query)
        how = "mean" if family.layout is None else "aligned"
    pooling = Pooling(heads, num_kv_heads, "mean" if how == "aligned" else how, seed)
    outputs = convert_tensors(where, family, hf_config, tensors, pooling, aligned=how == "aligned")
    try:
        new = family.configure(config, hf_config, pooling)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if window is not None:
        new = with_windows(where, family, new, window, layers, len(tensors))
    specs = {name: output.spec for name, output in outputs.items()}
    result = f"the result of converting {where}"
    converted = transformers_schema.read_config(result, new, len(specs))
    transformers_schema.check_tensors(result, converted, specs)
    if transformers_schema.heads(result, converted) != heads._replace(num_kv_heads=num_kv_heads):
        raise AssertionError(f"{result}: transformers reads {transformers_schema.heads(result, converted)} from it")
    return ConversionPlan(new, outputs, how if pooling.changes else None)


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
