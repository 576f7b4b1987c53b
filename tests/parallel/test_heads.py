"""`qkv.parallel.Heads`: on real ranks, a layer of which each has some heads computes and learns as one process does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.ranks import Failure, Ranks, mesh
from torch import Tensor, nn

import qkv
from qkv import Mask

Of = Callable[[int], Ranks]

GROUPS: dict[str, Callable[[], qkv.Attention]] = {
    "multi-head": lambda: qkv.MultiHeadAttention(24, 12, head_dim=4),
    "cross": lambda: qkv.CrossAttention(24, 12, num_kv_heads=12, head_dim=4, context_dim=20),
    "six KV heads": lambda: qkv.CausalAttention(24, 12, num_kv_heads=6, head_dim=4, qk_norm=True),
    "two KV heads": lambda: qkv.CausalAttention(24, 12, num_kv_heads=2, head_dim=4, qk_norm=True),
    "window": lambda: qkv.SlidingWindowAttention(24, 12, 4, head_dim=4, alibi=[0.1 * h for h in range(12)]),
    "multi-query": lambda: qkv.MultiQueryAttention(24, 12, head_dim=4, qk_norm=True, sink_logits=True),
    "grouped": lambda: qkv.GroupedQueryAttention(24, 12, 12, head_dim=4, value_dim=6, softcap=5.0, gate=True),
    "all options": lambda: qkv.CausalAttention(
        24, 12, num_kv_heads=1, head_dim=4, value_dim=6, rotary=qkv.RotaryEmbedding(4), qk_norm=True, gate=True,
        sink_logits=True, alibi=[0.1 * h for h in range(12)], position_bias=qkv.RelativePositionBias(12),
    ),
    "no biases": lambda: qkv.CausalAttention(24, 12, num_kv_heads=12, head_dim=4, bias=False),
    "differential": lambda: qkv.DifferentialAttention(24, 12, num_kv_heads=12, mask=Mask.causal(), head_dim=4),
}  # fmt: skip


def made(name: str) -> qkv.Attention:
    """A layer whose norms and sinks are not those of the start, under which errors cancel."""
    torch.manual_seed(3)
    layer = GROUPS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def over_ranks(layer: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(layer, mesh(), qkv.parallel.Heads())


def whole(tensor: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def learned(name: str, cut: bool) -> dict[str, Tensor]:
    """The output of a step, and every gradient."""
    layer = made(name)
    if cut:
        over_ranks(layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 24, generator=generator, requires_grad=True)
    context = None
    if layer.context_dim is not None:
        context = torch.randn(2, 5, layer.context_dim, generator=generator, requires_grad=True)
    bias = torch.randn(1, 12, 7, 5 if context is not None else 7, generator=generator, requires_grad=True)
    out = layer(x, context, bias=bias)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "bias": bias.grad}
    if context is not None:
        found["context"] = context.grad
    weights = layer.attention_weights(x, context, bias=bias)
    found["weights"] = weights.detach()
    return found | {name: whole(parameter.grad) for name, parameter in layer.named_parameters()}


UNFIT = {("six KV heads", 4), ("two KV heads", 3)}
"""Refused: a rank would have one and a half KV heads."""
CUTS = [(name, count) for name in GROUPS for count in (2, 3, 4) if (name, count) not in UNFIT]


@pytest.mark.parametrize("name, count", CUTS)
def test_outputs_and_gradients_are_those_of_one_process(name: str, count: int, ranks: Of) -> None:
    want = learned(name, cut=False)
    for got in ranks(count).run(learned, name, True):
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")


def decoded(name: str, kind: str, cut: bool) -> list[Tensor]:
    """A prompt and steps through a cache, without gradients."""
    layer = made(name).eval()
    if cut:
        over_ranks(layer)
    caches: dict[str, Callable[[], Any]] = {
        "own": layer.make_cache,
        "int8": lambda: layer.make_cache(dtype="int8"),
        "pages": lambda: qkv.PagedKVCache(qkv.PagePool(64, 4)),
    }
    x = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(1))
    cache = caches[kind]()
    with torch.no_grad():
        outs = [layer(part, cache=cache, mask=Mask.causal()) for part in x.split([7, 1, 3, 1], dim=1)]
        outs.append(layer.attention_weights(x[:, :3], cache=cache, mask=Mask.causal()))
    if cut:
        assert cache.keys().k.shape[1] == max(1, layer.num_kv_heads // mesh().size()) if kind != "pages" else True
    return outs


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("window", "own", 3),
        ("window", "int8", 2),
        ("six KV heads", "own", 3),
        ("two KV heads", "pages", 4),
        ("multi-query", "int8", 2),
        ("all options", "own", 4),
    ],
)
def test_caches_have_the_heads_of_their_rank(name: str, kind: str, count: int, ranks: Of) -> None:
    want = decoded(name, kind, cut=False)
    for got in ranks(count).run(decoded, name, kind, True):
        torch.testing.assert_close(got, want)


def read_across(cut: bool) -> tuple[Tensor, Tensor | None]:
    """A layer that reads the keys of another, of which two ranks share one."""
    torch.manual_seed(5)
    first = qkv.CausalAttention(24, 4, num_kv_heads=2)
    second = qkv.CrossLayerAttention(24, 4, num_kv_heads=2, mask=Mask.causal(), qk_norm=True)
    x = torch.randn(2, 7, 24, requires_grad=True)
    for layer in (first, second) if cut else ():
        over_ranks(layer)
    cache = qkv.KVCache()
    out = second(first(x, cache=cache), cache=cache)
    out.square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_reads_its_own_keys_of_another_layer(count: int, ranks: Of) -> None:
    for got in ranks(count).run(read_across, True):
        torch.testing.assert_close(got, read_across(False))


def of_jagged(cut: bool) -> list[Tensor]:
    torch.manual_seed(5)
    layer = qkv.CausalAttention(24, 4, num_kv_heads=2, qk_norm=True, rotary=qkv.RotaryEmbedding(6))
    if cut:
        over_ranks(layer)
    sequences = [torch.randn(length, 24, requires_grad=True) for length in (3, 7, 1)]
    x = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    out = layer(x).values()
    out.square().sum().backward()
    return [out.detach(), *(one.grad for one in sequences)]  # type: ignore[list-item]


def test_nested_tensors_too(ranks: Of) -> None:
    for got in ranks(2).run(of_jagged, True):
        torch.testing.assert_close(got, of_jagged(False))


def shared_bias(cut: bool) -> list[Tensor]:
    """A position bias of two layers, only one of which is cut."""
    torch.manual_seed(5)
    bias = qkv.RelativePositionBias(4)
    layers = [qkv.CausalAttention(24, 4, position_bias=bias) for _ in range(2)]
    if cut:
        over_ranks(layers[0])
    x = torch.randn(2, 7, 24)
    out = layers[1](layers[0](x))
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in bias.parameters())]  # type: ignore[list-item]


def test_a_position_bias_may_be_of_a_whole_layer_as_well(ranks: Of) -> None:
    for got in ranks(2).run(shared_bias, True):
        torch.testing.assert_close(got, shared_bias(False))


def state_of_parts() -> None:
    """What a state dict has, and takes: parts and whole tensors, and packed ones."""
    want = made("all options")
    layer = over_ranks(made("all options"))
    assert {name: one.shape for name, one in layer.state_dict().items()} == {
        name: one.shape for name, one in want.state_dict().items()
    }
    for name, part in layer.state_dict().items():
        assert torch.equal(whole(part), want.state_dict()[name]), name
    torch.manual_seed(9)
    other = GROUPS["all options"]()
    layer.load_state_dict(other.state_dict())
    for name, part in layer.state_dict().items():
        assert torch.equal(whole(part), other.state_dict()[name]), name
    packed = other.state_dict()
    packed["in_proj_weight"] = torch.cat([packed.pop(f"{letter}_proj.weight") for letter in "qkv"]) + 1
    layer.load_state_dict(packed, assign=True)
    assert torch.equal(whole(layer.q_proj.weight), other.q_proj.weight + 1)  # type: ignore[union-attr]
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 5, 24)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.q_proj.weight.zero_()  # type: ignore[union-attr]
    assert not torch.equal(twin(x), layer(x))


def test_a_state_dict_is_that_of_the_whole_layer(ranks: Of) -> None:
    ranks(3).run(state_of_parts)


def drawn(name: str, seed: int, cut: bool) -> dict[str, Tensor]:
    """A layer without memory, cut, then initialised; ranks have different seeds."""
    with torch.device("meta"):
        layer = GROUPS[name]()
    if cut:
        over_ranks(layer)
        seed += mesh().get_local_rank()
    layer.to_empty(device="cpu")
    torch.manual_seed(seed)
    layer.reset_parameters()
    if layer.position_bias is not None:
        nn.init.zeros_(next(layer.position_bias.parameters()))
    return {name: whole(parameter.detach()) for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("name", ["all options", "differential"])
def test_parameters_are_drawn_as_by_one_process(name: str, ranks: Of) -> None:
    want = drawn(name, 4, cut=False)
    for got in ranks(2).run(drawn, name, 4, True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def of_first_rank() -> dict[str, Tensor]:
    """Weights of ranks that started with different seeds."""
    torch.manual_seed(mesh().get_local_rank())
    layer = over_ranks(qkv.CausalAttention(24, 4, num_kv_heads=1, qk_norm=True))
    return {name: whole(parameter.detach()) for name, parameter in layer.named_parameters()}


def test_the_weights_of_the_first_rank_count(ranks: Of) -> None:
    torch.manual_seed(0)
    want = dict(qkv.CausalAttention(24, 4, num_kv_heads=1, qk_norm=True).named_parameters())
    for got in ranks(2).run(of_first_rank):
        torch.testing.assert_close(got, {name: one.detach() for name, one in want.items()}, rtol=0, atol=0)


def saved(folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    layer = over_ranks(made("two KV heads"))
    dcp.save(layer.state_dict(), checkpoint_id=folder)


def loaded(folder: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(8)
    layer = GROUPS["two KV heads"]()
    if torch.distributed.is_initialized():
        over_ranks(layer)
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=folder)
    layer.load_state_dict(state)
    return {name: whole(one) for name, one in layer.state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_checkpoint_of_some_ranks_loads_on_others(ranks: Of, tmp_path: Path) -> None:
    ranks(4).run(saved, str(tmp_path / "of four"))
    want = made("two KV heads").state_dict()
    for got in (*ranks(2).run(loaded, str(tmp_path / "of four")), loaded(str(tmp_path / "of four"))):
        torch.testing.assert_close(got, dict(want), rtol=0, atol=0)
    ranks(2).run(saved, str(tmp_path / "of two"))
    for got in ranks(4).run(loaded, str(tmp_path / "of two")):
        torch.testing.assert_close(got, dict(want), rtol=0, atol=0)


class Block(nn.Module):
    """A model with a layer that is cut, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = made("two KV heads")
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.norm(x + self.attention(x)))
        return head


BATCH = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(2))


def stepped(way: str) -> dict[str, Tensor]:
    """Parameters after steps over a batch of which each data rank has its part."""
    model: Any = Block()
    batch = BATCH
    if way:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import parallelize_module

        both = mesh(2, 2, names=("data", "heads"))
        plan = {"attention": qkv.parallel.Heads()}
        parallelize_module(model, both["heads"], plan)
        batch = BATCH.chunk(2)[both["data"].get_local_rank()]
        if way == "FSDP2":
            for part in (model.attention, model):
                fully_shard(part, mesh=both["data"])
        else:
            model = nn.parallel.DistributedDataParallel(model, device_mesh=both["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    if way == "DDP":  # torch keeps the parts in it, which the next call makes DTensors
        model(batch)
        return {"out": model(BATCH).detach()}
    parameters = {name: whole(one.detach()) for name, one in model.named_parameters()}
    return {"out": model(BATCH).detach(), **parameters}


@pytest.mark.parametrize("way", ["FSDP2", "DDP"])
def test_together_with_data_parallelism(way: str, ranks: Of) -> None:
    want = stepped("")
    for got in ranks(4).run(stepped, way):
        torch.testing.assert_close(got, {name: want[name] for name in got})


def clipped(cut: bool) -> list[Tensor]:
    """Parameters after a step of clipped gradients, which are large in the heads of some ranks."""
    layer = made("six KV heads")
    if cut:
        over_ranks(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(BATCH).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    optimizer.step()
    return [whole(norm), *(whole(parameter.detach()) for parameter in layer.parameters())]


def test_gradients_are_clipped_by_their_norm_over_all_ranks(ranks: Of) -> None:
    for got in ranks(3).run(clipped, True):
        torch.testing.assert_close(got, clipped(False))


def repeated(kind: str, cut: bool) -> list[Tensor]:
    """Under gradient checkpointing, autocast and a compiler."""
    from torch.utils.checkpoint import checkpoint

    layer: Any = made("two KV heads")
    if cut:
        over_ranks(layer)
    x = BATCH.clone().requires_grad_()
    if kind == "checkpointed":
        out = checkpoint(layer, x, use_reentrant=False)
    elif kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
    else:
        out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    out.float().square().mean().backward()
    return [out.detach(), x.grad, *(whole(parameter.grad) for parameter in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["checkpointed", "autocast", "compiled"])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_calls_that_are_repeated_cast_and_compiled(kind: str, ranks: Of) -> None:
    want = repeated(kind, False)
    tolerance = {"rtol": 0.05, "atol": 0.05} if kind == "autocast" else {}
    for got in ranks(2).run(repeated, kind, True):
        torch.testing.assert_close(got, want, **tolerance)


def refused(case: str) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    layer: Any = qkv.CausalAttention(24, 6, num_kv_heads=2, head_dim=4)
    heads = qkv.parallel.Heads()
    if case == "twice":
        over_ranks(over_ranks(layer))
    elif case == "projections":
        over_ranks(parallelize_module(layer, mesh(), {"q_proj": ColwiseParallel()}))
    elif case == "two dimensions":
        heads._apply(layer, mesh(1, torch.distributed.get_world_size(), names=("a", "b")))
    elif case == "wrapped":
        layer.q_proj = nn.Sequential(layer.q_proj)
        over_ranks(layer)
    elif case == "norm":
        layer.q_norm = nn.LayerNorm(4)
        over_ranks(layer)
    elif case in ("record", "to_torch", "convert"):
        over_ranks(layer)
        if case == "record":
            layer.record(torch.randn(1, 5, 24))
        elif case == "to_torch":
            layer.to_torch()
        else:
            from qkv.convert import convert_layer

            convert_layer(layer, 1)
    else:
        over_ranks(
            {
                "latent": lambda: qkv.LatentAttention(24, 4, kv_rank=8, nope_dim=4),
                "of torch": lambda: nn.MultiheadAttention(24, 4),
                "a model": lambda: nn.Sequential(layer),
                "query heads": lambda: qkv.CausalAttention(24, 4, head_dim=4),
                "KV heads": lambda: layer,
            }[case]()
        )


REFUSED = {
    "twice": (2, "ValueError", "parameters of the CausalAttention must be whole; got DTensors for q_proj.weight"),
    "projections": (2, "ValueError", "got DTensors for q_proj.weight, q_proj.bias. Leave its projections out"),
    "two dimensions": (2, "ValueError", "mesh must have one dimension; got 2. Pass one of them, such as mesh['tp']"),
    "wrapped": (2, "TypeError", "q_proj must be an nn.Linear with the forward of nn.Linear; got Sequential"),
    "norm": (2, "TypeError", "q_norm must be that of the constructor; got another LayerNorm"),
    "record": (2, "ValueError", "CausalAttention: record is of layers that have all of their heads"),
    "to_torch": (2, "ValueError", "to_torch: the layer must have all of its heads; got one whose heads are over ranks"),
    "convert": (2, "ValueError", "convert_layer: the layer must have all of its heads"),
    "latent": (2, "TypeError", "got LatentAttention. All its heads read one latent"),
    "of torch": (2, "TypeError", "got MultiheadAttention. Convert it by qkv.Attention.from_torch."),
    "a model": (2, "TypeError", "got Sequential. Name the attention layers of a model in the plan"),
    "query heads": (3, "ValueError", "got 3 ranks for 4 query heads on 4 KV heads. Take another number of ranks."),
    "KV heads": (3, "ValueError", "got 3 ranks for 6 query heads on 2 KV heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_on_all_ranks(case: str, ranks: Of) -> None:
    count, kind, message = REFUSED[case]
    for got in ranks(count).refused(refused, case):
        assert got.kind == kind and message in got.message, got


def dropped(cut: bool) -> list[Tensor]:
    """A training step with dropout, whose seed is that of the first rank."""
    layer: Any = made("two KV heads").train()
    layer.dropout = 0.4
    if cut:
        over_ranks(layer)
    torch.manual_seed(6 + (mesh().get_local_rank() if cut else 0))
    out = layer(BATCH) - layer(BATCH)  # of two seeds
    out.square().mean().backward()
    return [out.detach(), *(whole(parameter.grad) for parameter in layer.parameters())]


@pytest.mark.parametrize("count", [2, 4])
def test_dropout_draws_what_one_process_does(count: int, ranks: Of) -> None:
    want = dropped(False)
    for got in ranks(count).run(dropped, True):
        torch.testing.assert_close(got, want)


def at_odds(is_told: bool) -> None:
    layer, x = over_ranks(made("two KV heads")), torch.randn(2, 6, 24)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QKV_CHECK", str(int(is_told)))
        layer(x)
        layer(x + mesh().get_local_rank())


def test_ranks_with_other_inputs_raise_if_they_are_told_to_check(ranks: Of) -> None:
    ranks(2).run(at_odds, False)
    for got in ranks(2).try_run(at_odds, True):
        assert isinstance(got, Failure), got
        assert "Heads: all ranks must make the same call; got x <float32 (2, 6, 24) " in got.message, got


def over_both(cut: bool) -> list[Tensor]:
    """Heads over one dimension of a mesh and tokens over the other, with dropout. Gradients are summed over tokens."""
    from torch.distributed.tensor.parallel import parallelize_module

    layer: Any = made("all options").train()
    layer.dropout = 0.4
    torch.manual_seed(6)
    x, tokens = BATCH.clone().requires_grad_(), None
    if cut:
        both = mesh(2, 2, names=("heads", "tokens"))
        parallelize_module(layer, both["heads"], qkv.parallel.Heads())
        tokens = qkv.parallel.Tokens.zigzag(7, both["tokens"])
        torch.manual_seed(6 + torch.distributed.get_rank())
    out = layer(x, tokens=tokens) if tokens is None else layer(tokens.take(x), tokens=tokens)
    direction = torch.randn(out.shape[0], 7, 24, generator=torch.Generator().manual_seed(4))
    (out * (direction if tokens is None else tokens.take(direction))).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    if tokens is None:
        return [out.detach(), *gradients]
    for gradient in gradients:
        own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        torch.distributed.all_reduce(own, group=both["tokens"].get_group())
    return [tokens.join(out.detach()), *map(whole, gradients)]


def test_heads_and_tokens_over_ranks(ranks: Of) -> None:
    for got in ranks(4).run(over_both, True):
        torch.testing.assert_close(got, over_both(False))
