"""`FAMILIES`: the models that can be converted."""

from collections.abc import Mapping
from typing import Any

from qkv.convert.errors import CheckpointError
from qkv.convert.family import Family, Output, Pooling
from qkv.convert.gpt import GPT2, GPT_BIGCODE, GPT_NEOX
from qkv.convert.llama import PACKED, SEPARATE, set_window, set_window_by_layers
from qkv.convert.safetensors_file import TORCH_DTYPES, TensorSpec

FAMILIES: dict[str, Family] = {
    "llama": SEPARATE,
    "mistral": SEPARATE._replace(windowed=set_window),
    "qwen2": SEPARATE._replace(windowed=set_window_by_layers),
    "qwen3": SEPARATE._replace(windowed=set_window_by_layers),
    "gemma": SEPARATE,
    "gemma2": SEPARATE,
    "gemma3_text": SEPARATE,
    "phi3": PACKED._replace(windowed=set_window),
    "phi": SEPARATE,
    "granite": SEPARATE,
    "smollm3": SEPARATE,
    "starcoder2": SEPARATE._replace(windowed=set_window),
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neox": GPT_NEOX,
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
            f"{where}: models of type {model_type!r:.200} are not supported; those of type {', '.join(FAMILIES)} are."
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: the weights are quantised (quantization_config), and quantised numbers have no mean. "
            "Give the checkpoint that they were made from."
        )
    return family


def convert_tensors(
    where: str, family: Family, tensors: Mapping[str, TensorSpec], pooling: Pooling
) -> dict[str, Output]:
    """What the result holds, by name.

    Raises:
        CheckpointError: for keys and values in a dtype that cannot be pooled.
    """
    outputs: dict[str, Output] = {}
    for name, spec in tensors.items():
        for output in family.convert(family, name, spec, pooling):
            for source in output.sources if output.compute is not None else ():
                if tensors[source].dtype not in TORCH_DTYPES:
                    raise CheckpointError(
                        f"{where}: tensor {source!r} must be in one of {', '.join(TORCH_DTYPES)} to be converted; "
                        f"it is {tensors[source]}."
                    )
            outputs[output.name] = output
    return outputs
