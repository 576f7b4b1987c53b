"""`FAMILIES`: the models that can be converted."""

from collections.abc import Mapping
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.families.aligned_outputs import align_outputs
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.gpt import GPT2, GPT_BIGCODE, GPT_NEOX
from qkv.convert.families.llama import GEMMA, PACKED, PHI, SEPARATE, set_window, set_window_by_layers
from qkv.convert.files.json_document import show
from qkv.convert.files.safetensors import TORCH_DTYPES, TensorSpec

FAMILIES: dict[str, Family] = {
    "llama": SEPARATE,
    "mistral": SEPARATE._replace(windowed=set_window),
    "qwen2": SEPARATE._replace(windowed=set_window_by_layers),
    "qwen3": SEPARATE._replace(windowed=set_window_by_layers),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": PACKED._replace(windowed=set_window),
    "phi": PHI,
    "granite": SEPARATE,
    "smollm3": SEPARATE,
    "starcoder2": SEPARATE._replace(windowed=set_window),
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neox": GPT_NEOX,
    **ENCODER_DECODERS,
}
"""By ``model_type``."""


def find_family(where: str, config: Mapping[str, Any]) -> Family:
    """The family that a configuration names.

    Raises:
        CheckpointError: for another, and for quantised weights.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{where}: models of type {show(model_type)} are not supported; those of type {', '.join(FAMILIES)} are."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: the weights are quantised (quantization_config), and quantised numbers have no mean. "
            "Give the checkpoint that they were made from."
        )
    return family


def convert_tensors(
    where: str, family: Family, known: Any, tensors: Mapping[str, TensorSpec], pooling: Pooling, *, aligned: bool
) -> dict[str, Output]:
    """What the result holds, by name.

    Raises:
        CheckpointError: for tensors that are missing or in a dtype that cannot be computed with, and heads that cannot
            be aligned.
    """
    made = (output for name, spec in tensors.items() for output in family.convert(family, name, spec, pooling))
    outputs = {output.name: output for output in made}
    if aligned and pooling.changes:
        if family.layout is None:
            able = ", ".join(name for name, other in FAMILIES.items() if other.layout is not None)
            raise CheckpointError(
                f"{where}: heads of {known.model_type} models cannot be aligned, those of {able} can; pool them in "
                "another way."
            )
        outputs = align_outputs(where, family, family.layout, known, tensors, outputs, pooling)
    for output in outputs.values():
        for source in output.sources if output.compute is not None else ():
            if source not in tensors:
                raise CheckpointError(f"{where}: {output.name!r} is made from {source!r}, of which there is none.")
            if tensors[source].dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{where}: tensor {source!r} must be in one of {', '.join(TORCH_DTYPES)} to be converted; "
                    f"it is {tensors[source]}."
                )
    return outputs
