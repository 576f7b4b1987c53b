"""`inspect_config`: the attention of any model of transformers, from the modules that it builds without weights.

Families that convert are described by their tensors, where there are any (`inspect_tensors`). Others are too many for
rules of their own, but nearly all have projections with one of a few names, whose widths, with the numbers of heads
that their modules or configurations state, say what there is. Windows and rotary embeddings are named where they are
found; that none is found does not say that there is none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qkv.convert.errors import CheckpointError
from qkv.convert.families.registry import FAMILIES
from qkv.convert.files.json_document import short_repr
from qkv.convert.inspect.inspection import Inspection, LayerAttention
from qkv.convert.inspect.rotary_words import describe_rotary
from qkv.layers.rotary_config import given_parameters

MOST = 10_000
"""Layers or experts of a model; building a layer takes about a millisecond."""
COUNTS = re.compile(r"num_\w*(layers?|blocks|experts)|n_layers?|\w+_layers|depth|n_\w*experts")
"""Keys of a configuration for as many modules."""
MAX_CAUSE = 400
"""Characters of a message of transformers that are shown."""

_KINDS = r"(_proj|_lin|_layer|_linear|_head|_projection|_b_proj)?"
QUERY, KEY, VALUE = (
    re.compile(
        rf"({short}|w_?{short[0]}|W{short[0]}|{word}){_KINDS}|(lin|linear|to|proj|project|projection)_({short}|{word})"
    )
    for short, word in (("q", "query"), ("k", "keys?"), ("v", "values?"))
)
PACKED = re.compile(
    r"(to_|linear_)?qkv(_proj|_linear|_projection)?|query_key_value|c_attn|w_?qkv|Wqkv|in_proj|att_proj"
)
"""Names of one projection for queries, keys and values."""
PACKED_KEYS = re.compile(r"(to_)?kv(_proj|_layer)?")
"""Names of one projection for keys and values."""
EXPANSION = "kv_b_proj"
"""Name of the projection that expands latents."""
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")


def inspect_config(where: str, config: Mapping[str, Any]) -> Inspection:
    """Describes the attention of a model by its configuration alone. ``where`` names it in errors.

    Raises:
        CheckpointError: for a configuration of which transformers builds no model, and a model without attention of a
            known kind.
    """
    hf_config = _read(where, config)
    model = _build(where, hf_config)
    modules = dict(model.named_modules())
    cached: list[LayerAttention] = []
    others: list[LayerAttention] = []
    for name, module in modules.items():
        layer = _layer(name, module, hf_config)
        if layer is not None:
            parameters = sum(each.numel() for each in _whole(name, modules).parameters())
            (cached if _is_cached(module, hf_config) else others).append(layer._replace(parameters=parameters))
    if not cached and not others:
        raise CheckpointError(
            f"{where}: qkv finds no attention in a {hf_config.model_type} model: none of its modules has projections "
            "of queries, keys and values by names that it knows."
        )
    if len({layer.place for layer in (*cached, *others)}) == 1:
        cached, others = ([layer._replace(place="") for layer in layers] for layers in (cached, others))
    dtype = str(getattr(hf_config, "dtype", None) or torch.float32).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cached.sort(key=lambda layer: layer.cross)
    converts = hf_config.model_type in FAMILIES and config.get("quantization_config") is None
    return Inspection(hf_config.model_type, dtype, parameters, tuple(cached), tuple(others), converts, is_stored=False)


def _read(where: str, config: Mapping[str, Any]) -> Any:
    """The configuration object of transformers."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where}: model_type must be one that transformers {transformers.__version__} knows; "
            f"got {short_repr(model_type)}."
        )
    _check_counts(where, config)
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:
        raise CheckpointError(f"{where}: transformers refuses the configuration: {_one_line(error)}") from error


def _check_counts(where: str, part: Mapping[str, Any]) -> None:
    """Raises a CheckpointError for so many layers or experts that building them would not end."""
    for key, value in part.items():
        if isinstance(value, dict):
            _check_counts(where, value)
        elif COUNTS.fullmatch(key) and isinstance(value, (int, float)) and value > MOST:
            raise CheckpointError(f"{where}: {key} must be at most {MOST}; got {short_repr(value)}.")


def _build(where: str, config: Any) -> Any:
    """The model of the first architecture that the configuration names, else its body, on the meta device."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    names = config.architectures or [""]
    cls = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(cls, type) or getattr(cls, "config_class", None) is not type(config):
        cls = MODEL_MAPPING.get(type(config), None)
        cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    if cls is None:
        raise CheckpointError(f"{where}: transformers has no model of type {config.model_type!r}.")
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:
        raise CheckpointError(f"{where}: transformers cannot build this model: {_one_line(error)}") from error


def _layer(name: str, module: nn.Module, config: Any) -> LayerAttention | None:
    """Describes a module; None for one that is not attention, or of no known kind."""
    if not any(part in type(module).__name__ for part in ("Attention", "Attn")):
        return None
    own = getattr(module, "config", config)
    heads, width = _number(module, own, HEADS), _number(module, own, WIDTHS)
    found = _latent(module, own, heads) or _separate(module, heads, width) or _packed(module, own, heads, width)
    if found is None:
        return None
    num_heads, num_kv_heads, head_dim, value_dim, latent, projections = found
    number = getattr(module, "layer_idx", None)
    return LayerAttention(
        num_heads,
        num_kv_heads,
        head_dim,
        value_dim,
        _window(module, own, number),
        any(part.endswith("bias") for each in projections for part, _ in each.named_parameters()),
        any("norm" in part.rpartition(".")[2] for part, _ in module.named_modules() if part),
        _rotary(own, number),
        0,
        sum(parameter.numel() for each in projections for parameter in each.parameters()),
        _is_cross(name, module),
        latent,
        re.split(r"\.\d+(?:\.|$)", name)[0],
        is_complete=False,
    )


_Found = tuple[int, int, int, int, tuple[int, int] | None, Sequence[nn.Module]]
"""Heads, KV heads, widths of keys and values, widths of latents, and the projections of keys and values."""


def _latent(module: nn.Module, config: Any, heads: int | None) -> _Found | None:
    """Latent attention, by the names of DeepSeek's configurations."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    rank, rotary, plain, value = (_number(module, config, (name,)) for name in names)
    if not (heads and rank and rotary and plain and value and EXPANSION in dict(module.named_children())):
        return None
    return heads, 1, plain + rotary, value, (rank, rotary), [getattr(module, EXPANSION)]


def _separate(module: nn.Module, heads: int | None, width: int | None) -> _Found | None:
    """Attention with a projection each for queries, keys and values."""
    q, k, v = (_child(module, pattern) for pattern in (QUERY, KEY, VALUE))
    if q is None or k is None:
        return None
    q_rows, k_rows, v_rows = _rows(q), _rows(k), _rows(k if v is None else v)
    width = width if width and q_rows % width == 0 == k_rows % width else heads and q_rows // heads
    if not width or k_rows < width:
        return None
    # Queries may be projected together with a gate, so that what a module says goes before.
    heads = heads if heads and heads * width <= q_rows else q_rows // width
    kv_heads = k_rows // width
    if heads % kv_heads:
        return None
    return heads, kv_heads, width, v_rows // kv_heads, None, [k] if v is None else [k, v]


def _packed(module: nn.Module, config: Any, heads: int | None, width: int | None) -> _Found | None:
    """Attention with one projection for queries, keys and values, or one for keys and values."""
    whole, keys = _child(module, PACKED), _child(module, PACKED_KEYS)
    if not heads or (whole is None and keys is None):
        return None
    if whole is None:
        q = _child(module, QUERY)
        width = width or (q and _rows(q) // heads)
        kv_heads = _rows(keys) // (2 * width) if width else 0
    else:
        width = width or getattr(config, "hidden_size", _rows(whole) // 3) // heads
        kv_heads = (_rows(whole) // width - heads) // 2 if width else 0
    if not width or kv_heads < 1 or heads % kv_heads:
        return None
    return heads, kv_heads, width, width, None, [whole if keys is None else keys]


def _child(module: nn.Module, pattern: re.Pattern[str]) -> Any:
    """The first projection of a module whose name matches; None without one."""
    for name, child in module.named_children():
        if pattern.fullmatch(name) and _weight(child) is not None:
            return child
    return None


def _weight(module: nn.Module) -> torch.Tensor | None:
    """The matrix of a projection, which may be wrapped; None for other modules."""
    return next((parameter for parameter in module.parameters() if parameter.dim() == 2), None)


def _rows(projection: Any) -> int:
    """The width of what a projection returns; GPT-2 keeps its matrices transposed."""
    weight = _weight(projection)
    assert weight is not None
    return int(weight.shape[1] if hasattr(projection, "nf") else weight.shape[0])


def _number(module: nn.Module, config: Any, names: Sequence[str]) -> int | None:
    """The first of these that a module says of itself, or else its configuration."""
    for place in (module, config):
        for name in names:
            value = getattr(place, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _window(module: nn.Module, config: Any, number: Any) -> int | None:
    """The window of a layer of a decoder, the query's own key included, where it is found."""
    if not getattr(module, "is_causal", False):
        return None
    window = getattr(module, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and type(number) is int and number < len(kinds):
        window = getattr(config, "sliding_window", None) if kinds[number] == "sliding_attention" else None
    return window if type(window) is int and window > 0 else None


def _rotary(config: Any, number: Any) -> str:
    """The rotary embedding in words, where it is found."""
    try:
        return describe_rotary(config, number if type(number) is int else 0) if given_parameters(config) else ""
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return ""  # settings of a kind that is not known


def _is_cross(name: str, module: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return bool(getattr(module, "is_cross_attention", False)) or any(
        word in words for word in ("cross", "encoder_attn", "encdec")
    )


def _is_cached(module: nn.Module, config: Any) -> bool:
    """Whether a layer reads keys of earlier calls: that of a decoder."""
    from transformers.models.auto import modeling_auto as auto

    says = [getattr(module, name, None) for name in ("is_causal", "is_decoder")]
    if any(isinstance(value, bool) for value in says):
        return True in says
    kind = type(getattr(module, "config", config))
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING


def _whole(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The outermost attention around a module, which has the output projection too."""
    parent = name.rpartition(".")[0]
    if parent in modules and "Attention" in type(modules[parent]).__name__:
        return _whole(parent, modules)
    return modules[name]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_CAUSE]
