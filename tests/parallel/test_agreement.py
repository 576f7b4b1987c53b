"""What ranks have in common, or else: layouts that are joined, `QKV_CHECK=1`, and ranks that are gone."""

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parallel import sharded
from parallel.ranks import Failure, Ranks, mesh, mesh_that_waits
from parallel.sharded import LAYOUTS, joined, ragged
from torch import Tensor

import qkv
from qkv import Mask, parallel
from qkv.parallel.runs import even

Of = Callable[[int], Ranks]


def _take_and_join(layout: Any) -> dict[str, Any]:
    tokens = parallel.Tokens(layout, mesh())
    whole = torch.arange(2 * tokens.length * 3.0).reshape(2, tokens.length, 3)
    own = tokens.take(whole).requires_grad_()
    found = tokens.join(own)
    (found * whole).sum().backward()
    return {
        "same": torch.equal(found, whole),
        "gradient": own.grad,
        "want": len(layout) * tokens.take(whole),
        "positions": tokens.positions,
        "rows": tokens.take(torch.arange(tokens.length), dim=0),
        "other dimension": torch.equal(tokens.join(tokens.take(whole.mT, dim=-1), dim=-1), whole.mT),
        "text": repr(tokens),
        "equal": tokens == parallel.Tokens(layout, mesh()) and hash(tokens) == hash(parallel.Tokens(layout, mesh())),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_join_is_the_inverse_of_take_and_adds_the_gradients_of_all_ranks(ranks: Of, name: str) -> None:
    for n in (1, 23):
        for found in ranks(3).run(_take_and_join, LAYOUTS[name](n, 3)):
            assert found["same"] and found["other dimension"] and found["equal"]
            assert torch.equal(found["gradient"], found["want"])
            assert torch.equal(found["positions"], found["rows"])
            assert found["text"].startswith(f"Tokens({n} over 3 ranks; 0: ")


def _join_kinds() -> None:
    tokens = parallel.Tokens(ragged(17, 3), mesh())
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.complex64):
        whole = (torch.arange(17 * 3) % 2).reshape(17, 3).to(dtype)
        found = tokens.join(tokens.take(whole, dim=0), dim=0)
        assert found.dtype is dtype and torch.equal(found, whole), dtype


def test_tensors_of_every_kind_are_joined(ranks: Of) -> None:
    ranks(3).run(_join_kinds)


def _large_and_small() -> Tensor:
    """The gradient of a number that the first rank wants 256 times, and each other once."""
    tokens = parallel.Tokens.even(3, mesh())
    own = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (tokens.join(own) * (256 if tokens.rank == 0 else 1)).sum().backward()
    assert own.grad is not None
    return own.grad


def test_gradients_of_ranks_are_added_in_fp32(ranks: Of) -> None:
    """In bf16, 256 and 1 are 256."""
    for found in ranks(3).run(_large_and_small):
        assert found.item() == 258


def _best(n: int, mask: Mask | None) -> tuple[tuple[int, int], ...]:
    return parallel.Tokens.best(n, mesh(), mask).runs[0]


def test_best_balances_what_the_mask_shows(ranks: Of) -> None:
    for mask, want in (
        (Mask.causal(), ((0, 10), (50, 60))),
        (None, ((0, 20),)),
        (Mask.causal(window=8), ((0, 20),)),
        (Mask.sliding(window=8), ((0, 20),)),
        (Mask.causal() & Mask.chunked(5), ((0, 20),)),
    ):
        assert ranks(3).run(_best, 60, mask) == [want] * 3


def _wrong_layout(change: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    tokens = parallel.Tokens.even(10, mesh())
    if change == "mesh":
        parallel.Tokens.even(10, mesh().get_group())  # type: ignore[arg-type]
    if change == "dimensions":
        parallel.Tokens.even(10, init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b")))
    if change == "count":
        parallel.Tokens.even(2.5, mesh())  # type: ignore[arg-type]
    if change == "ranks":
        parallel.Tokens(even(10, 2), mesh())
    if change == "rows":
        tokens.take(torch.zeros(2, 9))
    if change == "joined rows":
        tokens.join(torch.zeros(2, 9))
    if change == "mask":
        parallel.Tokens.best(10, mesh(), torch.ones(3))  # type: ignore[arg-type]
    if change == "merge":
        parallel.merge(torch.zeros(3), mesh())  # type: ignore[arg-type]
    if change == "merged over":
        parallel.merge((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)), "cp")
    if change == "merged over two dimensions":
        two = init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b"))
        parallel.merge((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)), two)
    if change in ("DTensor", "DTensor to join"):
        from torch.distributed.tensor import DTensor, Replicate

        own = DTensor.from_local(tokens.take(torch.zeros(1, 10, 2, 8)), mesh(), [Replicate()])
        if change == "DTensor":
            parallel.attention(*[own.transpose(1, 2)] * 3, tokens)
        tokens.join(own)
    if change == "merged integers":
        parallel.merge((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, dtype=torch.int64)), mesh())
    if change == "merged shapes":
        parallel.merge((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4)), mesh())
    raise AssertionError


MESSAGES = {
    "mesh": r'Tokens.even: mesh must be a torch.distributed DeviceMesh; got ProcessGroup. Use init_device_mesh\("cpu"',
    "dimensions": r"Tokens.even: mesh must have one dimension; got 2. Take one of them by its name",
    "count": r"Tokens.even: n must be an int, a number of tokens; got 2.5",
    "ranks": r"Tokens: runs must be .* of the mesh, 3; got those of 2",
    "rows": r"Tokens.take: the layout is of 10 tokens, so x must have as many in dimension 1; got shape \(2, 9\)",
    "joined rows": r"Tokens.join: the layout gives rank \d [34] rows, so x must have as many in dimension 1",
    "mask": r"Tokens.best: mask must be a qkv.Mask or None; got Tensor",
    "merge": r"parallel.merge: partial must be a pair of tensors \(out, lse\); got Tensor",
    "merged over": r"parallel.merge: group must be a DeviceMesh, a process group, or None .*; got str",
    "merged over two dimensions": r"parallel.merge: group must have one dimension; got a mesh of 2. Take one of them",
    "DTensor": r"parallel.attention: tensors must be plain ones, .*; got a DTensor. Pass x.to_local\(\)",
    "DTensor to join": r"Tokens.join: tensors must be plain ones, .*; got a DTensor",
    "merged integers": r"parallel.merge: out and lse must be floating-point; got torch.float32 and torch.int64",
    "merged shapes": r"parallel.merge: partial must be .*; got \(1, 2, 3, 4\) and \(1, 2, 4\)",
}


def test_layouts_and_partial_results_that_are_none_raise(ranks: Of) -> None:
    for change, message in MESSAGES.items():
        for one in ranks(3).refused(_wrong_layout, change):
            assert re.search(message, one.message), f"{change}: {one}"


def _merge(keys: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v, towards = sharded.long_inputs(dtype, 40)
    tokens = parallel.Tokens(keys, mesh())
    own = [tokens.take(x, dim=2).requires_grad_() for x in (k, v)]
    partial = qkv.attention_with_lse(q[:, :, :5], *own)
    found = parallel.merge(partial, mesh())
    by_group = parallel.merge((partial.out.detach(), partial.lse.detach()), mesh().get_group())
    assert torch.equal(by_group.out, found.out)
    (found.out * towards[:, :, :5]).sum().backward()
    assert own[0].grad is not None and own[1].grad is not None
    return {"out": found.out.detach(), "lse": found.lse.detach(), "d_k": own[0].grad, "d_v": own[1].grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_gives_all_ranks_the_same_bits(ranks: Of, dtype: torch.dtype) -> None:
    layout = ragged(40, 3)
    results = ranks(3).run(_merge, layout, dtype)
    q, k, v, towards = sharded.long_inputs(dtype, 40)
    k, v = k.requires_grad_(), v.requires_grad_()
    want = qkv.attention_with_lse(q[:, :, :5], k, v)
    (want.out * towards[:, :, :5]).sum().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for found in results:
        assert torch.equal(found["out"], results[0]["out"]) and torch.equal(found["lse"], results[0]["lse"])
    torch.testing.assert_close(results[0]["out"], want.out.detach(), **tolerance)
    for name, x in (("d_k", k), ("d_v", v)):  # each rank has the loss of all
        assert x.grad is not None
        torch.testing.assert_close(joined([one[name] for one in results], layout) / 3, x.grad, **tolerance)


@pytest.fixture
def checked(ranks: Of) -> Iterator[Ranks]:
    """Three ranks with QKV_CHECK=1."""
    ranks(3).run(_set_check, "1")
    yield ranks(3)
    ranks(3).run(_set_check, "0")


def _set_check(value: str) -> None:
    os.environ["QKV_CHECK"] = value


def _disagree(change: str) -> str:
    """A call in which rank 1 differs."""
    rank, n = mesh().get_local_rank(), 24
    tokens, options = parallel.Tokens.even(n, mesh()), {"mask": Mask.causal()}
    q, k, v = (tokens.take(x, dim=2) for x in sharded.long_inputs(torch.float32, n)[:3])
    if rank == 1:
        if change == "mask":
            options["mask"] = Mask.causal(window=5)
        if change == "documents":
            options["mask"] = Mask.causal() & Mask.documents(torch.ones(1, n, dtype=torch.int64))
        if change == "layout":
            tokens = parallel.Tokens((((0, 7),), ((8, 16),), ((7, 8), (16, 24))), mesh())
        if change == "scheme":
            options["scheme"] = "heads"
        if change == "gradient":
            k.requires_grad_()
        if change == "rows":
            q = q[:, :, 1:]
        if change == "scores":
            options["softcap"] = 3.0
    elif change == "documents":
        options["mask"] = Mask.causal() & Mask.documents(torch.zeros(1, n, dtype=torch.int64))
    parallel.attention(q, k, v, tokens, **options)
    return "none"


DISAGREEMENTS = {
    "mask": r"got mask Mask.causal\(\) on rank 0 and Mask.causal\(window=5\) on rank 1",
    "documents": r"got mask .*Mask.documents.* on rank 0 and .* on rank 1",
    "layout": r"got tokens .* on rank 0 and .* on rank 1",
    "scheme": r"got scheme gather on rank 0 and heads on rank 1",
    "gradient": r"got requires_grad \[False, False, False\] on rank 0 and \[False, True, False\] on rank 1",
    "scores": r"got scores .* on rank 0 and .*3.0.* on rank 1",
    "rows": r"rank 1 raised ValueError: parallel.attention: q must have the 8 rows .*; got 7|q must have the 8 rows",
}


def test_ranks_that_disagree_raise_where_they_would_wait(checked: Ranks) -> None:
    assert checked.run(_disagree, "nothing") == ["none"] * 3
    for change, message in DISAGREEMENTS.items():
        for one in checked.try_run(_disagree, change):
            assert isinstance(one, Failure) and one.kind == "ValueError", f"{change}: {one}"
            assert re.search(message, one.message), f"{change}: {one.message}"


def _alone(change: str, scheme: str) -> tuple[Tensor, Tensor]:
    """A call of which the second rank makes another; the rows of the output and of what one process has."""
    n, tokens = 24, parallel.Tokens.even(24, mesh_that_waits(5))
    whole = sharded.long_inputs(torch.float32, n)[:3]
    q, k, v = (tokens.take(x, dim=2) for x in whole)
    mask, want = Mask.causal(), tokens.take(qkv.attention(*whole, mask=Mask.causal()), dim=2)
    if tokens.rank == 1:
        if change == "gone":
            os._exit(3)
        if change == "error":
            raise KeyError("its own")
        if change == "rows":
            q = q[:, :, 1:]
        if change == "dtype":
            q, k, v = (x.bfloat16() for x in (q, k, v))
        if change == "wider dtype":
            q, k, v = (x.double() for x in (q, k, v))
        if change == "fewer KV heads":
            k, v = k[:, :1], v[:, :1]
        if change == "more KV heads":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        if change == "batch":
            q, k, v = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
        if change == "mask":
            mask = Mask.causal(window=5)
        if change == "layout":
            tokens = parallel.Tokens((((0, 7),), ((8, 16),), ((7, 8), (16, 24))), mesh_that_waits(5))
        if change == "scheme":
            scheme = "gather" if scheme == "heads" else "heads"
    return parallel.attention(q, k, v, tokens, mask=mask, scheme=scheme), want


OTHERS = [
    ("gone", "gather"),
    ("error", "gather"),
    ("rows", "merge"),
    ("dtype", "gather"),
    ("wider dtype", "merge"),
    ("fewer KV heads", "gather"),
    ("fewer KV heads", "heads"),
    ("more KV heads", "merge"),
    ("batch", "gather"),
    ("mask", "gather"),
    ("mask", "heads"),
    ("mask", "merge"),
    ("layout", "heads"),
    ("scheme", "gather"),
]


@pytest.mark.parametrize(("change", "scheme"), OTHERS, ids=str)
def test_a_rank_that_makes_another_call_makes_no_other_wrong(ranks: Of, change: str, scheme: str) -> None:
    """A rank that needs nothing of it may be done; each other has an error, of ours, of torch, or of gloo's process."""
    found = ranks(3).try_run(_alone, change, scheme)
    failed = [one for one in found if isinstance(one, Failure)]
    assert any(isinstance(one, Failure) for one in (found[0], found[2])), "no other rank has noticed"
    for rank in (0, 2):
        if not isinstance(found[rank], Failure):
            got, want = found[rank]
            torch.testing.assert_close(got, want, msg="a wrong result on another rank")
    assert not any(one.kind == "TimeoutError" for one in failed), "a rank hangs"
    if (change, scheme) in (("mask", "heads"), ("fewer KV heads", "heads")):  # messages of as many bytes
        assert re.search(
            r"parallel.attention: all ranks must make the same call; rank \d has made another .* QKV_CHECK=1",
            next(one for one in failed if one.kind == "ValueError").message,
        )


@pytest.mark.parametrize("what", ["join", "merge"])
def test_ranks_that_join_or_merge_other_tensors_say_in_what_they_differ(checked: Ranks, what: str) -> None:
    caller, differs = {
        "join": ("Tokens.join", r"got x <torch.float32, rows of \(2, 3\)> on rank 0 and .*\(2, 4\)> on rank 1"),
        "merge": (
            "parallel.merge",
            r"got out <torch.float32 \(1, 2, 4, 8\)> on rank 0 and .*\(1, 2, 5, 8\)> on rank 1",
        ),
    }[what]
    for one in checked.try_run(_join_and_merge_others, what):
        assert isinstance(one, Failure) and one.kind == "ValueError", one
        assert re.search(f"{caller}: all ranks must make the same call; {differs}", one.message), one.message


def _backward_of_another() -> str:
    """A backward pass of which the second rank takes that of another call."""
    tokens = parallel.Tokens.even(24, mesh_that_waits(5))
    q, k, v = (tokens.take(x, dim=2).requires_grad_() for x in sharded.long_inputs(torch.float32, 24)[:3])
    first = parallel.attention(q, k, v, tokens, mask=Mask.causal(), scheme="heads")
    second = parallel.attention(q, k, v, tokens, mask=Mask.causal(window=5), scheme="heads")
    (second if tokens.rank == 1 else first).sum().backward()
    return "done"


def test_backward_passes_of_other_calls_raise(ranks: Of) -> None:
    for one in ranks(3).try_run(_backward_of_another):
        assert isinstance(one, Failure) and one.kind == "ValueError", one
        assert "parallel.attention: all ranks must make the same call" in one.message


def _join_and_merge_others(what: str) -> Any:
    rank, tokens = mesh_that_waits(5).get_local_rank(), parallel.Tokens.even(24, mesh_that_waits(5))
    if what == "join":
        return tokens.join(torch.zeros(2, 8, 3 + (rank == 1)))
    rows = 4 + (rank == 1)
    return parallel.merge((torch.zeros(1, 2, rows, 8), torch.zeros(1, 2, rows)), mesh_that_waits(5))


@pytest.mark.parametrize("what", ["join", "merge"])
def test_tensors_of_other_shapes_are_not_joined_or_merged(ranks: Of, what: str) -> None:
    for one in ranks(3).try_run(_join_and_merge_others, what):
        assert isinstance(one, Failure), one


def _die(rank: int) -> float:
    n, own = 24, mesh().get_local_rank()
    tokens = parallel.Tokens.even(n, mesh())
    q, k, v = (tokens.take(x, dim=2).requires_grad_() for x in sharded.long_inputs(torch.float32, n)[:3])
    out = parallel.attention(q, k, v, tokens)
    if own == rank:
        os._exit(3)
    start = time.monotonic()
    try:
        out.sum().backward()
    except RuntimeError:
        return time.monotonic() - start
    raise AssertionError("a backward pass without one of the ranks has gone through")


def test_a_rank_that_is_gone_is_an_error_on_the_others() -> None:
    group = Ranks(3)
    try:
        first, gone, last = group.try_run(_die, 1)
    finally:
        group.stop()
    assert isinstance(gone, Failure) and gone.kind == "EOFError"
    for one in (first, last):
        assert not isinstance(one, Failure), one.trace
        assert one < 35
