"""Rotary embeddings of transformers' attention modules, by qkv's rotation, in single models.

An attention module calls ``apply_rotary_pos_emb`` of its file by name. So the module gets a forward of the same code
whose globals are those of the file but for this one name; the file, and other models, do not change.
"""

import functools
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from qkv import kernels
from qkv.integrations import calls
from qkv.integrations.transformers.cache_argument import with_wrapped, wrapped
from qkv.integrations.transformers.steps.cached_module import CachedForward
from qkv.integrations.transformers.steps.rotary import Apply, apply_rotary_pos_emb, is_usual
from qkv.torch_internals import transforms_are_active

_NAME = "apply_rotary_pos_emb"


class RotatedForward(CachedForward):
    """The forward of an attention module: of few tokens as one call of the kernel, of others with qkv's rotation."""

    positional = ("hidden_states", "position_embeddings", "attention_mask")
    last_projection = "o_proj"

    @property
    def attention(self) -> nn.Module:
        """The module itself."""
        return self.module

    def output_of(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The output without the weights."""
        out: Tensor = self(hidden_states=x, **given)[0]
        return out

    def returned(self, out: Tensor) -> tuple[Tensor, None]:
        """With the weights, which no backend of ours returns."""
        return out, None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class; as it is where someone has replaced it, or the rotation, since."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        from qkv.integrations.transformers.steps.attention_step import attention_step  # which imports transformers

        out = attention_step(self.module, args, kwargs)
        if isinstance(out, Tensor):
            return out, None
        forward = _rotated(type(self.module).forward)
        with calls.because(out):
            return self.forward(*args, **kwargs) if forward is None else forward(self.module, *args, **kwargs)


def replace_rotary(module: nn.Module) -> None:
    """Gives an attention module whose rotation is the usual one a `RotatedForward`."""
    if "forward" not in module.__dict__ and _rotated(type(module).forward) is not None:
        RotatedForward.set_on(module)


def rotates(module: nn.Module) -> bool:
    """Whether a module calls a rotation, usual or not."""
    forward: Any = type(module).forward
    return _NAME in getattr(getattr(wrapped(forward), "__code__", None), "co_names", ())


def _rotated(forward: Any) -> FunctionType | None:
    """A forward with qkv's rotation; None if it does not call the usual one itself."""
    inner = wrapped(forward)
    if type(inner) is not FunctionType or _NAME not in inner.__code__.co_names:
        return None
    theirs = inner.__globals__.get(_NAME)
    return None if theirs is None else _with_rotation(forward, inner, theirs)


@functools.lru_cache(maxsize=1024)
def _with_rotation(forward: FunctionType, inner: FunctionType, theirs: Apply) -> FunctionType | None:
    if not is_usual(theirs, rotary_dim=8):
        return None
    names = _Globals(inner.__globals__, functools.partial(_apply, theirs))
    copied = FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    copied.__kwdefaults__ = inner.__kwdefaults__
    return with_wrapped(forward, copied)


class _Globals(dict[str, Any]):
    """The globals of a file, as they are at any time, with another rotation."""

    def __init__(self, theirs: dict[str, Any], apply: Apply) -> None:
        # What Python itself looks up goes past `__missing__`.
        super().__init__({_NAME: apply, **{name: theirs[name] for name in ("__builtins__", "__name__")}})
        self.theirs = theirs

    def __missing__(self, name: str) -> Any:
        return self.theirs[name]


def _apply(theirs: Apply, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """A model's ``apply_rotary_pos_emb``."""
    if not _is_ours(theirs, q, k, cos, sin):
        return theirs(q, k, cos, sin, unsqueeze_dim)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def _is_ours(theirs: Apply, *tensors: Tensor) -> bool:
    """Whether `apply_rotary_pos_emb` computes the same of q, k, cos and sin, in the same dtype."""
    if kernels.is_tracing() or transforms_are_active():
        return False
    q, k, cos, sin = tensors
    if not (q.dtype is k.dtype is cos.dtype is sin.dtype and all(map(kernels.is_exact_tensor, tensors))):
        return False
    width, rotary_dim = q.shape[-1], cos.shape[-1]
    if k.shape[-1] != width or rotary_dim > width:
        return False
    return rotary_dim == width or is_usual(theirs, rotary_dim=4)
