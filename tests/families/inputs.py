"""Inputs for any model, by the names that its ``forward`` takes."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

BATCH, LENGTH, DECODER_LENGTH = 3, 19, 11

Inputs = dict[str, Tensor]


def variants(model: Any) -> Iterator[Inputs]:
    """Inputs that may suit the model, the fullest first; which ones do is found by running it."""
    names = inspect.signature(model.forward).parameters
    torch.manual_seed(1)
    base: Inputs = {}
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        base["decoder_input_ids"] = tokens(model.config, DECODER_LENGTH)
    if "bbox" in names:
        base["bbox"] = torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4).clone()
    text = {**base, "input_ids": tokens(model.config, LENGTH)} if "input_ids" in names else base
    if "attention_mask" in names and "input_ids" in names:
        text = text | {"attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    if "input_features" in names:
        yield from ({**base, "input_features": features} for features in spectrograms(model.config))
    if "input_values" in names:
        yield from ({**base, "input_values": wave} for wave in waves(model.config))
    if "pixel_values" in names and "input_ids" in names:
        yield from with_images(model, text, names)
    if "pixel_values" in names and find(model.config, "num_frames"):
        yield from ({**base, "pixel_values": video} for video in videos(model.config, names))
    if "flattened_patches" in names:
        row = 2 + 3 * find(model.config, "patch_size") ** 2
        yield {**base, "flattened_patches": torch.randn(BATCH, 16, row).abs(), "attention_mask": torch.ones(BATCH, 16)}
    if "pixel_values" in names:
        yield from ({**text, **image} for image in images(model.config, names))
        yield from ({**base, **image} for image in images(model.config, names))
    if "pixel_values_videos" in names:
        yield from ({**base, "pixel_values_videos": video} for video in videos(model.config, names))
    if "past_values" in names:
        yield from series(model.config, names)
    if "input_ids" in names:
        yield text
    if "hidden_states" in names or "inputs_embeds" in names:
        width = getattr(model.config, "hidden_size", None) or getattr(model.config, "d_model", 64)
        name = "inputs_embeds" if "inputs_embeds" in names else "hidden_states"
        yield {**base, name: torch.randn(BATCH, LENGTH, width)}


def tokens(config: PreTrainedConfig, length: int) -> Tensor:
    """Ordinary tokens: none that any part of the configuration gives a meaning to."""
    special = set(_numbers(config))
    vocabulary = find(config, "vocab_size") or 97
    ordinary = torch.tensor([t for t in range(3, min(vocabulary, 97)) if t not in special] or [0])
    return ordinary[torch.randint(len(ordinary), (BATCH, length))]


def _numbers(config: PreTrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value)
        elif "token" in name or name.endswith("_id"):
            yield from (x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, int))


def find(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these attributes that the configuration or one of its parts has."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    parts = [getattr(config, name, None) for name in sorted(config.sub_configs, reverse=True)]
    found = (find(part, *names) for part in parts if isinstance(part, PreTrainedConfig))
    return next((value for value in found if value is not None), None)


def spectrograms(config: PreTrainedConfig) -> Iterator[Tensor]:
    bins = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim") or 80
    frames = 2 * (find(config, "max_source_positions") or 32)
    yield torch.randn(BATCH, bins, frames)
    yield torch.randn(BATCH, frames, bins)


def waves(config: PreTrainedConfig) -> Iterator[Tensor]:
    bins, frames = find(config, "num_mel_bins"), find(config, "max_length")
    if bins and frames:
        yield torch.randn(BATCH, frames, bins)
    yield torch.randn(BATCH, 6400)
    yield torch.randn(BATCH, 1, 6400)


def images(config: PreTrainedConfig, names: Any) -> Iterator[Inputs]:
    size, channels = find(config, "image_size", "crop_size") or 64, find(config, "num_channels") or 3
    height, width = (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)
    patch = find(config, "patch_size") or 8
    if not isinstance(patch, int):
        patch = patch[0]
    if "image_grid_thw" in names or "grid_thw" in names:
        temporal = find(config, "temporal_patch_size") or 1
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        row = channels * temporal * patch * patch
        yield {"pixel_values": torch.randn(BATCH * 16, row), "image_grid_thw": grid}
        yield {"pixel_values": torch.randn(BATCH * 16, channels, patch, patch), "image_grid_thw": grid}
    extras: Inputs = {}
    if "image_sizes" in names:
        extras["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    yield {"pixel_values": torch.randn(BATCH, channels, height, width), **extras}
    yield {"pixel_values": torch.randn(BATCH, 1, channels, height, width), **extras}
    if "spatial_shapes" in names:
        shapes = torch.tensor([[4, 4]] * BATCH)
        flat = torch.randn(BATCH, 16, channels * patch * patch)
        yield {"pixel_values": flat, "pixel_attention_mask": torch.ones(BATCH, 16).long(), "spatial_shapes": shapes}


def videos(config: PreTrainedConfig, names: Any) -> Iterator[Tensor]:
    frames = find(config, "frames_per_clip", "num_frames") or 2
    for image in images(config, names):
        if image["pixel_values"].dim() == 4:
            yield image["pixel_values"][:, None] + torch.randn(1, frames, 1, 1, 1)


def with_images(model: Any, text: Inputs, names: Any) -> Iterator[Inputs]:
    """A picture in front of each text, with as many places for it as the model's own vision part returns."""
    token = find(model.config, "image_token_id", "image_token_index")
    if token is None or not hasattr(model, "get_image_features"):
        return
    for image in images(model.config, names):
        taken = inspect.signature(model.get_image_features).parameters
        try:
            with torch.no_grad():
                found = model.get_image_features(**{k: v for k, v in image.items() if k in taken}, return_dict=True)
        except Exception:  # not the picture that this model wants
            continue
        found = getattr(found, "pooler_output", found)
        parts = found if isinstance(found, (list, tuple)) else [found]
        rows = sum(part.numel() // part.shape[-1] for part in parts)
        if rows % BATCH:
            continue
        ids = torch.cat([text["input_ids"][:, :2], torch.full((BATCH, rows // BATCH), token), text["input_ids"]], dim=1)
        extras = {}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in names:
                extras[name] = (ids == token).long()
        yield {**text, **image, **extras, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def series(config: PreTrainedConfig, names: Any) -> Iterator[Inputs]:
    length, channels = find(config, "context_length") or 32, find(config, "num_input_channels") or 1
    yield {"past_values": torch.randn(BATCH, length, channels)}
    yield {"past_values": torch.randn(BATCH, length)}


def pad(inputs: Inputs, side: str) -> Inputs:
    """The same inputs with rows of different lengths."""
    keep = inputs["attention_mask"].clone()
    length = keep.shape[1]
    keep[1, : length // 3] = 0
    keep[2, : length // 2 + 1] = 0
    return {**inputs, "attention_mask": keep if side == "left" else keep.flip(1)}
