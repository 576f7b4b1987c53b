"""One family by one line: `accelerate` gives attention, cache and linear layers, and takes them back."""

from typing import Any

from families.compare import DisagreementError, Outcome, build, compare, generate, on, suitable
from families.inputs import pad
from families.registry import candidates
from torch import nn
from transformers import PreTrainedConfig

import qkv


def judge_one_line(family: str, only: str) -> Outcome:
    """Runs a family by `accelerate`: greedy tokens are those of eager, other models' results as near as `compare` asks;
    the report knows of it, and what `accelerate` changes it takes back.
    """
    (cls,) = (cls for cls in candidates(family) if cls.__name__ == only)
    outcome = Outcome(family, only)
    model = build(cls)
    inputs = suitable(model)
    before = state(model)
    if qkv.accelerate(model) is not model:
        raise AssertionError("accelerate returned another model")
    try:
        if model.can_generate():
            generate(model, pad(inputs, "left") if "attention_mask" in inputs else inputs, outcome)
        if "generate" not in outcome.checks:
            compare(model, inputs, outcome)
    except (DisagreementError, NotImplementedError) as error:
        outcome.reason = str(error)
    on(model, "qkv")
    found = qkv.report(model)
    if not found.routed or not any(part.subject == "attention" and part.taken for part in found.parts):
        outcome.reason = outcome.reason or f"nothing ran on qkv:\n{found}"
    outcome.notes += [f"{part.subject}: {part.detail}" for part in found.parts if part.subject == "cache"]
    qkv.accelerate(model, enabled=False)
    if state(model) != before:
        outcome.reason = outcome.reason or "accelerate(model, enabled=False) left something behind"
    return outcome


def state(model: nn.Module) -> dict[str, Any]:
    """All that `accelerate` may change of a model."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        implementation = config._attn_implementation if isinstance(config, PreTrainedConfig) else None
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("hooks")]
        found[name] = type(module), sorted(vars(module)), vars(module).get("forward"), hooks, implementation
    return found
