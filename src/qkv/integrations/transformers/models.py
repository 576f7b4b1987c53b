"""Models of transformers within a module: taken to ``attn_implementation="qkv"``, and given back as they were."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from qkv.integrations.transformers.attention import NAME, register

_TWINS = "_qkv_configurations"
"""Attribute of a module with the `_Twin` of each of its configurations, by the name of their attribute."""


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


def take(model: nn.Module) -> list[Any]:
    """Sets the models of transformers in a module to ``attn_implementation="qkv"``, for which they make our cache as
    well; `why_not` says when not.

    Their configurations become copies, since other models may have been made from the same ones. Modules that share a
    configuration share its copy, whichever of them is taken first.

    Returns:
        the `roots`.
    """
    found = roots(model)
    if found:
        register()
    before = _configurations(found)
    try:
        for root in found:
            _take(root)
    except BaseException:
        _put_back(before)
        raise
    return found


def _take(root: Any) -> None:
    taken = [(module, name, value) for module in root.modules() for name, value in _untaken(module)]
    configs = [part.config for part in parts(root) if why_not(part) is None]
    configs += [value for _, _, value in taken]  # of modules that were given back alone, too
    if all(config._attn_implementation == NAME for config in configs):
        return
    twins = {id(value): _twin_of(value) for value in {id(value): value for _, _, value in taken}.values()}
    for module, name, value in taken:
        module.__dict__.setdefault(_TWINS, {})[name] = twin = twins[id(value)]
        module.__dict__[name] = twin.copied
    root.set_attn_implementation(NAME)


def _twins_in(module: nn.Module) -> "dict[str, _Twin]":
    """The twins of a module's configurations, by the name of their attribute; empty without any."""
    twins: dict[str, _Twin] = module.__dict__.get(_TWINS, {})
    return twins


def give_back(model: nn.Module) -> None:
    """Undoes `take` for all modules of a model: they get the configurations that they had.

    A copy that has been changed since, otherwise than by `take`, stays in effect, with the former attention.
    """
    formers: dict[_Twin, Any] = {}
    for module in model.modules():
        for name, twin in module.__dict__.pop(_TWINS, {}).items():
            if module.__dict__.get(name) is twin.copied:
                module.__dict__[name] = twin.former(formers)


@contextmanager
def on_qkv(model: nn.Module) -> Iterator[list[Any]]:
    """Has the models of transformers in a module run on "qkv" meanwhile, whatever they ran on before; their `roots`."""
    before = _configurations(roots(model))
    try:
        yield take(model)
    finally:
        _put_back(before)


_Configurations = list[tuple[nn.Module, dict[str, Any], dict[str, "_Twin"]]]
"""Of modules: the attributes that are configurations, and the twins of these."""


def _configurations(found: list[Any]) -> _Configurations:
    """Those of all modules in models, as they are."""
    from transformers import PreTrainedConfig

    modules = [module for root in found for module in root.modules()]
    return [
        (
            module,
            {name: value for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)},
            dict(_twins_in(module)),
        )
        for module in modules
    ]


def _put_back(before: _Configurations) -> None:
    for module, configs, twins in before:
        vars(module).update(configs)
        _twins_in(module).clear()
        _twins_in(module).update(twins)
        if not twins:
            vars(module).pop(_TWINS, None)


def why_not(part: Any) -> str | None:
    """Why a model does not run on another attention implementation; None if it does."""
    if not getattr(type(part), "_can_set_attn_implementation", lambda: True)():
        return "it computes attention by code of its own, not by transformers' AttentionInterface"
    if part.config.output_attentions:
        return "output_attentions in its configuration, which transformers has for eager attention only"
    return None


def _untaken(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The configurations of a module that are not copies made for it, by name."""
    from transformers import PreTrainedConfig

    twins = _twins_in(module)
    for name, value in list(vars(module).items()):
        if isinstance(value, PreTrainedConfig) and not (name in twins and twins[name].copied is value):
            yield name, value


class _Twin:
    """A configuration and its copy, which says "qkv"; one for all modules with the configuration."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.parts = [_twin_of(part) for part in _parts(original)]
        within = [twin for part in self.parts for twin in part.with_parts()]
        self.copied: Any = copy.deepcopy(original, {id(twin.original): twin.copied for twin in within})
        self.fields = original.to_dict()
        self._enter()

    def _enter(self) -> None:
        _twins[id(self.original)] = _twins[id(self.copied)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Registers "qkv" where a pickled model is loaded, which may be another process."""
        self.__dict__.update(state)
        self._enter()
        register()

    def with_parts(self) -> "Iterator[_Twin]":
        """The twin, and those of the configurations within."""
        yield self
        for part in self.parts:
            yield from part.with_parts()

    @property
    def is_changed(self) -> bool:
        """Whether the copy has been changed since, otherwise than to "qkv"."""
        attention = [
            (twin.copied._attn_implementation, twin.original._attn_implementation) for twin in self.with_parts()
        ]
        return self.copied.to_dict() != self.fields or any(now not in (NAME, had) for now, had in attention)

    def former(self, formers: "dict[_Twin, Any]") -> Any:
        """The configuration to give back: the original, or a changed copy with the former attention.

        Args:
            formers: those that have been given back in the same call, which are shared.
        """
        if self not in formers:
            memo = {id(part.copied): part.former(formers) for part in self.parts}
            formers[self] = copy.deepcopy(self.copied, memo) if self.is_changed else self.original
            if self.is_changed and self.copied._attn_implementation == NAME:
                formers[self]._attn_implementation_internal = self.original._attn_implementation
        return formers[self]


_twins: "WeakValueDictionary[int, _Twin]" = WeakValueDictionary()
"""By the identities of both configurations, which they keep."""


def _twin_of(config: Any) -> _Twin:
    """The twin with a configuration: the one of other modules, unless they would differ in more than attention."""
    twin = _twins.get(id(config))
    if twin is None or (config is twin.original and (twin.is_changed or config.to_dict() != twin.fields)):
        return _Twin(config)
    return twin


def _parts(value: Any) -> Iterator[Any]:
    """The configurations within one, outermost first, without those within these."""
    from transformers import PreTrainedConfig

    for part in vars(value).values() if isinstance(value, PreTrainedConfig) else value:
        if isinstance(part, PreTrainedConfig):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _parts(part)
        elif isinstance(part, dict):
            yield from _parts(part.values())
