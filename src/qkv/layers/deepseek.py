"""Conversion of transformers' latent attention, of DeepSeek-V2 and V3, to the options and weights of ours."""

from typing import Any

import torch
from torch import Tensor, nn

from qkv.layers.projection import require_linear
from qkv.layers.rotary import RotaryEmbedding
from qkv.masks import Mask

NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "out_proj": "o_proj",
}
"""Submodules of `LatentAttention`, and their names in transformers."""

STATIC_FREQUENCIES = ("default", "linear", "yarn", "llama3")
"""Kinds of rotary embedding whose frequencies do not depend on the text."""


def options(module: nn.Module) -> dict[str, Any]:
    """The arguments with which `LatentAttention` computes what the module does in a causal model.

    Raises:
        TypeError: for modules without the submodules and sizes of ``DeepseekV3Attention``.
        ValueError: for frequencies that depend on the text.
    """
    sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scaling", "config")
    if not isinstance(module, nn.Module) or not all(hasattr(module, name) for name in (*sizes, "kv_b_proj")):
        raise TypeError(
            "from_transformers: module must be the attention of a DeepSeek-V2 or V3 model of transformers; "
            f"got {type(module).__name__}."
        )
    theirs: Any = module
    for name in NAMES.values():
        projection = getattr(module, name, None)
        if name.endswith(("proj", "mqa")) and projection is not None:
            require_linear("from_transformers", name, projection)
    weight = theirs.kv_b_proj.weight
    return {
        "embed_dim": theirs.kv_a_proj_with_mqa.in_features,
        "num_heads": weight.shape[0] // (theirs.qk_nope_head_dim + theirs.v_head_dim),
        "kv_rank": theirs.kv_lora_rank,
        "nope_dim": theirs.qk_nope_head_dim,
        "rope_dim": theirs.qk_rope_head_dim,
        "value_dim": theirs.v_head_dim,
        "q_rank": theirs.q_lora_rank,
        "mask": Mask.causal(),
        "rotary": _rotary(theirs.config, theirs.qk_rope_head_dim),
        "norm_eps": theirs.kv_a_layernorm.variance_epsilon,
        "bias": theirs.kv_a_proj_with_mqa.bias is not None,
        "out_bias": theirs.o_proj.bias is not None,
        "scale": theirs.scaling,
        "dropout": float(theirs.attention_dropout),
        "device": weight.device,
        "dtype": weight.dtype,
    }


def state(module: nn.Module, layer: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``layer``, built with `options`, that gives it the function of the module."""
    given = module.state_dict()
    converted = {
        name: given[f"{NAMES[submodule]}.{parameter}"]
        for name in layer.state_dict()
        for submodule, _, parameter in [name.partition(".")]
        if f"{NAMES[submodule]}.{parameter}" in given
    }
    if "q_proj.bias" in layer.state_dict():  # theirs has none where the others do
        converted["q_proj.bias"] = layer.get_parameter("q_proj.bias").detach()
    factor = _rotary_scaling(module.config)
    if factor != 1:
        # Both queries and keys are multiplied by it; here, queries are by its square.
        name = "q_proj.weight" if "q_proj.weight" in converted else "q_b_proj.weight"
        heads = converted[name].clone().unflatten(0, (layer.num_heads, -1))
        heads[:, layer.nope_dim :] *= factor**2
        converted[name] = heads.flatten(0, 1)
    return converted


def _rotary(config: Any, rope_dim: int) -> RotaryEmbedding:
    """The rotary embedding that a model of this configuration passes to its layers."""
    interleaved = getattr(config, "rope_interleave", True)
    return RotaryEmbedding(rope_dim, interleaved=interleaved, frequencies=_frequencies(config)[0])


def _rotary_scaling(config: Any) -> float:
    """The factor of rotated queries and keys, 1 for most."""
    return float(_frequencies(config)[1])


def _frequencies(config: Any) -> tuple[Tensor, float]:
    """The frequencies of a configuration's rotary embedding and the factor of what it rotates."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    if kind not in STATIC_FREQUENCIES:
        raise ValueError(
            f"from_transformers: rope_type must be one of {', '.join(STATIC_FREQUENCIES)}; got {kind}, whose "
            "frequencies depend on the text. Build a LatentAttention with a rotary of your own, and load the weights."
        )
    if kind == "default":
        exponent = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float32) / config.qk_rope_head_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, factor
