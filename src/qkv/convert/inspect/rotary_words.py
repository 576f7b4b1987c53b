"""`describe_rotary`: the rotary embedding of a layer in words, from transformers' ``rope_parameters``."""

from typing import Any

from qkv.layers.rotary_config import rope_parameters


def describe_rotary(config: Any, layer: int) -> str:
    """The rotary embedding of a layer in words; empty without."""
    by_type, kinds = rope_parameters(config), getattr(config, "layer_types", None)
    parameters = by_type.get(kinds[layer] if kinds else None) or by_type.get(None)
    uses = getattr(config, "no_rope_layers", None)
    if not parameters or (uses and not uses[layer]):
        return ""
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor", 1.0)
    scaling = f", {kind} scaling" if kind != "default" else ""
    return f"theta {theta:g}{scaling}" + (f", {partial:g} of the width" if partial != 1 else "")
