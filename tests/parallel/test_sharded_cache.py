"""`qkv.parallel.ShardedKVCache`: on real ranks, decoding over a text in blocks is decoding over the whole of it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parallel.ranks import Failure, Ranks, mesh
from torch import Tensor, distributed, nn

import qkv
from qkv import Mask
from qkv.parallel import ShardedKVCache
from qkv.parallel.exchange import HEADING

Of = Callable[[int], Ranks]

N = 31
IDS = torch.arange(N)[None] // 9
MASKS: dict[str, Mask] = {
    "causal": Mask.causal(),
    "prefix": Mask.causal() | Mask.prefix(5),
    "chunks": Mask.causal() & Mask.chunked(8),
    "dilated": Mask.causal() & Mask.band(None, None, dilation=3),
    "documents": Mask.causal() & Mask.documents(IDS),
    "documents in turns": Mask.causal() & Mask.documents(torch.arange(N)[None] % 3),
    "dense": Mask.dense((torch.rand(N, N, generator=torch.Generator().manual_seed(0)) > 0.4).tril()),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "rotary and norms": {"rotary": qkv.RotaryEmbedding(4), "qk_norm": True, "gate": True},
    "sinks and a cap": {"sink_logits": True, "softcap": 3.0},
    "alibi": {"alibi": [0.1, 0.2, 0.3, 0.4]},
    "position bias": {"position_bias": None},
    "differential": {},
}


def made(options: str) -> qkv.Attention:
    torch.manual_seed(3)
    kind = qkv.DifferentialAttention if options == "differential" else qkv.Attention
    layer = kind(16, 4, num_kv_heads=2, **OPTIONS[options])
    if "position_bias" in OPTIONS[options]:
        layer.position_bias = qkv.RelativePositionBias(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer.eval()


def of_step(mask: Mask, stop: int) -> Mask:
    """The mask of the first tokens, in whose tensors those that are not there yet have no place."""
    if mask.allow is not None:
        return Mask.dense(mask.allow[..., :stop, :stop])
    if mask.document_ids is not None:
        return Mask.causal() & Mask.documents(mask.document_ids[:, :stop])
    return mask


def decoded(mask: Mask, options: str, cache: Any, steps: list[int], dtype: torch.dtype) -> list[Tensor]:
    layer, x = made(options).to(dtype), torch.randn(2, N, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    outs, at = [], 0
    for count in steps:
        own = of_step(mask, at + count)
        if own.allow is not None:
            own = Mask.dense(own.allow[..., at:, :])
        with torch.no_grad():
            outs.append(layer(x[:, at : at + count], mask=own, cache=cache))
        at += count
    return outs


def compare(name: str, options: str, block: int, steps: list[int], dtype: torch.dtype) -> Tensor:
    cache = ShardedKVCache(mesh(), block)
    got = decoded(MASKS[name], options, cache, steps, dtype)
    want = decoded(MASKS[name], options, qkv.KVCache(), steps, dtype)
    for one, two in zip(got, want, strict=True):
        assert one.dtype is two.dtype
        torch.testing.assert_close(one, two)
    assert cache.length == cache.columns == sum(steps)
    return torch.cat(got, dim=1)


STEPS = [9, 1, 1, 1, 6, 1, 12]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("name", MASKS)
def test_steps_are_those_over_the_whole_text(name: str, count: int, ranks: Of) -> None:
    for block in (1, 4, 50):
        outs = ranks(count).run(compare, name, "rotary and norms", block, STEPS, torch.float32)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_of_every_kind(options: str, ranks: Of) -> None:
    for name in ("causal", "documents"):
        ranks(3).run(compare, name, options, 4, STEPS, torch.float32)


def test_fp64(ranks: Of) -> None:
    ranks(3).run(compare, "causal", "sinks and a cap", 4, STEPS, torch.float64)


def rounded(dtype: torch.dtype) -> float:
    """The share of results over a sharded cache that are not the exact ones, rounded."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=generator).to(dtype) for heads, n in ((4, 3), (2, 60), (2, 60)))
    cache = ShardedKVCache(mesh(), 4)
    cache.append(k[:, :, :57], v[:, :, :57])
    keys = cache.append(k[:, :, 57:], v[:, :, 57:])
    assert keys.shards is not None
    got = keys.shards.attend(q, keys, Mask.causal(), {}, "auto")
    exact = qkv.attention(q.double(), k.double(), v.double(), mask=Mask.causal(), offset=57)
    assert got.dtype is dtype
    return float((got != exact.to(dtype)).double().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_of_ranks_are_rounded_once(dtype: torch.dtype, ranks: Of) -> None:
    """An error of 2^-20 moves one in 500 numbers, at most, to another neighbour in fp16, and fewer in bf16."""
    assert all(share < 1 / 100 for share in ranks(3).run(rounded, dtype))


def sent(lengths: list[int]) -> list[list[int]]:
    """The numbers that each collective of a step sends, by the length of the text before it."""
    layer, numbers = made("sinks and a cap"), []
    for length in lengths:
        cache, calls = ShardedKVCache(mesh(), 4), []
        send = distributed.all_to_all_single

        def counted(output: Tensor, given: Tensor, *rest: Any, calls: list[int] = calls, **options: Any) -> Any:
            calls.append(given.numel() * given.element_size())
            return send(output, given, *rest, **options)

        with torch.no_grad():
            layer(torch.randn(2, length, 16), mask=Mask.causal(), cache=cache)
            distributed.all_to_all_single = counted
            layer(torch.randn(2, 1, 16), mask=Mask.causal(), cache=cache)
        distributed.all_to_all_single = send
        numbers.append(calls)
    return numbers


def test_a_step_is_one_collective_whose_bytes_do_not_grow(ranks: Of) -> None:
    for numbers in ranks(3).run(sent, [1, 5, 100, 1000]):
        to_others, queries, width = 2, 2 * 4, 4 + 1
        assert numbers == [[to_others * (queries * width * 4 + HEADING)]] * 4


def memory(capacity: int | None) -> tuple[int, int]:
    cache = ShardedKVCache(mesh(), 4, capacity)
    k = torch.randn(1, 2, 64, 8)
    with torch.no_grad():
        for part in k.split(16, dim=2):
            cache.append(part, part)
    return cache.nbytes, cache.keys().k.shape[2]


def test_a_rank_has_its_part_of_the_memory(ranks: Of) -> None:
    whole = 2 * 2 * 64 * 8 * 4
    assert ranks(4).run(memory, 64) == [(whole // 4, 16)] * 4
    assert ranks(4).run(memory, None) == [(whole // 4, 16)] * 4


def operations() -> None:
    """Copies, crops, beams and state dicts, against a cache of all keys."""
    layer, x = made("alibi"), torch.randn(2, 20, 16)
    cache, want = ShardedKVCache(mesh(), 3), qkv.KVCache()

    def step(sharded: Any, whole: Any, tokens: Tensor) -> None:
        got, expected = (layer(tokens, mask=Mask.causal(), cache=one) for one in (sharded, whole))
        torch.testing.assert_close(got, expected)

    with torch.no_grad():
        step(cache, want, x[:, :11])
        twins = copy.copy(cache), copy.deepcopy(cache)
        wants = copy.copy(want), copy.deepcopy(want)
        for each in (cache, want):
            each.crop(7)
        step(cache, want, x[:, 11:14])
        for twin, own in zip(twins, wants, strict=True):
            step(twin, own, x[:, 14:16])
        for each in (cache, want):
            each.select(torch.tensor([1, 0, 1]))
            each.repeat(2)
        step(cache, want, torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(4)))
        other = ShardedKVCache(mesh(), 3)
        other.load_state_dict(cache.state_dict())
        assert (other.length, want.length) == (12, 12)
        step(other, want, torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(5)))
        for each in (cache, want):
            each.reset()
        step(cache, want, x[:1, :1])  # of which most ranks have no token
        step(cache, want, x[:1, 1:2])
        reader = qkv.CrossLayerAttention(16, 4, num_kv_heads=2, mask=Mask.causal())
        torch.testing.assert_close(reader(x[:1, :1], cache=cache), reader(x[:1, :1], cache=want))
    parted, before = ShardedKVCache(mesh(), 3, 5), x[:, :4]
    with torch.no_grad():
        layer(before, mask=Mask.causal(), cache=parted)
        with pytest.raises(ValueError, match="capacity is 5 tokens; got 2 more than the 4 in the cache"):
            layer(x[:, :2], mask=Mask.causal(), cache=parted)
        assert parted.length == 4


def test_caches_are_copied_cropped_repeated_and_stored(ranks: Of) -> None:
    ranks(3).run(operations)


def dealt(name: str, zigzag: bool) -> list[Tensor]:
    """A prompt of which each rank has its rows, and steps that all have."""
    layer, x = made("rotary and norms"), torch.randn(2, N, 16, generator=torch.Generator().manual_seed(1))
    make = qkv.parallel.Tokens.zigzag if zigzag else qkv.parallel.Tokens.even
    tokens, cache, want = make(25, mesh()), ShardedKVCache(mesh(), 4), qkv.KVCache()
    outs = []
    with torch.no_grad():
        first = layer(tokens.take(x[:, :25]), mask=of_step(MASKS[name], 25), cache=cache, tokens=tokens)
        outs.append(tokens.join(first))
        torch.testing.assert_close(outs[0], layer(x[:, :25], mask=of_step(MASKS[name], 25), cache=want))
        for at in range(25, N):
            step = {"mask": of_step(MASKS[name], at + 1)}
            outs.append(layer(x[:, at : at + 1], cache=cache, **step))
            torch.testing.assert_close(outs[-1], layer(x[:, at : at + 1], cache=want, **step))
        with pytest.raises(ValueError, match="a call with tokens= must be the first; got a cache of 31 tokens"):
            layer(tokens.take(x[:, :25]), mask=Mask.causal(), cache=cache, tokens=tokens)
    return outs


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("name, count", [("causal", 2), ("causal", 3), ("documents", 4), ("chunks", 3)])
def test_the_keys_of_a_prompt_over_ranks_are_dealt_out(name: str, count: int, zigzag: bool, ranks: Of) -> None:
    outs = ranks(count).run(dealt, name, zigzag)
    for own in outs:
        assert all(map(torch.equal, own, outs[0]))


def with_heads() -> None:
    """Heads over one dimension of a mesh, and blocks over the other."""
    from torch.distributed.tensor.parallel import parallelize_module

    layer, x = made("rotary and norms"), torch.randn(1, 12, 16)
    whole, want = copy.deepcopy(layer), qkv.KVCache()
    both = mesh(2, 2, names=("heads", "blocks"))
    parallelize_module(layer, both["heads"], qkv.parallel.Heads())
    cache = ShardedKVCache(both["blocks"], 3)
    with torch.no_grad():
        for part in x.split([7, 1, 4], dim=1):
            expected = whole(part, mask=Mask.causal(), cache=want)
            torch.testing.assert_close(layer(part, mask=Mask.causal(), cache=cache), expected)
    assert cache.keys().k.shape[1] == 1


def test_together_with_heads(ranks: Of) -> None:
    ranks(4).run(with_heads)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        options: Any = {"head_dim": 8, "rotary": qkv.RotaryEmbedding(8), "bias": False}
        self.attention = qkv.CausalAttention(width, 9, num_kv_heads=3, **options)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 96, bias=False), nn.Linear(96, width, bias=False)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        x = x + self.attention(self.norms[0](x), cache=cache)
        down: Tensor = self.down(F.silu(self.up(self.norms[1](x))))
        return x + down


def written(sharded: bool) -> list[int]:
    """Greedy tokens of a small model with the heads of SmolLM2."""
    torch.manual_seed(0)
    embed, blocks, head = nn.Embedding(97, 72), [Block(72) for _ in range(4)], nn.Linear(72, 97)
    caches = [ShardedKVCache(mesh(), 16) if sharded else qkv.KVCache() for _ in blocks]
    tokens = torch.randint(97, (1, 50), generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for _ in range(64):
            x = embed(tokens)
            for block, cache in zip(blocks, caches, strict=True):
                x = block(x, cache)
            tokens = head(x[:, -1:]).argmax(-1)
            found.append(int(tokens))
    return found


@pytest.mark.parametrize("count", [3, 4])
def test_greedy_tokens_are_those_of_one_process(count: int, ranks: Of) -> None:
    want = written(False)
    assert len(set(want)) > 5
    assert ranks(count).run(written, True) == [want] * count


def refused(case: str) -> None:
    layer, x = made("sinks and a cap"), torch.randn(2, 6, 16)
    cache = ShardedKVCache(mesh(), 4)
    if case == "gradients":
        layer(x, mask=Mask.causal(), cache=cache)
    elif case == "mesh":
        ShardedKVCache(distributed.group.WORLD)  # type: ignore[arg-type]
    elif case == "two dimensions":
        ShardedKVCache(mesh(1, distributed.get_world_size(), names=("a", "b")))
    elif case == "pickle":
        pickle.dumps(cache)
    with torch.no_grad():
        if case == "window":
            layer(x, mask=Mask.causal(4), cache=cache)
        elif case == "window with sinks":
            layer(x, mask=Mask.causal(4, sink_tokens=2), cache=cache)
        elif case == "padding":
            layer(x, mask=Mask.causal() & Mask.padding(torch.tensor([6, 4])), cache=cache)
        elif case == "dropout":
            layer.dropout = 0.5
            layer.train()(x, mask=Mask.causal(), cache=cache)
        else:
            layer(x, mask=Mask.causal(), cache=cache)
        if case == "weights":
            layer.attention_weights(x, mask=Mask.causal(), cache=cache)
        elif case == "crop":
            cache.crop(torch.tensor([3, 4]))
        elif case == "join":
            cache.join(copy.copy(cache))
        elif case == "state":
            ShardedKVCache(mesh(), 5).load_state_dict(cache.state_dict())


REFUSED = {
    "gradients": ("ValueError", "decoding, without gradients and dropout; got tensors that require a gradient"),
    "dropout": ("ValueError", "got dropout=0.5. Call the layer under torch.no_grad(), in eval mode"),
    "mesh": ("TypeError", "ShardedKVCache: mesh must be a torch.distributed DeviceMesh; got ProcessGroup"),
    "two dimensions": ("ValueError", "mesh must have one dimension; got 2. Take one of them by its name"),
    "pickle": ("TypeError", "a pickle has no process group; got a cache to pickle. Store its state_dict()."),
    "window": ("ValueError", "got Mask.causal(window=4), which shows 4. Give each rank a SlidingKVCache(4)."),
    "window with sinks": ("ValueError", "Give each rank a SlidingKVCache(4, 2)."),
    "padding": ("ValueError", "rows must have one length, so that a position is on one rank; got padding"),
    "weights": ("ValueError", "attention_weights is of caches that have all keys; got one with those of a rank"),
    "crop": ("ValueError", "rows must keep one length, so that a position is on one rank; got [3, 4]"),
    "join": ("ValueError", "join adds others. Make one cache for each text."),
    "state": ("ValueError", "the state must be of block=5 and rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_on_all_ranks(case: str, ranks: Of) -> None:
    kind, message = REFUSED[case]
    for got in ranks(2).refused(refused, case):
        assert got.kind == kind, got
        assert message in got.message, got


def at_odds(what: str) -> None:
    rank = mesh().get_local_rank()
    layer, x = made("sinks and a cap"), torch.randn(2, 6, 16)
    cache = ShardedKVCache(mesh(), 4 + (what == "blocks" and rank == 1))
    mask = Mask.causal() | Mask.prefix(3) if what == "mask" and rank == 1 else Mask.causal()
    with torch.no_grad(), pytest.MonkeyPatch.context() as environment:
        environment.setenv("QKV_CHECK", "1")
        layer(x, mask=Mask.causal(), cache=ShardedKVCache(mesh()))
        layer(x + (what == "x" and rank == 1), mask=mask, cache=cache)


AT_ODDS = {
    "blocks": "got tokens 6 in blocks of 4 on rank 0 and 6 in blocks of 5 on rank 1",
    "mask": "got mask Mask.causal() on rank 0 and ",
    "x": "got q <float32 (2, 4, 6, 4) ",
}


@pytest.mark.parametrize("what", AT_ODDS)
def test_ranks_that_disagree_raise_if_they_are_told_to_check(what: str, ranks: Of) -> None:
    for got in ranks(2).try_run(at_odds, what):
        assert isinstance(got, Failure), got
        assert "ShardedKVCache: all ranks must make the same call; " + AT_ODDS[what] in got.message, got
