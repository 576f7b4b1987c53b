"""Tokens over ranks together with FSDP2 and DDP: gradients are those of one process, over every mesh."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parallel.ranks import Ranks, mesh
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import MistralConfig, MistralForCausalLM

import qkv
from qkv import Mask, parallel
from qkv.parallel.runs import even, zigzag

Of = Callable[[int], Ranks]
N, ROWS = 23, 4
LAYOUTS: dict[str, Callable[[int], Any]] = {
    "zigzag": lambda ranks: zigzag(N, ranks),
    "a rank without tokens": lambda ranks: ((), *even(N, ranks - 1)),
}


class Block(nn.Module):
    """Attention within a model that knows nothing of ranks."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        self.norm, self.repeated = nn.LayerNorm(24), repeated
        self.attention = qkv.CausalAttention(
            24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4), qk_norm=True, sink_logits=True
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        if self.repeated:
            attended: Tensor = checkpoint(self.attention, normed, use_reentrant=False)
        else:
            attended = self.attention(normed)
        return x + attended


class Model(nn.Module):
    def __init__(self, repeated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.head = nn.Embedding(20, 24), nn.Linear(24, 20)
        self.blocks = nn.ModuleList(Block(repeated) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels."""
    ids = torch.randint(20, (ROWS, N + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def learned_by_one() -> dict[str, Tensor]:
    """The gradients of the mean over all tokens, and their norm."""
    model, (ids, labels) = Model(), batch()
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten()).backward()
    return gradients_of(model) | {"norm": nn.utils.clip_grad_norm_(model.parameters(), 1.0)}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): whole(one.grad) for name, one in model.named_parameters()}
    return {name: one.clone() for name, one in found.items()}


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def meshes(way: str) -> tuple[DeviceMesh, DeviceMesh | None, DeviceMesh]:
    """Of tokens, of batches, and over which gradients are averaged."""
    if "batches" not in way:
        return mesh(), None, mesh()
    both = mesh(2, distributed.get_world_size() // 2, names=("dp", "cp"))
    averaged = both["dp"] if "sum" in way else both._flatten("dp_cp")
    return both["cp"], both["dp"], averaged


def learned(way: str, layout: str, repeated: bool = False) -> dict[str, Tensor]:
    """The gradients of all parameters on this rank, whole, and their norm."""
    cp, dp, averaged = meshes(way)
    model: Any = Model(repeated)
    tokens = parallel.Tokens(LAYOUTS[layout](cp.size()), cp)
    if "later" not in way:
        parallelize_module(model, cp, {"blocks.*.attention": parallel.Context()})
    if "FSDP2" in way:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=averaged)
    if "later" in way:
        parallelize_module(model, cp, {"blocks.*.attention": parallel.Context()})
    if "DDP" in way:
        model = nn.parallel.DistributedDataParallel(model, process_group=averaged.get_group())
    ids, labels = (tokens.take(x if dp is None else x.chunk(2)[dp.get_local_rank()]) for x in batch())
    with parallel.over(tokens):
        logits = model(ids)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        part = losses.sum() / (ROWS * N)  # of the mean over all tokens
        (part * averaged.size()).backward()
    if "sum" in way:
        for parameter in model.parameters():
            own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            distributed.all_reduce(own, group=cp.get_group())
    found = gradients_of(model)
    return found | {"norm": whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0)).clone()}


WAYS = [
    ("DDP", 3, "a rank without tokens"),
    ("FSDP2 of batches and tokens", 4, "zigzag"),
]
MORE_WAYS = [
    ("FSDP2", 2, "zigzag"),
    ("FSDP2, marked later", 3, "a rank without tokens"),
    ("FSDP2 of batches, sum over tokens", 4, "a rank without tokens"),
    ("DDP of batches and tokens", 4, "a rank without tokens"),
    ("DDP of batches, sum over tokens", 4, "zigzag"),
]


@pytest.mark.parametrize(
    ("way", "count", "layout"),
    [
        *(pytest.param(*way, id=way[0]) for way in WAYS),
        *(pytest.param(*way, id=way[0], marks=pytest.mark.long) for way in MORE_WAYS),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_gradients_are_those_of_one_process(ranks: Of, way: str, count: int, layout: str) -> None:
    want = learned_by_one()
    for found in ranks(count).run(learned, way, layout):
        assert found.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("way", ["FSDP2", "DDP"])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_forward_passes_that_are_repeated(ranks: Of, way: str) -> None:
    want = learned_by_one()
    for found in ranks(2).run(learned, way, "zigzag", True):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "sliding_window": 9,
}


def of_transformers(way: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model: Any = MistralForCausalLM(MistralConfig(**SIZES))
    (ids, labels), mask = batch(), Mask.documents(torch.arange(N)[None] // 9)
    qkv.register()
    model.set_attn_implementation("qkv")
    if not way:
        seen = (Mask.causal(window=9) & mask).visible(N, N)
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        model.set_attn_implementation("eager")
        logits = model(ids, attention_mask=hidden.expand(ROWS, 1, N, N), use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return gradients_of(model)
    tokens = parallel.Tokens.zigzag(N, mesh())
    parallelize_module(model, mesh(), {"model.layers.*.self_attn": parallel.Context()})
    if way == "FSDP2":
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh())
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with parallel.over(tokens, mask=mask):
        logits = model(tokens.take(ids), position_ids=tokens.positions[None], use_cache=False).logits
    part = F.cross_entropy(logits.flatten(0, 1), tokens.take(labels).flatten(), reduction="sum") / (ROWS * N)
    (part * len(tokens.runs)).backward()
    return gradients_of(model)


@pytest.mark.parametrize("way", ["FSDP2", "DDP"])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_model_of_transformers(ranks: Of, way: str) -> None:
    want = of_transformers("")
    for found in ranks(2).run(of_transformers, way):
        assert found.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
