"""`qkv.parallel` over real processes: the contract grid, bits, bytes, and errors that are the same on all ranks."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from cases import CASES, Case, answer
from parallel import sharded
from parallel.ranks import Ranks, mesh
from parallel.sharded import LAYOUTS, exact, joined, one_process, upstream, whole
from peer import compute, gradient_terms
from torch import Tensor

import qkv
from qkv import Mask, parallel
from qkv.parallel.runs import even, zigzag
from qkv.scores import Draw, new_seed

Of = Callable[[int], Ranks]

GRID = [
    ("gather", 3, "ragged", torch.float32),
    ("heads", 2, "even", torch.float32),
    ("merge", 4, "zigzag", torch.float32),
]
"""in `make test`; all others in `make test-all`"""
FULL_GRID = [
    (scheme, ranks, layout, dtype)
    for scheme in ("gather", "heads", "merge")
    for ranks, layout in ((2, "ragged"), (3, "zigzag"), (3, "ragged"), (4, "even"), (4, "ragged"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if (scheme, ranks, layout, dtype) not in GRID
] + [
    ("gather", 8, "ragged", torch.float32),
    ("heads", 8, "ragged", torch.bfloat16),
    ("merge", 8, "even", torch.bfloat16),
]


def parameters(grid: Sequence[tuple[str, int, str, torch.dtype]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*one, marks=marks, id=f"{one[0]}-{one[1]}-{one[2]}-{str(one[3])[6:]}") for one in grid]


@cache
def references(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """The results in fp64, what torch makes of them in ``dtype``, and what rounding may add to a gradient."""
    leaves = {name: leaf.requires_grad_() for name, leaf in case.inputs(dtype).items()}
    out = compute(case, leaves)
    found = torch.autograd.grad(out, list(leaves.values()), upstream(case, dtype), allow_unused=True)
    theirs = {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    terms = gradient_terms(case, {name: leaf.detach() for name, leaf in leaves.items()}, upstream(case, dtype))
    want, out = exact(case, dtype), out.detach()
    if dtype is torch.float64:  # where the formula is what torch computes, and has no error
        want |= {"out": answer(case, dtype).out, "lse": answer(case, dtype).lse}
    error = (out.double() - want["out"]).abs().max() / want["out"].abs().max().clamp(min=1e-300)
    relative = max(torch.finfo(dtype).eps, float(error))
    rounding = {f"d_{name}": relative * float(term.abs().max()) for name, term in terms.items()}
    return want, {"out": out.detach(), **theirs}, rounding


def promised(case: Case, scheme: str, ranks: int, layout: str, dtype: torch.dtype) -> Sequence[str]:
    """The results that have the bits of one process."""
    runs = [run for runs in LAYOUTS[layout](case.lq, ranks) for run in runs]
    if scheme == "merge" or dtype == torch.float64:
        return ()
    if scheme == "heads":
        return ("out", "lse", "d_q", "d_k", "d_v") if case.kv_heads % ranks == 0 else ()
    return ("out", "lse", "d_q") if all(run.stop - run.start > 1 for run in runs) else ()


@pytest.mark.parametrize(
    ("scheme", "count", "layout", "dtype"), parameters(GRID) + parameters(FULL_GRID, pytest.mark.long)
)
def test_every_case_over_ranks(ranks: Of, scheme: str, count: int, layout: str, dtype: torch.dtype) -> None:
    results = ranks(count).run(sharded.solve_all, [case.name for case in CASES], dtype, scheme, layout)
    wrong: list[str] = []
    for index, case in enumerate(CASES):
        got = whole(case, [of_rank[index] for of_rank in results], layout)
        want, theirs, rounding = references(case, dtype)
        ours = one_process(case, dtype)
        names = promised(case, scheme, count, layout, dtype)
        for name, value in got.items():
            what = f"{case.name}, {name}"
            if name in names:
                if not torch.equal(value, ours[name]):
                    wrong.append(f"{what}: other bits than one process")
                continue
            # Of one process where torch has no lse.
            peer = theirs[name] if name in theirs else ours[name]
            allowance = rounding.get(name, 0.0) * (1 + (name != "d_q"))
            try:
                assert_within_budget(value, want[name], peer, what, allowance)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


LONG = 4400
"""beyond three times the period at which keys repeat for the kernel"""
MASKS = {
    "causal": Mask.causal(),
    "window": Mask.causal(window=700),
    "sliding": Mask.sliding(600),
    "sinks": Mask.causal(window=300, sink_tokens=5),
    "sinks, alibi": Mask.causal(window=300, sink_tokens=5),
    "documents": Mask.causal() & Mask.documents(torch.arange(LONG)[None] // 950),
    "chunks": Mask.causal() & Mask.chunked(1500),
}
RUNS = {
    "even": even(LONG, 3),
    "zigzag": zigzag(LONG, 3),
    "ragged": (((3001, 4400),), (), ((0, 17), (1741, 3001), (17, 1741))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("name", MASKS)
def test_gather_has_the_bits_of_one_process(ranks: Of, name: str, runs: str, dtype: torch.dtype) -> None:
    options = {"alibi": torch.tensor([0.001, 0.01, 0.1, 1.0])} if "alibi" in name else {}
    results = ranks(3).run(_solve_long, MASKS[name], RUNS[runs], dtype, options)
    *inputs, towards = sharded.long_inputs(dtype, LONG)
    leaves = [x.requires_grad_() for x in inputs]
    out = qkv.attention(*leaves, mask=MASKS[name], **options)
    d_q, d_k, d_v = torch.autograd.grad(out, leaves, towards)
    found = {key: joined([result[key] for result in results], RUNS[runs]) for key in results[0]}
    assert torch.equal(found["out"], out) and torch.equal(found["d_q"], d_q)
    for key, want in (("d_k", d_k), ("d_v", d_v)):
        # The sum of what three ranks have rounded, of sums of up to LONG terms in another order.
        rounding = 4 * torch.finfo(dtype).eps + LONG**0.5 * torch.finfo(torch.float32).eps
        assert float((found[key] - want).double().norm()) <= rounding * float(want.double().norm())


def _solve_long(mask: Mask, layout: Any, dtype: torch.dtype, options: dict[str, Tensor]) -> dict[str, Tensor]:
    return sharded.solve_long(mask, layout, dtype, "gather", **options)


@pytest.mark.parametrize("scheme", ["gather", "heads", "merge"])
def test_dropout_drops_the_weights_that_one_process_drops(ranks: Of, scheme: str) -> None:
    draw = Draw(torch.tensor([7]))
    *inputs, towards = sharded.long_inputs(torch.float32, 201)
    for mask in (Mask.causal(window=30, sink_tokens=3), Mask.full()):
        layout = LAYOUTS["ragged"](201, 3)
        results = ranks(3).run(solve_with_dropout, mask, layout, scheme, draw)
        leaves = [x.requires_grad_() for x in inputs]
        out = qkv.attention(*leaves, mask=mask, dropout=0.3, draw=draw)
        want = dict(zip(("d_q", "d_k", "d_v"), torch.autograd.grad(out, leaves, towards), strict=True)) | {"out": out}
        for name, value in want.items():
            got = joined([result[name] for result in results], layout)
            torch.testing.assert_close(got, value.detach(), rtol=1e-4, atol=1e-4)
            assert scheme == "merge" or name in ("d_k", "d_v") or torch.equal(got, value)


def solve_with_dropout(mask: Mask, layout: Any, scheme: str, draw: Draw) -> dict[str, Tensor]:
    return sharded.solve_long(mask, layout, torch.float32, scheme, dropout=0.3, draw=draw)


def _drawn(rows: int) -> Tensor:
    """Values of a rank whose generator is in a state of its own; key j has the value of weight j."""
    tokens = parallel.Tokens.even(rows, mesh())
    torch.manual_seed(tokens.rank)
    q, v = torch.zeros(1, 1, rows, 8), torch.eye(rows)[None, None]
    own = [tokens.take(x, dim=2) for x in (q, q, v)]
    found = parallel.attention(*own, tokens, dropout=0.5, scheme="heads")
    return tokens.join(found, dim=2)[0, 0]


def test_ranks_without_a_draw_take_one_from_the_first(ranks: Of) -> None:
    first, second, third = ranks(3).run(_drawn, 30)
    torch.manual_seed(0)
    q, v = torch.zeros(1, 1, 30, 8), torch.eye(30)[None, None]
    want = qkv.attention(q, q, v, dropout=0.5, draw=Draw(new_seed()))[0, 0]
    assert 0.3 < (want == 0).float().mean() < 0.7
    for found in (first, second, third):
        assert torch.equal(found, want)


def test_gradients_are_the_same_bits_each_time(ranks: Of) -> None:
    for scheme in ("gather", "heads", "merge"):
        arguments = (MASKS["causal"], RUNS["zigzag"], torch.bfloat16, scheme)
        first, second = (ranks(3).run(sharded.solve_long, *arguments) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("scheme", ["gather", "heads", "merge"])
@pytest.mark.parametrize("name", ["causal", "window", "sinks", "documents"])
def test_bytes_are_those_of_the_plan(ranks: Of, name: str, scheme: str) -> None:
    for runs in (RUNS["even"], RUNS["ragged"]):
        for found in ranks(3).run(sharded.count_bytes, MASKS[name], runs, scheme):
            assert len(found["forward"]) == (1 if scheme == "gather" else 2)
            assert sum(found["forward"]) == found["explained"]
            assert len(found["backward"]) == len(found["forward"])


def test_a_backward_pass_sends_back_what_the_forward_pass_has_sent(ranks: Of) -> None:
    for scheme in ("gather", "heads"):
        results = ranks(3).run(sharded.count_bytes, MASKS["causal"], RUNS["even"], scheme)
        assert sum(sum(one["forward"]) for one in results) == sum(sum(one["backward"]) for one in results)


def test_documents_that_no_cut_divides_need_no_collective(ranks: Of) -> None:
    mask = Mask.documents(torch.arange(90)[None] // 30)
    for found in ranks(3).run(sharded.count_bytes, mask, even(90, 3), "gather"):
        assert found == {"forward": [], "backward": [], "explained": 0, "chosen": "gather"}


def _call(change: str) -> str:
    """The message of a call that is wrong on all ranks."""
    ranks = mesh()
    tokens = parallel.Tokens.even(20, ranks)
    options: dict[str, Any] = {"mask": Mask.causal()}
    q, k, v = (tokens.take(torch.randn(1, heads, 20, 8), dim=2) for heads in (4, 2, 2))
    if change == "rows":
        q = q[:, :, 1:]
    elif change == "key rows":
        k, v = k[:, :, 1:], v[:, :, 1:]
    elif change == "value rows":
        v = v[:, :, 1:]
    elif change == "value rows of whole keys":
        k, v, options["key_tokens"] = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 8, 8), parallel.WHOLE
    elif change == "scale rows":
        k, v = k.to(torch.int8), v.to(torch.int8)
        options |= {"k_scale": torch.ones(1, 2, 20), "v_scale": torch.ones(1, 2, 20)}
    elif change == "scale type":
        options["k_scale"] = 1.0
    elif change == "key layout":
        options["key_tokens"] = parallel.Tokens.even(21, ranks)
        k, v = (options["key_tokens"].take(torch.randn(1, 2, 21, 8), dim=2) for _ in range(2))
    elif change == "scheme":
        options["scheme"] = "ring"
    elif change == "no layout":
        tokens = 20  # type: ignore[assignment]
    elif change == "no key layout":
        options["key_tokens"] = 20
    elif change == "whole keys by heads":
        options |= {"key_tokens": parallel.WHOLE, "scheme": "heads"}
    elif change == "documents":
        options["mask"] = Mask.documents(torch.zeros(1, 7, dtype=torch.int64))
    elif change == "bias":
        options["bias"] = torch.zeros(7, 7)
    elif change == "backend":
        options["backend"] = "fast"
    elif change == "pages":
        options["pages"] = 3
    elif change == "dimensions":
        q = q[0]
    elif change == "type":
        q = None  # type: ignore[assignment]
    elif change == "transform":
        torch.func.vmap(lambda q: parallel.attention(q, k, v, tokens))(q[None])
    parallel.attention(q, k, v, tokens, **options)
    return "none"


MESSAGES = {
    "rows": r"q must have the [67] rows that the layout gives rank \d of 3; got [56]. Use tokens.take\(q, dim=2\)",
    "key rows": r"k must have the [67] rows that the layout gives rank \d of 3; got [56]",
    "value rows": r"v must have the [67] rows that k has on this rank, in dimension 2; got shape \(1, 2, [56], 8\)",
    "value rows of whole keys": r"v must have the 9 rows that k has on this rank, in dimension 2; got .*8, 8\)",
    "scale rows": r"k_scale must have the [67] rows that k has on this rank, in dimension 2; got shape \(1, 2, 20\)",
    "scale type": r"k_scale must be a tensor; got float",
    "key layout": r"Mask.causal\(\) depends on the positions of queries, so 20 queries with 21 keys need an offset",
    "scheme": r"scheme must be 'auto' or one of 'gather', 'heads', 'merge'; got 'ring'",
    "no layout": r"tokens must be a qkv.parallel.Tokens; got int. Use Tokens.even\(n, mesh\)",
    "no key layout": r"key_tokens must be a qkv.parallel.Tokens, parallel.WHOLE or None; got int",
    "whole keys by heads": r"scheme must be 'auto' or 'gather' for keys that each rank has whole; got 'heads'",
    "documents": r"mask's documents ids must fit \(1, 20\); got shape \(1, 7\)",
    "bias": r"bias must broadcast to \(1, 4, 20, 20\); got shape \(7, 7\)",
    "backend": r"backend must be 'auto' or one of .*; got 'fast'",
    "pages": r"pages must be None in a call over ranks; pass the keys of each rank",
    "dimensions": r"q, k and v must have 4 dimensions",
    "type": r"q must be a tensor; got NoneType",
    "transform": r"a call over ranks has no functorch transforms",
}


def test_errors_are_raised_on_all_ranks_before_anything_is_sent(ranks: Of) -> None:
    """One that was raised on some would leave the others at a collective, until it times out."""
    for change, message in MESSAGES.items():
        for one in ranks(3).refused(_call, change):
            assert one.message.startswith("parallel.attention: ")
            assert re.search(message, one.message), f"{change}: {one.message}"
