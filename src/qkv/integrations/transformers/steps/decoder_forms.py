"""Which decoder layers of transformers are attention and an MLP amid norms and residuals, by the code of their
forwards, as `qkv.integrations.transformers.steps.attention_forms` does for attention modules.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from qkv.integrations.transformers.cache_argument import CACHE_NAMES, wrapped
from qkv.layers.known_code import compiled, essence

_FORWARD = """
def forward(self, {parameters}):
    residual = hidden_states
    {before_attention}
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        {arguments}
        **kwargs,
    )
    {after_attention}

    residual = hidden_states
    {before_mlp}
    hidden_states = self.mlp(hidden_states)
    {after_mlp}
    return hidden_states
"""

_ARGUMENTS = [
    arguments
    for cache in CACHE_NAMES
    for arguments in (
        ("attention_mask", "position_ids", cache, "use_cache", "position_embeddings"),
        ("position_embeddings", "attention_mask", "position_ids", cache),
    )
]
"""What forwards hand on to attention, in their order: as Llama and as Gemma."""


class Form(NamedTuple):
    """The parts of a decoder layer, by their names in it, beside ``self_attn`` and ``mlp``."""

    norms: tuple[str | None, ...]
    """before and after attention, before and after the MLP; None for no norm"""
    dropouts: tuple[str, ...]
    names: frozenset[str]
    """of all parts"""


def _form(*norms: str | None, dropouts: tuple[str, ...] = ()) -> Form:
    return Form(norms, dropouts, frozenset({"self_attn", "mlp", *filter(None, norms), *dropouts}))


_BEFORE, _BETWEEN = "input_layernorm", "post_attention_layernorm"
_FORMS = [
    _form(_BEFORE, None, _BETWEEN, None),
    _form(_BEFORE, None, _BETWEEN, None, dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    _form(_BEFORE, _BETWEEN, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
]
"""Llama, Phi-3 and Gemma 2."""


def form_of(forward: object) -> Form | None:
    """The form of a forward of a decoder layer, in wrappers of transformers or not; None for any other function."""
    inner = wrapped(without_checkpointing(forward))
    return None if type(inner) is not FunctionType or inner.__closure__ else _form_of_code(inner.__code__)


@functools.lru_cache(maxsize=1024)
def without_checkpointing(forward: object) -> object:
    """The forward that transformers' checkpointing calls, for calls that are not checkpointed; any other as it is."""
    if type(forward) is not FunctionType or forward.__code__ is not _checkpointing_code():
        return forward
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells["forward"].cell_contents


@functools.cache
def _checkpointing_code() -> CodeType | None:
    """The code of the forward that transformers puts around those of its layers; None in releases without it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Probe(GradientCheckpointingLayer):  # type: ignore[misc]
        def forward(self) -> None:
            """Wrapped when the class is made."""

    code: CodeType = Probe.forward.__code__
    return code if "forward" in code.co_freevars else None


@functools.lru_cache(maxsize=1024)
def _form_of_code(code: CodeType) -> Form | None:
    sought, names = _identity(code), set(code.co_names)
    for source, form in _sources():
        if form.names <= names and _identity(compiled(source)) == sought:
            return form
    return None


def _identity(code: CodeType) -> tuple[Any, ...]:
    """What a forward does, and the names of its arguments, by which callers pass them."""
    return essence(code), code.co_varnames[: code.co_argcount + 1]


def _sources() -> Iterator[tuple[str, Form]]:
    """All forms, as they are written."""
    for form, arguments in itertools.product(_FORMS, _ARGUMENTS):
        norms = ["" if name is None else f"hidden_states = self.{name}(hidden_states)" for name in form.norms]
        added = [f"self.{name}(hidden_states)" for name in form.dropouts] or ["hidden_states", "hidden_states"]
        before_attention, after_attention, before_mlp, after_mlp = norms
        source = _FORWARD.format(
            parameters=", ".join(["hidden_states", *(f"{name}=None" for name in arguments), "**kwargs"]),
            arguments=" ".join(f"{name}={name}," for name in arguments),
            before_attention=before_attention,
            after_attention=f"{after_attention}\n    hidden_states = residual + {added[0]}",
            before_mlp=before_mlp,
            after_mlp=f"{after_mlp}\n    hidden_states = residual + {added[1]}",
        )
        yield re.sub(r"\n\s*\n", "\n", source), form
