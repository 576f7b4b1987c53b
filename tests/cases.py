"""The contract grid: every mask and every score option, over sizes that are primes or at the edge of a block."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from oracle import Answer, Rule, Scores, attend
from torch import Tensor

from qkv import Mask

B, H, D = 2, 6, 13


@dataclass(frozen=True)
class Case:
    """One problem, stated twice: as a `Mask` for the library and as a `Rule` for the oracle."""

    name: str
    mask: Callable[[], Mask] = Mask.full
    rule: Callable[[], Rule] = Rule
    lq: int = 19
    lk: int = 19
    offset: int | tuple[int, ...] = 0
    """of all rows of the batch, or of each"""
    batch: int = B
    heads: int = H
    kv_heads: int = 2
    width: int = D
    value_width: int = D
    scale: float | None = None
    softcap: float | None = None
    bias_shape: tuple[int, ...] | None = None
    bias_hides: bool = False
    alibi: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, *, views: bool = False) -> dict[str, Tensor]:
        """q, k, v and the tensors among the score options, in ``dtype``; the same numbers at every call."""
        found = {name: tensor.to(dtype, copy=True) for name, tensor in _numbers(self).items()}
        if views:
            found |= {name: _between_poisoned_neighbours(found[name]) for name in "qkv"}
        return found

    def options(self) -> dict[str, object]:
        """The other keywords of the call."""
        offset = self.offset if isinstance(self.offset, int) else torch.tensor(self.offset)
        return {"mask": self.mask(), "offset": offset, "scale": self.scale, "softcap": self.softcap}

    def offset_of(self, b: int) -> int:
        """The offset of a row of the batch."""
        return self.offset if isinstance(self.offset, int) else self.offset[b]

    def distance(self) -> Tensor:
        """How far each query is from each key, (B, 1, Lq, Lk)."""
        first = torch.tensor([self.offset_of(b) for b in range(self.batch)])
        position = first[:, None] + torch.arange(self.lq)
        return (position[:, None, :, None] - torch.arange(self.lk)).abs()

    def scores(self, inputs: dict[str, Tensor]) -> Scores:
        alibi, sinks = inputs.get("alibi"), inputs.get("sink_logits")
        return Scores(
            scale=self.scale,
            softcap=self.softcap,
            bias=inputs.get("bias"),
            alibi=None if alibi is None else alibi.double().tolist(),
            sink_logits=None if sinks is None else sinks.double().tolist(),
        )


@cache
def _numbers(case: Case) -> dict[str, Tensor]:
    """The inputs of the case in fp64."""
    generator = torch.Generator().manual_seed(len(case.name) + 31 * case.lk + 7 * case.lq)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "q": draw(case.batch, case.heads, case.lq, case.width),
        "k": draw(case.batch, case.kv_heads, case.lk, case.width),
        "v": draw(case.batch, case.kv_heads, case.lk, case.value_width),
    }
    if case.bias_shape is not None:
        found["bias"] = draw(*case.bias_shape)
        if case.bias_hides:
            found["bias"][..., ::3] = -torch.inf
    if case.alibi:
        found["alibi"] = torch.arange(1, case.heads + 1, dtype=torch.float64) / 16
    if case.sinks:
        found["sink_logits"] = draw(case.heads)
    return found


def _between_poisoned_neighbours(tensor: Tensor) -> Tensor:
    """The same numbers as a view, head-split and sliced, of a buffer with NaN everywhere else."""
    batch, heads, length, width = tensor.shape
    buffer = torch.full((batch + 1, length + 5, heads + 2, width + 3), torch.nan, dtype=tensor.dtype)
    view = buffer[1:, 2 : 2 + length, 1 : 1 + heads, 1 : 1 + width].transpose(1, 2)
    view.copy_(tensor)
    return view


@cache
def answer(case: Case, dtype: torch.dtype) -> Answer:
    """The oracle's answer for the inputs as rounded to ``dtype``."""
    inputs = case.inputs(dtype)
    return attend(inputs["q"], inputs["k"], inputs["v"], case.rule(), case.offset, case.scores(inputs))


KEEP_LEFT = [[j >= 7 for j in range(19)], [j >= 2 for j in range(19)]]
KEEP_HOLES = [[j % 3 != 1 for j in range(19)], [False] * 19]
IDS = [[0] * 5 + [1] * 9 + [2] * 5, [3] * 1 + [8] * 18]
GLOBAL = [[j in (0, 7) for j in range(19)], [j == 18 for j in range(19)]]
ALLOW = torch.rand(B, H, 19, 19, generator=torch.Generator().manual_seed(5)) < 0.4
ALLOW_SHARED = torch.rand(1, 1, 19, 19, generator=torch.Generator().manual_seed(6)) < 0.4

LONG = 197  # more than two blocks of 64, and a prime
KEEP_LONG = [[j % 11 != 3 and j > 20 for j in range(LONG)], [j < 150 for j in range(LONG)]]
GLOBAL_ROWS = [[j == 150 for j in range(LONG)], [j == 10 for j in range(LONG)]]
"""One row each, which sees blocks of keys without a global token."""
GLOBAL_LONG = [[j in (2, 130) for j in range(LONG)], [j > 194 for j in range(LONG)]]
IDS_LONG = [[j // 41 for j in range(LONG)], [j // 90 for j in range(LONG)]]
IDS_IN_TURNS = [[j // 41 % 2 for j in range(LONG)], [j // 5 % 3 for j in range(LONG)]]


def _keep(rows: list[list[bool]]) -> Mask:
    return Mask.padding(torch.tensor(rows))


def _lengths(lengths: list[int], lk: int) -> list[list[bool]]:
    return [[j < length for j in range(lk)] for length in lengths]


def _both(first: list[list[bool]], second: list[list[bool]]) -> list[list[bool]]:
    return [[a and b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


MASKS = [
    Case("full"),
    Case("full, other length", lk=23),
    Case("one key", lq=3, lk=1),
    Case("one query", lq=1, lk=17),
    Case("causal", Mask.causal, lambda: Rule(right=0)),
    Case("causal, top-left", Mask.causal, lambda: Rule(right=0), lk=23),
    Case("causal, more queries than keys", Mask.causal, lambda: Rule(right=0), lq=23, lk=11),
    Case("causal, bottom-right", Mask.causal, lambda: Rule(right=0), lq=5, lk=23, offset=18),
    Case("causal, decoding", Mask.causal, lambda: Rule(right=0), lq=1, lk=23, offset=22),
    Case("causal, decoding in a longer buffer", Mask.causal, lambda: Rule(right=0), lq=1, lk=23, offset=10),
    Case("causal, first rows see nothing", Mask.causal, lambda: Rule(right=0), offset=-4),
    Case("causal, no row sees anything", Mask.causal, lambda: Rule(right=0), lq=3, offset=-4),
    Case("causal, past all keys", Mask.causal, lambda: Rule(right=0), offset=40),
    Case("band", lambda: Mask.band(3, 2), lambda: Rule(left=3, right=2)),
    Case("band, left only", lambda: Mask.band(3, None), lambda: Rule(left=3)),
    Case("band, itself only", lambda: Mask.band(0, 0), lambda: Rule(left=0, right=0)),
    Case("band, past all keys", lambda: Mask.band(3, 0), lambda: Rule(left=3, right=0), lq=5, offset=17),
    Case("window", lambda: Mask.causal(window=4), lambda: Rule(left=3, right=0)),
    Case("window, decoding", lambda: Mask.causal(window=4), lambda: Rule(left=3, right=0), lq=1, offset=18),
    Case("window, chunk", lambda: Mask.causal(window=4), lambda: Rule(left=3, right=0), lq=5, lk=23, offset=11),
    Case("window at least the length", lambda: Mask.causal(window=19), lambda: Rule(left=18, right=0)),
    Case("sliding", lambda: Mask.sliding(6), lambda: Rule(left=3, right=3)),
    Case("window and sinks", lambda: Mask.causal(4, sink_tokens=2), lambda: Rule(left=3, right=0, sink_tokens=2)),
    Case(
        "window and sinks, decoding",
        lambda: Mask.causal(4, sink_tokens=2),
        lambda: Rule(left=3, right=0, sink_tokens=2),
        lq=1,
        offset=18,
    ),
    Case("lengths", lambda: Mask.padding(torch.tensor([11, 0])), lambda: Rule(keep=_lengths([11, 0], 19))),
    Case(
        "lengths, causal",
        lambda: Mask.padding(torch.tensor([11, 3])) & Mask.causal(),
        lambda: Rule(right=0, keep=_lengths([11, 3], 19)),
    ),
    Case("left padding, causal", lambda: _keep(KEEP_LEFT) & Mask.causal(), lambda: Rule(right=0, keep=KEEP_LEFT)),
    Case(
        "left padding, decoding",
        lambda: _keep(KEEP_LEFT) & Mask.causal(),
        lambda: Rule(right=0, keep=KEEP_LEFT),
        lq=1,
        offset=18,
    ),
    Case("holes", lambda: _keep(KEEP_HOLES), lambda: Rule(keep=KEEP_HOLES)),
    Case(
        "holes, window and sinks",
        lambda: Mask.causal(4, sink_tokens=2) & _keep(KEEP_HOLES),
        lambda: Rule(left=3, right=0, sink_tokens=2, keep=KEEP_HOLES),
    ),
    Case("documents", lambda: Mask.documents(torch.tensor(IDS)), lambda: Rule(documents=IDS)),
    Case(
        "documents, window",
        lambda: Mask.documents(torch.tensor(IDS)) & Mask.causal(4),
        lambda: Rule(left=3, right=0, documents=IDS),
    ),
    Case(
        "documents, chunk",
        lambda: Mask.documents(torch.tensor(IDS)) & Mask.causal(4),
        lambda: Rule(left=3, right=0, documents=IDS),
        lq=5,
        offset=9,
    ),
    Case(
        "chunks, window and documents",
        lambda: Mask.causal(3) & Mask.chunked(4) & Mask.documents(torch.tensor(IDS)),
        lambda: Rule(left=2, right=0, chunk_ends=[4, 8, 12, 16], documents=IDS),
    ),
    Case(
        "prefixes, left padding",
        lambda: Mask.prefix(torch.tensor([12, 0])) & _keep(KEEP_LEFT),
        lambda: Rule(right=0, prefix=[12, 0], keep=KEEP_LEFT),
    ),
    Case(
        "prefix, decoding",
        lambda: Mask.prefix(11) & Mask.band(2, None, sink_tokens=1),
        lambda: Rule(left=2, right=0, sink_tokens=1, prefix=[11, 11]),
        lq=1,
        offset=6,
    ),
    Case(
        "dilated, sinks",
        lambda: Mask.causal(2, sink_tokens=3, dilation=5),
        lambda: Rule(left=5, right=0, sink_tokens=3, step=5),
    ),
    Case(
        "global tokens, window, holes",
        lambda: (
            (Mask.causal(3, sink_tokens=1) | Mask.global_tokens(torch.tensor(GLOBAL)))
            & _keep(KEEP_HOLES)
            & Mask.documents(torch.tensor(IDS))
        ),
        lambda: Rule(left=2, right=0, sink_tokens=1, is_global=GLOBAL, keep=KEEP_HOLES, documents=IDS),
        lq=7,
        offset=9,
    ),
    Case(
        "global tokens, decoding",
        lambda: Mask.causal(2) | Mask.global_tokens(torch.tensor(GLOBAL)),
        lambda: Rule(left=1, right=0, is_global=GLOBAL),
        lq=1,
        offset=9,
    ),
    Case("dense", lambda: Mask.dense(ALLOW), lambda: Rule(allow=ALLOW)),
    Case("dense, shared", lambda: Mask.dense(ALLOW_SHARED), lambda: Rule(allow=ALLOW_SHARED)),
    Case(
        "everything at once",
        lambda: (
            Mask.dense(ALLOW)
            & Mask.causal(9, sink_tokens=3)
            & _keep(KEEP_LEFT)
            & Mask.documents(torch.tensor(IDS))
            & Mask.padding(torch.tensor([18, 17]))
        ),
        lambda: Rule(
            left=8,
            right=0,
            sink_tokens=3,
            keep=_both(KEEP_LEFT, _lengths([18, 17], 19)),
            documents=IDS,
            allow=ALLOW,
        ),
    ),
]

LONG_WINDOWS = [
    Case(
        "long window",
        lambda: Mask.causal(window=6),
        lambda: Rule(left=5, right=0),
        lq=LONG,
        lk=LONG,
        batch=1,
        heads=3,
        kv_heads=1,
    ),
    Case(
        "long sliding",
        lambda: Mask.sliding(10),
        lambda: Rule(left=5, right=5),
        lq=LONG,
        lk=LONG,
        heads=2,
        value_width=7,
    ),
    Case(
        "long window and sinks",
        lambda: Mask.causal(6, sink_tokens=3),
        lambda: Rule(left=5, right=0, sink_tokens=3),
        lq=LONG,
        lk=LONG,
        heads=2,
        sinks=True,
    ),
    Case(
        "long window, holes and sinks",
        lambda: Mask.sliding(6, sink_tokens=2) & _keep(KEEP_LONG) & Mask.padding(torch.tensor([190, 120])),
        lambda: Rule(
            left=3,
            right=3,
            sink_tokens=2,
            keep=_both(KEEP_LONG, _lengths([190, 120], LONG)),
        ),
        lq=LONG,
        lk=LONG,
        heads=2,
    ),
    Case(
        "long window, documents",
        lambda: Mask.sliding(10) & Mask.documents(torch.tensor(IDS_LONG)),
        lambda: Rule(left=5, right=5, documents=IDS_LONG),
        lq=LONG,
        lk=LONG,
        heads=2,
    ),
    Case(
        "long window, alibi",
        lambda: Mask.causal(6),
        lambda: Rule(left=5, right=0),
        lq=LONG,
        lk=LONG,
        heads=2,
        alibi=True,
    ),
    Case(
        "long window, chunk",
        lambda: Mask.causal(6, sink_tokens=1),
        lambda: Rule(left=5, right=0, sink_tokens=1),
        lq=140,
        lk=LONG,
        offset=50,
        heads=2,
    ),
    Case(
        "long window, dilated",
        lambda: Mask.sliding(6, sink_tokens=2, dilation=4),
        lambda: Rule(left=12, right=12, sink_tokens=2, step=4),
        lq=LONG,
        lk=LONG,
        heads=1,
        kv_heads=1,
    ),
    Case(
        "long chunks, holes and window",
        lambda: Mask.band(30, 3) & Mask.chunked(70) & _keep(KEEP_LONG) & Mask.documents(torch.tensor(IDS_LONG)),
        lambda: Rule(left=30, right=3, chunk_ends=[70, 140], keep=KEEP_LONG, documents=IDS_LONG),
        lq=LONG,
        lk=LONG,
        heads=1,
        kv_heads=1,
    ),
    Case(
        "long chunks, within one at first",
        lambda: Mask.causal() & Mask.chunked(7, start=3),
        lambda: Rule(right=0, chunk_ends=[*range(3, LONG, 7)]),
        lq=LONG,
        lk=LONG,
        heads=2,
        kv_heads=1,
    ),
    Case(
        "long window, first rows see nothing",
        lambda: Mask.sliding(4),
        lambda: Rule(left=2, right=2),
        lq=LONG,
        lk=LONG,
        offset=-9,
        heads=2,
    ),
]

LONG_MASKS = [
    Case(
        "blocks of keys, whose largest score comes late",
        Mask.causal,
        lambda: Rule(right=0),
        lq=31,
        lk=401,
        offset=370,
        heads=4,
        alibi=True,
    ),
    Case(
        "documents in turns",
        lambda: Mask.documents(torch.tensor(IDS_IN_TURNS)),
        lambda: Rule(documents=IDS_IN_TURNS),
        lq=LONG,
        lk=LONG,
        heads=2,
    ),
    Case(
        "long window, global tokens, all at once",
        lambda: (
            (Mask.causal(6, sink_tokens=2, dilation=2) | Mask.global_tokens(torch.tensor(GLOBAL_LONG)))
            & _keep(KEEP_LONG)
            & Mask.documents(torch.tensor(IDS_LONG))
            & Mask.padding(torch.tensor([190, 197]))
        ),
        lambda: Rule(
            left=10,
            right=0,
            sink_tokens=2,
            step=2,
            is_global=GLOBAL_LONG,
            keep=_both(KEEP_LONG, _lengths([190, 197], LONG)),
            documents=IDS_LONG,
        ),
        lq=130,
        lk=LONG,
        offset=60,
        heads=1,
        kv_heads=1,
    ),
    Case(
        "long window, global rows",
        lambda: Mask.sliding(4) | Mask.global_tokens(torch.tensor(GLOBAL_ROWS)),
        lambda: Rule(left=2, right=2, is_global=GLOBAL_ROWS),
        lq=LONG,
        lk=LONG,
        heads=1,
        kv_heads=1,
    ),
]

SCORES = [
    Case("scale", scale=0.37),
    Case("scale of 0", scale=0.0),
    Case("softcap", softcap=1.5),
    Case("bias", bias_shape=(B, H, 19, 19)),
    Case("bias per head", bias_shape=(H, 1, 19)),
    Case("bias per query", Mask.causal, lambda: Rule(right=0), bias_shape=(19, 1)),
    Case("bias of -inf", bias_shape=(1, H, 19, 19), bias_hides=True),
    Case("bias, decoding", Mask.causal, lambda: Rule(right=0), lq=1, offset=11, bias_shape=(B, 1, 1, 19)),
    Case("alibi", Mask.causal, lambda: Rule(right=0), alibi=True),
    Case("alibi, chunk", Mask.causal, lambda: Rule(right=0), lq=5, offset=14, alibi=True),
    Case("alibi both ways", alibi=True, lq=7, offset=6),
    Case("sinks", sinks=True),
    Case("sinks, causal", Mask.causal, lambda: Rule(right=0), sinks=True),
    Case("sinks, rows that see nothing", Mask.causal, lambda: Rule(right=0), offset=-4, sinks=True),
    Case("sinks, no row sees anything", Mask.causal, lambda: Rule(right=0), lq=3, offset=-4, sinks=True),
    Case(
        "sinks, lengths",
        lambda: Mask.padding(torch.tensor([11, 0])),
        lambda: Rule(keep=_lengths([11, 0], 19)),
        sinks=True,
    ),
    Case(
        "every score",
        lambda: Mask.causal(9, sink_tokens=2) & _keep(KEEP_LEFT),
        lambda: Rule(left=8, right=0, sink_tokens=2, keep=KEEP_LEFT),
        scale=0.4,
        softcap=2.0,
        bias_shape=(H, 19, 19),
        alibi=True,
        sinks=True,
    ),
]

SHAPES = [
    Case("multi-head", Mask.causal, lambda: Rule(right=0), kv_heads=6),
    Case("multi-query", Mask.causal, lambda: Rule(right=0), kv_heads=1),
    Case("group of 3", Mask.causal, lambda: Rule(right=0), heads=3, kv_heads=1),
    Case("group of 5", Mask.causal, lambda: Rule(right=0), heads=5, kv_heads=1),
    Case("group of 7", Mask.causal, lambda: Rule(right=0), heads=7, kv_heads=1, batch=1),
    Case("narrow values", value_width=5, lk=23),
    Case("wide values", Mask.causal, lambda: Rule(right=0), value_width=29),
    Case("wide values, sinks", Mask.causal, lambda: Rule(right=0), value_width=29, sinks=True),
    Case("narrow values, sinks", value_width=5, sinks=True),
    Case("width 64", Mask.causal, lambda: Rule(right=0), width=64, value_width=64),
    Case("width 1", width=1, value_width=1),
]

ROWS = [
    Case("rows, causal", Mask.causal, lambda: Rule(right=0), lq=5, lk=23, offset=(18, -3)),
    Case("rows, window", lambda: Mask.causal(4), lambda: Rule(left=3, right=0), lq=2, offset=(0, 40), alibi=True),
    Case(
        "rows, decoding",
        lambda: Mask.causal(4, sink_tokens=2) & Mask.padding(torch.tensor([19, 8])),
        lambda: Rule(left=3, right=0, sink_tokens=2, keep=_lengths([19, 8], 19)),
        lq=1,
        offset=(18, 7),
    ),
    Case(
        "rows, documents",
        lambda: Mask.documents(torch.tensor(IDS[:1])) & Mask.band(4, None),
        lambda: Rule(left=4, documents=[IDS[0]] * B),
        lq=7,
        offset=(12, 1),
    ),
    Case(
        "rows, everything at once",
        lambda: (
            Mask.dense(ALLOW[:, :, :13])
            & Mask.causal(9, sink_tokens=3)
            & _keep(KEEP_LEFT)
            & Mask.documents(torch.tensor(IDS))
        ),
        lambda: Rule(left=8, right=0, sink_tokens=3, keep=KEEP_LEFT, documents=IDS, allow=ALLOW[:, :, :13]),
        lq=13,
        offset=(6, 1),
        softcap=2.0,
        bias_shape=(H, 13, 1),
        alibi=True,
        sinks=True,
    ),
    Case(
        "rows, prefixes and chunks",
        lambda: Mask.prefix(torch.tensor([9, 2])) & Mask.chunked(8, start=3),
        lambda: Rule(right=0, prefix=[9, 2], chunk_ends=[-5, 3, 11, 19, 27]),
        lq=7,
        offset=(6, -4),
    ),
    Case(
        "rows, global tokens and dilation",
        lambda: Mask.sliding(4, dilation=2) | Mask.global_tokens(torch.tensor(GLOBAL)),
        lambda: Rule(left=4, right=4, step=2, is_global=GLOBAL),
        lq=7,
        offset=(6, 12),
    ),
    Case(
        "rows, tiles",
        lambda: Mask.causal(6),
        lambda: Rule(left=5, right=0),
        lq=67,
        lk=101,
        heads=2,
        offset=(34, -9),
    ),
]

CASES = [*MASKS, *LONG_WINDOWS, *LONG_MASKS, *SCORES, *SHAPES, *ROWS]
assert len({case.name for case in CASES}) == len(CASES)
