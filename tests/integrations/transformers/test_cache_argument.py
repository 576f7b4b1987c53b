"""Forwards within transformers' wrappers for former names of arguments, as all that take a cache are from 5.24 on."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integrations.transformers.one_line import model
from integrations.transformers.test_attention_step import steps_seen
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.deprecation import deprecate_kwarg

import qkv
from qkv import kernels
from qkv.integrations.transformers import cache_argument
from qkv.integrations.transformers.cache_argument import former_names, with_wrapped, wrapped
from qkv.integrations.transformers.steps.attention_forms import form_of
from qkv.integrations.transformers.steps.rotated_forward import rotates
from qkv.integrations.transformers.unpadding import _only_appends

renames = deprecate_kwarg("former", "1000.0", new_name="position_embeddings")
LLAMAS = LlamaAttention.forward
X, ANGLES = (torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)) for width in (32, 8))
TABLES = ANGLES.cos(), ANGLES.sin()


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An attention module in one more wrapper, accelerated."""
    monkeypatch.setattr(LlamaAttention, "forward", renames(LLAMAS))
    _only_appends.cache_clear()
    yield qkv.accelerate(model("llama", num_hidden_layers=1)).requires_grad_(False).model.layers[0].self_attn
    _only_appends.cache_clear()


def test_a_forward_is_read_within_its_wrappers(attention: Any) -> None:
    forward = type(attention).forward
    assert forward is not LLAMAS and wrapped(forward) is wrapped(LLAMAS)
    assert former_names(forward) == former_names(LLAMAS) | {"former"}
    assert form_of(forward) == form_of(LLAMAS) and form_of(forward) is not None
    assert rotates(attention) and _only_appends(type(attention))


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_a_call_is_a_step_unless_an_argument_has_its_former_name(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_seen(monkeypatch)
    want = attention(X, TABLES, None)[0]
    assert steps == [3]
    with pytest.warns(FutureWarning, match="`former` is deprecated"):
        got = attention(X, former=TABLES, attention_mask=None)[0]
    assert steps == [3] and "an argument is given by its former name" in str(qkv.report(attention))
    torch.testing.assert_close(got, want)


def test_a_copy_has_the_wrappers_of_the_original() -> None:
    def inner(self: Any, position_embeddings: Any) -> Any:
        return position_embeddings

    twice = renames(renames(LLAMAS))
    copied = with_wrapped(twice, inner)
    assert wrapped(copied) is inner and wrapped(twice) is wrapped(LLAMAS)
    with pytest.warns(FutureWarning, match="`former` is deprecated"):
        assert copied(None, former=3) == 3
    assert with_wrapped(inner, inner) is inner


def test_other_wrappers_are_called() -> None:
    @functools.wraps(LLAMAS)
    def other(*args: Any, **kwargs: Any) -> Any:
        return LLAMAS(*args, **kwargs)

    for forward in (other, functools.partial(LLAMAS), LlamaAttention, None):
        assert wrapped(forward) is forward and not former_names(forward) and form_of(forward) is None


def test_without_wrappers_of_transformers_the_function_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that moves `deprecate_kwarg` has no steps where it wraps, and the same results."""
    monkeypatch.setattr(cache_argument, "_code_of_wrappers", lambda: None)
    monkeypatch.setattr(LlamaAttention, "forward", renames(LLAMAS))
    assert form_of(LlamaAttention.forward) is None
    theirs = model("llama", num_hidden_layers=1).requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    want = theirs(ids).logits
    torch.testing.assert_close(qkv.accelerate(theirs)(ids).logits, want)
