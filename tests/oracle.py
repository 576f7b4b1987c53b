"""The oracle: attention in fp64, one query at a time, straight from the formula. Shares no code with the library."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rule:
    """Which keys a query sees, in the words of the documentation rather than of the code."""

    left: int | None = None
    right: int | None = None
    sink_tokens: int = 0
    keep: list[list[bool]] | None = None
    documents: list[list[int]] | None = None
    allow: Tensor | None = None

    def sees(self, b: int, h: int, i: int, j: int, offset: int) -> bool:
        p = i + offset
        if self.right is not None and j > p + self.right:
            return False
        if self.left is not None and j < p - self.left and j >= self.sink_tokens:
            return False
        if self.keep is not None and not self.keep[b][j]:
            return False
        if self.documents is not None and self.documents[b][p] != self.documents[b][j]:
            return False
        if self.allow is not None:
            where = [x if size != 1 else 0 for x, size in zip((b, h, i, j), self.allow.shape, strict=True)]
            return bool(self.allow[tuple(where)])
        return True


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


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, offset: int = 0, scores: Scores | None = None) -> Answer:
    """The answer in fp64. Masked keys are never read, so that whatever they hold cannot matter."""
    scores = scores or Scores()
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    batch, heads, lq, width = q.shape
    group, lk = heads // k.shape[1], k.shape[2]
    scale = 1 / math.sqrt(width) if scores.scale is None else scores.scale
    out = torch.zeros(batch, heads, lq, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, lq), -math.inf, dtype=torch.float64)
    weights = torch.zeros(batch, heads, lq, lk, dtype=torch.float64)
    bias = None if scores.bias is None else scores.bias.detach().double().expand(batch, heads, lq, lk)
    for b in range(batch):
        for h in range(heads):
            g = h // group
            for i in range(lq):
                seen = [j for j in range(lk) if rule.sees(b, h, i, j, offset)]
                s = [scale * float(torch.dot(q[b, h, i], k[b, g, j])) for j in seen]
                if scores.softcap is not None:
                    s = [scores.softcap * math.tanh(x / scores.softcap) for x in s]
                if bias is not None:
                    s = [x + float(bias[b, h, i, j]) for x, j in zip(s, seen, strict=True)]
                if scores.alibi is not None:
                    s = [x - scores.alibi[h] * abs(i + offset - j) for x, j in zip(s, seen, strict=True)]
                terms = list(s) if scores.sink_logits is None else [*s, scores.sink_logits[h]]
                top = max(terms, default=-math.inf)
                if top == -math.inf:
                    continue
                total = math.fsum(math.exp(x - top) for x in terms)
                lse[b, h, i] = top + math.log(total)
                for x, j in zip(s, seen, strict=True):
                    weights[b, h, i, j] = math.exp(x - top) / total
                    out[b, h, i] += weights[b, h, i, j] * v[b, g, j]
    return Answer(out, lse, weights)
