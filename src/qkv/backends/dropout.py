"""The weights that a `Draw` drops, in torch's operators; the kernel drops the same (`native/src/softmax/scores.h`)."""

import torch
from torch import Tensor

from qkv.problem import Problem

_GOLDEN = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF


def kept_weights(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The factors ``(B, H, Lq, Lk)`` of weights: 0 for those that are dropped, ``1 / (1 - dropout)`` for the others."""
    draw, device = problem.scores.draw, problem.q.device
    assert draw is not None
    assert draw.seed is not None
    batch, heads, lq, _ = problem.q.shape
    row, head, query, key = (torch.arange(n, device=device) for n in (batch, heads, lq, problem.lk))
    position = (query + (problem.offset[:, None] if isinstance(problem.offset, Tensor) else problem.offset)).long()
    position = position.expand(batch, lq)[:, None] + draw.first_key
    state = _mix(draw.seed.to(device) ^ _mix((row[:, None] << 32 | (head + draw.first_head)) + _signed(_GOLDEN)))
    number = _mix(state[..., None] + position * _signed(_GOLDEN))[..., None]
    low, high = number & _LOW, _shifted(number, 32)
    drawn = _scatter((_scatter(low ^ ((key + draw.first_key) & _LOW)) + high) & _LOW)
    probability = torch.tensor(problem.scores.dropout, dtype=torch.float32)
    least = min(int(probability.double() * 2**32), _LOW)
    return (drawn >= least).to(dtype) * float(1 / (1 - probability))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's, of 64 bits."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _scatter(x: Tensor) -> Tensor:
    """lowbias32, of 32 bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & _LOW
    x = ((x ^ x >> 15) * 0x846CA68B) & _LOW
    return x ^ x >> 16


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills in zeros, as of unsigned numbers."""
    return x >> bits & (1 << 64 - bits) - 1


def _signed(constant: int) -> int:
    return constant - (1 << 64)
