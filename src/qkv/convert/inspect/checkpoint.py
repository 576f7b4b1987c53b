"""`inspect_checkpoint`: describes the attention of a model from its configuration and headers."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.families import transformers_schema
from qkv.convert.families.family import Family
from qkv.convert.families.latent_decoder import LATENT_DECODERS
from qkv.convert.families.registry import FAMILIES, find_family
from qkv.convert.files.folder import CONFIG, INDEX, SINGLE, read_folder
from qkv.convert.files.json_document import paused_gc, read_document
from qkv.convert.files.safetensors import TensorSpec, read_header
from qkv.convert.inspect.gguf import inspect_gguf
from qkv.convert.inspect.inspection import Inspection, LayerAttention
from qkv.convert.inspect.modules import inspect_config
from qkv.convert.inspect.rotary_words import describe_rotary


@paused_gc()
def inspect_checkpoint(path: Path | str) -> Inspection:
    """Describes the attention of a model; reads configuration and headers, no weights.

    Models that `convert_checkpoint` does not take (encoders of texts, images or speech, other decoders) are described
    by the modules that transformers builds from their configuration.

    Args:
        path: a folder written by ``save_pretrained``, or only its ``config.json``; a safetensors file of a whole model,
            next to its ``config.json``; or a GGUF file.

    Raises:
        CheckpointError: for broken or inconsistent files, and model types of which transformers builds no model.

    Example:
        >>> from qkv.convert import inspect_checkpoint
        >>> inspect_checkpoint("Llama-2-7b-hf").layers[0].num_kv_heads  # doctest: +SKIP
        32
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return inspect_gguf(path)
    if path.suffix == ".json":
        return inspect_config(str(path), read_document(path))
    if path.is_file():
        where = path.with_name(CONFIG)
        if not os.path.lexists(where):
            raise CheckpointError(
                f"{path} must be a folder written by save_pretrained, a GGUF file, or a safetensors file next to its "
                f"{CONFIG}; {where} is missing."
            )
        return inspect_tensors(str(where), read_document(where), read_header(path).tensors)
    if (path / CONFIG).is_file() and not any(os.path.lexists(path / name) for name in (SINGLE, INDEX)):
        return inspect_config(str(path / CONFIG), read_document(path / CONFIG))
    folder = read_folder(path)
    return inspect_tensors(str(folder.path / CONFIG), folder.config, folder.tensors)


def inspect_tensors(where: str, config: dict[str, Any], tensors: Mapping[str, TensorSpec]) -> Inspection:
    """Describes the attention of a transformers model. ``where`` names the configuration in errors.

    Raises:
        CheckpointError: for a configuration that does not match the tensors of a family that converts, and a model type
            of which transformers builds no model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES or config.get("quantization_config") is not None:
        return _of_modules(where, config, tensors)
    family = find_family(where, config)
    hf_config = transformers_schema.read_config(where, config, len(tensors))
    transformers_schema.check_tensors(where, hf_config, tensors)
    heads, windows = transformers_schema.heads(where, hf_config), transformers_schema.windows(hf_config)
    parts = _by_layer(family.attention, tensors, len(windows))
    own = [
        _layer(family, heads, windows[number], describe_rotary(hf_config, number), part)
        for number, part in enumerate(parts)
    ]
    if config["model_type"] in LATENT_DECODERS:
        own = [_latent_layer(layer, hf_config) for layer in own]
    parts = _by_layer(family.cross, tensors, len(windows))
    cross = [_layer(family, heads, None, "", part)._replace(cross=True) for part in parts]
    encoder_heads = transformers_schema.encoder_heads(hf_config)
    parts = _by_layer(family.encoder, tensors, len(encoder_heads))
    encoder = tuple(_layer(family, heads, None, "", part) for heads, part in zip(encoder_heads, parts, strict=False))
    dtype = next(spec.dtype for name, spec in tensors.items() if family.is_kv(name))
    parameters = sum(spec.numel for spec in tensors.values())
    return Inspection(config["model_type"], dtype, parameters, (*own, *cross), encoder)


def _of_modules(where: str, config: dict[str, Any], tensors: Mapping[str, TensorSpec]) -> Inspection:
    """The description of `inspect_config`, with parameters and dtype of the tensors."""
    found = inspect_config(where, config)
    if config.get("quantization_config") is not None:  # what is stored are not the parameters
        return found
    sizes: dict[str, int] = {}
    for spec in tensors.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
    return found._replace(
        dtype=max(sizes, key=lambda dtype: sizes[dtype], default=found.dtype),
        parameters=sum(sizes.values()),
        is_stored=True,
    )


def _by_layer(
    pattern: re.Pattern[str] | None, tensors: Mapping[str, TensorSpec], num_layers: int
) -> list[dict[str, TensorSpec]]:
    """The attention tensors of each layer, by name within the attention."""
    if pattern is None:
        return []
    parts: list[dict[str, TensorSpec]] = [{} for _ in range(num_layers)]
    for name, spec in tensors.items():
        match = pattern.fullmatch(name)
        if match is not None and int(match[1]) < num_layers:
            parts[int(match[1])][match[2]] = spec
    return parts


def _layer(
    family: Family,
    heads: transformers_schema.Heads,
    window: int | None,
    rotary: str,
    parts: Mapping[str, TensorSpec],
) -> LayerAttention:
    """Describes one layer. ``parts``: its attention tensors, by name within the attention."""
    kv = {part: spec for part, spec in parts.items() if family.holds_kv.fullmatch(part)}
    queries, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    share = 2 * keys / (queries + 2 * keys) if family.is_packed else 1
    return LayerAttention(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.head_dim,
        window,
        any(part.endswith("bias") for part in kv),
        any("norm" in part for part in parts),
        rotary,
        sum(spec.numel for spec in parts.values()),
        round(sum(spec.numel for spec in kv.values()) * share),
    )


def _latent_layer(layer: LayerAttention, config: Any) -> LayerAttention:
    """A layer that caches latents, which all heads share."""
    return layer._replace(
        num_kv_heads=1,
        head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
        latent=(config.kv_lora_rank, config.qk_rope_head_dim),
    )
