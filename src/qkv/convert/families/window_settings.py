"""How configurations of transformers express windows: one for all layers, or by layer.

A window counts the keys that a query sees, its own included, in ``sliding_window`` as in `Mask.causal`.
"""

from typing import Any

from qkv.convert.errors import CheckpointError

CLASS_PREFIXES = {"llama": "Llama", "mistral": "Mistral"}
"""Of the classes whose models can become ``ministral``, by ``model_type``."""


def set_window(config: dict[str, Any], window: int) -> dict[str, Any]:
    """Sets the window of models with one for all layers; with ``layer_types``, Mistral would be read as Ministral."""
    kept = {name: value for name, value in config.items() if name != "layer_types"}
    return {**kept, "sliding_window": window}


def set_layer_types(config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """Sets the windows of models with ``layer_types``. All that are set are equal."""
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {**config, "layer_types": kinds, "sliding_window": next(filter(None, windows))}


def set_layer_types_of_gemma3(config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """As `set_layer_types`, for causal models: others read ``sliding_window`` as the keys on both sides."""
    if hf_config.use_bidirectional_attention:
        raise CheckpointError("windows of a model with use_bidirectional_attention cannot be set.")
    return set_layer_types(config, hf_config, windows)


def set_layer_types_of_smollm3(config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """As `set_layer_types`, with the switch without which the layers do not pass their window on."""
    return {**set_layer_types(config, hf_config, windows), "use_sliding_window": True}


def set_layer_types_of_qwen(config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """As `set_layer_types`, with the switch without which Qwen has no window whatever ``layer_types`` says.

    ``max_window_layers``, which transformers reads where ``layer_types`` is missing, says the same as far as it can:
    the layers from there on have windows.
    """
    last_full = max((layer for layer, window in enumerate(windows) if window is None), default=-1)
    new = set_layer_types(config, hf_config, windows)
    return {**new, "use_sliding_window": True, "max_window_layers": last_full + 1}


def become_ministral(config: dict[str, Any], hf_config: Any, windows: list[int | None]) -> dict[str, Any]:
    """Sets the windows of Llama and Mistral, whose own types have none or one for all layers.

    Ministral is Mistral with ``layer_types``, and transformers itself loads a ``mistral`` configuration with
    ``layer_types`` as that; without windows, either computes what Llama without biases does. SmolLM3 would have the
    biases, but programs other than transformers skip its rotary embedding in every fourth layer, whatever
    ``no_rope_layers`` says.
    """
    import transformers

    biases = [name for name in ("attention_bias", "mlp_bias") if getattr(hf_config, name, False)]
    if biases:
        raise CheckpointError(
            f"a {hf_config.model_type} model gets windows as a ministral model, which has no biases; "
            f"got {', '.join(biases)}."
        )
    prefix = CLASS_PREFIXES[hf_config.model_type]
    classes = [f"Ministral{name.removeprefix(prefix)}" for name in config.get("architectures") or []]
    new = {
        **set_layer_types(config, hf_config, windows),
        "model_type": "ministral",
        "architectures": classes or None,
    }
    if hf_config.model_type == "llama":
        # Of large tokenizers of Mistral's types before version 5, or without one, transformers says that they need
        # mending.
        new["transformers_version"] = transformers.__version__
    # Settings that the file left to the defaults of its type, where those of the other type differ.
    old, found = hf_config.to_dict(), transformers.MinistralConfig.from_dict(new).to_dict()
    own = {"model_type", "architectures", "layer_types", "sliding_window"}
    return new | {name: old[name] for name in old.keys() & found.keys() - own if old[name] != found[name]}
