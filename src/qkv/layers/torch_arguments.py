"""What to write for arguments of ``nn.MultiheadAttention`` that layers do not have."""

import difflib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from typing_extensions import ParamSpec

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

CONTEXT = "Use context_dim=, the width of the sequence that keys and values come from, as CrossAttention has it."
OPTIONS = {
    "kdim": CONTEXT,
    "vdim": CONTEXT,
    "add_bias_kv": "Layers add no keys; sink_logits=True adds a learned logit to the softmax of each head.",
    "add_zero_attn": "Use sink_logits=True, which adds a logit to the softmax of each head: 0 at first, then learned.",
    "batch_first": "Leave it out: inputs are (B, L, embed_dim).",
}
"""Arguments of the constructor."""

SEQUENCES = "Call layer(x) for self-attention and layer(x, context) for cross-attention, which project keys and values."
CALL = {
    "query": SEQUENCES,
    "key": SEQUENCES,
    "value": SEQUENCES,
    "key_padding_mask": "Use mask=Mask.padding(~key_padding_mask): True means may attend.",
    "attn_mask": "Use mask=Mask.dense(~attn_mask): True means may attend. Numbers to be added are bias=attn_mask.",
    "need_weights": "Leave it out: the result is the output alone. layer.attention_weights(x) has the weights.",
    "average_attn_weights": "Use layer.attention_weights(x).mean(dim=1).",
    "is_causal": "Use CausalAttention, or mask=Mask.causal().",
}
"""Arguments of a call."""


def refuse_unknown_options(caller: str, unknown: Mapping[str, object], known: Collection[str]) -> None:
    """Raises TypeError if there are ``unknown`` keywords of a constructor, with what to write instead."""
    for name in unknown:
        if name in OPTIONS:
            raise TypeError(f"{caller}: {_given(name)}. {OPTIONS[name]}")
        similar = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {similar[0]}?" if similar else "help(qkv.Attention) lists the options."
        raise TypeError(f"{caller}: got an unexpected argument {name!r}. {remedy}")


def answer_calls_of_torch(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a method ``(self, x, context)``: arguments of ``nn.MultiheadAttention`` raise by name."""

    @functools.wraps(call)
    def answering(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return call(*args, **kwargs)
        except TypeError:
            # Calls without such arguments keep their error.
            caller = type(args[0]).__name__
            for name in kwargs:
                if name in CALL:
                    raise TypeError(f"{caller}: {_given(name)}. {CALL[name]}") from None
            if len(args) > 3:
                raise TypeError(
                    f"{caller}: a call must have at most two positional arguments, x and context; got {len(args) - 1}. "
                    f"{SEQUENCES} Pass others by keyword, such as mask= or cache=."
                ) from None
            raise

    return answering


def _given(name: str) -> str:
    return f"got {name}, an argument of nn.MultiheadAttention"
