"""The oracle: attention in fp64, one query at a time, straight from the formula. Shares no code with the library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Rule:
    """Which keys a query sees, in the words of the documentation rather than of the code."""

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    prefix: list[int] | None = None
    step: int = 1
    chunk_ends: list[int] | None = None
    is_global: Sequence[Sequence[bool]] | Tensor | None = None
    keep: Sequence[Sequence[bool]] | Tensor | None = None
    documents: Sequence[Sequence[int]] | Tensor | None = None
    allow: Tensor | None = None

    def __post_init__(self) -> None:
        """Lists become tensors once, not for each query."""
        for name in ("is_global", "keep", "documents"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.as_tensor(getattr(self, name)))

    def sees(self, b: int, h: int, i: int, lk: int, offset: int) -> Tensor:
        """Whether the query sees each of ``lk`` keys."""
        p, j = i + offset, torch.arange(lk)
        seen = torch.ones(lk, dtype=torch.bool)
        if self.right is not None:
            seen &= (j <= p + self.right) | (j < (0 if self.prefix is None else self.prefix[b]))
        if self.left is not None:
            seen &= (j >= p - self.left) | (j < self.sink_tokens)
        if self.step != 1:
            seen &= ((p - j).abs() % self.step == 0) | (j < self.sink_tokens)
        if self.chunk_ends is not None:
            ends = torch.tensor(self.chunk_ends)
            seen &= ((p < ends) == (j[:, None] < ends)).all(1)
        if self.is_global is not None:
            seen |= self.is_global[b] | self.is_global[b][p]
        if self.keep is not None:
            seen &= self.keep[b]
        if self.documents is not None:
            seen &= self.documents[b] == self.documents[b][p]
        if self.allow is not None:
            where = [x if size != 1 else 0 for x, size in zip((b, h, i), self.allow.shape[:3], strict=True)]
            seen &= self.allow[tuple(where)]
        return seen


@dataclass
class Scores:
    """What happens to a score before the softmax."""

    scale: float | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    alibi: list[float] | None = None
    sink_logits: list[float] | None = None


@dataclass
class Answer:
    out: Tensor
    lse: Tensor
    weights: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, offset: int | Sequence[int] = 0, scores: Scores | None = None
) -> Answer:
    """The answer in fp64. Masked keys are never read, so their numbers cannot matter."""
    scores = scores or Scores()
    # numpy, whose steps over a row of keys cost a fifth of torch's.
    queries, keys, values = (x.detach().double().numpy() for x in (q, k, v))
    batch, heads, lq, width = queries.shape
    group, lk = heads // keys.shape[1], keys.shape[2]
    scale = 1 / math.sqrt(width) if scores.scale is None else scores.scale
    out = np.zeros((batch, heads, lq, values.shape[3]))
    lse = np.full((batch, heads, lq), -math.inf)
    weights = np.zeros((batch, heads, lq, lk))
    bias = None if scores.bias is None else scores.bias.detach().double().expand(batch, heads, lq, lk).numpy()
    for b in range(batch):
        first = offset if isinstance(offset, int) else offset[b]
        for i in range(lq):
            for h in range(heads):
                if h == 0 or rule.allow is not None:
                    seen = rule.sees(b, h, i, lk, first).numpy().nonzero()[0]
                s = scale * (keys[b, h // group][seen] @ queries[b, h, i])
                if scores.softcap is not None:
                    s = scores.softcap * np.tanh(s / scores.softcap)
                if bias is not None:
                    s = s + bias[b, h, i, seen]
                if scores.alibi is not None:
                    s = s - scores.alibi[h] * abs(i + first - seen)
                terms = s if scores.sink_logits is None else np.append(s, scores.sink_logits[h])
                if (terms == -math.inf).all():  # also where there are none
                    continue
                top = terms.max()
                total = np.exp(terms - top).sum()
                lse[b, h, i] = top + np.log(total)
                share = np.exp(s - top) / total
                weights[b, h, i, seen] = share
                out[b, h, i] = share @ values[b, h // group][seen]
    return Answer(*map(torch.from_numpy, (out, lse, weights)))
