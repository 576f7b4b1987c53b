"""`Scores`: the options between ``q @ k.mT`` and the sum of values. Each is listed here once."""

from collections.abc import Collection
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from qkv.arguments import broadcasts, more, require_finite, require_positive, require_probability, require_strided


class Draw(NamedTuple):
    """Which weights dropout drops: a number for each row of the batch, head and position of query and key.

    Calls with one seed, which have some of the heads, queries and keys each, drop what one call with all of them does.
    The position of a query is that among the keys, by the offset of the call.
    """

    seed: Tensor | None
    """integer (1,), on the CPU; see `new_seed`"""
    first_head: int = 0
    """the first query head of the call among all of them"""
    first_key: int = 0
    """position of the first key of the call"""


def new_seed() -> Tensor:
    """A seed from torch's generator on the CPU."""
    return torch.randint(torch.iinfo(torch.int64).max, (1,))


class Scores(NamedTuple):
    """The validated options of one call, in the order in which they apply.

    Scores are ``scale * q @ k.mT``, then softcap, then bias and alibi. The mask follows, then the softmax, with the
    sink logit of the head as one more term of its normaliser, then dropout of the weights.
    """

    scale: float
    softcap: float | None
    bias: Tensor | None
    """(B, H, Lq, Lk), broadcastable, always with 4 dimensions"""
    alibi: Tensor | None
    """(H,)"""
    sink_logits: Tensor | None
    """(H,)"""
    dropout: float
    draw: Draw | None
    """that of dropout; a new one if None"""

    def used(self) -> list[str]:
        """Names of the options in use, except scale."""
        named = zip(self._fields[1:], self[1:], strict=True)
        return [name for name, value in named if isinstance(value, Tensor) or value]

    def unsupported_by(self, supported: Collection[str]) -> list[str]:
        """Names of the options in use that are not among ``supported``, those of a backend."""
        return [name for name in self.used() if name not in supported]

    def tensors(self) -> list[Tensor]:
        """The options that are tensors, and may need a gradient."""
        return [value for value in self if isinstance(value, Tensor)]

    def is_positional(self) -> bool:
        """Whether a score depends on the position of the query, so that an offset is needed."""
        return self.alibi is not None

    def select_queries(self, start: int, stop: int) -> "Scores":
        """The options of the query rows ``start .. stop - 1``."""
        if self.bias is None or self.bias.shape[2] == 1:
            return self
        return self._replace(bias=self.bias[:, :, start:stop])

    def select_keys(self, start: int, stop: int) -> "Scores":
        """The options of the keys ``start .. stop - 1``."""
        draw, bias = self.draw, self.bias
        if draw is not None:
            draw = draw._replace(first_key=draw.first_key + start)
        return self._replace(
            bias=bias if bias is None or bias.shape[3] == 1 else bias[..., start:stop],
            draw=draw,
        )


class ScoreOptions(TypedDict, total=False):
    """The keywords of `qkv.attention` that become `Scores`."""

    scale: float | None
    softcap: float | None
    bias: Tensor | None
    alibi: Tensor | None
    sink_logits: Tensor | None
    dropout: float
    draw: Draw | None


DEFAULTS: ScoreOptions = {
    "scale": None,
    "softcap": None,
    "bias": None,
    "alibi": None,
    "sink_logits": None,
    "dropout": 0.0,
    "draw": None,
}


def only_scale(softcap: object, bias: object, alibi: object, sinks: object, dropout: object, draw: object) -> bool:
    """Whether these options of `qkv.attention` leave scores as ``scale * q @ k.mT``."""
    return softcap is bias is alibi is sinks is draw is None and type(dropout) is float and dropout == 0


def make_scores(caller: str, q: Tensor, k: Tensor, **options: Unpack[ScoreOptions]) -> Scores:
    """The validated `Scores` of a call to ``caller`` with ``q (B, H, Lq, D)`` and ``k (B, Hkv, Lk, D)``.

    Raises:
        TypeError: for options of the wrong type.
        ValueError: for shapes, devices and numbers that do not fit together.
    """
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}.")
    given: ScoreOptions = {**DEFAULTS, **options}
    softcap, bias, alibi, sink_logits = given["softcap"], given["bias"], given["alibi"], given["sink_logits"]
    scale, dropout = _resolve_scale(caller, given["scale"], q.shape[3]), given["dropout"]
    if softcap is not None:
        require_positive(caller, "softcap", softcap, " or None")
    if bias is not None:
        bias = _check_bias(caller, bias, q, k)
    if alibi is not None:
        _check_per_head(caller, "alibi", alibi, q)
    if sink_logits is not None:
        _check_per_head(caller, "sink_logits", sink_logits, q)
    require_probability(caller, "dropout", dropout)
    draw = given["draw"]
    if draw is not None:
        _check_draw(caller, draw)
    return Scores(scale, softcap, bias, alibi, sink_logits, dropout, draw if dropout else None)


def _resolve_scale(caller: str, scale: float | None, width: int) -> float:
    """The scale, ``1 / sqrt(width)`` if None."""
    if scale is None:
        if width == 0:
            raise ValueError(f"{caller}: heads of width 0 have no default scale, 1 / sqrt(width); pass scale.")
        return float(width**-0.5)
    if isinstance(scale, Tensor):
        raise TypeError(
            f"{caller}: scale must be a number; got a tensor. For a learned scale, multiply q by it and pass scale=1.0."
        )
    require_finite(caller, "scale", scale, ", or None for 1 / sqrt(width)")
    return scale


def _check_bias(caller: str, bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias with 4 dimensions. Raises unless it broadcasts to the scores."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(
            f"{caller}: bias must be a floating-point tensor, added to the scores; got {got}. "
            f"Pass a boolean mask as mask=Mask.dense(allow).{more('polarity')}"
        )
    require_strided(caller, "bias", bias)
    if bias.device != q.device:
        raise ValueError(f"{caller}: bias must be on the device of q; got {bias.device} and {q.device}.")
    if not broadcasts(bias, shape):
        raise ValueError(f"{caller}: bias must broadcast to {shape}; got shape {tuple(bias.shape)}.")
    return bias[(None,) * (4 - bias.dim())]


def _check_draw(caller: str, draw: Draw) -> None:
    if not isinstance(draw, Draw) or not isinstance(draw.seed, Tensor):
        got = f"one with seed {draw.seed!r}" if isinstance(draw, Draw) else type(draw).__name__
        raise TypeError(
            f"{caller}: draw must be a qkv.scores.Draw with a seed, a tensor, or None; got {got}. "
            "Use Draw(qkv.scores.new_seed())."
        )
    seed = draw.seed
    if seed.dtype is not torch.int64 or seed.shape != (1,) or not (seed.is_cpu or seed.is_meta):
        raise ValueError(
            f"{caller}: the seed of draw must be int64 of shape (1,) on the CPU; got {seed.dtype} of shape "
            f"{tuple(seed.shape)} on {seed.device}. Make it by qkv.scores.new_seed()."
        )


def _check_per_head(caller: str, name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point or tensor.shape != (q.shape[1],):
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(
            f"{caller}: {name} must be floating-point of shape ({q.shape[1]},), one per query head; got {got}."
        )
    if tensor.device != q.device:
        raise ValueError(f"{caller}: {name} must be on the device of q; got {tensor.device} and {q.device}.")
