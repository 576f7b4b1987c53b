"""Rotary settings of transformers' configurations, without transformers: attributes, or the dict of a config.json."""

from collections.abc import Mapping
from typing import Any

from qkv.layers.rotary_scaling import RotaryScaling

INTERLEAVED = frozenset(
    {
        "axk1",
        "axk2",
        "bailing_hybrid",
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "glm4_moe_lite",
        "glm4v_text",
        "glm_moe_dsa",
        "glm_ocr_text",
        "helium",
        "llama4_text",
        "longcat_flash",
        "mistral4",
        "moonshine",
        "moonshine_streaming",
        "openai_privacy_filter",
        "youtu",
    }
)
"""Model types whose code in transformers pairs neighbouring channels, if rope_interleave does not say otherwise."""

UNMATCHED: Mapping[str, str] = {
    "deepseek_v4": "rotates the last channels",
    "dinov3_vit": "rotates by rows and columns",
    "dots3_note_text": "has heads that differ by layer",
    "efficientloftr": "rotates by rows and columns",
    "eomt_dinov3": "rotates by rows and columns",
    "ernie4_5_vl_moe_text": "orders the frequencies by axis",
    "llama4_vision_model": "rotates by rows and columns",
    "mistral_large4_text": "learns its frequencies",
    "musicflamingo": "rotates by time",
}
"""Model types with rotary settings that `RotaryEmbedding` does not have, and what their code in transformers does."""

PARTIAL = frozenset(
    {
        "bamba",
        "diffusion_gemma_text",
        "dots3_note_audio_encoder",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_image_text",
        "glm_ocr_text",
        "gpt_neox",
        "gpt_neox_japanese",
        "laguna",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "moonshine",
        "moonshine_streaming",
        "nemotron",
        "nemotron3_5_transcribe_asr_audio",
        "nemotron3_diarization_audio",
        "neomme",
        "persimmon",
        "phi",
        "phi3",
        "phi4_multimodal",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "qwen4_exp_text",
        "recurrent_gemma",
        "solar_open",
        "stablelm",
        "step3p5",
        "zaya",
    }
)
"""Model types whose code in transformers takes partial_rotary_factor if the rope_type is "default"."""

MULTIMODAL: Mapping[str, tuple[tuple[int, ...], bool]] = {
    **dict.fromkeys(("glm4v_text", "glm_ocr_text"), ((8, 12, 12), False)),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), ((16, 24, 24), False)),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text"), ((24, 20, 20), True)),
}
"""For each multimodal model type, its sections where the configuration has none, and whether they are interleaved."""

_TRAINED = "original_max_position_embeddings"
_FIELDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "max_position_embeddings"), ()),
    "yarn": (
        ("factor", _TRAINED),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _TRAINED, "factor"), ("attention_factor",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _TRAINED), ()),
}
"""The fields of each rope_type: those it must have, and the others that it may have."""

_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model_type": ((str,), "a string"),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ((Mapping,), "a mapping")),
    **dict.fromkeys(("head_dim", "hidden_size", "embed_dim", "num_attention_heads", "num_heads"), ((int,), "an int")),
    **dict.fromkeys(("max_position_embeddings", _TRAINED, "partial_rotary_factor"), ((int, float), "a number")),
}
"""The types of the fields that are read, and their names; any may be None or left out."""


def given_parameters(config: Any) -> dict[str | None, Any]:
    """The rotary settings as they are given, for each type of layer; under None if one holds for all layers.

    A value of None stands for layers without rotary embedding. A configuration without any gives an empty dict.
    """
    given = _field(config, "rope_parameters") or _field(config, "rope_scaling") or {}
    if any(isinstance(fields, Mapping) for fields in given.values()):
        return dict(given)
    if not given and _field(config, "rope_theta") is None:
        return {}
    local = _field(config, "rope_local_base_freq")  # Gemma 3 before rope_parameters
    return {None: given} if local is None else {"full_attention": given, "sliding_attention": {"rope_theta": local}}


def rope_parameters(config: Any) -> dict[str | None, Mapping[str, Any] | None]:
    """`given_parameters`, with the defaults that transformers takes."""
    given = given_parameters(config)
    return {kind: None if fields is None else _complete(config, fields) for kind, fields in given.items()}


def rotary_options(caller: str, config: Any, layer_type: str | None, interleaved: bool | None) -> dict[str, Any]:
    """The arguments of `RotaryEmbedding` for a layer type of a configuration.

    Raises:
        ValueError: as `RotaryEmbedding.from_config`.
    """
    model_type = _field(config, "model_type")
    if isinstance(model_type, str) and model_type in UNMATCHED:
        raise ValueError(
            f"{caller}: model_type must be one that RotaryEmbedding can match; got {model_type!r}, whose code in "
            f"transformers {UNMATCHED[model_type]}. Rotate queries and keys as the model does, before qkv.attention."
        )
    fields, head_dim = select_parameters(caller, config, layer_type), head_dim_of(caller, config, "hidden_size")
    partial = fields.get("partial_rotary_factor", 1.0)
    if partial != 1 and fields["rope_type"] == "default" and model_type is not None and model_type not in PARTIAL:
        raise ValueError(
            f"{caller}: partial_rotary_factor must be 1 or None for model_type {model_type!r}, whose code in "
            f"transformers is not known to take it; got {partial}. Remove it, or build RotaryEmbedding(..., "
            "rotary_dim=...) as the model does."
        )
    if interleaved is None:
        given = _field(config, "rope_interleave")
        interleaved = model_type in INTERLEAVED if given is None else bool(given)
    sections, turns = MULTIMODAL.get(model_type, (None, False))
    sections = fields.get("mrope_section", sections)
    if sections is not None and model_type is not None and model_type not in MULTIMODAL:
        raise ValueError(
            f"{caller}: mrope_section must belong to a model_type whose layout is known, {', '.join(MULTIMODAL)}; "
            f"got {model_type!r}. Build RotaryEmbedding(..., sections=...) as the model does."
        )
    return {
        "head_dim": head_dim,
        "base": fields["rope_theta"],
        "rotary_dim": int(head_dim * partial),
        "interleaved": interleaved,
        "scaling": _scaling(caller, config, fields),
        "sections": sections,
        "interleaved_sections": sections is not None and bool(fields.get("mrope_interleaved", turns)),
    }


def select_parameters(caller: str, config: Any, layer_type: str | None) -> Mapping[str, Any]:
    """The settings for a layer type. Raises ValueError if it has none, TypeError for fields of another type."""
    _require_types(caller, _TYPES, config)
    by_type = rope_parameters(config)
    if not by_type:
        nested = " Pass its text_config." if _field(config, "text_config") is not None else ""
        raise ValueError(
            f"{caller}: config must have rope_parameters, rope_scaling or rope_theta; got {_name(config)} without."
            f"{nested}"
        )
    fields = by_type.get(None) or by_type.get(layer_type)
    if fields is None:
        kinds = ", ".join(repr(kind) for kind, known in by_type.items() if known is not None)
        raise ValueError(f"{caller}: layer_type must be one with rotary embedding, {kinds}; got {layer_type!r}.")
    _require_types(caller, {"rope_type": ((str,), "a string"), **_TYPES}, fields)
    return fields


def _require_types(caller: str, types: Mapping[str, tuple[tuple[type, ...], str]], fields: Any) -> None:
    """Raises TypeError for a field of another type."""
    for name, (kinds, what) in types.items():
        value = _field(fields, name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise TypeError(f"{caller}: {name} of config must be {what}; got {value!r}.")


def head_dim_of(caller: str, config: Any, *widths: str) -> int:
    """The width of a head, from ``head_dim``, or a field of ``widths`` and the number of heads.

    Raises:
        ValueError: for a configuration without these fields.
    """
    head_dim, heads = _field(config, "head_dim"), _field(config, "num_attention_heads") or _field(config, "num_heads")
    width = next(filter(None, (_field(config, name) for name in widths)), None)
    if head_dim is None and heads and width:
        head_dim = width // heads
    if head_dim is None:
        raise ValueError(
            f"{caller}: config must have head_dim, or {widths[-1]} and num_attention_heads; "
            f"got {_name(config)} without."
        )
    return int(head_dim)


def _complete(config: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields with those that stand outside of them, as transformers' ``standardize_rope_params`` does."""
    fields = {name: value for name, value in given.items() if value is not None}
    kind = fields.setdefault("rope_type", fields.pop("type", "default"))
    fields["rope_type"] = "default" if kind == "mrope" else "longrope" if kind == "su" else kind  # earlier names
    theta, default = _field(config, "rope_theta"), _field(config, "default_theta")
    if theta is None:
        theta = default if isinstance(default, float) else 10000.0
    fields.setdefault("rope_theta", theta)
    partial, trained = _field(config, "partial_rotary_factor"), _field(config, _TRAINED)
    if partial is not None:
        fields.setdefault("partial_rotary_factor", partial)
    if trained is not None:
        fields[_TRAINED] = trained  # Phi-3 has it here, and transformers prefers it
    return fields


def _scaling(caller: str, config: Any, fields: Mapping[str, Any]) -> RotaryScaling | None:
    """The scaling that the fields name; None for the default."""
    kind = fields["rope_type"]
    if kind == "default":
        return None
    if kind not in _FIELDS:
        raise ValueError(f"{caller}: rope_type must be one of 'default', {str(list(_FIELDS))[1:-1]}; got {kind!r}.")
    known = {**_lengths(config, fields), **fields}
    required, optional = _FIELDS[kind]
    if missing := [name for name in required if known.get(name) is None]:
        raise ValueError(f"{caller}: rope_type {kind!r} must have {', '.join(missing)}; got {dict(fields)}.")
    build: Any = getattr(RotaryScaling, kind)
    scaling: RotaryScaling = build(**{name: known[name] for name in required + optional if name in known})
    return scaling


def _lengths(config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that follow from the lengths of a configuration, as far as it has them."""
    longest = _field(config, "max_position_embeddings")
    trained = fields.get(_TRAINED, longest)
    known = {"max_position_embeddings": longest, _TRAINED: trained}
    if fields["rope_type"] in ("yarn", "longrope") and longest and trained:
        known["factor"] = longest / trained
    return known


def _field(config: Any, name: str) -> Any:
    """An entry of a dict or an attribute of an object; None without."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _name(config: Any) -> str:
    return f"a {type(config).__name__} of model_type {_field(config, 'model_type')!r}"
