"""`FAMILIES`: the supported model types."""

from collections.abc import Mapping
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.families.aligned_outputs import OTHER_METHODS, align_outputs
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.gpt import GPT2, GPT_BIGCODE, GPT_NEOX
from qkv.convert.families.latent_decoder import LATENT_DECODERS
from qkv.convert.families.llama import GEMMA, PACKED, PHI, SEPARATE
from qkv.convert.families.window_settings import (
    become_ministral,
    set_layer_types,
    set_layer_types_of_gemma3,
    set_layer_types_of_qwen,
    set_layer_types_of_smollm3,
    set_window,
)
from qkv.convert.files.json_document import short_repr
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec

FAMILIES: dict[str, Family] = {
    "llama": SEPARATE._replace(set_windows=become_ministral),
    "mistral": SEPARATE._replace(set_window=set_window, set_windows=become_ministral),
    "ministral": SEPARATE._replace(set_windows=set_layer_types),
    "qwen2": SEPARATE._replace(set_windows=set_layer_types_of_qwen),
    "qwen3": SEPARATE._replace(set_windows=set_layer_types_of_qwen),
    "gemma": GEMMA,
    "gemma2": GEMMA._replace(set_windows=set_layer_types),
    "gemma3_text": GEMMA._replace(set_windows=set_layer_types_of_gemma3),
    "phi3": PACKED._replace(set_window=set_window),
    "phi": PHI,
    "granite": SEPARATE,
    "smollm3": SEPARATE._replace(set_windows=set_layer_types_of_smollm3),
    "starcoder2": SEPARATE._replace(set_window=set_window),
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neox": GPT_NEOX,
    **ENCODER_DECODERS,
    **LATENT_DECODERS,
}
"""Families by ``model_type``."""


def find_family(where: str, config: Mapping[str, Any]) -> Family:
    """The family of a configuration's ``model_type``.

    Raises:
        CheckpointError: for a type that is not supported, and quantised weights.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{where}: model_type must be one of {', '.join(FAMILIES)}; got {short_repr(model_type)}."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantised weights (quantization_config) cannot be pooled. Give the original checkpoint."
        )
    return family


def convert_tensors(
    where: str, family: Family, hf_config: Any, tensors: Mapping[str, TensorSpec], pooling: Pooling, *, aligned: bool
) -> dict[str, Output]:
    """The outputs of a conversion, by name.

    Raises:
        CheckpointError: for missing tensors, dtypes other than `TORCH_DTYPES`, and heads that cannot be aligned.
    """
    converted = (output for name, spec in tensors.items() for output in family.convert(family, name, spec, pooling))
    outputs = {output.name: output for output in converted}
    if aligned and pooling.changes:
        if family.layout is None:
            supported = ", ".join(name for name, other in FAMILIES.items() if other.layout is not None)
            raise CheckpointError(
                f"{where}: heads of {hf_config.model_type} models cannot be aligned, those of {supported} can. "
                f"{OTHER_METHODS}"
            )
        outputs = align_outputs(where, family, family.layout, hf_config, tensors, outputs, pooling)
    for output in outputs.values():
        for source in output.sources if output.compute is not None else ():
            if source not in tensors:
                raise CheckpointError(f"{where}: {output.name!r} needs tensor {source!r}, which is missing.")
            if tensors[source].dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{where}: tensor {source!r} must have dtype {', '.join(TORCH_DTYPES)} to be converted; "
                    f"got {tensors[source]}."
                )
    return outputs
