"""Plans are ints: they are tested without processes. `simulated` moves what a plan says between lists."""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parallel.sharded import LAYOUTS, ragged

from qkv import Mask, kernels
from qkv.parallel import plan
from qkv.parallel.plan import Plan, gathering, keys_seen, pairs, shares, visiting
from qkv.parallel.runs import Layout, even, normalised, require_layout, rows_of, zigzag

PERIOD = kernels.KEY_PERIOD
SIZES = Path(__file__).parents[2] / "native" / "src" / "sizes.h"


def test_keys_repeat_as_the_kernel_splits_them() -> None:
    text = SIZES.read_text()
    numbers = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    (times,) = re.findall(r"BWD_BLOCK_N = (\d+) \* BLOCK_N;", text)
    assert math.lcm(numbers["KV_SPLIT"], int(times) * numbers["BLOCK_N"]) == PERIOD


def random_mask(draw: random.Random, n: int) -> Mask:
    """A mask of any kind that positions, documents or global tokens decide, over n tokens and two rows of a batch."""
    left, right = (draw.choice([None, 0, draw.randrange(n)]) for _ in range(2))
    sinks = draw.choice([0, 0, draw.randrange(1, 6)])
    mask = Mask.band(left, right, sinks, draw.choice([1, 1, 3]))
    if draw.random() < 0.3 and not mask.sink_tokens:
        mask = mask & Mask.chunked(draw.randrange(1, n), draw.randrange(n))
    if draw.random() < 0.3 and mask.right is None:
        mask = mask & Mask.prefix(draw.randrange(n))
    if draw.random() < 0.4:
        rows = [sorted(draw.randrange(4) for _ in range(n)) for _ in range(2)]
        mask = mask & Mask.documents(torch.tensor(rows))
    elif draw.random() < 0.1:
        mask = mask | Mask.global_tokens(torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.2)
    return mask


def random_cases(count: int) -> list[tuple[Mask, Layout, Layout, int, int]]:
    """Masks, layouts of queries and keys, the number of keys and the offset of the queries among them."""
    found = []
    for seed in range(count):
        draw = random.Random(seed)
        n, ranks = draw.randrange(2, 60), draw.choice([1, 2, 3, 4, 8])
        later = draw.choice([0, 0, draw.randrange(n)])
        queries = draw.choice(list(LAYOUTS.values()))(n - later, ranks)
        keys = queries if not later else ragged(n, ranks, seed)
        found.append((random_mask(draw, n), queries, keys, n, later))
    return found


CASES = random_cases(250)


@pytest.fixture(autouse=True)
def short_period(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the kernel split few keys, so that short sequences have keys that begin at its splits."""
    monkeypatch.setattr(kernels, "KEY_PERIOD", 7)
    plan._gathering.cache_clear()
    yield
    plan._gathering.cache_clear()


def simulated(plans: list[Plan], kind: int, held: list[list[list[int]]]) -> list[list[list[int | None]]]:
    """What each rank has received, (rank, head, row), where ``held`` says what each has."""
    found: list[list[list[int | None]]] = []
    for rank, own in enumerate(plans):
        buffer = own.buffers[kind]
        memory: list[list[int | None]] = [[None] * buffer.rows for _ in range(buffer.heads)]
        for peer, incoming in enumerate(own.receives):
            outgoing = [move for move in plans[peer].sends[rank] if move.kind == kind]
            incoming = tuple(move for move in incoming if move.kind == kind)
            assert [move.size() for move in outgoing] == [move.size() for move in incoming]
            for sent, taken in zip(outgoing, incoming, strict=True):
                for head, to in zip(range(*sent.heads), range(*taken.heads), strict=True):
                    for row, place in zip(range(*sent.rows), range(*taken.rows), strict=True):
                        assert memory[to][place] is None, "a row arrives twice"
                        memory[to][place] = held[peer][head][row]
        found.append(memory)
    return found


def positions(layout: Layout) -> list[list[int]]:
    return [[position for run in runs for position in range(*run)] for runs in layout]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_gather_brings_each_run_the_keys_that_it_sees(case: int) -> None:
    mask, queries, keys, n, offset = CASES[case]
    seen = keys_seen(mask, queries, n, offset)
    ranks = range(len(queries))
    keeps_distances = case % 3 == 0
    found = [gathering(seen, keys, 2, rank, keeps_distances=keeps_distances) for rank in ranks]
    plans = [one.plan for one in found]
    held = positions(keys)
    memory = simulated(plans, 0, [[own, [-1 - position for position in own]] for own in held])
    visible = mask.visible(sum(map(rows_of, queries)), n, offset).expand(2, 1, -1, -1).any(0)[0]
    for rank in ranks:
        buffer = plans[rank].buffers[0]
        assert all(memory[rank][0][row] is None for hole in buffer.holes for row in range(*hole))
        assert sum(row is None for row in memory[rank][0]) == sum(stop - start for start, stop in buffer.holes)
        for run, placed, intervals in zip(queries[rank], found[rank].keys, buffer.outputs, strict=True):
            arrived = [memory[rank][0][row] for interval in intervals for row in range(*interval)]
            assert placed.start % 7 == 0 or placed.start == placed.stop
            assert not (keeps_distances and placed.head)
            lies = [*range(placed.head), *range(placed.start, placed.stop)]
            assert len(arrived) == len(lies)
            for position, key in zip(lies, arrived, strict=True):
                assert key in (position, None)
            sees = visible[slice(*run)].any(0).nonzero()[:, 0].tolist()
            assert set(sees) <= set(arrived)
    assert plans[0].is_local == all(
        not move.size()
        for one, own in zip(plans, ranks, strict=True)
        for peer in ranks
        if peer != own
        for move in one.sends[peer]
    )
    sent = [
        sum(move.size() for peer in ranks if peer != rank for move in plans[rank].sends[peer]) // 2 for rank in ranks
    ]
    assert sent == list(plan.gather_rows(seen, keys))


@pytest.mark.parametrize("case", range(0, len(CASES), 3))
def test_merge_meets_each_pair_of_a_query_and_a_key_once(case: int) -> None:
    mask, queries, keys, n, offset = CASES[case]
    seen = keys_seen(mask, queries, n, offset)
    ranks = range(len(queries))
    found = [visiting(seen, queries, keys, 1, rank) for rank in ranks]
    lq = sum(map(rows_of, queries))
    met = torch.zeros(lq, n, dtype=torch.int64)
    there = simulated([one.there for one in found], 0, [[own] for own in positions(queries)])
    answers = []
    for rank, one in enumerate(found):
        outputs = one.there.buffers[0].outputs
        for visit, ((start, stop),) in zip(one.visits, outputs, strict=True):
            assert there[rank][0][start:stop] == list(range(*visit.run))
            for run, row in visit.keys:
                assert positions(keys)[rank][row : row + run.stop - run.start] == list(range(*run))
                met[slice(*visit.run), slice(*run)] += 1
        answers.append([position for visit in one.visits for position in range(*visit.run)])
    back = simulated([one.back for one in found], 0, [[own] for own in answers])
    for rank, one in enumerate(found):
        outputs = one.back.buffers[0].outputs
        assert sorted(index for own in one.partials for index in own) == list(range(len(outputs)))
        for run, own in zip(queries[rank], one.partials, strict=True):
            for index in own:
                ((start, stop),) = outputs[index]
                assert back[rank][0][start:stop] == list(range(*run))
    visible = mask.visible(lq, n, offset).expand(2, 1, -1, -1).any(0)[0]
    assert met.max() <= 1 and met[visible].all()
    sent = [
        sum(move.size() for peer in ranks if peer != rank for move in found[rank].there.sends[peer]) for rank in ranks
    ]
    assert sent == list(plan.visit_rows(seen, queries, keys)[0])
    sent = [
        sum(move.size() for peer in ranks if peer != rank for move in found[rank].back.sends[peer]) for rank in ranks
    ]
    assert sent == list(plan.visit_rows(seen, queries, keys)[1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 8), (4, 1), (2, 2), (12, 4), (5, 5), (7, 1), (32, 8)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_heads_brings_each_rank_whole_groups_of_its_heads(heads: int, kv_heads: int, ranks: int) -> None:
    of_ranks, group = shares(heads, kv_heads, ranks), heads // kv_heads
    assert [head for share in of_ranks for head in range(*share.queries)] == list(range(heads))
    for share in of_ranks:
        read = []
        for queries, keys in share.groups:
            count, of_keys = queries[1] - queries[0], keys[1] - keys[0]
            assert count % of_keys == 0
            for index, head in enumerate(range(*queries)):
                read.append((share.queries[0] + head, share.keys[0] + keys[0] + index // (count // of_keys)))
        assert read == [(head, head // group) for head in range(*share.queries)]
        assert len(share.groups) <= 1 or heads % ranks or kv_heads % ranks
    n, layout = 23, ragged(23, ranks)
    plans = [plan.by_heads(layout, layout, of_ranks, (n, n), rank) for rank in range(ranks)]
    for kind, count in enumerate((heads, kv_heads)):
        held = [[[100 * head + position for position in own] for head in range(count)] for own in positions(layout)]
        for share, memory in zip(of_ranks, simulated(plans, kind, held), strict=True):
            own = share.keys if kind else share.queries
            assert memory == [[100 * head + position for position in range(n)] for head in range(*own)]


SENT: dict[str, tuple[Mask, Callable[[int, int], Layout], Callable[[int, int], float]]] = {
    "full mask: all": (Mask.full(), even, lambda n, p: (p - 1) * n),
    "causal, even: half": (Mask.causal(), even, lambda n, p: (p - 1) * n / 2),
    "causal, zigzag: three quarters": (Mask.causal(), zigzag, lambda n, p: (p - 1) * n * 3 / 4),
    "window: its keys at each boundary": (Mask.causal(window=6), even, lambda n, p: (p - 1) * 5),
    "both sides": (Mask.sliding(window=8), even, lambda n, p: (p - 1) * 8),
    "sinks: to all others": (Mask.causal(6, sink_tokens=3), even, lambda n, p: (p - 1) * 8),
    "wider than a shard": (Mask.causal(window=31), even, lambda n, p: sum(min(30, n // p * r) for r in range(p))),
    "documents of a rank: nothing": (
        Mask.documents(torch.arange(120)[None] // 10),
        even,
        lambda n, p: 0,
    ),
    "documents over boundaries: what is left of them": (
        Mask.causal() & Mask.documents((torch.arange(120)[None] + 4) // 12),
        even,
        lambda n, p: {2: 4, 3: 8, 4: 24}[p],
    ),
    "chunks: those that are cut": (Mask.chunked(40), even, lambda n, p: {2: 40, 3: 0, 4: 120}[p]),
}


@pytest.mark.parametrize("name", SENT)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gather_sends_what_the_formula_says(name: str, ranks: int) -> None:
    mask, make, formula = SENT[name]
    layout = make(120, ranks)
    assert sum(plan.gather_rows(keys_seen(mask, layout, 120, 0), layout)) == formula(120, ranks)


def test_a_window_over_a_long_text_sends_the_window_at_each_boundary() -> None:
    layout = even(65536, 4)
    sent = plan.gather_rows(keys_seen(Mask.causal(window=512), layout, 65536, 0), layout)
    assert sent == (511, 511, 511, 0)


@pytest.mark.parametrize("case", range(0, len(CASES), 2))
def test_pairs_are_counted_as_the_mask_shows_them(case: int) -> None:
    mask, queries, keys, n, offset = CASES[case]
    if mask.is_global is not None:
        return
    band = Mask(*mask.values()[:7])
    lq = sum(map(rows_of, queries))
    visible = band.visible(lq, n, offset)[0, 0]
    for runs in queries:
        for run in runs:
            for interval in [(0, n), *keys[0]]:
                want = int(visible[slice(*run), slice(*interval)].sum())
                assert pairs(mask, run, interval, offset) == want


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_hold_each_position_once(make: Callable[[int, int], Layout], n: int, ranks: int) -> None:
    layout = make(n, ranks)
    assert require_layout("test", layout, ranks) == layout
    assert sorted(itertools.chain(*positions(layout))) == list(range(n))
    if make is not ragged:
        lengths = [rows_of(runs) for runs in layout]
        assert max(lengths) - min(lengths) <= 1 + (make is zigzag)


def test_neighbouring_runs_are_one_and_empty_ones_are_none() -> None:
    assert normalised([[(3, 5), (5, 9), (2, 2)], [(0, 3)], []]) == (((3, 9),), ((0, 3),), ())


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        (3, TypeError, r"runs must be a sequence for each rank of \(start, stop\) pairs; got int"),
        ([[(0, 3, 5)], []], TypeError, r"got \[\(0, 3, 5\)\] for rank 0"),
        ([[(0, 3.0)], []], TypeError, r"runs must be an int, a position; got 3.0"),
        ([[(0, 3)], [(5, 3)]], ValueError, r"with 0 <= start <= stop; got \(5, 3\) for rank 1"),
        ([[(0, 3)]], ValueError, r"pairs of the mesh, 2; got those of 1"),
        ([[(0, 3)], [(2, 5)]], ValueError, r"must hold each position from 0 on once; got positions 2 to 2 twice"),
        ([[(0, 3)], [(5, 9)]], ValueError, r"got none for 3 to 4"),
        ([[(1, 3)], []], ValueError, r"got none for 0 to 0"),
        (
            [[(i, i + 1) for i in range(0, 132, 2)], [(i, i + 1) for i in range(1, 132, 2)]],
            ValueError,
            r"at most 64 runs, each of which is a call of its own; got 66. Tokens.zigzag",
        ),
    ],
)
def test_runs_that_are_no_layout_raise(layout: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        require_layout("Tokens", layout, 2)


def test_documents_are_read_again_after_they_changed() -> None:
    ids = torch.zeros(1, 20, dtype=torch.int64)
    layout, mask = even(20, 2), Mask.documents(ids)
    assert sum(plan.gather_rows(keys_seen(mask, layout, 20, 0), layout)) == 20
    ids[:, 10:] = 1
    assert sum(plan.gather_rows(keys_seen(mask, layout, 20, 0), layout)) == 0


def test_offsets_by_row_need_all_keys() -> None:
    (keys,), _ = keys_seen(Mask.causal(window=2), even(4, 2), 20, torch.tensor([3, 5]))
    assert keys.intervals() == [(0, 20)]
