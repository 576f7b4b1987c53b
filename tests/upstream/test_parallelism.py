"""Complaints of users who shard heads or tokens. Here the part of each rank is computed in turn."""

import copy
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv import Mask


def share(layer: qkv.Attention, rank: int, ranks: int) -> qkv.Attention:
    """The part of a rank: its query heads, and a copy of each KV head that these read."""
    heads, group = layer.num_heads // ranks, layer.num_heads // layer.num_kv_heads
    first, kv_heads = rank * heads // group, max(1, heads // group)
    part = qkv.Attention(24, heads, num_kv_heads=kv_heads, head_dim=4, mask=layer.mask, rotary=layer.rotary, bias=False)
    state = {}
    for name, start, count in (
        ("q_proj", rank * heads, heads),
        ("k_proj", first, kv_heads),
        ("v_proj", first, kv_heads),
    ):
        state[f"{name}.weight"] = getattr(layer, name).weight[4 * start : 4 * (start + count)]
    state["out_proj.weight"] = layer.out_proj.weight[:, 4 * rank * heads : 4 * (rank + 1) * heads]
    part.load_state_dict(state)
    return part


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_transformers_48307_more_ranks_than_kv_heads(ranks: int) -> None:
    """Tensor parallelism over more processes than there are KV heads fails in the middle of a forward pass
    (huggingface/transformers#48307, huggingface/transformers#47811, pytorch/torchtitan#2574).

    A layer of fewer heads is a layer, whatever its width; and one whose heads do not go together is none.
    """
    torch.manual_seed(0)
    layer = qkv.CausalAttention(24, 8, num_kv_heads=2, head_dim=4, rotary=qkv.RotaryEmbedding(4), bias=False)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(sum(share(layer, rank, ranks)(x) for rank in range(ranks)), layer(x))
    with pytest.raises(ValueError, match=r"multiple of num_kv_heads, .* got num_heads=3 and num_kv_heads=2"):
        qkv.Attention(24, 3, num_kv_heads=2, head_dim=4)


def test_torchtitan_2574_projections_may_be_sharded_in_place() -> None:
    """As torch's ``parallelize_module`` cuts them: rows of q_proj, k_proj, v_proj and gate_proj, columns of out_proj. A
    KV head that is cut in two must be an error and no other answer (pytorch/torchtitan#2574).
    """
    torch.manual_seed(0)
    layer, x = qkv.CausalAttention(24, 4, num_kv_heads=2, gate=True, bias=False), torch.randn(2, 7, 24)

    def cut(rank: int, ranks: int) -> qkv.Attention:
        part = copy.deepcopy(layer)
        for projection in (part.q_proj, part.k_proj, part.v_proj, part.gate_proj):
            projection.weight = nn.Parameter(projection.weight.chunk(ranks)[rank])
        part.out_proj.weight = nn.Parameter(part.out_proj.weight.chunk(ranks, dim=1)[rank])
        return part

    torch.testing.assert_close(cut(0, 2)(x) + cut(1, 2)(x), layer(x))
    with pytest.raises(ValueError, match=r"whole heads, of width 6; got 3 channels. Over ranks, .*parallel.Heads\(\)"):
        cut(0, 4)(x)


def test_nemo_rl_3716_norms_of_all_heads_are_not_trained_by_a_part_of_them() -> None:
    """Gains of q_norm and k_norm get the gradient of a rank's own heads, without an error (NVIDIA-NeMo/RL#3716).

    A part of a layer refuses that, and whatever else is of all heads; without gradients, norms are no obstacle.
    """
    torch.manual_seed(0)
    x = torch.randn(2, 7, 24)

    def part(**options: Any) -> qkv.Attention:
        layer = qkv.CausalAttention(24, 4, num_kv_heads=2, bias=False, **options)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection.weight = nn.Parameter(projection.weight.chunk(2)[0])
        layer.out_proj.weight = nn.Parameter(layer.out_proj.weight.chunk(2, dim=1)[0])
        return layer

    normed = part(qk_norm=True)
    wrong = r"all heads, 4 on 2 KV heads, since q_norm.weight, k_norm.weight learn from all of them; got 2 on 1"
    with pytest.raises(ValueError, match=wrong):
        normed(x)
    with torch.no_grad():
        assert normed(x).isfinite().all() and normed(x[:1, :3]).isfinite().all()
    for options in ({"sink_logits": True}, {"alibi": [1.0] * 4}, {"position_bias": qkv.RelativePositionBias(4)}):
        layer = part(**options)
        for tokens in (3, 7):  # by one call of the kernel and by its parts
            wrong = "since sink_logits, alibi and position_bias are of all of them"
            with pytest.raises(ValueError, match=wrong), torch.no_grad():
                layer(x[:1, :tokens])
    layer = part()
    layer.k_proj, layer.v_proj = (nn.Linear(24, 12, bias=False) for _ in range(2))
    for tokens in (3, 7):
        with pytest.raises(ValueError, match="since a part has as many of each; got 2 on 2"), torch.no_grad():
            layer(x[:1, :tokens])


def test_a_rank_reads_the_keys_of_its_own_heads_from_another_layer() -> None:
    torch.manual_seed(0)
    first, x = qkv.CausalAttention(24, 4, num_kv_heads=2, bias=False), torch.randn(2, 7, 24)
    second = qkv.CrossLayerAttention(24, 4, num_kv_heads=2, mask=Mask.causal(), bias=False)
    cache = qkv.KVCache()
    first(x, cache=cache)
    parts = []
    for rank in range(2):
        mine, reader, own = copy.deepcopy(first), copy.deepcopy(second), qkv.KVCache()
        for projection in (mine.q_proj, mine.k_proj, mine.v_proj, reader.q_proj):
            projection.weight = nn.Parameter(projection.weight.chunk(2)[rank])
        for layer in (mine, reader):
            layer.out_proj.weight = nn.Parameter(layer.out_proj.weight.chunk(2, dim=1)[rank])
        mine(x, cache=own)
        parts.append(reader(x, cache=own))
    torch.testing.assert_close(parts[0] + parts[1], second(x, cache=cache))


def in_pieces(x: Tensor, sizes: list[int]) -> list[tuple[int, Tensor]]:
    """Where each piece begins, and the piece."""
    return list(zip([0, *accumulate(sizes)], x.split(sizes, dim=2), strict=False))


BANDS: dict[str, tuple[Mask, int, int]] = {  # and the same in keys before and after the query's own
    "full": (Mask.full(), 99, 99),
    "causal": (Mask.causal(), 99, 0),
    "causal window": (Mask.causal(window=6), 5, 0),
    "window": (Mask.sliding(window=8), 4, 4),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("sizes", [[8, 8, 8], [1, 20, 3]], ids=str)
def test_pytorch_177583_merged_parts_of_a_context_equal_the_whole(name: str, sizes: list[int]) -> None:
    """Context parallelism does not run on a CPU, is for causal masks alone where load is balanced, and for pieces of
    one length (pytorch/pytorch#177583, pytorch/pytorch#147793, pytorch/pytorch#141429).

    What a process computes of the keys that reach it, and how that is merged, is exact for every mask, forward and
    backward; the queries that it holds may be any.
    """
    torch.manual_seed(0)
    mask, before, after = BANDS[name]
    q, k, v = (torch.randn(2, heads, 24, 8, requires_grad=True) for heads in (4, 2, 2))
    merged = []
    for start, queries in in_pieces(q, [5, 12, 7]):
        partials = [
            qkv.attention_with_lse(queries, keys, values, mask=mask, offset=start - first)
            for (first, keys), (_, values) in zip(in_pieces(k, sizes), in_pieces(v, sizes), strict=True)
        ]
        merged.append(qkv.merge(partials).out)
    out = torch.cat(merged, dim=2)
    seen = torch.ones(24, 24, dtype=torch.bool).tril(after).triu(-before)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, want)
    towards = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), towards), torch.autograd.grad(want, (q, k, v), towards)
    )
