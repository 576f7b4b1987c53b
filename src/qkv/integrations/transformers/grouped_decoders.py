"""`register`: encoder-decoders of transformers whose decoder has fewer key/value heads than query heads.

Their configurations are those of transformers with one more number, ``num_key_value_heads``, and types of their own, so
that transformers without us refuses them instead of reading them wrongly. The number has the name by which transformers
sizes caches, and only a decoder has one; the encoder keeps a key/value head for each query head.
"""

import functools
from typing import Any

from torch import nn

from qkv.integrations.transformers import attention

MODEL_TYPES = ("t5", "mt5", "bart", "mbart", "pegasus", "marian")
"""What transformers calls them; their attention counts heads by what the projections give."""

TYPE_PREFIX, CLASS_PREFIX = "qkv_", "Grouped"
"""``t5`` becomes ``qkv_t5``, and ``T5Model`` becomes ``GroupedT5Model``."""


def register() -> None:
    """Makes the model types ``qkv_t5``, ``qkv_bart``, ... known to transformers, which `qkv.convert` writes.

    Afterwards ``AutoModelForSeq2SeqLM`` and ``AutoModel`` load, build and save them as any other model. Each is
    transformers' own but for the projections to keys and values in its decoder, and runs on
    ``attn_implementation="qkv"`` unless another is asked for.

    The models raise a ValueError for a ``num_key_value_heads`` that does not divide the query heads of the decoder, and
    for ``attn_implementation="eager"``, which cannot share keys and values here. Their classes are attributes of this
    module: ``GroupedT5Model``, ``GroupedT5ForConditionalGeneration``, ``GroupedT5Config``, ...

    Raises:
        ModuleNotFoundError: where transformers is not installed.

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
    """A class of ours, wherever it is asked for first: in an import or a pickle."""
    classes = _registered() if name.startswith(CLASS_PREFIX) else {}
    if name not in classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return classes[name]


@functools.cache
def _registered() -> dict[str, Any]:
    """Our classes, by name."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    attention.register()
    classes = []
    for model_type in MODEL_TYPES:
        theirs = CONFIG_MAPPING[model_type]
        config = _config_class(theirs)
        classes.append(config)
        AutoConfig.register(config.model_type, config)
        for mapping in (MODEL_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
            classes.append(_model_class(mapping[theirs], config))
            mapping.register(config, classes[-1])
        if theirs in TOKENIZER_MAPPING:
            TOKENIZER_MAPPING.register(config, TOKENIZER_MAPPING[theirs])
    return {cls.__name__: cls for cls in classes}


class GroupedDecoder:
    """What our models have before transformers' own."""

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
        """Ours where none is asked for. Signature as transformers'."""
        if requested_attention == "eager":
            raise ValueError(
                f'{type(self).__name__}: attn_implementation="eager" cannot share keys and values among query heads; '
                f"use {attention.NAME!r}, which returns attention weights, too, or 'sdpa'."
            )
        implementation: str = super().get_correct_attn_implementation(  # type: ignore[misc]
            requested_attention or attention.NAME, is_init_check
        )
        return implementation


def _narrow(decoder: nn.Module, num_heads: int, num_kv_heads: int) -> None:
    """Leaves the rows of ``num_kv_heads``, which as all rows are drawn alike is how fewer would have been drawn."""
    for module in decoder.modules():
        projections = [getattr(module, name) for name in ("k", "v", "k_proj", "v_proj") if hasattr(module, name)]
        for projection in projections:
            projection.out_features = projection.out_features // num_heads * num_kv_heads
            for name, parameter in list(projection.named_parameters()):
                setattr(projection, name, nn.Parameter(parameter.detach()[: projection.out_features].clone()))
        if projections:
            # By which transformers' other implementations repeat keys and values.
            module.num_key_value_groups = num_heads // num_kv_heads  # type: ignore[assignment]


def _config_class(theirs: Any) -> Any:
    from huggingface_hub.dataclasses import strict

    class Grouped(theirs):  # type: ignore[misc]
        model_type = TYPE_PREFIX + theirs.model_type
        num_key_value_heads: int | None = None

    Grouped.__name__ = Grouped.__qualname__ = CLASS_PREFIX + theirs.__name__
    return strict(Grouped)


def _model_class(theirs: Any, config_class: Any) -> Any:
    return type(CLASS_PREFIX + theirs.__name__, (GroupedDecoder, theirs), {"config_class": config_class})
