"""The rule that makes a small configuration of any of transformers' configuration classes."""

import dataclasses
import math
import re
from typing import Any

from transformers import PreTrainedConfig

HEADS, HEAD_DIM, LAYERS, VOCAB = 4, 16, 2, 97
WIDTH = HEADS * HEAD_DIM
WINDOW, CHUNK, PATCH, PATCHES = 6, 8, 8, 4

# The first pattern that matches the whole name gives the largest value; what matches none keeps its own.
NUMBERS: tuple[tuple[str, int], ...] = (
    (r"(mtp_|.*nextn.*|num_mtp).*layers", 0),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_|transformer_|attention_)?(layers?|blocks?)(_num)?", LAYERS),
    (r"depth|.*_depth|.*_layer_period", LAYERS),
    (r".*_layer_offset", 1),
    (r"codebook_size|num_embeddings", 64),
    (r".*vocab(ulary)?_size.*|.*_vocab", VOCAB),
    (r"max_(position_embeddings|seq_len.*|sequence_length)|n_positions|context_length", 128),
    (r"max_length", 64),
    (r"num_frames|frames_per_clip", 4),
    (r"(.*_)?(sliding_window|sliding_window_size|local_attention|local_attention_window)", WINDOW),
    (r"(attention_)?chunk_size", CHUNK),
    (r"(.*_)?n(um)?_(routed_|local_)?experts|moe_num_experts", 4),
    (r"(.*num_)?experts?_(per_tok|top_k)|moe_(k|topk)|num_selected_experts", 2),
    (r"n_group|n_groups|.*_n_groups|index_kpool", 2),
    (r"topk_group", 1),
    (r".*_lora_rank|.*_rank", 32),
    (r"index_topk", 6),
    (r"mamba_d_head", 2 * WIDTH // HEADS),
    (r"(.*_)?(head_dim|dim_head|d_kv|d_head)(_.*)?|kv_channels|query_pre_attn_scalar", HEAD_DIM),
    (r"(.*intermediate|.*ffn|.*mlp|.*feed_?forward).*(size|dim|width)|d_ff|n_inner|mamba_d_ssm", 2 * WIDTH),
    (r"num_pos_feats", WIDTH // 2),
    (
        r".*hidden_size(_.*)?|d_model|n_embd|width|dim|.*_dim|.*projection_size|.*hidden_channels|classifier_proj_size",
        WIDTH,
    ),
    (r"(.*_)?(embed|embedding|embeddings|emb|model|output|latent|projection|context|inner|memory)_(size|width)", WIDTH),
    (r"num_queries|num_query_tokens|num_latents|resampler_n_latents", 7),
    (r"max_source_positions", 32),
)
KEPT = (
    r"num_channels|in_channels|out_channels|.*mel.*|.*rotary_dim|feature_.*|num_labels|.*ratio|.*kernel.*|.*stride.*|"
    r".*expand.*|rotary_.*|.*conv_dim|initializer.*|(.*_)?input_size|gate_low_rank_dim"
)
HEAD_COUNT = r"(.*_)?heads|(.*_)?n(um)?_head"
KV_HEAD_COUNT = r"(.*_)?(num_|n_)?(key_value|kv)_heads|multi_query_group_num"
TOKEN = r".*(token|_bos|_eos|pad)_?(id|idx|index|ids)|.*_token_index"
# What a class may leave for the checkpoint to say.
MISSING = {
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "num_experts_per_tok": 2,
    "vocab_size": VOCAB,
    "n_routed_experts": 4,
}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small configuration of the same kind, with everything that depends on the sizes computed by its constructor."""
    config.allow_global_per_layer_attribute_access = True
    values: dict[str, Any] = {name: number for name, number in MISSING.items() if getattr(config, name, 0) is None}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if isinstance(value, PreTrainedConfig):
            values[field.name] = shrink(value)
        elif field.default is not None and not isinstance(field.default, str) and not field.name.startswith("_"):
            small = _small(field.name, value)
            if small is not value:
                values[field.name] = small
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            values[name] = shrink(getattr(config, name))
    _shrink_heads(config, values)
    _shrink_images(config, values)
    _shrink_layers(config, values)
    _shrink_rope(config, values)
    return type(config)(**values)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if re.fullmatch(TOKEN, name):
        return _token(value)
    if re.fullmatch(KEPT, name):
        return value
    if isinstance(value, float) and re.fullmatch(r".*softcap.*", name):
        return min(value, 2.0)  # scores are of the order of 1, to which a cap of 50 does nothing
    if isinstance(value, int) and value > 0:
        for pattern, number in NUMBERS:
            if re.fullmatch(pattern, name):
                return min(value, number)
    if isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
        if re.fullmatch(r"depths|.*layers_per_stage|num_blocks", name):
            return type(value)(min(x, 1) for x in value)
        if re.fullmatch(r".*(hidden_sizes|dims?|channels)", name):
            return type(value)(x // 8 for x in value) if math.gcd(*value) % 32 == 0 else value
    return value


def _token(value: Any) -> Any:
    """Ids beyond the small vocabulary move to its end, each to a place of its own."""
    if isinstance(value, (list, tuple)):
        return type(value)(_token(x) for x in value)
    if isinstance(value, int) and value >= VOCAB - 40:
        return VOCAB - 1 - value % 40
    return value


def _shrink_heads(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    given = {field.name for field in dataclasses.fields(config) if field.default is not None}
    own = {name: getattr(config, name, None) for name in given}
    groups = {name: value for name, value in own.items() if re.fullmatch(KV_HEAD_COUNT, name)}
    heads = {name: value for name, value in own.items() if re.fullmatch(HEAD_COUNT, name) and name not in groups}
    for name, value in heads.items():
        if isinstance(value, (list, tuple)):
            values[name] = type(value)(x // math.gcd(*value) for x in value)
        elif type(value) is int:
            values[name] = min(value, HEADS)
    most = max((value for value in heads.values() if type(value) is int), default=HEADS)
    for name, value in groups.items():
        if type(value) is int:
            values[name] = max(1, min(HEADS, value * HEADS // most))


def _shrink_images(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    names = {field.name for field in dataclasses.fields(config)}
    patch = getattr(config, "patch_size", None)
    if type(patch) is int and "patch_size" in names:
        values["patch_size"] = patch = min(patch, PATCH)
    step = patch if type(patch) is int and patch > 1 else PATCH
    for name in names & {"image_size", "crop_size"}:
        size = getattr(config, name)
        if type(size) is int:
            values[name] = step * PATCHES
        elif isinstance(size, (list, tuple)):
            values[name] = type(size)(step * PATCHES for _ in size)


def _shrink_layers(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """One layer of each kind, where a configuration names the kinds of its layers."""
    kinds = getattr(config, "layer_types", None)
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != depth:
        return
    chosen = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())
    if len(chosen) == 1 and depth > 1:
        chosen = [*chosen, next(place for place in range(depth) if place not in chosen)]
    names = {field.name for field in dataclasses.fields(config)}
    attribute = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    values[attribute] = len(chosen)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) == depth:
            values[name] = type(value)(value[p] for p in chosen)


def _shrink_rope(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """The sections of a rotation in three dimensions, for those models that have one, sum to half the head."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2
        values["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
