"""`watched`: a model of transformers, on "qkv" meanwhile, whose modules are all called by their forward."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv.integrations.transformers.models import on_qkv, parts, why_not


class Watched(NamedTuple):
    """What is known of the modules of a model."""

    model: nn.Module
    names: dict[int, str]
    """by the ids of modules"""
    crossing: set[int]
    """ids of the modules that were handed a context, found while the model runs"""
    called: dict[int, None]
    """ids of the modules that were called, in order, found while the model runs"""

    def is_cross(self, module: nn.Module, q: Tensor, k: Tensor, options: dict[str, Any]) -> bool:
        """Whether a call of attention attends to another sequence."""
        lengths_differ = q.shape[2] != k.shape[2] and not options["offset"] and not options["mask"].is_positional
        named = "cross" in self.names[id(module)].rpartition(".")[2]
        return id(module) in self.crossing or named or lengths_differ

    def without_heads(self, attended: Collection[int]) -> tuple[str, ...]:
        """The names of layers that were called and keep no keys by heads, such as recurrent ones between others.

        Args:
            attended: ids of the modules that called attention.
        """
        found: dict[int, None] = {}
        for blocks in stacks(self.model):
            attend = [any(id(part) in attended for part in block.modules()) for block in blocks]
            if any(attend):
                others = [id(block) for block, attends in zip(blocks, attend, strict=True) if not attends]
                found.update(dict.fromkeys(others))
        return tuple(self.names[block] for block in self.called if block in found)

    def no_calls(self, caller: str) -> ValueError:
        """The error of a model that did not call attention."""
        return ValueError(
            f"{caller}: a layer of {type(self.model).__name__} must have heads of keys that queries attend to; got no "
            "call of one."
        )


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers in a model, without those within layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    within = {id(part) for outer in lists for part in outer.modules() if part is not outer}
    return [blocks for blocks in lists if id(blocks) not in within]


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was called on a module, or on its forward."""
    forward = vars(module).get("forward")
    wrapped = type(module).__name__ == "OptimizedModule" or hasattr(forward, "_torchdynamo_orig_callable")
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def require_itself(caller: str, model: Any) -> None:
    """Raises a TypeError for a module that contains a model of transformers, and is none."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"{caller}: model must be a model of transformers itself; got {type(model).__name__}, which contains one. "
            "Hand in that one."
        )


@contextmanager
def watched(caller: str, model: nn.Module) -> Iterator[Watched]:
    """Has a model run on "qkv" meanwhile, without gradients, and as it was afterwards.

    Hooks on all modules keep programs of several modules from being run instead of them, so that
    `attention.observed` is told of each call.

    Raises:
        TypeError: for anything but a module with a model of transformers.
        ValueError: for a model that is training, compiled, or does not run on "qkv".
    """
    roots_wanted = f"{caller}: model must be, or contain, a model of transformers; got {type(model).__name__}."
    if not isinstance(model, nn.Module):
        raise TypeError(roots_wanted)
    with on_qkv(model) as roots:
        if not roots:
            raise TypeError(roots_wanted)
        if model.training:
            raise ValueError(f"{caller}: model must be in evaluation mode, model.eval(); it is training.")
        for part in (part for root in roots for part in parts(root)):
            reason = why_not(part)
            if reason is not None:
                name = type(part).__name__
                raise ValueError(f'{caller}: {name} does not run on attn_implementation="qkv": {reason}.')
        for name, module in model.named_modules():
            if _is_compiled(module):
                raise ValueError(f"{caller}: model must not be compiled, in whole or in part; {name or 'it'} is.")
        found = Watched(model, {id(module): name for name, module in model.named_modules()}, set(), {})

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            found.called.setdefault(id(module))
            context = kwargs.get("key_value_states")
            context = kwargs.get("encoder_hidden_states") if context is None else context
            if context is not None:
                found.crossing.add(id(module))

        handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
        try:
            with torch.no_grad():
                yield found
        finally:
            for handle in handles:
                handle.remove()
