"""GPT-2, GPT-BigCode and GPT-NeoX: packed QKV. Conversion turns GPT-2 into GPT-BigCode and GPT-NeoX into Phi."""

import re
from typing import Any

import torch
from torch import Tensor

from qkv.convert.errors import CheckpointError
from qkv.convert.families.family import Family, Output, Pooling
from qkv.convert.families.layout import Layout, unpack_by_head
from qkv.convert.families.llama import convert_packed, pool_packed
from qkv.convert.files.safetensors import TensorSpec

GPT2_BUFFER = re.compile(r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)")
GPT2_TRANSPOSED = re.compile(r"(.*\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
NEOX_NAMES = {
    "attention.dense": "self_attn.dense",
    "mlp.dense_4h_to_h": "mlp.fc2",
    "gpt_neox.embed_in": "model.embed_tokens",
    "gpt_neox.final_layer_norm": "model.final_layernorm",
    "gpt_neox.layers": "model.layers",
    "embed_out": "lm_head",
}
"""Parts of tensor names: GPT-NeoX to Phi."""


def _convert_gpt2(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Transposes to GPT-BigCode: weights of GPT-2 are (in, out), those of GPT-BigCode (out, in)."""
    if GPT2_BUFFER.fullmatch(name):
        return []
    if not GPT2_TRANSPOSED.fullmatch(name):
        return convert_packed(family, name, spec, pooling)
    transposed = spec._replace(shape=spec.shape[::-1])
    if not family.is_kv(name):
        return [Output(name, transposed, (name,), lambda weight: weight.T)]
    return [
        output._replace(compute=lambda weight: pool_packed(pooling, name, weight.T))
        for output in convert_packed(family, name, transposed, pooling)
    ]


def _convert_bigcode(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Pools packed rows that are ordered by head: query, key and value of the first, then of the second, ..."""

    def pool(weight: Tensor) -> Tensor:
        return pool_packed(pooling, name, torch.cat(unpack_by_head(weight, pooling.heads)))

    outputs = convert_packed(family, name, spec, pooling)
    return [output if output.compute is None else output._replace(compute=pool) for output in outputs]


def _convert_neox(family: Family, name: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Folds the two norms of a GPT-NeoX layer (attention and MLP) into projections, since Phi has a single norm.

    The norms differ only in gain g and offset c, ``norm(x) = g * n(x) + c``, so
    ``W @ norm(x) + b = (W * g) @ n(x) + (W @ c + b)``. Phi's norm then has gain 1 and offset 0.
    """
    layer = re.fullmatch(r"(gpt_neox\.layers\.\d+\.)(.+)", name)
    part = "" if layer is None else layer[2]
    prefix = "" if layer is None else layer[1]
    if part.startswith("post_attention_layernorm.") or re.search(r"(masked_bias|attention\.bias|inv_freq)$", part):
        return []
    if part == "input_layernorm.weight":
        return [Output(_phi_name(name), spec, (name,), torch.ones_like)]
    if part == "input_layernorm.bias":
        return [Output(_phi_name(name), spec, (name,), torch.zeros_like)]
    if part.startswith("attention.query_key_value."):
        return _unpack_neox(prefix, part.rpartition(".")[2], spec, pooling)
    if part.startswith("mlp.dense_h_to_4h."):
        kind = part.rpartition(".")[2]
        sources, fold = _fold_norm(prefix + "mlp.dense_h_to_4h", prefix + "post_attention_layernorm", kind)
        return [Output(_phi_name(f"{prefix}mlp.fc1.{kind}"), spec, sources, fold)]
    outputs = [Output(_phi_name(name), spec, (name,))]
    if name in ("embed_out.weight", "lm_head.weight"):
        bias = spec._replace(shape=spec.shape[:1])
        outputs.append(Output("lm_head.bias", bias, (name,), lambda weight: torch.zeros_like(weight[:, 0])))
    return outputs


def _unpack_neox(prefix: str, kind: str, spec: TensorSpec, pooling: Pooling) -> list[Output]:
    """Splits a packed weight or bias of GPT-NeoX into Phi's q, k and v."""
    sources, fold = _fold_norm(prefix + "attention.query_key_value", prefix + "input_layernorm", kind)
    outputs = []
    for index, (letter, rows) in enumerate((("q", pooling.query_rows), ("k", pooling.rows), ("v", pooling.rows))):
        name = _phi_name(f"{prefix}self_attn.{letter}_proj.{kind}")

        def compute(*values: Tensor, index: int = index, name: str = name) -> Tensor:
            rows = unpack_by_head(fold(*values), pooling.heads)[index]
            return rows if index == 0 else pooling.pool(name, rows)

        outputs.append(Output(name, spec._replace(shape=(rows, *spec.shape[1:])), sources, compute))
    return outputs


def _fold_norm(linear: str, norm: str, kind: str) -> tuple[tuple[str, ...], Any]:
    """Sources and function for the weight or bias of a projection with a norm folded into it."""
    if kind == "weight":
        return (f"{linear}.weight", f"{norm}.weight"), _fold_gain
    return (f"{linear}.bias", f"{linear}.weight", f"{norm}.bias"), _fold_offset


def _fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """``weight * gain``: a linear layer takes over the gain of the norm before it."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(precise) * gain.to(precise)).to(weight.dtype)


def _fold_offset(bias: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """``weight @ offset + bias``: a linear layer takes over the offset of the norm before it."""
    precise = torch.promote_types(bias.dtype, torch.float32)
    return (bias.to(precise) + weight.to(precise) @ offset.to(precise)).to(bias.dtype)


def _phi_name(name: str) -> str:
    """Phi's name for a tensor of GPT-NeoX."""
    for theirs, ours in NEOX_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _configure_bigcode(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    """The new configuration.

    Raises:
        CheckpointError: unless there is one KV head, or one for each query head.
    """
    if pooling.num_kv_heads != 1 and pooling.changes:
        raise CheckpointError(
            "GPT-BigCode models have a single KV head (multi-query attention) or one for each query head; "
            f"got {pooling.num_kv_heads}. Give 1 KV head."
        )
    return {**config, "multi_query": pooling.num_kv_heads == 1, "num_key_value_heads": pooling.num_kv_heads}


def _configure_gpt2(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    """The configuration of GPT-BigCode.

    Raises:
        CheckpointError: for more than one KV head, and options that GPT-BigCode does not have.
    """
    if pooling.num_kv_heads != 1:
        raise CheckpointError(
            "GPT-2 becomes GPT-BigCode, which has a single KV head (multi-query attention); "
            f"got {pooling.num_kv_heads}. Give 1 KV head."
        )
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(hf_config, option):
            raise CheckpointError(f"GPT-2 with {option} cannot become GPT-BigCode, which does not have this option.")
    classes = [name.replace("GPT2", "GPTBigCode") for name in hf_config.architectures or []]
    return {
        **config,
        "model_type": "gpt_bigcode",
        "architectures": [name.replace("LMHeadModel", "ForCausalLM") for name in classes],
        "activation_function": hf_config.activation_function,
        "multi_query": True,
    }


def _configure_neox(config: dict[str, Any], hf_config: Any, pooling: Pooling) -> dict[str, Any]:
    """The configuration of Phi.

    Raises:
        CheckpointError: for models without parallel residuals or biases, with tied embeddings, or that are not
            language models.
    """
    if not hf_config.use_parallel_residual or not hf_config.attention_bias or hf_config.tie_word_embeddings:
        raise CheckpointError(
            "GPT-NeoX becomes Phi, which requires use_parallel_residual=True, attention_bias=True and "
            f"tie_word_embeddings=False; got {hf_config.use_parallel_residual}, {hf_config.attention_bias} and "
            f"{hf_config.tie_word_embeddings}."
        )
    if hf_config.architectures not in (None, ["GPTNeoXForCausalLM"]):
        raise CheckpointError(
            f"GPT-NeoX becomes Phi, which requires architectures ['GPTNeoXForCausalLM']; got {hf_config.architectures}."
        )
    dropped = {"use_parallel_residual", "attention_bias", "classifier_dropout", "is_decoder", "rotary_pct"}
    kept = {name: value for name, value in hf_config.to_dict().items() if name not in dropped}
    return {
        **kept,
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "num_key_value_heads": pooling.num_kv_heads,
        "resid_pdrop": hf_config.hidden_dropout,
        "embd_pdrop": hf_config.hidden_dropout,
    }


GPT2 = Family(
    re.compile(r"(?:transformer\.)?h\.(\d{1,9})\.attn\.((?!bias|masked_bias).+)"),
    re.compile(r"c_attn\.(weight|bias)"),
    True,
    _convert_gpt2,
    _configure_gpt2,
    layout=Layout(("c_attn",), "c_proj", transposed=True, norm="ln_1"),
)
GPT_BIGCODE = GPT2._replace(
    convert=_convert_bigcode,
    configure=_configure_bigcode,
    layout=Layout(("c_attn",), "c_proj", by_head=True, norm="ln_1"),
)
GPT_NEOX = Family(
    re.compile(r"gpt_neox\.layers\.(\d{1,9})\.attention\.((?!bias|masked_bias).+)"),
    re.compile(r"query_key_value\.(weight|bias)"),
    True,
    _convert_neox,
    _configure_neox,
    layout=Layout(("query_key_value",), "dense", by_head=True),
)
