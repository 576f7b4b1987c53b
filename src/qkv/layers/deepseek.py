"""Conversion of transformers' latent attention, of DeepSeek-V2 and V3, to the options and weights of ours."""

from typing import Any

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


def options(module: nn.Module) -> dict[str, Any]:
    """The arguments with which `LatentAttention` computes what the module does in a causal model.

    Raises:
        TypeError: for modules without the submodules and sizes of ``DeepseekV3Attention``.
        ValueError: as `RotaryEmbedding.from_config`.
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
        # Always so in DeepSeek-V2, whose configuration does not say it.
        "rotary": RotaryEmbedding.from_config(
            theirs.config, interleaved=getattr(theirs.config, "rope_interleave", True)
        ),
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
    if "q_proj.bias" in layer.state_dict():  # in the module, q_proj alone never has one
        converted["q_proj.bias"] = layer.get_parameter("q_proj.bias").detach()
    return converted
