"""Models of transformers within a module: taken to ``attn_implementation="qkv"``, and given back as they were."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from qkv.integrations.transformers.attention import NAME, register

_BEFORE = "_qkv_attention_before"
"""Attribute of a model with its configurations before `take`."""


def roots(module: nn.Module) -> list[Any]:
    """The models of transformers that a module is or contains, except those inside other ones."""
    transformers = sys.modules.get("transformers")
    if transformers is None:  # no module is one
        return []
    found: list[Any] = []
    waiting = [module]
    while waiting:
        part = waiting.pop()
        if isinstance(part, transformers.PreTrainedModel):
            found.append(part)
        else:
            waiting += reversed(list(part.children()))
    return list(dict.fromkeys(found))


def parts(root: Any) -> list[Any]:
    """The models of transformers in one, itself first, one for each configuration."""
    from transformers import PreTrainedModel

    models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    return list({id(model.config): model for model in reversed(models)}.values())[::-1]


def take(root: Any) -> None:
    """Sets a model to ``attn_implementation="qkv"``, for which it makes our cache as well; `why_not` says when not.

    Its configurations become copies, since other models may have been made from the same ones.
    """
    register()
    if all(why_not(part) is not None or part.config._attn_implementation == NAME for part in parts(root)):
        return
    if _BEFORE in root.__dict__:  # its configurations are copies already
        root.set_attn_implementation(NAME)
        return
    before = _Before(root)
    try:
        root.set_attn_implementation(NAME)
    except Exception:
        before.put_back()
        raise
    root.__dict__[_BEFORE] = before


def give_back(root: Any) -> None:
    """Undoes `take`: configurations that are still on "qkv" get what they had."""
    before = root.__dict__.pop(_BEFORE, None)
    if before is not None:
        before.put_back()


def why_not(part: Any) -> str | None:
    """Why a model does not run on another attention implementation; None if it does."""
    if not getattr(type(part), "_can_set_attn_implementation", lambda: True)():
        return "it computes attention by code of its own, not by transformers' AttentionInterface"
    if part.config.output_attentions:
        return "output_attentions in its configuration, which transformers has for eager attention only"
    return None


class _Before:
    """The configurations of a model, which are copied: where they were, and their attention implementations."""

    def __init__(self, root: nn.Module) -> None:
        from transformers import PreTrainedConfig

        self.places = [
            (module, name, value)
            for module in root.modules()
            for name, value in vars(module).items()
            if isinstance(value, PreTrainedConfig)
        ]
        memo: dict[int, Any] = {}  # one for all, since configurations contain those of parts
        self.copies = [copy.deepcopy(value, memo) for _, _, value in self.places]
        for (module, name, _), copied in zip(self.places, self.copies, strict=True):
            vars(module)[name] = copied

    def put_back(self) -> None:
        """Puts configurations back; those that have been changed otherwise since stay, with the former attention."""
        for (module, name, value), copied in zip(self.places, self.copies, strict=True):
            is_same = copied.to_dict() == value.to_dict()
            for now, had in zip(_with_parts(copied), _with_parts(value), strict=False):
                if now._attn_implementation == NAME:
                    now._attn_implementation_internal = had._attn_implementation
                is_same = is_same and now._attn_implementation == had._attn_implementation
            if is_same and vars(module).get(name) is copied:
                vars(module)[name] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Registers "qkv" where a pickled model is loaded, which may be another process."""
        self.__dict__.update(state)
        register()


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and those of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(part)
