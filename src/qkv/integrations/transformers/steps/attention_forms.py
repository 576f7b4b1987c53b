"""Which attention modules of transformers compute what a step does, by the code of their forwards.

transformers copies one forward into the files of most families, with few differences. `form_of` compares the bytecode
of a forward with those of all its forms, which are compiled here from source: a forward of any family that is one of
them is recognised, and one that a release or a user has changed is not.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, Literal, NamedTuple

from qkv.integrations.transformers.cache_argument import wrapped
from qkv.layers.known_code import compiled, essence

_FORWARD = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def forward(self, hidden_states, position_embeddings, attention_mask, {cache}=None, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)

    {projections}

    {rotation}

    if {cache} is not None:
        key_states, value_states = {cache}.update(key_states, value_states, self.layer_idx{more})

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )

    attn_output, attn_weights = attention_interface(
        self,
        query_states,
        key_states,
        value_states,
        attention_mask,
        dropout={dropout},
        scaling=self.scaling,
        {options}
        **kwargs,
    )

    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""

_CACHES = {"past_key_values": "", "cache": ", kwargs=kwargs"}
"""The argument with the cache, before transformers 5.24 and since, and what ``update`` is given as well."""

_ALONE = """
    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
"""
_NORMED = """
    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
"""
_THEN_NORMED = f"""{_ALONE}
    query_states = self.q_norm(query_states)
    key_states = self.k_norm(key_states)
"""
_PACKED = """
    qkv = self.qkv_proj(hidden_states)
    query_pos = self.config.num_attention_heads * self.head_dim
    query_states = qkv[..., :query_pos]
    key_states = qkv[..., query_pos : query_pos + self.num_key_value_heads * self.head_dim]
    value_states = qkv[..., query_pos + self.num_key_value_heads * self.head_dim :]

    query_states = query_states.view(hidden_shape).transpose(1, 2)
    key_states = key_states.view(hidden_shape).transpose(1, 2)
    value_states = value_states.view(hidden_shape).transpose(1, 2)
"""

_ROTATED = """
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
"""
_ROTATED_IF = """
    if {}:
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
"""

RotaryOf = Literal["always", "use_rope", "given"]
"""When a module rotates: always, if its ``use_rope`` is true, or if it gets position embeddings."""


class Form(NamedTuple):
    """What a forward computes, and of which attributes of its module."""

    cache: str
    """the argument with the cache"""
    is_packed: bool
    """whether the projections of queries, keys and values are one, ``qkv_proj``"""
    has_norms: bool
    """whether queries and keys are normalised, by ``q_norm`` and ``k_norm``"""
    rotary: RotaryOf
    softcap: str | None
    """the attribute with the bound of scores"""
    sinks: str | None
    """the attribute with the learned logits"""
    keywords: frozenset[str]
    """of the attention function, which a caller must not give as well"""


_PROJECTIONS = [
    (_ALONE, {"is_packed": False, "has_norms": False}),
    (_NORMED, {"is_packed": False, "has_norms": True}),
    (_THEN_NORMED, {"is_packed": False, "has_norms": True}),
    (_PACKED, {"is_packed": True, "has_norms": False}),
]
_ROTATIONS: list[tuple[str, RotaryOf]] = [
    (_ROTATED, "always"),
    (_ROTATED_IF.format("self.use_rope"), "use_rope"),
    (_ROTATED_IF.format("position_embeddings is not None"), "given"),
]
_DROPOUTS = ("0.0 if not self.training else self.attention_dropout", "self.attention_dropout if self.training else 0.0")
_WINDOWS = ("", "sliding_window=self.sliding_window,", 'sliding_window=getattr(self.config, "sliding_window", None),')
"""What masks have already, so that `attend` ignores it."""
_OPTIONS = ("", "softcap=self.attn_logit_softcapping,", "s_aux=self.sinks,")


def form_of(forward: object) -> Form | None:
    """The form of a forward of an attention module, in wrappers of transformers or not; None for any other function."""
    if type(forward) is not FunctionType:
        return None
    inner = wrapped(forward)
    return None if inner.__closure__ else _form_of_code(inner.__code__)


@functools.lru_cache(maxsize=1024)
def _form_of_code(code: CodeType) -> Form | None:
    sought, names = _identity(code), {*code.co_names, *code.co_varnames}
    for source, form in _sources(names):
        if _identity(compiled(source)) == sought:
            return form
    return None


def _identity(code: CodeType) -> tuple[Any, ...]:
    """What a forward does, and the names of its arguments, by which callers pass them."""
    return essence(code), code.co_varnames


def _sources(names: set[str]) -> Iterator[tuple[str, Form]]:
    """All forms of a forward with these names."""
    for (cache, more), (project, parts), (rotate, rotary), dropout, window, option in itertools.product(
        _CACHES.items(), _PROJECTIONS, _ROTATIONS, _DROPOUTS, _WINDOWS, _OPTIONS
    ):
        options = f"{window} {option}"
        if {cache, *re.findall(r"self\.(\w+)", f"{project} {rotate} {options}")} <= names:
            places = {"projections": project.strip(), "rotation": rotate.strip(), "dropout": dropout}
            places |= {"cache": cache, "more": more}
            yield (
                _FORWARD.format(**places, options=options),
                Form(
                    **parts,
                    cache=cache,
                    rotary=rotary,
                    softcap="attn_logit_softcapping" if "softcap" in option else None,
                    sinks="sinks" if "sinks" in option else None,
                    keywords=frozenset({"dropout", "scaling", *re.findall(r"(\w+)=", options)}),
                ),
            )
