"""`register_model_type`: a model type of qkv's own in the auto classes of transformers."""

from collections.abc import Callable, Iterable
from typing import Any


def register_model_type(
    base: type, config: Any, mappings: Iterable[Any], model_class: Callable[[Any], type]
) -> list[type]:
    """Registers a configuration, and a model for each model of ``base``, with transformers.

    Args:
        base: the configuration class that ``config`` derives from. Its tokenizer is used.
        config: the new configuration class.
        mappings: transformers' mappings from configurations to models, such as ``MODEL_MAPPING``.
        model_class: the new model class from that of ``base``.

    Returns:
        the configuration and the models.
    """
    from transformers import AutoConfig
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    AutoConfig.register(config.model_type, config)
    classes = [config]
    for mapping in mappings:
        classes.append(model_class(mapping[base]))
        mapping.register(config, classes[-1])
    if base in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(config, TOKENIZER_MAPPING[base])
    return classes
