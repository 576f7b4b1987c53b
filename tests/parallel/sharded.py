"""What tests of `qkv.parallel` run on each rank, and how they cut a case of the grid."""

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cases import CASES, Case
from parallel.ranks import mesh
from peer import formula
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv import Mask, parallel
from qkv.parallel.exchange import HEADING
from qkv.parallel.runs import Layout, even, normalised, zigzag

BY_NAME = {case.name: case for case in CASES}


def ragged(n: int, ranks: int, seed: int = 0) -> Layout:
    """Runs of any lengths in any order, of at least two rows where n allows it; one rank of three or more has none."""
    draw = random.Random(f"{n} {ranks} {seed}")
    pieces = max(1, min(2 * ranks, n // 2))
    cuts = [0, *sorted(draw.sample(range(2, n - 1), pieces - 1)), n] if pieces > 1 and n > 2 * pieces else [0, n]
    cuts = [cut for index, cut in enumerate(cuts) if index == 0 or cut == n or cut - cuts[index - 1] >= 2]
    runs = list(itertools.pairwise(cuts))
    draw.shuffle(runs)
    holders = range(ranks - (ranks > 2))
    empty = draw.randrange(ranks) if ranks > 2 else ranks
    layout: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for index, run in enumerate(runs):
        rank = holders[index % len(holders)]
        layout[rank + (rank >= empty)].append(run)
    return normalised(layout)


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"even": even, "zigzag": zigzag, "ragged": ragged}


def taken(whole: Tensor, layout: Layout, rank: int, dim: int = 2) -> Tensor:
    """The rows of a rank."""
    parts = [whole.narrow(dim, start, stop - start) for start, stop in layout[rank]]
    return torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0).clone()


def joined(parts: Sequence[Tensor], layout: Layout, dim: int = 2) -> Tensor:
    """The rows of all ranks, in order."""
    runs = sorted(
        (run, rank, row) for rank, own in enumerate(layout) for run, row in zip(own, _starts(own), strict=True)
    )
    return torch.cat([parts[rank].narrow(dim, row, stop - start) for (start, stop), rank, row in runs], dim)


def _starts(runs: Sequence[tuple[int, int]]) -> list[int]:
    found, row = [], 0
    for start, stop in runs:
        found.append(row)
        row += stop - start
    return found


def upstream(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, case.heads, case.lq, case.value_width, generator=generator).to(dtype)


def solve(case: Case, dtype: torch.dtype, scheme: str, layout: str, **options: Any) -> dict[str, Tensor]:
    """This rank's output, lse, and gradients of all inputs, by ``scheme``."""
    ranks = mesh()
    queries, keys = (LAYOUTS[layout](n, ranks.size()) for n in (case.lq, case.lk))
    rank = ranks.get_local_rank()
    leaves = case.inputs(dtype)
    for name, layout_of in (("q", queries), ("k", keys), ("v", keys)):
        leaves[name] = taken(leaves[name], layout_of, rank)
    leaves = {name: leaf.contiguous().requires_grad_() for name, leaf in leaves.items()}
    key_tokens = None if queries == keys else parallel.Tokens(keys, ranks)
    found = parallel.attention_with_lse(
        **leaves,
        tokens=parallel.Tokens(queries, ranks),
        key_tokens=key_tokens,
        scheme=scheme,
        **case.options(),
        **options,
    )
    gradients = torch.autograd.grad(
        found.out, list(leaves.values()), taken(upstream(case, dtype), queries, rank), allow_unused=True
    )
    assert all(gradient is not None for gradient in gradients), "a gradient is missing on this rank"
    names = [f"d_{name}" for name in leaves]
    return {"out": found.out.detach(), "lse": found.lse.detach(), **dict(zip(names, gradients, strict=True))}


def solve_all(
    names: Sequence[str], dtype: torch.dtype, scheme: str, layout: str, **options: Any
) -> list[dict[str, Tensor]]:
    """`solve` for each case."""
    return [solve(BY_NAME[name], dtype, scheme, layout, **options) for name in names]


def whole(case: Case, results: Sequence[dict[str, Tensor]], layout: str) -> dict[str, Tensor]:
    """The results of all ranks as one process has them."""
    queries, keys = (LAYOUTS[layout](n, len(results)) for n in (case.lq, case.lk))
    found: dict[str, Tensor] = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in ("out", "lse", "d_q"):
            found[name] = joined(parts, queries)
        elif name in ("d_k", "d_v"):
            found[name] = joined(parts, keys)
        else:
            found[name] = functools.reduce(torch.add, [part.double() for part in parts]).to(parts[0].dtype)
    return found


def one_process(case: Case, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """What `solve` returns, computed here."""
    leaves = {name: leaf.requires_grad_() for name, leaf in case.inputs(dtype).items()}
    out, lse = qkv.attention_with_lse(**leaves, **case.options(), **options)
    found = torch.autograd.grad(out, list(leaves.values()), upstream(case, dtype), allow_unused=True)
    gradients = {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def exact(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the formula in fp64, of inputs as rounded to ``dtype``."""
    leaves = {name: leaf.double().requires_grad_() for name, leaf in case.inputs(dtype).items()}
    out, lse = formula(case, leaves)
    found = torch.autograd.grad(out, list(leaves.values()), upstream(case, dtype).double(), allow_unused=True)
    gradients = {
        f"d_{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **gradients}


def long_inputs(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, of 4 heads on 2."""
    generator = torch.Generator().manual_seed(n)
    found = [torch.randn(1, heads, n, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    return found[0], found[1], found[2], found[3]


def solve_long(mask: Mask, layout: Layout, dtype: torch.dtype, scheme: str, **options: Any) -> dict[str, Tensor]:
    """Output and gradients of this rank's rows of `long_inputs`."""
    ranks = mesh()
    tokens = parallel.Tokens(layout, ranks)
    *qkv_, towards = (tokens.take(x, dim=2).contiguous() for x in long_inputs(dtype, tokens.length))
    leaves = [x.requires_grad_() for x in qkv_]
    out = parallel.attention(*leaves, tokens, mask=mask, scheme=scheme, **options)
    return dict(
        zip(("out", "d_q", "d_k", "d_v"), (out.detach(), *torch.autograd.grad(out, leaves, towards)), strict=True)
    )


class BytesSent(TorchDispatchMode):
    """Counts the bytes that this process hands to collectives for others, without those before each message."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.calls: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "alltoall" in str(func):
            self.count(args[1], args[4])
        return func(*args, **(kwargs or {}))

    def count(self, packed: Tensor, splits: Sequence[int]) -> None:
        assert splits[self.rank] == 0, "a rank sends to itself"
        self.calls.append(sum(splits) * packed.element_size() - HEADING * sum(count > 0 for count in splits))


@contextlib.contextmanager
def counted(rank: int, *, by_dispatch: bool) -> Iterator[BytesSent]:
    """Counts in a dispatch mode, or without one, in which numbers of tensors are not read."""
    found = BytesSent(rank)
    if by_dispatch:
        with found:
            yield found
        return
    send = distributed.all_to_all_single

    def counting(output: Tensor, packed: Tensor, expected: list[int], sent: list[int], group: Any) -> Any:
        found.count(packed, sent)
        return send(output, packed, expected, sent, group)

    distributed.all_to_all_single = counting
    try:
        yield found
    finally:
        distributed.all_to_all_single = send


def count_bytes(mask: Mask, layout: Layout, scheme: str, **options: Any) -> dict[str, Any]:
    """What is sent in a forward and in a backward pass, and what `explain` says of it."""
    tokens, by_dispatch = parallel.Tokens(layout, mesh()), not mask.has_tensors
    q, k, v = (tokens.take(x, dim=2).requires_grad_() for x in long_inputs(torch.float32, tokens.length)[:3])
    found = parallel.explain(q, k, v, tokens, mask=mask, scheme=scheme, **options)
    with counted(tokens.rank, by_dispatch=by_dispatch) as forward:
        out = parallel.attention(q, k, v, tokens, mask=mask, scheme=scheme, **options)
    with counted(tokens.rank, by_dispatch=by_dispatch) as backward:
        out.sum().backward()
    sent = found.sent[found.chosen][tokens.rank]
    return {"forward": forward.calls, "backward": backward.calls, "explained": sent, "chosen": found.chosen}


def run_layer(
    layer: nn.Module,
    x: Tensor,
    layout: Layout,
    context: Tensor | None = None,
    context_layout: Layout | None = None,
    reader: nn.Module | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Output, gradient of x and of parameters of a layer over ranks, and of one that reads its keys."""
    ranks = mesh()
    tokens = parallel.Tokens(layout, ranks)
    own = tokens.take(x).detach().requires_grad_()
    if context is not None:
        context_tokens: Any = parallel.WHOLE
        if context_layout is not None:
            context_tokens = parallel.Tokens(context_layout, ranks)
            context = context_tokens.take(context)
        options |= {"context": context.detach(), "context_tokens": context_tokens}
    modules: list[nn.Module] = [layer]
    if reader is None:
        out = layer(own, tokens=tokens, **options)
    else:
        cache = qkv.KVCache()
        modules.append(reader)
        out = reader(layer(own, cache=cache, tokens=tokens), cache=cache, tokens=tokens)
    (out * tokens.take(weights_like(x))).sum().backward()
    names = {
        f"{index}.{name}": parameter.grad
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
    return {"out": out.detach(), "x": own.grad, **names}


def weights_like(x: Tensor) -> Tensor:
    """Numbers by which outputs are summed."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
