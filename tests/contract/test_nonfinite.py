"""DESIGN's table of non-finite numbers, computed for all pairs of queries and keys and compared with every backend.

Results must be NaN or inf where the table says so. All others must have the bits of a call without the non-finite
number, and with incoming gradients of 0 for the rows that see it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from budget import assert_within_budget
from cases import Case, answer
from oracle import Rule
from peer import peer, visible
from solver import Solver
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import qkv
from qkv import Mask
from qkv.backends import BACKENDS, flex
from qkv.problem import make_problem

NAN, INF = torch.nan, torch.inf
NAMES = [backend.NAME for backend in BACKENDS]

KEEP = [[j % 4 != 2 for j in range(11)], [False] * 11]
IDS = [[0] * 4 + [1] * 7, [2] * 5 + [3] * 3 + [2] * 3]
ALLOW = torch.rand(2, 4, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.4
SMALL = Case("full", lq=11, lk=11, heads=4, width=5, value_width=3)
MASKS = [
    SMALL,
    replace(SMALL, name="causal", mask=Mask.causal, rule=lambda: Rule(right=0)),
    replace(SMALL, name="blank rows", mask=Mask.causal, rule=lambda: Rule(right=0), offset=-4),
    replace(
        SMALL,
        name="window and sink tokens",
        mask=lambda: Mask.causal(3, sink_tokens=2),
        rule=lambda: Rule(left=2, right=0, sink_tokens=2),
    ),
    replace(SMALL, name="band", mask=lambda: Mask.band(2, 1), rule=lambda: Rule(left=2, right=1)),
    replace(SMALL, name="padding", mask=lambda: Mask.padding(torch.tensor(KEEP)), rule=lambda: Rule(keep=KEEP)),
    replace(
        SMALL,
        name="lengths, causal",
        mask=lambda: Mask.padding(torch.tensor([8, 0])) & Mask.causal(),
        rule=lambda: Rule(right=0, keep=[[j < length for j in range(11)] for length in (8, 0)]),
    ),
    replace(SMALL, name="documents", mask=lambda: Mask.documents(torch.tensor(IDS)), rule=lambda: Rule(documents=IDS)),
    replace(SMALL, name="dense", mask=lambda: Mask.dense(ALLOW), rule=lambda: Rule(allow=ALLOW)),
]
ROWS = [
    replace(MASKS[1], name="causal, rows", lq=7, offset=(3, -2)),
    replace(MASKS[3], name="window and sink tokens, rows", lq=7, offset=(-1, 4)),
    replace(MASKS[7], name="documents, rows", lq=7, offset=(0, 4)),
    replace(MASKS[2], name="every score, rows", lq=7, offset=(3, -2), bias_shape=(4, 1, 11), alibi=True, sinks=True),
]
LONG = replace(SMALL, batch=1, heads=2, kv_heads=1)
SHAPES = [
    replace(SMALL, name="one query", lq=1),
    replace(MASKS[3], name="one query, window", lq=1, offset=8),
    replace(MASKS[5], name="one query, padding", lq=1),
    replace(MASKS[2], name="one blank query, sinks", lq=1, offset=-1, sinks=True),
    replace(
        SMALL,
        name="rows beyond a window, sinks",
        mask=lambda: Mask.causal(3),
        rule=lambda: Rule(left=2, right=0),
        lk=4,
        sinks=True,
    ),
    replace(LONG, name="chunk", mask=Mask.causal, rule=lambda: Rule(right=0), lq=70, lk=150, offset=80),
    replace(LONG, name="blocks", mask=lambda: Mask.causal(6), rule=lambda: Rule(left=5, right=0), lq=300, lk=300),
]
SCORES = [
    replace(case, name=f"{case.name}, {name}", **options)
    for case in (MASKS[0], MASKS[2], MASKS[7])
    for name, options in {
        "softcap": {"softcap": 1.5},
        "scale of 0": {"scale": 0.0},
        "negative scale": {"scale": -0.4},
        "bias": {"bias_shape": (2, 4, 11, 11)},
        "bias of keys": {"bias_shape": (4, 1, 11)},
        "bias of -inf": {"bias_shape": (1, 4, 11, 11), "bias_hides": True},
        "alibi": {"alibi": True},
        "sinks": {"sinks": True},
        "every score": {"softcap": 2.0, "bias_shape": (4, 11, 11), "alibi": True, "sinks": True},
    }.items()
]
CASES = [*MASKS, *ROWS, *SHAPES, *SCORES]
OF_FLEX = (MASKS[0], MASKS[2], MASKS[7])
"""a few, since FlexAttention recompiles at each call"""


class CallVariant(NamedTuple):
    """A backend, with or without the lse, and the tensors that need a gradient."""

    backend: str
    wants_lse: bool
    learned: tuple[str, ...]
    """the tensors that need a gradient"""

    def __call__(self, case: Case, inputs: dict[str, Tensor]) -> list[Tensor]:
        with Solver(flex).at_work():
            if self.wants_lse:
                return [*qkv.attention_with_lse(**inputs, **case.options(), backend=self.backend)]
            return [qkv.attention(**inputs, **case.options(), backend=self.backend)]


def call_variants(case: Case, dtype: torch.dtype) -> Iterator[CallVariant]:
    """Every call of each backend that can solve the case, and ``auto`` without a gradient."""
    inputs = case.inputs(dtype)
    yield CallVariant("auto", False, ())
    for backend in BACKENDS:
        if backend.NAME == "flex" and case not in OF_FLEX:
            continue
        if backend.NAME == "reference" and dtype != torch.float32:
            continue  # it computes all dtypes alike, in fp32
        for wants_lse in (False, True):
            for learned in (tuple(inputs), ("q", "k", "v"), ()):
                call = {name: x.clone().requires_grad_(name in learned) for name, x in inputs.items()}
                if not backend.why_not(make_problem("test", **call, **case.options(), wants_lse=wants_lse)):
                    yield CallVariant(backend.NAME, wants_lse, learned)
                    break


VARIANTS = [
    pytest.param(case, dtype, variant, id=f"{variant.backend}{'-lse' * variant.wants_lse}-{str(dtype)[6:]}-{case.name}")
    for case in CASES
    for dtype in ([torch.float32, torch.bfloat16] if case in SHAPES else [torch.float32])
    for variant in call_variants(case, dtype)
]


def test_every_backend_is_compared_with_and_without_lse_and_gradients() -> None:
    variants = [parameters.values[2] for parameters in VARIANTS]
    found = {(variant.backend, variant.wants_lse, bool(variant.learned)) for variant in variants}
    missing = {(name, lse, grad) for name in NAMES for lse in (False, True) for grad in (True,)} - found
    assert missing == {("flex", False, True), ("flex", True, True)}
    assert {("flex", False, False), ("flex", True, False), ("auto", False, False)} <= found


class Nonfinite(NamedTuple):
    """One non-finite number: ``tensor[where] = value``."""

    tensor: str
    where: tuple[int, ...]
    value: float


def nonfinite_numbers(case: Case, variant: CallVariant) -> Iterator[Nonfinite]:
    """One number in each of the tensors and incoming gradients, at early and at late keys and rows."""
    heads = case.heads
    # inf and -inf have the same effect on the output, but not on the lse.
    for value in (-INF,) if variant.backend == "flex" else (NAN, INF, -INF) if variant.wants_lse else (NAN, -INF):
        for j in (0, case.lk // 2):
            yield Nonfinite("k", (0, 0, j, 1), value)
            yield Nonfinite("v", (0, 0, j, 1), value)
        for i in sorted({0, max(0, case.lq - 2)}):
            yield Nonfinite("q", (0, 1, i, 1), value)
            if variant.learned:
                yield Nonfinite("d_out", (0, 1, i, 1), value)
            if variant.learned and variant.wants_lse:
                yield Nonfinite("d_lse", (0, heads - 1, i), value)
        if value != -INF and case.bias_shape is not None:
            yield Nonfinite("bias", (0,) * len(case.bias_shape), value)
            yield Nonfinite("bias", tuple(size // 2 for size in case.bias_shape), value)
        if value != -INF and case.sinks:
            yield Nonfinite("sink_logits", (1,), value)
        if case.alibi and value == NAN:
            yield Nonfinite("alibi", (1,), value)


def adds_nan(score: Tensor) -> Tensor:
    return score.isnan() | (score == INF)


class Law(NamedTuple):
    seen: Tensor
    """(B, H, Lq, Lk)"""
    nan: Tensor
    """(B, H, Lq), rows whose output and lse are NaN"""
    values: Tensor
    """(B, H, Lq, Dv) of 0, inf, -inf or NaN: what values add to the other rows"""


@cache
def law(case: Case, dtype: torch.dtype, nonfinite: Nonfinite) -> Law:
    """The table of DESIGN, line by line, for the inputs with a non-finite number."""
    inputs, seen = with_nonfinite(case.inputs(dtype), nonfinite, nonfinite.value), visible(case)
    q, k, v = (inputs[name].double() for name in "qkv")
    group = case.heads // case.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = case.width**-0.5 if case.scale is None else case.scale
    raw = scale * (q[:, :, :, None] * k[:, :, None]).sum(-1)
    nan = (seen & ~raw.isfinite()).any(-1)
    weight = torch.ones_like(raw)
    if "bias" in inputs:
        bias = inputs["bias"].double().expand(raw.shape)
        nan = nan | (seen & adds_nan(bias)).any(-1)
        weight = weight.masked_fill(bias == -INF, 0)
    if "alibi" in inputs:
        nan = nan | (seen.any(-1) & inputs["alibi"].isnan()[:, None])
    if "sink_logits" in inputs:
        nan = nan | adds_nan(inputs["sink_logits"])[:, None]
    terms = weight[..., None] * torch.where(v.isfinite(), 0, v)[:, :, None]
    return Law(seen, nan, torch.where(seen[..., None], terms, 0).sum(-2))


def with_nonfinite(tensors: dict[str, Tensor], nonfinite: Nonfinite, value: float) -> dict[str, Tensor]:
    if nonfinite.tensor not in tensors:
        return tensors
    changed = tensors[nonfinite.tensor].clone()
    changed[nonfinite.where] = value
    return {**tensors, nonfinite.tensor: changed}


def run(
    case: Case, variant: CallVariant, inputs: dict[str, Tensor], from_above: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results, and a gradient for each tensor of ``variant.learned``."""
    leaves = {name: x.detach().clone().requires_grad_(name in variant.learned) for name, x in inputs.items()}
    results = variant(case, leaves)
    if not variant.learned:
        return results, {}
    above = list(from_above.values())[: len(results)]
    found = torch.autograd.grad(results, [leaves[name] for name in variant.learned], above)
    return [result.detach() for result in results], dict(zip(variant.learned, found, strict=True))


def assert_same(got: Tensor, want: Tensor, where: Tensor, what: object) -> None:
    where = where.expand(got.shape)
    assert torch.equal(got[where], want[where]), what


@pytest.mark.parametrize(("case", "dtype", "variant"), VARIANTS)
def test_nonfinite_numbers_follow_the_table(case: Case, dtype: torch.dtype, variant: CallVariant) -> None:
    inputs = case.inputs(dtype)
    generator = torch.Generator().manual_seed(3)
    shape = (case.batch, case.heads, case.lq)
    above = {
        "d_out": torch.randn(*shape, case.value_width, generator=generator).to(dtype),
        "d_lse": torch.randn(*shape, generator=generator),
    }
    for name in above:
        above[name][:, :, 1::3] = 0  # rows without a gradient from above
    clean_runs = {}  # the same for NaN as for inf in the same place, as long as the same rows are bad
    for nonfinite in nonfinite_numbers(case, variant):
        what = (case.name, variant, nonfinite)
        given, given_above = (with_nonfinite(tensors, nonfinite, nonfinite.value) for tensors in (inputs, above))
        results, gradients = run(case, variant, given, given_above)
        found = law(case, dtype, nonfinite)

        # A row is bad in the backward pass where its gradient is, or where it has one and its result is not finite.
        used = above if variant.wants_lse else {"d_out": above["d_out"]}
        used_given = [given_above[name].reshape(*shape, -1) for name in used]
        columns = torch.cat([column.float() for column in used_given], -1)
        bad = ~columns.isfinite().all(-1) | ((columns != 0).any(-1) & (found.nan | ~found.values.isfinite().all(-1)))
        of_clean = (nonfinite.tensor, nonfinite.where, *bad.flatten().tolist())
        if of_clean not in clean_runs:
            clean_above = {name: x.masked_fill(bad.view(*shape, *[1] * (x.dim() - 3)), 0) for name, x in above.items()}
            clean_runs[of_clean] = run(case, variant, with_nonfinite(inputs, nonfinite, 0.5), clean_above)
        clean_results, clean = clean_runs[of_clean]

        out = results[0].float()
        assert out[found.nan].isnan().all(), what
        rows = ~found.nan[..., None]
        nonfinite_values = ~found.values.isfinite()
        assert torch.equal(
            out[rows & nonfinite_values].nan_to_num(nan=7.0),
            found.values[rows & nonfinite_values].float().nan_to_num(nan=7.0),
        ), what
        assert_same(results[0], clean_results[0], rows & ~nonfinite_values, what)
        if variant.wants_lse:
            assert results[1][found.nan].isnan().all(), what
            assert_same(results[1], clean_results[1], ~found.nan, what)
        if not gradients:
            continue

        pairs = found.seen & bad[..., None]
        sees, seen = pairs.any(-1), pairs.any(-2).unflatten(1, (case.kv_heads, -1)).any(2)
        by_nan = (found.seen & (bad & found.nan)[..., None]).any(-2).unflatten(1, (case.kv_heads, -1)).any(2)
        must = {"q": sees[..., None], "k": seen[..., None], "v": by_nan[..., None]}
        may = {**must, "v": seen[..., None]}
        if "bias" in gradients:
            want = inputs["bias"].shape
            must["bias"] = may["bias"] = pairs.float().sum_to_size((1,) * (4 - len(want)) + want).view(want) > 0
        if "alibi" in gradients:
            must["alibi"] = may["alibi"] = sees.any(0).any(-1)
        if "sink_logits" in gradients:
            must["sink_logits"], may["sink_logits"] = sees.any(0).any(-1), bad.any(0).any(-1)
        for name, gradient in gradients.items():
            must_here, may_here = (flags[name].expand(gradient.shape) for flags in (must, may))
            assert not gradient[must_here].isfinite().any(), (what, name)
            assert_same(gradient, clean[name], ~may_here, (what, name))
        if nonfinite.tensor == "d_out":
            channel = gradients["v"][..., nonfinite.where[-1]]
            assert not channel[seen].isfinite().any(), what


def learned(case: Case) -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in case.inputs(torch.float32).items()}


def solves(name: str, case: Case, inputs: dict[str, Tensor]) -> bool:
    (backend,) = (backend for backend in BACKENDS if name == backend.NAME)
    return not backend.why_not(make_problem("test", **inputs, **case.options(), wants_lse=True))


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("case", MASKS, ids=str)
def test_a_sink_logit_of_minus_infinity_equals_none(case: Case, backend: str) -> None:
    inputs = learned(case)
    sinks = torch.tensor([0.3, -INF, -INF, 0.1]).requires_grad_()
    with_sinks = qkv.attention_with_lse(**inputs, **case.options(), sink_logits=sinks, backend=backend)
    without = qkv.attention_with_lse(**inputs, **case.options(), backend=backend)
    for got, want in zip(with_sinks, without, strict=True):
        torch.testing.assert_close(got[:, 1:3], want[:, 1:3])
    masked_rows = ~visible(case).any(-1).expand(case.batch, case.heads, case.lq)
    assert not with_sinks.out[masked_rows].any()
    assert (with_sinks.lse[masked_rows] == sinks[:, None].expand(masked_rows.shape)[masked_rows]).all()
    grads = torch.autograd.grad([x.sum() for x in with_sinks], [*inputs.values(), sinks])
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[-1][1:3].any()
    assert not grads[0][masked_rows].any()


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_all_tensors_have_a_gradient_if_no_row_sees_a_key(backend: str) -> None:
    case = replace(MASKS[2], name="no row sees anything", offset=-20, bias_shape=(4, 1, 11), alibi=True, sinks=True)
    for wants_lse in (False, True):
        for names in (["q", "k", "v", "bias", "alibi"], ["q", "k", "v", "bias", "alibi", "sink_logits"]):
            inputs = {name: x for name, x in learned(case).items() if name in names}
            if backend == "sdpa" and (wants_lse or "sink_logits" in names):
                for name in ("bias", "alibi"):
                    inputs[name] = inputs[name].detach()
            if wants_lse:
                results = [*qkv.attention_with_lse(**inputs, **case.options(), backend=backend)][
                    : 2 - ("sink_logits" not in names)
                ]
            else:
                results = [qkv.attention(**inputs, **case.options(), backend=backend)]
            assert not results[0].any()
            leaves = [x for x in inputs.values() if x.requires_grad]
            grads = torch.autograd.grad([x.sum() for x in results], leaves)
            for leaf, grad in zip(leaves, grads, strict=True):
                wanted = case.batch * case.lq if leaf is inputs.get("sink_logits") and wants_lse else 0
                assert (grad == wanted).all()


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("mask", [Mask.full(), Mask.causal()], ids=repr)
def test_a_row_whose_every_bias_is_minus_infinity_is_0_with_gradient_0(mask: Mask, backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 7, 4).requires_grad_() for _ in range(3))
    bias = torch.randn(7, 7)
    bias[3] = -INF
    out, lse = qkv.attention_with_lse(q, k, v, bias=bias, mask=mask, backend=backend)
    assert not out[:, :, 3].any() and (lse[:, :, 3] == -INF).all() and lse[:, :, 4].isfinite().all()
    row = torch.autograd.grad(out[:, :, 3].sum() + lse[:, :, 3].sum(), (q, k, v))
    assert not any(grad.any() for grad in row)


SCALES = [
    replace(case, name=f"{case.name}, scale {scale}", scale=scale, sinks=sinks, value_width=case.width)
    for case in MASKS
    for scale, sinks in ((0.0, False), (-0.4, True))
]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in SCALES
        for name in (*NAMES, "auto")
        if name != "flex" or case.name.startswith("blank rows")
    ],
    ids=str,
)
def test_any_finite_scale_is_as_near_the_oracle_as_torch(case: Case, name: str) -> None:
    for dtype in (torch.float32,) if name == "flex" else (torch.float32, torch.float64):
        inputs = case.inputs(dtype)
        want, near = answer(case, dtype), peer(case, dtype)
        if name == "auto" or solves(name, case, inputs):
            out, lse = qkv.attention_with_lse(**inputs, **case.options(), backend=name)
            assert_within_budget(out, want.out, near.out, case.name)
            assert_within_budget(lse, want.lse, near.lse, case.name)
            out = qkv.attention(**inputs, **case.options(), backend=name)
            assert_within_budget(out, want.out, near.out, case.name)


@pytest.mark.parametrize("scale", [NAN, INF, -INF])
def test_a_nonfinite_scale_is_refused(scale: float) -> None:
    q = torch.randn(1, 1, 3, 8)
    calls: list[Callable[..., object]] = [
        qkv.attention,
        qkv.attention_with_lse,
        qkv.explain,
        lambda q, k, v, scale: qkv.attention_weights(q, k, scale=scale),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"scale must be a finite number, or None for 1 / sqrt\(width\); got {scale}"
        ):
            call(q, q, q, scale=scale)


@pytest.mark.parametrize("case", [*MASKS, *SCORES], ids=str)
def test_attention_weights_follow_the_table(case: Case) -> None:
    inputs = {name: x for name, x in case.inputs(torch.float32).items() if name != "v"}
    for nonfinite in nonfinite_numbers(case, CallVariant("", False, ())):
        if nonfinite.tensor == "v":
            continue
        given, clean = (with_nonfinite(inputs, nonfinite, value) for value in (nonfinite.value, 0.5))
        nan = law(case, torch.float32, nonfinite).nan
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        weights = qkv.attention_weights(**leaves, **case.options())
        assert weights[nan].isnan().all()
        assert torch.equal(weights[~nan], qkv.attention_weights(**clean, **case.options())[~nan])
        # Of the rows that are not NaN alone: whatever the others see, it has no part in this.
        for grad in torch.autograd.grad(weights[~nan].square().sum(), list(leaves.values())):
            assert grad.isfinite().all(), nonfinite


def test_merged_pieces_follow_the_table() -> None:
    q, k, v = (torch.randn(1, 1, 6, 8) for _ in range(3))
    k[0, 0, 1, 2], v[0, 0, 4, 3] = -INF, INF
    halves = [
        qkv.attention_with_lse(q, k[:, :, part], v[:, :, part], mask=Mask.causal(), offset=-start, backend="reference")
        for start, part in ((0, slice(0, 3)), (3, slice(3, 6)))
    ]
    merged = qkv.merge(halves)
    whole = qkv.attention_with_lse(q, k, v, mask=Mask.causal(), backend="reference")
    torch.testing.assert_close(merged, whole, equal_nan=True)
    assert merged.out[0, 0, 1:].isnan().all() and merged.out[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("wanted", ["out", "lse"])
@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_gradients_of_merged_pieces_follow_the_table(backend: str, wanted: str) -> None:
    q, k, v = (torch.randn(1, 1, 6, 8) for _ in range(3))
    k[0, 0, 1, 2] = torch.nan  # rows 1 to 5 see it

    def gradients(row: int, part: slice) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        pieces = [
            qkv.attention_with_lse(
                leaves[0], *(x[:, :, a:b] for x in leaves[1:]), mask=Mask.causal(), offset=-a, backend=backend
            )
            for a, b in ((0, 3), (3, 6))
        ]
        getattr(qkv.merge(pieces), wanted)[:, :, row].sum().backward()
        return [x.grad[:, :, part] for x in leaves if x.grad is not None]

    assert all(grad.isfinite().all() for grad in gradients(0, slice(0, 6)))
    for grad in gradients(4, slice(0, 5))[1:]:
        assert grad.isnan().any(dim=-1).all()
    assert all(grad[:, :, -1].isfinite().all() for grad in gradients(4, slice(0, 6)))


def traced(call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)


def recorded(call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The operators of a call on harmless numbers, run on these."""
    program = make_fx(call)(*(torch.ones_like(x) for x in inputs))
    return program(*inputs)


def batched(call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = torch.vmap(call)(*(torch.stack([torch.ones_like(x), x]) for x in inputs))
    return tuple(x[1] for x in found)


COMPILED = [
    ("full", "reference"),
    ("blank rows", "sdpa"),
    ("window and sink tokens", "reference"),
    ("documents", "sdpa"),
]
"""Cases and backends that are compiled in `make test`, each of them once or more: it takes two seconds."""


def test_each_case_and_each_backend_is_compiled() -> None:
    assert [name for name, _ in COMPILED] == [MASKS[n].name for n in (0, 2, 3, 7)]
    assert {backend for _, backend in COMPILED} == {"sdpa", "reference"}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*should not be instantiated")  # torch's own
@pytest.mark.parametrize(
    ("case", "backend", "transform"),
    [
        pytest.param(
            case,
            backend,
            transform,
            id=f"{case.name}-{backend}-{transform.__name__}",
            marks=pytest.mark.long if transform is traced and (case.name, backend) not in COMPILED else (),
        )
        for case in (MASKS[n] for n in (0, 2, 3, 7))
        for backend in ("sdpa", "reference")
        for transform in (traced, recorded, batched)
    ],
)
def test_the_table_holds_while_tracing_and_batching(
    case: Case, backend: str, transform: Callable[..., tuple[Tensor, ...]]
) -> None:
    inputs = case.inputs(torch.float64)
    inputs["k"][0, 0, 5, 1], inputs["v"][0, 1, 2, 0], inputs["q"][1, 3, 8, 0] = -INF, NAN, INF

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return qkv.attention_with_lse(q, k, v, **case.options(), backend=backend)

    given = tuple(inputs.values())
    torch.testing.assert_close(transform(call, given), tuple(call(*given)), equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("case", [MASKS[n] for n in (0, 2, 3, 7)], ids=str)
def test_gradients_are_the_same_while_compiling(case: Case, backend: str) -> None:
    inputs = case.inputs(torch.float64)
    inputs["k"][0, 0, 5, 1], inputs["q"][1, 3, 8, 0] = -INF, INF
    above = torch.randn(case.batch, case.heads, case.lq, case.value_width, dtype=torch.float64)
    above[0, 2, 7], above[:, :, 1::3] = NAN, 0

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (qkv.attention(q, k, v, **case.options(), backend=backend) * above).sum()

    leaves = [x.requires_grad_() for x in inputs.values()]
    want = torch.autograd.grad(qkv.attention(*leaves, **case.options(), backend=backend), leaves, above)
    found = [torch.func.grad(loss, argnums=(0, 1, 2))(*inputs.values())]
    if (case.name, backend) in COMPILED:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found.append(torch.autograd.grad(compiled(*leaves), leaves))
    for got in found:
        for mine, theirs in zip(got, want, strict=True):
            nan = theirs.isnan()
            assert torch.equal(mine.isnan(), nan)
            torch.testing.assert_close(mine[~nan], theirs[~nan])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_compiled_function_takes_another_mask_and_offset() -> None:
    """The compiler then makes symbols of the bounds and the offset, which the backward pass needs as well."""
    torch.compiler.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Mask, offset: int) -> Tensor:
        return qkv.attention(q, k, v, mask=mask, offset=offset, backend="sdpa").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mask, offset in ((Mask.band(3, 0), 0), (Mask.band(5, 1), -4)):
        leaves = [torch.randn(2, heads, 11, 5, dtype=torch.float64) for heads in (4, 2, 2)]
        leaves[0][1, 3, 8, 0], leaves[1][0, 0, 5, 1] = INF, -INF
        leaves = [leaf.requires_grad_() for leaf in leaves]
        got, want = (torch.autograd.grad(run(*leaves, mask, offset), leaves) for run in (compiled, loss))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)
