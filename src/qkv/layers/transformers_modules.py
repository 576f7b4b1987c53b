"""Conversion of transformers' attention modules to the options and weights of `Attention`.

Modules are recognised by their class and read by their attributes: transformers is not imported. Slopes of ALiBi are
computed by the function of the module that defines the class, since models differ in them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from qkv.layers.packed import split_by_group, split_by_kind
from qkv.layers.position_bias import RelativePositionBias
from qkv.layers.rotary import RotaryEmbedding
from qkv.masks import FULL, Mask


class _Kind(NamedTuple):
    """How the attention modules of one or more classes store their weights, and what they compute."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """The three projections, or the packed one."""
    out: str = "o_proj"
    split: Callable[[Tensor, int, int], Sequence[Tensor]] = split_by_kind
    """Splits packed rows of ``num_heads`` heads of ``head_dim`` into those of queries, keys and values."""
    rotates: bool = True
    norm_offset: float = 0.0
    """Added to the weight of ``q_norm`` and ``k_norm`` to get their gain."""
    has_gate: bool = False
    """Whether the rows of a head in q_proj are those of its queries, then those of its gate."""
    has_softcap: bool = False
    window_in_config: bool = False
    """Whether the window is that of the configuration, not of the module."""
    has_position_bias: bool = False
    """Whether a position bias is added in self-attention."""


_LLAMA = _Kind()
_WINDOWED = _Kind(window_in_config=True)
_BART = _Kind(out="out_proj", rotates=False)
_GPT2 = _Kind(("c_attn",), "c_proj", rotates=False)
_T5 = _Kind(("q", "k", "v"), "o", rotates=False, has_position_bias=True)
_KINDS = {
    "LlamaAttention": _LLAMA,
    "MistralAttention": _WINDOWED,
    "Qwen2Attention": _LLAMA,
    "Qwen3Attention": _LLAMA,
    "Qwen3NextAttention": _Kind(norm_offset=1.0, has_gate=True),
    "GemmaAttention": _LLAMA,
    "Gemma2Attention": _Kind(has_softcap=True),
    "Gemma3Attention": _Kind(norm_offset=1.0),
    "Phi3Attention": _Kind(("qkv_proj",), window_in_config=True),
    "PhiAttention": _Kind(out="dense"),
    "GraniteAttention": _LLAMA,
    "SmolLM3Attention": _LLAMA,
    "Starcoder2Attention": _WINDOWED,
    "GptOssAttention": _LLAMA,
    "GPT2Attention": _GPT2,
    "GPTBigCodeAttention": _GPT2,
    "GPTNeoXAttention": _Kind(("query_key_value",), "dense", split_by_group),
    "FalconAttention": _Kind(("query_key_value",), "dense", split_by_group),
    "MptAttention": _Kind(("Wqkv",), "out_proj", rotates=False),
    "OPTAttention": _BART,
    "BartAttention": _BART,
    "MBartAttention": _BART,
    "PegasusAttention": _BART,
    "MarianAttention": _BART,
    "T5Attention": _T5,
    "MT5Attention": _T5,
    "BertAttention": _Kind(("query", "key", "value"), "dense", rotates=False),
}
_DIFFERENTIAL = {"DiffLlamaAttention": _LLAMA}


class Converted(NamedTuple):
    """An attention module as `Attention` has it."""

    options: dict[str, Any]
    state: dict[str, Tensor]
    position_bias: RelativePositionBias | None
    needs_position_bias: bool
    """Whether, in self-attention, the model adds the position bias of another module."""


def read(module: nn.Module, kinds: Mapping[str, _Kind] = _KINDS) -> Converted:
    """The arguments with which `Attention` computes what the module does, and its weights by the names of `Attention`.

    Args:
        module: an attention module.
        kinds: the classes that are read, by name.

    Raises:
        TypeError: for a module of another class, and projections that are wrapped or quantised.
        ValueError: for modules that `Attention` cannot express.
    """
    name = type(module).__name__
    kind = kinds.get(name) if type(module).__module__.startswith("transformers.") else None
    if kind is None:
        remedy = " Use DifferentialAttention.from_transformers." if name in _DIFFERENTIAL else ""
        raise TypeError(f"from_transformers: module must be a {', '.join(kinds)} of transformers; got {name}.{remedy}")
    outer: Any = module
    attention: Any = outer.self if name == "BertAttention" else outer
    owner: Any = outer.output if name == "BertAttention" else outer
    _refuse_what_layers_lack(name, attention)
    num_heads, head_dim = _first(attention, _NUM_HEADS), _first(attention, _HEAD_DIM)
    if name == "GPTBigCodeAttention" and not attention.multi_query:
        kind = kind._replace(split=split_by_group)

    state = _split(kind, attention, "weight", num_heads, head_dim)
    biases = _split(kind, attention, "bias", num_heads, head_dim)
    state |= biases
    state["out_proj.weight"], out_bias = _oriented(_linear(owner, kind.out)), _linear(owner, kind.out).bias
    if out_bias is not None:
        state["out_proj.bias"] = out_bias

    options: dict[str, Any] = {
        "embed_dim": state["q_proj.weight"].shape[1],
        "num_heads": num_heads,
        "num_kv_heads": state["k_proj.weight"].shape[0] // head_dim,
        "head_dim": head_dim,
        "gate": kind.has_gate,
        "bias": bool(biases),
        "out_bias": out_bias is not None,
        "dropout": _dropout(attention),
        "mask": _mask(kind, attention),
        "device": state["out_proj.weight"].device,
        "dtype": state["out_proj.weight"].dtype,
    }
    if getattr(outer, "is_cross_attention", False):
        options["context_dim"] = state["k_proj.weight"].shape[1]
    scale = _first(attention, ("scaling", "softmax_scale", "inv_norm_factor"))
    if kind.rotates and _uses_rotary(attention):
        options["rotary"] = RotaryEmbedding.from_config(attention.config, getattr(attention, "layer_type", None))
    options["scale"] = None if scale == head_dim**-0.5 else scale
    if kind.has_softcap:
        options["softcap"] = attention.attn_logit_softcapping
    if getattr(attention, "sinks", None) is not None:
        options["sink_logits"], state["sink_logits"] = True, attention.sinks
    if getattr(attention, "q_norm", None) is not None:
        options |= {"qk_norm": True, "qk_norm_eps": _first(attention.q_norm, ("eps", "variance_epsilon"))}
        for norm in ("q_norm", "k_norm"):
            state[f"{norm}.weight"] = getattr(attention, norm).weight + kind.norm_offset
    slopes = _alibi_slopes(attention, num_heads)
    if slopes is not None:
        options["alibi"] = slopes
    position_bias = _position_bias(attention)
    return Converted(options, state, position_bias, kind.has_position_bias and position_bias is None)


def read_differential(module: nn.Module) -> Converted:
    """As `read`, for `DifferentialAttention`: head i and head ``i + num_heads / 2`` become the halves of one.

    Raises:
        TypeError: as `read`.
    """
    converted, theirs = read(module, _DIFFERENTIAL), cast(Any, module)
    state, width = dict(converted.state), converted.options["head_dim"]
    for name, rows in state.items():
        if not name.startswith("out_proj"):
            state[name] = rows.unflatten(0, (2, -1, width)).transpose(0, 1).flatten(0, 2)
    state |= {name: getattr(theirs, name) for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
    state["sub_norm.weight"] = torch.ones_like(theirs.lambda_q1).repeat(2)
    halved = {name: converted.options[name] // 2 for name in ("num_heads", "num_kv_heads")}
    own = {"head_dim": 2 * width, "lambda_init": theirs.lambda_init, "sub_norm_eps": theirs.groupnorm.eps}
    return converted._replace(options={**converted.options, **halved, **own}, state=state)


_NUM_HEADS = ("num_heads", "n_heads", "num_attention_heads")
_HEAD_DIM = ("head_dim", "head_size", "key_value_proj_dim", "attention_head_size")


def _first(module: Any, names: Sequence[str]) -> Any:
    """The first of these attributes that a module has; for numbers of heads, else that of its configuration."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    return getattr(module.config, names[-1])


def _refuse_what_layers_lack(name: str, attention: Any) -> None:
    """Raises ValueError for options of the module that `Attention` does not have."""
    for option, what in (("qk_layernorm", "LayerNorm of queries and keys"), ("clip_qkv", "clipping of projections")):
        if getattr(attention, option, None):
            raise ValueError(
                f"from_transformers: {option} must be off, since layers have no {what}; "
                f"got a {name} with {option}={getattr(attention, option)}."
            )


def _linear(module: Any, name: str) -> Any:
    """A projection. Raises TypeError unless it is linear."""
    projection = getattr(module, name)
    plain = isinstance(projection, nn.Linear) and type(projection).forward is nn.Linear.forward
    if not plain and type(projection).__name__ not in ("Conv1D", "FalconLinear"):
        raise TypeError(
            f"from_transformers: {name} of the module must be an nn.Linear; got {type(projection).__name__}. "
            "Merge adapters, remove wrappers or dequantise first."
        )
    return projection


def _oriented(projection: Any) -> Tensor:
    """The weight as ``(out, in)``."""
    weight: Tensor = projection.weight
    return weight.T if type(projection).__name__ == "Conv1D" else weight


def _split(kind: _Kind, attention: Any, part: str, num_heads: int, head_dim: int) -> dict[str, Tensor]:
    """The weights or biases of queries, keys and values (and of the gate), by the names of `Attention`."""
    names = kind.qkv
    if hasattr(attention, "q_attn"):  # cross-attention of GPT-2
        names = ("q_attn", *names)
    linears = [_linear(attention, name) for name in names]
    rows = [_oriented(linear) if part == "weight" else linear.bias for linear in linears]
    if any(tensor is None for tensor in rows):
        return {}
    if len(rows) == 1:
        rows = list(kind.split(rows[0], num_heads, head_dim))
    elif len(rows) == 2:
        rows = [rows[0], *rows[1].chunk(2)]
    if kind.has_gate:
        by_head = rows[0].unflatten(0, (num_heads, 2, head_dim))
        rows = [by_head[:, 0].flatten(0, 1), *rows[1:], by_head[:, 1].flatten(0, 1)]
    return {f"{name}_proj.{part}": tensor for name, tensor in zip(("q", "k", "v", "gate"), rows, strict=False)}


def _dropout(attention: Any) -> float:
    """The probability of dropping a weight."""
    dropout = _first(attention, ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout"))
    if type(attention).__name__ == "FalconAttention" and not attention.config.alibi:
        return 0.0  # transformers applies it with ALiBi only
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)


def _mask(kind: _Kind, attention: Any) -> Mask:
    """The mask that the model gives to the module, padding apart."""
    window = getattr(attention.config if kind.window_in_config else attention, "sliding_window", None)
    if not getattr(attention, "is_causal", True):
        return FULL if window is None else Mask.band(window - 1, window - 1)
    return Mask.causal(window)


def _uses_rotary(attention: Any) -> bool:
    return bool(getattr(attention, "use_rope", True)) and not getattr(attention.config, "alibi", False)


def _position_bias(attention: Any) -> RelativePositionBias | None:
    """The position bias of a module of T5 that has the table, a copy."""
    if not getattr(attention, "has_relative_attention_bias", False):
        return None
    table = attention.relative_attention_bias.weight
    bias = RelativePositionBias(
        attention.n_heads,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
        bidirectional=not attention.is_decoder,
        device=table.device,
        dtype=table.dtype,
    )
    bias.load_state_dict({"relative_attention_bias.weight": table})
    return bias


def _alibi_slopes(attention: Any, num_heads: int) -> list[float] | None:
    """The slopes of a module with ALiBi, by the functions of its model."""
    functions = vars(sys.modules[type(attention).__module__])
    if type(attention).__name__ == "MptAttention":
        bias = functions["build_mpt_alibi_tensor"](num_heads, 2)[:, 0]
        return [float(slope) for slope in bias[:, 1] - bias[:, 0]]
    if getattr(attention.config, "alibi", False):
        bias = functions["build_alibi_tensor"](torch.ones(1, 2), num_heads, torch.float32)[:, 0]
        return [float(slope) * attention.inv_norm_factor for slope in bias[:, 1] - bias[:, 0]]
    return None
