"""Checks a checkpoint against transformers: its configuration class, and the tensors of its model class.

Runs before and after a conversion, so it finds configurations that do not match the tensors, and tensors that a
conversion missed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qkv.convert.errors import CheckpointError
from qkv.convert.files.fields import CONFIG, NULL, OBJECT, ROTARY, check_fields, either
from qkv.convert.files.json_document import count_keys, short_repr
from qkv.convert.files.safetensors import TensorSpec
from qkv.integrations.transformers import grouped_decoders, latent_decoders
from qkv.layers.rotary_config import given_parameters

OLD_NAMES = {"lm_head.weight": "embed_out.weight"}
"""Parameter names of transformers, and what older files call them: the LM head of GPT-NeoX."""

NUMBER = re.compile(r"\.\d+\.")
"""The layer number in a tensor's name."""

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Configuration keys for numbers of layers."""

MAX_KEYS = 100_000
"""Of a configuration. transformers takes 50 us per key; classifiers of 20,000 labels have 40,000 keys."""


class Heads(NamedTuple):
    """Head counts and head width of every layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_config(where: str, config: Mapping[str, Any], num_tensors: int) -> Any:
    """The configuration object of transformers.

    Args:
        where: name of the file, for error messages.
        config: its contents.
        num_tensors: of the checkpoint, an upper bound on the number of layers.

    Raises:
        CheckpointError: for invalid fields, and configurations that transformers refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if (keys := count_keys(config)) > MAX_KEYS:
        raise CheckpointError(f"{where}: a configuration must have at most {MAX_KEYS} keys; got {keys}.")
    if config["model_type"].startswith(grouped_decoders.TYPE_PREFIX):
        grouped_decoders.register()
        latent_decoders.register()
    for key in LAYERS:
        layers = config.get(key)
        if layers is not None and (type(layers) is not int or not 0 < layers <= num_tensors):
            raise CheckpointError(
                f"{where}: {key} must be an integer from 1 to {num_tensors}, the number of tensors; "
                f"got {short_repr(layers)}."
            )
    check_fields(where, config, CONFIG)
    try:
        hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        parts = [hf_config, _decoder(hf_config)]
    except Exception as error:
        raise CheckpointError(f"{where}: transformers refuses the configuration: {_one_line(error)}") from error
    for part in parts:
        check_fields(where, {name: getattr(part, name) for name in CONFIG if hasattr(part, name)}, CONFIG)
    check_rotary(where, hf_config)
    return hf_config


def check_rotary(where: str, config: Any) -> None:
    """Checks the fields of ``rope_parameters``: one dict for all layers, or one per layer type."""
    for fields in given_parameters(config).values():
        check_fields(f"{where}: rope_parameters", {"": fields}, {"": either(NULL, OBJECT)})
        check_fields(f"{where}: rope_parameters", fields or {}, ROTARY)


def heads(where: str, config: Any) -> Heads:
    """The head counts of a model; of the decoder in an encoder-decoder.

    Raises:
        CheckpointError: unless the KV heads divide the query heads.
    """
    config = _decoder(config)
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if not 0 < num_kv_heads <= num_heads or num_heads % num_kv_heads:
        raise CheckpointError(
            f"{where}: the number of query heads must be a multiple of the number of KV heads; "
            f"got {num_heads} and {num_kv_heads}."
        )
    return Heads(num_heads, num_kv_heads, _head_dim(config))


def encoder_heads(config: Any) -> list[Heads]:
    """The head counts of each encoder layer, which are always multi-head; empty without an encoder."""
    if not config.is_encoder_decoder:
        return []
    config = config.get_text_config(encoder=True)
    num_heads = config.num_attention_heads
    return [Heads(num_heads, num_heads, _head_dim(config))] * config.num_hidden_layers


def windows(config: Any) -> list[int | None]:
    """The sliding window of each layer (of the decoder, in an encoder-decoder), the query's own key included.

    None for layers without a window.
    """
    config = _decoder(config)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_tensors(where: str, config: Any, tensors: Mapping[str, TensorSpec]) -> None:
    """Compares the tensors with those of the model that transformers builds from the configuration.

    Unexpected tensors are ignored, as in transformers: old checkpoints contain buffers.

    Raises:
        CheckpointError: for tensors that are missing, have another shape or belong to layers beyond the last, and
            models that transformers cannot build.
    """
    model = _meta_model(where, config)
    cls = type(model)
    prefix = f"{model.base_model_prefix}."
    # Sinusoidal positions are frozen parameters in some models, and not always saved.
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optional = model.all_tied_weights_keys.keys() | frozen
    expected = set()
    for name, parameter in model.state_dict().items():
        # Checkpoints saved with and without a task head differ in the prefix; both load into either model.
        names = (name, name.removeprefix(prefix), prefix + name, OLD_NAMES.get(name, name))
        name_in_file = next((candidate for candidate in names if candidate in tensors), None)
        spec = None if name_in_file is None else tensors[name_in_file]
        expected.add(name_in_file)
        shape = tuple(parameter.shape)
        if spec is None and name not in optional:
            others = sum(NUMBER.sub(".0.", other) == NUMBER.sub(".0.", name) for other in tensors)
            raise CheckpointError(
                f"{where}: {cls.__name__} needs tensor {name!r} {list(shape)}, which the checkpoint does not have"
                + (f" ({'1 other layer does' if others == 1 else f'{others} other layers do'})" if others else "")
                + ". For sharded checkpoints, give the folder."
            )
        if spec is not None and (spec.shape != shape or spec.is_floating != parameter.is_floating_point()):
            kind = "floating-point" if parameter.is_floating_point() else "integer"
            raise CheckpointError(
                f"{where}: {cls.__name__} needs tensor {name!r} to be {kind} of shape {list(shape)}; got {spec}."
            )
    patterns = {NUMBER.sub(".0.", name) for name in expected if name is not None}
    extra = next((name for name in tensors if name not in expected and NUMBER.sub(".0.", name) in patterns), None)
    if extra is not None:
        raise CheckpointError(f"{where}: the configuration has fewer layers than the checkpoint, which has {extra!r}.")


def rotary_dim(where: str, config: Any) -> int:
    """Number of leading channels of a head with rotary embedding; 0 without.

    Counted from the model's ``inv_freq``: not every model follows its configuration here.
    """
    buffers = _meta_model(where, config).named_buffers()
    return max((2 * len(buffer) for name, buffer in buffers if name.endswith("inv_freq")), default=0)


def _meta_model(where: str, config: Any) -> Any:
    """The model on the meta device."""
    cls = _model_class(where, config)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:
        raise CheckpointError(f"{where}: transformers cannot build this model: {_one_line(error)}") from error


def _decoder(config: Any) -> Any:
    """The text decoder's configuration, with its number of layers, which T5 calls num_decoder_layers."""
    part = config.get_text_config(decoder=True)
    # transformers maps the key of BART, but not this one of T5.
    if config.is_encoder_decoder and hasattr(config, "num_decoder_layers"):
        part.num_hidden_layers = config.num_decoder_layers
    return part


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _model_class(where: str, config: Any) -> Any:
    """The model class for a configuration."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if type(config) in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        classes = [auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)], auto.MODEL_MAPPING[type(config)]]
        return _encoder_decoder_class(where, config, classes)
    if not config.architectures:
        return auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = config.architectures[0]
    module = latent_decoders if config.model_type.startswith(latent_decoders.TYPE_PREFIX) else transformers
    cls = getattr(module, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or getattr(cls, "config_class", None) is not type(config):
        raise CheckpointError(
            f"{where}: architectures must name a class of transformers for {config.model_type!r}; "
            f"got {short_repr(name)}, which transformers {transformers.__version__} does not have."
        )
    return cls


def _encoder_decoder_class(where: str, config: Any, classes: list[Any]) -> Any:
    """As `_model_class`, for encoder-decoders, whose possible ``classes`` are given."""
    names = [cls.__name__ for cls in classes]
    name = config.architectures[0] if config.architectures else names[0]
    if not config.is_encoder_decoder or name not in names:
        raise CheckpointError(
            f"{where}: a {config.model_type} model must be {' or '.join(names)} with is_encoder_decoder=True; got "
            f"{short_repr(name)} with is_encoder_decoder={config.is_encoder_decoder}."
        )
    return classes[names.index(name)]


def _one_line(error: Exception) -> str:
    """An exception as one line of at most 400 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
