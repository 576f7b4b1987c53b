"""`register`: encoder-decoders of transformers with grouped-query attention in the decoder.

Their configurations add ``num_key_value_heads``, the name by which transformers sizes caches. They have their own model
types, so that transformers without qkv refuses them instead of loading them wrongly. The encoder stays multi-head.
"""

import functools
from typing import Any

from torch import nn

from qkv.integrations.transformers import attention
from qkv.integrations.transformers.model_types import register_model_type

MODEL_TYPES = ("t5", "mt5", "bart", "mbart", "pegasus", "marian")
"""Supported model types. Their attention infers the number of heads from the projections' outputs."""

TYPE_PREFIX, CLASS_PREFIX = "qkv_", "Grouped"
"""``t5`` becomes ``qkv_t5``, and ``T5Model`` becomes ``GroupedT5Model``."""


def register() -> None:
    """Registers the model types ``qkv_t5``, ``qkv_bart``, ... with transformers; `qkv.convert` writes such models.

    ``AutoModelForSeq2SeqLM`` and ``AutoModel`` can then build, load and save them. They are transformers' models with
    fewer key/value heads in the decoder, and run on ``attn_implementation="qkv"`` by default.

    The models raise a ValueError if ``num_key_value_heads`` does not divide the query heads of the decoder, and for
    ``attn_implementation="eager"``, which does not support grouped-query attention in these models. Their classes are
    attributes of this module: ``GroupedT5Model``, ``GroupedT5ForConditionalGeneration``, ``GroupedT5Config``, ...

    Raises:
        ModuleNotFoundError: if transformers is not installed.

    Example:
        >>> from transformers import AutoConfig, AutoModelForSeq2SeqLM
        >>> from qkv.integrations.transformers import grouped_decoders
        >>> grouped_decoders.register()
        >>> sizes = {"vocab_size": 99, "d_model": 32, "d_ff": 32, "num_layers": 1, "d_kv": 8, "num_heads": 4}
        >>> config = AutoConfig.for_model("qkv_t5", **sizes, num_key_value_heads=2)
        >>> AutoModelForSeq2SeqLM.from_config(config).decoder.block[0].layer[1].EncDecAttention.k
        Linear(in_features=32, out_features=16, bias=False)

    Source: Ainslie et al. 2023, section 3.1: T5 with groups in self- and cross-attention of the decoder alone.
    """
    _registered()


def __getattr__(name: str) -> Any:
    """Creates the ``Grouped...`` classes on first use, by an import or a pickle."""
    classes = _registered() if name.startswith(CLASS_PREFIX) else {}
    if name not in classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return classes[name]


@functools.cache
def _registered() -> dict[str, Any]:
    """Creates and registers all classes; returns them by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING

    attention.register()
    mappings = (MODEL_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    classes = []
    for model_type in MODEL_TYPES:
        base = CONFIG_MAPPING[model_type]
        config = _config_class(base)
        classes += register_model_type(base, config, mappings, functools.partial(_model_class, config_class=config))
    return {cls.__name__: cls for cls in classes}


class GroupedDecoder:
    """Mixin for transformers' models: a decoder with ``num_key_value_heads``."""

    def __init__(self, config: Any) -> None:
        num_heads = config.get_text_config(decoder=True).num_attention_heads
        num_kv_heads = num_heads if config.num_key_value_heads is None else config.num_key_value_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{type(self).__name__}: num_key_value_heads must divide the {num_heads} query heads of the decoder; "
                f"got {num_kv_heads}."
            )
        super().__init__(config)  # type: ignore[call-arg]
        _narrow(self.get_decoder(), num_heads, num_kv_heads)  # type: ignore[attr-defined]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The requested implementation, "qkv" if None. Signature as in transformers."""
        if requested_attention == "eager":
            raise ValueError(
                f'{type(self).__name__}: attn_implementation="eager" does not support grouped-query attention; '
                f"use {attention.NAME!r}, which also returns attention weights, or 'sdpa'."
            )
        implementation: str = super().get_correct_attn_implementation(  # type: ignore[misc]
            requested_attention or attention.NAME, is_init_check
        )
        return implementation


def _narrow(decoder: nn.Module, num_heads: int, num_kv_heads: int) -> None:
    """Keeps the first ``num_kv_heads`` heads. Rows are initialised i.i.d., so this equals initialising fewer."""
    for module in decoder.modules():
        projections = [getattr(module, name) for name in ("k", "v", "k_proj", "v_proj") if hasattr(module, name)]
        for projection in projections:
            projection.out_features = projection.out_features // num_heads * num_kv_heads
            for name, parameter in list(projection.named_parameters()):
                setattr(projection, name, nn.Parameter(parameter.detach()[: projection.out_features].clone()))
        if projections:
            # transformers' other implementations repeat keys and values by this number.
            module.num_key_value_groups = num_heads // num_kv_heads  # type: ignore[assignment]


def _config_class(base: Any) -> Any:
    """Derives our configuration class from transformers' one."""
    from huggingface_hub.dataclasses import strict

    class Grouped(base):  # type: ignore[misc]
        model_type = TYPE_PREFIX + base.model_type
        num_key_value_heads: int | None = None

    Grouped.__name__ = Grouped.__qualname__ = CLASS_PREFIX + base.__name__
    return strict(Grouped)


def _model_class(base: Any, config_class: Any) -> Any:
    """Derives our model class from transformers' one."""
    return type(CLASS_PREFIX + base.__name__, (GroupedDecoder, base), {"config_class": config_class})
