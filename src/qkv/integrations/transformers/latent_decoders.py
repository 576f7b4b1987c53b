"""`register`: Llama, Mistral and Qwen2 of transformers with latent attention, as `qkv.convert` makes them.

DeepSeek's own model types normalise latents, which no conversion from grouped heads can express. These have their own
types, so that transformers without qkv refuses them instead of loading them wrongly.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkv import kernels
from qkv.integrations.transformers import attention
from qkv.integrations.transformers.model_types import register_model_type
from qkv.layers.latent_heads import LatentHeads, split_heads
from qkv.rotation import Rotation

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Supported model types. Their attention layers differ in biases and windows alone."""

TYPE_PREFIX, CLASS_PREFIX = "qkv_latent_", "Latent"
"""``llama`` becomes ``qkv_latent_llama``, and ``LlamaModel`` becomes ``LatentLlamaModel``."""


def register() -> None:
    """Registers the model types ``qkv_latent_llama``, ``qkv_latent_mistral`` and ``qkv_latent_qwen2``.

    ``AutoModelForCausalLM`` and ``AutoModel`` can then build, load and save them. They are transformers' models whose
    layers cache a latent of ``kv_lora_rank`` and a rotary key of ``qk_rope_head_dim`` for each token. Their
    configurations name sizes as DeepSeek's do; each frequency of the model is that of ``qk_rope_head_dim / head_dim``
    pairs of the rotary key in a row. `latent` makes them decode without expanding latents. Their classes are attributes
    of this module: ``LatentLlamaForCausalLM``, ``LatentLlamaModel``, ``LatentLlamaConfig``, ...

    Raises:
        ModuleNotFoundError: if transformers is not installed.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> from qkv.integrations.transformers import latent_decoders
        >>> latent_decoders.register()
        >>> sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        >>> latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        >>> config = AutoConfig.for_model("qkv_latent_llama", **sizes, **latent, num_attention_heads=4)
        >>> AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.kv_a_proj_with_mqa
        Linear(in_features=32, out_features=20, bias=False)
    """
    _registered()


def __getattr__(name: str) -> Any:
    """Creates the ``Latent...`` classes on first use, by an import or a pickle."""
    classes = _registered() if name.startswith(CLASS_PREFIX) else {}
    if name not in classes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return classes[name]


@functools.cache
def _registered() -> dict[str, Any]:
    """Creates and registers all classes; returns them by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    attention.register()
    mappings = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    classes = []
    for model_type in MODEL_TYPES:
        base = CONFIG_MAPPING[model_type]
        config, layer = _config_class(base), _attention_class(MODEL_MAPPING[base])
        model_class = functools.partial(_model_class, config_class=config, attention_class=layer)
        classes += [layer, *register_model_type(base, config, mappings, model_class)]
    return {cls.__name__: cls for cls in classes}


class LatentDecoder:
    """Mixin for transformers' models: each attention layer becomes one over latents."""

    attention_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for layer in self.get_decoder().layers:  # type: ignore[attr-defined]
            layer.self_attn.__class__ = self.attention_class
            layer.self_attn.become_latent(config)


class LatentDecoderAttention(nn.Module):
    """Mixin for transformers' attention layers: latent attention, without norms of latents."""

    def become_latent(self: Any, config: Any) -> None:
        """Replaces the projections of queries, keys and values."""
        self.num_key_value_groups = 1
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        heads, width = config.num_attention_heads, config.hidden_size

        def linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
            made = nn.Linear(in_features, out_features, bias=bias)
            nn.init.normal_(made.weight, std=config.initializer_range)
            return made

        has_bias = self.k_proj.bias is not None
        del self.k_proj, self.v_proj
        self.q_proj = linear(width, heads * (self.qk_nope_head_dim + self.qk_rope_head_dim), has_bias)
        self.kv_a_proj_with_mqa = linear(width, self.kv_lora_rank + self.qk_rope_head_dim, has_bias)
        self.kv_b_proj = linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), False)

    def expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, as DeepSeek's layers in transformers compute them."""
        return LatentHeads(self.kv_b_proj, self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim).expand(
            torch.cat([kv_nope, k_rot], dim=3)
        )

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As in transformers' layers, which call a cache ``past_key_values`` before 5.24."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        widths = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        q_nope, q_rot = split_heads(self.q_proj(hidden_states), sum(widths)).split(widths, dim=3)
        kv = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        kv_nope, k_rot = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=3)
        q_rot, k_rot = self._rotate(q_rot, k_rot, *position_embeddings)
        latents = past_key_values if cache is None else cache
        if latents is not None:
            kv_nope, k_rot = latents.update(kv_nope, k_rot, self.layer_idx)
        k, v = self.expand_kv(kv_nope, k_rot)
        eager = sys.modules[type(self).__mro__[2].__module__].eager_attention_forward
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        out, weights = attention_function(
            self,
            torch.cat([q_nope, q_rot], dim=3),
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), weights

    def _rotate(self: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """Rotates pairs of neighbouring channels, several in a row by each angle of the model."""
        repeats = q.shape[3] // cos.shape[2]
        cos, sin = (table[..., : cos.shape[2] // 2].repeat_interleave(repeats, dim=2) for table in (cos, sin))
        return kernels.rotate([q, k], Rotation(cos=cos, sin=sin, interleaved=True))


def _config_class(base: Any) -> Any:
    """Derives our configuration class from transformers' one."""
    from huggingface_hub.dataclasses import strict

    class Latent(base):  # type: ignore[misc]
        model_type = TYPE_PREFIX + base.model_type
        kv_lora_rank: int = 512
        qk_nope_head_dim: int = 0
        qk_rope_head_dim: int = 64
        v_head_dim: int = 64

    Latent.__name__ = Latent.__qualname__ = CLASS_PREFIX + base.__name__
    return strict(Latent)


def _attention_class(model: Any) -> Any:
    """Derives our attention layer from that of a model class."""
    base = getattr(sys.modules[model.__module__], model.__name__.removesuffix("Model") + "Attention")
    return type(CLASS_PREFIX + base.__name__, (LatentDecoderAttention, base), {})


def _model_class(base: Any, config_class: Any, attention_class: Any) -> Any:
    """Derives our model class from transformers' one."""
    fields = {"config_class": config_class, "attention_class": attention_class}
    return type(CLASS_PREFIX + base.__name__, (LatentDecoder, base), fields)
