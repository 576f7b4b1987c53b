"""Complaints of users who cut a sequence over ranks: some by plans, which are ints, the others on 3 real ranks."""

import itertools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from parallel.ranks import Failure, Ranks, mesh
from parallel.sharded import count_bytes, joined, long_inputs, ragged, run_layer, solve_long, taken, weights_like
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qkv
from qkv import Mask, parallel
from qkv.parallel import plan
from qkv.parallel.runs import Layout, even, require_layout, rows_of, zigzag

Of = Callable[[int], Ranks]
N, RANKS = 50, 3
LAYOUT = ragged(N, RANKS)
"""Runs of any lengths in any order; one rank has none."""
SCHEMES = ("gather", "heads", "merge")
WINDOW = Mask.causal(window=7)
IDS = torch.tensor([[0] * 11 + [1] * 22 + [2] * 17])


def in_one_process(mask: Mask, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """What ranks return by `solve_long`."""
    *qkv_, towards = long_inputs(dtype, N)
    leaves = [x.requires_grad_() for x in qkv_]
    out = qkv.attention(*leaves, mask=mask, **options)
    return dict(
        zip(("out", "d_q", "d_k", "d_v"), (out.detach(), *torch.autograd.grad(out, leaves, towards)), strict=True)
    )


def over_ranks(of: Of, mask: Mask, scheme: str, layout: Layout = LAYOUT, **options: Any) -> dict[str, Tensor]:
    """What `in_one_process` returns, by a scheme on ranks."""
    dtype = options.pop("dtype", torch.float32)
    results = of(len(layout)).run(partial(solve_long, **options), mask, layout, dtype, scheme)
    return {name: joined([result[name] for result in results], layout) for name in results[0]}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accelerate_4177_a_window_stays_a_window(ranks: Of, scheme: str) -> None:
    """Context parallelism replaces the mask of every layer by `is_causal=True`: layers with windows or chunks silently
    train with full attention (huggingface/accelerate#4177).

    The mask is an argument, and every scheme has it, or raises.
    """
    for mask in (WINDOW, Mask.causal() & Mask.chunked(9)):
        found, want = over_ranks(ranks, mask, scheme), in_one_process(mask)
        torch.testing.assert_close(found, want)
        assert not torch.allclose(found["out"], in_one_process(Mask.causal())["out"], atol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trl_6843_documents_stay_apart(ranks: Of, scheme: str) -> None:
    """Packed documents attend to each other once their sequence is cut; the guide had recommended it
    (huggingface/trl#6843).
    """
    mask = Mask.causal() & Mask.documents(IDS)
    torch.testing.assert_close(over_ranks(ranks, mask, scheme), in_one_process(mask))


def marked(layer: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(layer, mesh(), parallel.Context())
    tokens = parallel.Tokens(layout, mesh())
    with torch.no_grad(), parallel.over(tokens):
        out: Tensor = layer(tokens.take(x))
    return out


def test_prime_rl_2828_a_marked_layer_keeps_its_own_window(ranks: Of) -> None:
    """Patches read `window_size_left`, and models have `sliding_window`: it is ignored, without an error
    (PrimeIntellect-ai/prime-rl#2828).

    A mark adds a layout to the layer's own call; nothing is read from attributes, and an unknown name is an error. The
    same for models of transformers: ``../parallel/test_context.py``.
    """
    torch.manual_seed(0)
    layer, x = qkv.SlidingWindowAttention(24, 6, 5, causal=True), torch.randn(1, N, 24)
    with torch.no_grad():
        want = layer(x)
    torch.testing.assert_close(joined(ranks(RANKS).run(marked, layer, x, LAYOUT), LAYOUT, 1), want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prime_rl_3397_sinks_are_not_swallowed(ranks: Of, scheme: str) -> None:
    """Sink logits disappear in the ``**kwargs`` of a patched attention: wrong numbers, no error, no warning
    (PrimeIntellect-ai/prime-rl#3397).
    """
    sinks = torch.tensor([2.0, -1.0, 0.5, 1.0])
    found, want = over_ranks(ranks, WINDOW, scheme, sink_logits=sinks), in_one_process(WINDOW, sink_logits=sinks)
    torch.testing.assert_close(found, want)
    assert not torch.allclose(found["out"], in_one_process(WINDOW)["out"], atol=1e-2)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["sliding_window", "window_size", "s_aux", "is_causal"])
def test_prime_rl_3397_unknown_names_are_errors(name: str) -> None:
    q, tokens = torch.randn(1, 2, 6, 4), parallel.Tokens.even(6, mesh())
    with pytest.raises(TypeError, match=name):
        parallel.attention(q, q, q, tokens, **{name: 3})


def test_transformer_engine_3527_heads_have_windows_in_both_directions(ranks: Of) -> None:
    """The path that exchanges heads had no window: plain causal attention, and its gradients
    (NVIDIA/TransformerEngine#3527).
    """
    layout = ragged(N, 2)
    found, want = over_ranks(ranks, WINDOW, "heads", layout, backend="native"), in_one_process(WINDOW, backend="native")
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("n", [0, 1, 2, 7, 57])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_transformer_engine_1930_no_token_is_left_over(n: int, count: int) -> None:
    """7 tokens on 2 ranks are taken for 6, and the last is ignored (NVIDIA/TransformerEngine#1930,
    NVIDIA/TransformerEngine#1929).
    """
    for layout in (even(n, count), zigzag(n, count)):
        held = sorted(position for runs in layout for run in runs for position in range(*run))
        assert held == list(range(n))
        sizes = [rows_of(runs) for runs in layout]
        assert len(sizes) == count and max(sizes) - min(sizes) <= 1 + (layout != even(n, count))
    with pytest.raises(ValueError, match=r"each position from 0 on once; got none for 3 to 3"):
        require_layout("Tokens", [[(0, 3)], [(4, 7)]], 2)


def test_torchtitan_2536_documents_of_any_lengths() -> None:
    """Every document must be divisible by twice the number of ranks (pytorch/torchtitan#2536).

    What a rank receives is the keys of its documents, from their beginning up to its last query.
    """
    layout, mask = zigzag(N, RANKS), Mask.causal() & Mask.documents(IDS)
    seen = plan.keys_seen(mask, layout, N, 0)
    visible = mask.visible(N, N)[0, 0]
    owner = {position: rank for rank, runs in enumerate(layout) for run in runs for position in range(*run)}
    sent = [0] * RANKS
    for rank, runs in enumerate(layout):
        needed = {key for run in runs for query in range(*run) for key in visible[query].nonzero().flatten().tolist()}
        fetched = {key for keys in seen[rank] for interval in keys.intervals() for key in range(*interval)}
        assert fetched == needed
        for key in fetched:
            sent[owner[key]] += owner[key] != rank
    assert list(plan.gather_rows(seen, layout)) == sent


@pytest.mark.parametrize(("n", "count"), [(50, 4), (57826, 8), (3, 8)])
def test_deepspeed_5177_ranks_need_not_divide_the_length(n: int, count: int) -> None:
    """A length that the ranks do not divide is an assertion, or sizes that do not match in the exchange
    (deepspeedai/DeepSpeed#5177, huggingface/diffusers#12568, vllm-project/vllm-omni#492).

    What a rank sends to another is what the other expects of it.
    """
    layout, share = even(n, count), plan.shares(8, 4, count)
    plans = [plan.by_heads(layout, layout, share, (n, n), rank) for rank in range(count)]
    for sender, receiver in itertools.product(range(count), repeat=2):
        sent, expected = plans[sender].sends[receiver], plans[receiver].receives[sender]
        for kind in (0, 1):
            assert sum(m.size() for m in sent if m.kind == kind) == sum(m.size() for m in expected if m.kind == kind)
    assert sum(move.size() for moves in plans[0].receives for move in moves) == n * sum(
        end - first for first, end in (share[0].queries, share[0].keys)
    )


def there_and_back(x: Tensor, layout: Layout) -> Tensor:
    tokens = parallel.Tokens(layout, mesh())
    return tokens.join(tokens.take(x))


def test_xdit_471_as_many_tokens_come_back(ranks: Of) -> None:
    """57826 tokens in, 57832 out: those of padding came back (xdit-project/xDiT#471)."""
    x = torch.randn(2, 58, 3)
    for layout in (even(58, RANKS), zigzag(58, RANKS), ragged(58, RANKS)):
        for found in ranks(RANKS).run(there_and_back, x, layout):
            assert torch.equal(found, x)


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(8, 2, 4), (28, 4, 8), (28, 7, 3), (6, 6, 4), (2, 1, 5)])
def test_llama_factory_10794_kv_heads_go_to_all_ranks_that_read_them(heads: int, kv_heads: int, count: int) -> None:
    """2 KV heads on 4 ranks pass the check, and then fail in the exchange: `ProcessGroupGloo::alltoall: invalid tensor
    size` (hiyouga/LlamaFactory#10794). Query and KV heads are padded apart, 28 and 8: a crash, or wrong numbers
    (vllm-project/vllm-omni#5716).

    Any numbers of heads and ranks go together: nothing is padded, and each query head has its own KV head at hand.
    """
    found = plan.shares(heads, kv_heads, count)
    assert [head for share in found for head in range(*share.queries)] == list(range(heads))
    for share in found:
        for (start, stop), (first_key, end_key) in share.groups:
            group = (stop - start) // (end_key - first_key)
            for head in range(start, stop):
                read = share.keys[0] + first_key + (head - start) // group
                assert read == (share.queries[0] + head) // (heads // kv_heads)
        covered = [head for (start, stop), _ in share.groups for head in range(start, stop)]
        assert covered == list(range(share.queries[1] - share.queries[0]))


def few_heads() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = long_inputs(torch.float32, N)
    return q[:, :2], k[:, :1], v[:, :1]


def more_ranks_than_heads(scheme: str) -> dict[str, Any]:
    tokens = parallel.Tokens(LAYOUT, mesh())
    q, k, v = (tokens.take(x, dim=2) for x in few_heads())
    options: dict[str, Any] = {"mask": Mask.causal(), "scheme": scheme}
    return {
        "out": parallel.attention(q, k, v, tokens, **options),
        "chosen": parallel.explain(q, k, v, tokens, **options).chosen,
    }


@pytest.mark.parametrize("scheme", ["auto", *SCHEMES])
def test_verl_1226_more_ranks_than_heads(ranks: Of, scheme: str) -> None:
    """Exchanging heads limits the ranks to the number of (KV) heads (verl-project/verl#1226,
    ByteDance-Seed/VeOmni#363).

    `auto` takes the scheme that sends least, here not heads; asked for it, ranks without a head wait for the others.
    """
    results = ranks(RANKS).run(more_ranks_than_heads, scheme)
    want = qkv.attention(*few_heads(), mask=Mask.causal())
    torch.testing.assert_close(joined([one["out"] for one in results], LAYOUT), want)
    assert {one["chosen"] for one in results} == {"gather" if scheme == "auto" else scheme}


def test_ring_flash_attention_42_bf16_loses_nothing_by_ranks(ranks: Of) -> None:
    """Partial results in bf16: the error grows with the ranks, and "gradients can blow up while the loss looks fine"
    (zhuzilin/ring-flash-attention#42, zhuzilin/ring-flash-attention#22).

    `gather` makes no partial results, and has the bits of one process; those of `merge` travel in fp32.
    """
    options: dict[str, Any] = {"backend": "native"}
    exact, peer = in_one_process(Mask.causal(), torch.float64), in_one_process(Mask.causal(), torch.bfloat16, **options)
    gathered = over_ranks(ranks, Mask.causal(), "gather", dtype=torch.bfloat16, **options)
    for name in ("out", "d_q"):
        assert torch.equal(gathered[name], peer[name]), name
    merged = over_ranks(ranks, Mask.causal(), "merge", dtype=torch.bfloat16, **options)
    rounded = [x.double().requires_grad_() for x in long_inputs(torch.bfloat16, N)]
    out = qkv.attention(*rounded[:3], mask=Mask.causal())
    gradients = torch.autograd.grad(out, rounded[:3], rounded[3])
    for name, want in zip(exact, (out.detach(), *gradients), strict=True):
        assert_within_budget(merged[name], want, peer[name], name)
        assert_within_budget(gathered[name], want, peer[name], name)


def test_easy_context_14_large_scores_and_rows_that_see_nothing_yet() -> None:
    """Corrections by differences of log-sum-exps overflow, or are NaN where a part shows a row no key
    (jzhang38/EasyContext#14, NVIDIA/TransformerEngine#716).
    """
    q, k, v, _ = long_inputs(torch.float32, N)
    q = 1000 * q
    partials = [
        qkv.attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], mask=Mask.causal(), offset=-a)
        for a, b in ((30, 50), (0, 10), (10, 30))
    ]
    merged = qkv.merge(partials)
    torch.testing.assert_close(merged.out, qkv.attention(q, k, v, mask=Mask.causal()))
    nothing = qkv.merge(partials[:1])
    assert (
        torch.equal(nothing.out[:, :, :30], torch.zeros(1, 4, 30, 16)) and nothing.lse[:, :, :30].eq(-torch.inf).all()
    )


def test_easy_context_14_over_ranks(ranks: Of) -> None:
    """The same where partial results travel: most rows see nothing on most ranks."""
    torch.testing.assert_close(over_ranks(ranks, WINDOW, "merge", scale=300.0), in_one_process(WINDOW, scale=300.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_pytorch_147793_any_backend_and_dtype(ranks: Of, backend: str, dtype: torch.dtype) -> None:
    """On a CPU, or in fp32, the call falls to a kernel that has no sharding: "got mixed torch.Tensor and DTensor"
    (pytorch/pytorch#147793, pytorch/torchtitan#3340).
    """
    found = over_ranks(ranks, Mask.causal(), "gather", dtype=dtype, backend=backend)
    torch.testing.assert_close(found, in_one_process(Mask.causal(), dtype, backend=backend))


@pytest.mark.usefixtures("one_process")
def test_pytorch_159634_a_layout_needs_no_tensor() -> None:
    """`context_parallel` cannot be entered without a buffer to cut (pytorch/pytorch#159634)."""
    tokens = parallel.Tokens.zigzag(11, mesh())
    assert tokens.positions.tolist() == list(range(11)) and tokens.rows == tokens.length == 11
    with parallel.over(tokens):
        pass


@pytest.mark.usefixtures("one_process")
def test_diffusers_12443_a_part_is_not_taken_for_the_whole() -> None:
    """Each GPU attended to its own part alone: two pictures side by side (huggingface/diffusers#12443).

    A layer cannot know that its input is a part; one that was marked must be told the layout, or raises.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    layer, x = qkv.MultiHeadAttention(16, 4), torch.randn(1, 9, 16)
    parallelize_module(layer, mesh(), parallel.Context())
    with pytest.raises(ValueError, match=r"within `with parallel.over\(tokens\):`; got a call outside"):
        layer(x)
    with parallel.over(parallel.Tokens.even(9, mesh())):
        layer(x)


def part_of_loss(layer: nn.Module, x: Tensor, layout: Layout) -> dict[str, Any]:
    return run_layer(layer, x, layout)


def test_megatron_560_positions_are_those_of_the_sequence(ranks: Of) -> None:
    """Rotary positions, or lengths of packed documents, are those of the part (NVIDIA/Megatron-LM#560,
    sgl-project/sglang#28463, PrimeIntellect-ai/prime-rl#2392).
    """
    torch.manual_seed(0)
    mask = Mask.causal() & Mask.documents(IDS)
    layer, x = qkv.Attention(24, 6, mask=mask, rotary=qkv.RotaryEmbedding(4)), torch.randn(1, N, 24)
    results = ranks(RANKS).run(part_of_loss, layer, x, LAYOUT)
    torch.testing.assert_close(joined([one["out"] for one in results], LAYOUT, 1), layer(x).detach())


def test_megatron_673_gradients_are_sums(ranks: Of) -> None:
    """The loss, or a gradient, is wrong by the number of ranks: a mean where a sum is due (NVIDIA/Megatron-LM#673,
    NVIDIA/Megatron-LM#906, NVIDIA-NeMo/Automodel#3157).

    The README says which gradients sum, and ``examples/train_parallel.py`` does it: ``../parallel/test_training.py``.
    """
    torch.manual_seed(0)
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=2), torch.randn(1, N, 24)
    results = ranks(RANKS).run(part_of_loss, layer, x, LAYOUT)
    (layer(x) * weights_like(x)).sum().backward()
    for name, parameter in layer.named_parameters():
        total = sum(one[f"0.{name}"] for one in results)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_megatron_1464_gradients_are_those_of_the_formula(ranks: Of, scheme: str) -> None:
    """dq, dk and dv are reported to be wrong with keys that travel (NVIDIA/Megatron-LM#1464,
    NVIDIA/TransformerEngine#1557).
    """
    q, k, v, towards = long_inputs(torch.float64, N)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    place = torch.arange(N)
    hidden = (place[None] > place[:, None]) | (place[None] <= place[:, None] - 7)
    scores = (q @ keys.mT / 4).masked_fill(hidden, -torch.inf)
    want = torch.autograd.grad(scores.softmax(-1) @ values, leaves, towards)
    found = over_ranks(ranks, WINDOW, scheme, dtype=torch.float64)
    for name, gradient in zip(("d_q", "d_k", "d_v"), want, strict=True):
        torch.testing.assert_close(found[name], gradient)


def decoded(layer: nn.Module, x: Tensor, is_sharded: bool) -> Tensor:
    """A prompt and some steps, over a cache in blocks of 4 or a whole one."""
    cache = parallel.ShardedKVCache(mesh(), block=4) if is_sharded else qkv.KVCache()
    with torch.no_grad():
        return torch.cat([layer(part, cache=cache) for part in x.split([13, 1, 1, 2, 1], dim=1)], dim=1)


def test_vllm_41623_decoding_over_ranks_is_decoding(ranks: Of) -> None:
    """A sharded cache gives gibberish after a refactoring (vllm-project/vllm#41623)."""
    torch.manual_seed(0)
    layer = qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4)).eval()
    x = torch.randn(2, 18, 24)
    want = decoded(layer, x, False)
    for found in ranks(RANKS).run(decoded, layer, x, True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformer_engine_2052_padding_over_ranks(ranks: Of, scheme: str) -> None:
    """Padding masks are not supported where a sequence is cut (NVIDIA/TransformerEngine#2052)."""
    mask = Mask.causal() & Mask.padding(torch.tensor([37]))
    torch.testing.assert_close(over_ranks(ranks, mask, scheme), in_one_process(mask))


def test_pippy_1130_nothing_is_sent_from_rank_to_rank() -> None:
    """`batch_isend_irecv` hangs: on gloo, with other lists on each rank, with many operations (pytorch/PiPPy#1130,
    NVIDIA/nccl#2130, pytorch/pytorch#174288).

    There is no such call: all that is sent goes through collectives.
    """
    folder = Path(parallel.__file__).parent
    source = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert len(source) > 5
    found = {name for name, text in source.items() if re.search(r"\b(batch_isend_irecv|i?send|i?recv|P2POp)\(", text)}
    assert not found
    assert "all_to_all_single(" in source["exchange.py"]


class Collectives(TorchDispatchMode):
    """The names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def collectives(scheme: str, layout: Layout) -> list[str]:
    tokens = parallel.Tokens(layout, mesh())
    q, k, v = (taken(x, layout, tokens.rank) for x in long_inputs(torch.float32, N)[:3])
    with Collectives() as found:
        parallel.attention(q, k, v, tokens, scheme=scheme)
    return found.names


@pytest.mark.parametrize(("scheme", "times"), [("gather", 1), ("heads", 2), ("merge", 2)])
def test_diffusers_sizes_are_known_without_a_collective(ranks: Of, scheme: str, times: int) -> None:
    """Sizes are asked of the other ranks once for each local shape, so ranks with other shapes skip it, and hang
    (a note at `gather_size_by_comm` in huggingface/diffusers).

    All ranks make the same few calls, whatever they hold; one of them holds nothing.
    """
    assert any(not runs for runs in LAYOUT)
    for found in ranks(RANKS).run(collectives, scheme, LAYOUT):
        assert found == ["alltoall_base_"] * times


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchtitan_3086_a_scheme_that_was_asked_for_runs(ranks: Of, scheme: str) -> None:
    """The option for the way that keys travel had come to do nothing (pytorch/torchtitan#3086).

    What was asked for is what `explain` says, and what is sent is what it counts, other than by other schemes.
    """
    found = ranks(RANKS).run(count_bytes, WINDOW, even(N, RANKS), scheme)
    others = {"gather": "heads", "heads": "merge", "merge": "gather"}
    other = ranks(RANKS).run(count_bytes, WINDOW, even(N, RANKS), others[scheme])
    for one in found:
        assert one["chosen"] == scheme and sum(one["forward"]) == one["explained"]
    assert [one["explained"] for one in found] != [one["explained"] for one in other]


def without_a_scheme() -> None:
    tokens = parallel.Tokens(LAYOUT, mesh())
    q, k, v = (tokens.take(x, dim=2) for x in long_inputs(torch.float32, N)[:3])
    parallel.attention(q, k, v, tokens, scheme="ring")


def test_torchtitan_3086_an_unknown_scheme_is_an_error_on_all_ranks(ranks: Of) -> None:
    for one in ranks(RANKS).try_run(without_a_scheme):
        assert isinstance(one, Failure)
        assert re.search(r"scheme must be 'auto' or one of 'gather', 'heads', 'merge'; got 'ring'", one.message)


def dropped(scheme: str) -> Tensor:
    tokens = parallel.Tokens(LAYOUT, mesh())
    q, k, v = (tokens.take(x, dim=2) for x in long_inputs(torch.float32, N)[:3])
    return parallel.attention(q, k, v, tokens, mask=WINDOW, scheme=scheme, dropout=0.3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ring_flash_attention_36_dropout_drops_what_one_process_drops(ranks: Of, scheme: str) -> None:
    """Dropout silently loses the state of its generator; windows are "really tricky"
    (zhuzilin/ring-flash-attention#36, zhuzilin/ring-flash-attention#35).

    Ranks draw by the places of row, head and key in the whole; they begin with one seed, that of the first rank.
    """
    found = joined(ranks(RANKS).run(dropped, scheme), LAYOUT)
    torch.manual_seed(0)  # as ranks do before each function
    q, k, v, _ = long_inputs(torch.float32, N)
    torch.testing.assert_close(found, qkv.attention(q, k, v, mask=WINDOW, dropout=0.3))
    assert not torch.allclose(found, qkv.attention(q, k, v, mask=WINDOW), atol=1e-2)
