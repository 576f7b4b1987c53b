"""What transformers makes of a configuration: its defaults filled in, and the tensors that the model must have.

A checkpoint is held to this before and after its conversion: names and shapes that transformers' own model class asks
for. So a configuration that disagrees with the tensors is found, and so is a tensor that a conversion overlooked.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import CONFIG, OBJECT, ROTARY, check_fields
from qkv.convert.files.json_document import count_keys, show
from qkv.convert.files.safetensors import TensorSpec
from qkv.integrations.transformers import grouped_decoders

OLD_NAMES = {"lm_head.weight": "embed_out.weight"}
"""What transformers calls otherwise than the files do: the head of GPT-NeoX."""

NUMBER = re.compile(r"\.\d+\.")
"""Of a layer, in the name of a tensor."""

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""What configurations call their numbers of layers."""

MOST_KEYS = 100_000
"""Of a configuration: transformers takes 50 us for each, and those of 20,000 kinds of images have 40,000."""


class Heads(NamedTuple):
    """The heads that a configuration asks for, the same in each layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_config(where: str, config: Mapping[str, Any], num_tensors: int) -> Any:
    """The configuration object of transformers.

    Args:
        where: the file, for messages.
        config: what it says.
        num_tensors: of the checkpoint; more layers than that are refused before anything is built from them.

    Raises:
        CheckpointError: for what transformers does not accept.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if (keys := count_keys(config)) > MOST_KEYS:
        raise CheckpointError(f"{where} has {keys} keys; more than {MOST_KEYS} of a configuration are not read.")
    if config["model_type"].startswith(grouped_decoders.TYPE_PREFIX):
        grouped_decoders.register()
    for key in LAYERS:
        layers = config.get(key)
        if layers is not None and (type(layers) is not int or not 0 < layers <= num_tensors):
            raise CheckpointError(
                f"{where}: {key} must be a number of layers, of which the {num_tensors} tensors of the checkpoint "
                f"are parts; it is {show(layers)}."
            )
    check_fields(where, config, CONFIG)
    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        parts = [known, _decoder(known)]
    except Exception as error:
        raise CheckpointError(f"{where} is refused by transformers: {_brief(error)}") from error
    for part in parts:
        check_fields(where, {name: getattr(part, name) for name in CONFIG if hasattr(part, name)}, CONFIG)
    check_rotary(where, known)
    return known


def check_rotary(where: str, config: Any) -> None:
    """Holds ``rope_parameters``, one for all layers or one for each kind of them, to what is read there."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ()) & parameters.keys()
    for found in [parameters[kind] for kind in kinds] or [parameters]:
        check_fields(f"{where}: rope_parameters", {"": found}, {"": OBJECT})
        check_fields(f"{where}: rope_parameters", found, ROTARY)


def heads(where: str, config: Any) -> Heads:
    """How many heads of which width the configuration asks for, in the decoder if there is an encoder as well.

    Raises:
        CheckpointError: for numbers that do not fit together.
    """
    config = _decoder(config)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if not 0 < num_kv_heads <= num_heads or num_heads % num_kv_heads:
        raise CheckpointError(
            f"{where}: the number of query heads must be a multiple of the number of KV heads; "
            f"they are {num_heads} and {num_kv_heads}."
        )
    return Heads(num_heads, num_kv_heads, _head_dim(config))


def encoder_heads(config: Any) -> list[Heads]:
    """Of each layer of an encoder, if there is one; it has no groups."""
    if not config.is_encoder_decoder:
        return []
    config = config.get_text_config(encoder=True)
    num_heads = config.num_attention_heads
    return [Heads(num_heads, num_heads, _head_dim(config))] * config.num_hidden_layers


def windows(config: Any) -> list[int | None]:
    """For each layer, of a decoder if there is an encoder as well, the keys that a query sees, its own included.

    None where it sees all before it.
    """
    config = _decoder(config)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_tensors(where: str, config: Any, tensors: Mapping[str, TensorSpec]) -> None:
    """Compares the tensors with those of the model that transformers builds from the configuration.

    Tensors that the model does not know are let pass, as transformers does: old checkpoints hold buffers.

    Raises:
        CheckpointError: for tensors that are missing, of another shape or of layers beyond the last, and a model that
            cannot be built.
    """
    model = _build(where, config)
    cls = type(model)
    prefix = f"{model.base_model_prefix}."
    # Sines of positions are parameters in some models, and not saved by all.
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    absent = model.all_tied_weights_keys.keys() | fixed
    asked = set()
    for name, parameter in model.state_dict().items():
        # A model with a head reads files of one without, and the other way round.
        names = (name, name.removeprefix(prefix), prefix + name, OLD_NAMES.get(name, name))
        held = next((known for known in names if known in tensors), None)
        found = None if held is None else tensors[held]
        asked.add(held)
        shape = tuple(parameter.shape)
        if found is None and name not in absent:
            alike = sum(NUMBER.sub(".0.", known) == NUMBER.sub(".0.", name) for known in tensors)
            raise CheckpointError(
                f"{where} asks for a tensor {name!r} {list(shape)} ({cls.__name__}); the checkpoint has none"
                + (f", though {alike} for other layers" if alike else "")
                + "; of shards, give the folder."
            )
        if found is not None and (found.shape != shape or found.is_floating != parameter.is_floating_point()):
            kind = "a floating-point dtype" if parameter.is_floating_point() else "integers"
            raise CheckpointError(
                f"{where} asks for {kind} and the shape {list(shape)} of tensor {name!r} ({cls.__name__}); "
                f"the checkpoint holds {found}."
            )
    kinds = {NUMBER.sub(".0.", known) for known in asked if known is not None}
    beyond = next((name for name in tensors if name not in asked and NUMBER.sub(".0.", name) in kinds), None)
    if beyond is not None:
        raise CheckpointError(
            f"{where} asks for fewer layers than the checkpoint holds, which has a tensor {beyond!r}."
        )


def rotary_dim(where: str, config: Any) -> int:
    """The leading channels of a head that positions turn, in layers without positions all the same.

    Not every model heeds what its configuration says of that, so the frequencies that it computes are counted.
    """
    buffers = _build(where, config).named_buffers()
    return max((2 * len(buffer) for name, buffer in buffers if name.endswith("inv_freq")), default=0)


def _build(where: str, config: Any) -> Any:
    """The model, without numbers in it."""
    cls = _model_class(where, config)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:
        raise CheckpointError(f"{where}: transformers cannot build this model: {_brief(error)}") from error


def _decoder(config: Any) -> Any:
    """The configuration of the decoder alone, which without an encoder is the whole."""
    part = config.get_text_config(decoder=True)
    # transformers reads the names of BART, and not this one of T5.
    if config.is_encoder_decoder and hasattr(config, "num_decoder_layers"):
        part.num_hidden_layers = config.num_decoder_layers
    return part


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _model_class(where: str, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if type(config) in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        known = [auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)], auto.MODEL_MAPPING[type(config)]]
        return _encoder_decoder_class(where, config, known)
    if not config.architectures:
        return auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = config.architectures[0]
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or getattr(cls, "config_class", None) is not type(config):
        raise CheckpointError(
            f"{where}: architectures must name a class of transformers for {config.model_type!r}; "
            f"transformers {transformers.__version__} has no such {show(name)}."
        )
    return cls


def _encoder_decoder_class(where: str, config: Any, known: list[Any]) -> Any:
    names = [cls.__name__ for cls in known]
    name = config.architectures[0] if config.architectures else names[0]
    if not config.is_encoder_decoder or name not in names:
        raise CheckpointError(
            f"{where}: a {config.model_type} model must have encoder and decoder, as {' or '.join(names)}; this is "
            f"{show(name)} with is_encoder_decoder={config.is_encoder_decoder}."
        )
    return known[names.index(name)]


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
