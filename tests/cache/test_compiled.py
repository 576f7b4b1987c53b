"""Decoding by compiled programs: layers with caches are operators, so that no step is compiled anew."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qkv
from qkv import Caches, Mask
from qkv.cache.handle import Handle, find

X = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own making


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.linear = attention, nn.Linear(16, 16)

    def forward(self, x: Tensor, cache: Any = None, **options: Any) -> Tensor:
        x = x + self.attention(x, cache=cache, **options)
        return x + self.linear(x).relu()


def causal(**options: Any) -> nn.Module:
    return qkv.CausalAttention(16, 2, num_kv_heads=1, rotary=qkv.RotaryEmbedding(8), **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "causal": causal,
    "window": lambda: qkv.SlidingWindowAttention(16, 2, window=4, causal=True, rotary=qkv.RotaryEmbedding(8)),
    "gated": lambda: causal(gate=True, qk_norm=True),
    "biased": lambda: qkv.CausalAttention(16, 2, position_bias=qkv.RelativePositionBias(2, bidirectional=False)),
    "latent": lambda: qkv.LatentAttention(
        16, 2, kv_rank=8, nope_dim=8, rope_dim=4, mask=Mask.causal(), rotary=qkv.RotaryEmbedding(4, interleaved=True)
    ),
    "differential": lambda: qkv.DifferentialAttention(16, 2, mask=Mask.causal()),
}
CACHES: dict[str, Callable[[nn.Module], Any]] = {
    "one": lambda layer: layer.make_cache(),  # type: ignore[operator]
    "of a model": Caches.for_model,
    "with capacity": lambda layer: Caches.for_model(layer, capacity=64),
    "int8": lambda layer: Caches.for_model(layer, dtype="int8"),
    "paged": lambda layer: qkv.PagedKVCache(qkv.PagePool(page_size=4)),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield


def compiled(call: Any, **options: Any) -> Any:
    return torch.compile(call, **{"backend": "eager", "fullgraph": True, **options})


def graphs() -> int:
    """The number of graphs compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def decode(model: Any, cache: Any, x: Tensor = X, start: int = 0, prompt: int = 5, **options: Any) -> Tensor:
    """The outputs of a prompt and of the tokens after it, one by one."""
    parts = [x[:, start : start + prompt], *x[:, start + prompt :].split(1, dim=1)]
    return torch.cat([model(part, cache=cache, **options) for part in parts], dim=1)


CASES = [
    pytest.param("causal", "of a model"),
    pytest.param("window", "of a model"),
    *(
        pytest.param(layer, "of a model", marks=pytest.mark.long)
        for layer in LAYERS
        if layer not in ("causal", "window")
    ),
    *(pytest.param("causal", cache, marks=pytest.mark.long) for cache in CACHES if cache != "of a model"),
]


@pytest.mark.parametrize(("layer", "cache"), CASES)
def test_a_step_is_compiled_once_and_has_the_bits_of_eager(layer: str, cache: str) -> None:
    model = Block(LAYERS[layer]())
    make = lambda: CACHES[cache](model.attention)
    caches, program = make(), compiled(model)
    want = decode(model, make())
    assert torch.equal(decode(program, caches), want)
    assert caches.length == 40
    assert graphs() == 2  # a prompt and a step, though memory has grown
    assert torch.equal(decode(program, make()), want)
    caches.reset()
    assert torch.equal(decode(program, caches), want)
    assert graphs() == 2


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_each_way_to_compile(dynamic: bool | None, fullgraph: bool) -> None:
    model = Block(causal())
    program = compiled(model, dynamic=dynamic, fullgraph=fullgraph)
    assert torch.equal(decode(program, Caches.for_model(program)), decode(model, Caches.for_model(model)))
    assert graphs() == 2


def test_tokens_are_appended_in_place() -> None:
    model = causal()
    cache, program = qkv.KVCache(capacity=40), compiled(model)
    program(X[:, :5], cache=cache)
    memory = [part.memory for part in cache._parts]
    decode(program, cache, start=5, prompt=1)
    assert all(one is part.memory for one, part in zip(memory, cache._parts, strict=True))


@pytest.mark.long
def test_layers_compiled_one_by_one_share_a_program() -> None:
    model = nn.ModuleList([causal() for _ in range(10)])
    for layer in model:
        layer.compile(backend="eager", fullgraph=True)
    caches = Caches.for_model(model)
    for x in (X[:, :5], X[:, 5:6], X[:, 6:7]):
        x = x.contiguous()
        for layer in model:
            x = layer(x, cache=caches)
    assert graphs() == 2


@pytest.mark.long
def test_operations_between_steps() -> None:
    """The compiler sees none of them."""
    model = Block(causal())
    program, found = compiled(model), []
    for run in (model, program):
        caches = Caches.for_model(model)
        outs = [run(X[:, :5], cache=caches), run(X[:, 5:6], cache=caches)]
        before = graphs()
        caches.crop(3)
        outs.append(run(X[:, 3:4], cache=caches))
        caches.select(torch.tensor([1, 0]))
        outs.append(run(X[:, 4:5], cache=caches))
        caches.crop(torch.tensor([2, 5]))
        outs.append(run(X[:, 5:6], cache=caches))  # rows of different lengths
        twin = copy.deepcopy(caches)
        outs += [run(X[:, 6:7], cache=each) for each in (caches, twin, copy.copy(caches))]
        assert graphs() == before
        sent = pickle.loads(pickle.dumps(caches))
        sent.bind(model)
        outs.append(run(X[:, 7:8], cache=sent))
        caches.load_state_dict(twin.state_dict())
        outs.append(run(X[:, 8:9], cache=caches))
        found.append(torch.cat(outs, dim=1))
    assert torch.equal(*found)


@pytest.mark.long
def test_padding_beams_positions_and_biases() -> None:
    model = causal()
    program, found = compiled(model), []
    keep = torch.tensor([[False, True, True], [True, True, True]])
    for run in (model, program):
        cache = qkv.KVCache()
        outs = [run(X[:, :3], mask=Mask.padding(keep), cache=cache)]
        cache.repeat(3)
        outs += [run(X[:, i : i + 1].repeat(3, 1, 1), cache=cache) for i in range(3, 6)]
        bias, positions = torch.randn(1, 1, 1, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
        outs.append(run(X[:, 6:7].repeat(3, 1, 1), cache=cache, bias=bias, positions=positions))
        outs.append(run(X[:, 7:8].repeat(3, 1, 1), cache=cache, mask=Mask.causal(window=3)))
        found.append(torch.cat([out.flatten() for out in outs]))
    assert torch.equal(*found)


@pytest.mark.long
def test_cross_attention_and_another_layers_keys() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cross = causal(), qkv.CrossAttention(16, 2)
            self.second = qkv.CrossLayerAttention(16, 2, num_kv_heads=1, mask=Mask.causal())

        def forward(self, x: Tensor, cache: Caches, context: Tensor | None = None) -> Tensor:
            x = self.cross(self.first(x, cache=cache), context, cache=cache)
            return self.second(x, cache=cache["first"])

    model = Model()
    program = compiled(model, fullgraph=False)
    caches = [Caches.for_model(model), Caches.for_model(model)]
    for x, context in ((X[:, :5], CONTEXT), (X[:, 5:6], None), (X[:, 6:7], None), (X[:, 7:8], CONTEXT.clone())):
        assert torch.equal(program(x, caches[0], context), model(x, caches[1], context))
    with pytest.raises(ValueError, match="it contains another context"):
        program(X[:, 8:9], caches[0], CONTEXT + 1)
    assert caches[0].length == caches[1].length == 8


@pytest.mark.long
def test_errors_are_those_of_eager_and_leave_the_cache_as_it_was() -> None:
    model, other = causal(), causal()
    cache, full = qkv.KVCache(), qkv.KVCache(capacity=5)
    program, wrong = compiled(model), compiled(other)
    for each in (cache, full):
        program(X[:, :5], cache=each)
    with pytest.raises(ValueError, match="its 5 tokens are keys of another layer"):
        wrong(X[:, :5], cache=cache)
    with pytest.raises(ValueError, match="k must be"):
        program(X[:1, :5], cache=cache)
    with pytest.raises(ValueError, match="capacity is 5 tokens"):
        program(X[:, :5], cache=full)
    both_ways, seen = compiled(qkv.Attention(16, 2)), qkv.KVCache()
    both_ways(X[:, :5], cache=seen)
    with pytest.raises(ValueError, match="must not show keys after the query"):
        both_ways(X[:, :5], cache=seen)
    caches = Caches.for_model(nn.ModuleList([model]))
    with pytest.raises(ValueError, match="the layer must be of the model"):
        wrong(X[:, :5], cache=caches)
    assert (cache.length, full.length, caches.length) == (5, 5, 0)
    torch.testing.assert_close(program(X[:, 5:6], cache=cache), model(X[:, :6], cache=qkv.KVCache())[:, 5:])


@pytest.mark.long
def test_a_failed_call_of_a_model_leaves_nothing() -> None:
    model = nn.ModuleList([causal(), causal()])

    def call(x: Tensor, cache: Caches) -> Tensor:
        return model[1](model[0](x, cache=cache), cache=cache)

    program, caches = compiled(call), Caches.for_model(model)
    want = call(X, Caches.for_model(model))
    program(X[:, :5], caches)
    caches.values()[1].append(torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8))  # out of step
    with pytest.raises(ValueError, match="all layers must have the same tokens"):
        program(X[:, 5:6], caches)
    caches.crop(5)
    torch.testing.assert_close(program(X[:, 5:6], caches), want[:, 5:6])


def test_parameters_that_a_program_computes() -> None:
    """They are inputs of the operator, which are not yet, or never, those of the layer."""
    model = causal()

    def changed(x: Tensor, cache: qkv.KVCache) -> Tensor:
        model.q_proj.weight.mul_(2)
        return model(x, cache=cache)

    def replaced(x: Tensor, cache: qkv.KVCache) -> Tensor:
        weights = {name: 2 * parameter for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,), {"cache": cache})

    for call in (changed, replaced):
        before = copy.deepcopy(model.state_dict())
        want = call(X[:, :3], qkv.KVCache())
        model.load_state_dict(before)
        got = compiled(call, backend="aot_eager")(X[:, :3], qkv.KVCache())
        torch.testing.assert_close(got, want)
        model.load_state_dict(before)


@pytest.mark.long
def test_a_subclass_that_changes_its_input_and_a_copy_of_a_layer() -> None:
    class Doubled(qkv.CausalAttention):
        def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
            return super().forward(2 * x, *args, **options) + 1

    for model in (Doubled(16, 2), copy.deepcopy(causal()), copy.copy(causal()), pickle.loads(pickle.dumps(causal()))):
        model.out_proj.weight.mul_(3)
        torch.testing.assert_close(decode(compiled(model), qkv.KVCache()), decode(model, qkv.KVCache()))


def test_a_state_read_in_the_graph_of_a_call_is_the_state_after_it() -> None:
    model = causal()

    def before(x: Tensor, cache: qkv.KVCache) -> Tensor:
        count = cache.length
        return model(x, cache=cache) + count

    def after(x: Tensor, cache: qkv.KVCache) -> Tensor:
        return model(x, cache=cache) + cache.length

    def cropped(x: Tensor, cache: qkv.KVCache) -> Tensor:
        out = model(x, cache=cache)
        cache.crop(cache.length - 1)
        return out + model(x[:, -1:], cache=cache)

    for call, fullgraph in ((before, True), (after, False), (cropped, False)):
        torch.compiler.reset()
        caches = qkv.KVCache(), qkv.KVCache()
        program = compiled(call, fullgraph=fullgraph)
        for x in (X[:, :5], X[:, 5:6], X[:, 6:7]):
            assert torch.equal(program(x, caches[0]), call(x, caches[1]))
        assert caches[0].length == caches[1].length == 7
    with pytest.raises(Exception, match="the state of a cache must be read or changed in a graph of its own"):
        compiled(after)(X[:, :5], qkv.KVCache())


@pytest.mark.long
def test_gradients_autocast_and_inference() -> None:
    model = causal()
    program = compiled(model, backend="aot_eager")
    with torch.enable_grad():
        caches = qkv.KVCache(), qkv.KVCache()
        runs = list(zip((program, model), caches, strict=True))
        sums = [sum(run(x, cache=cache).sum() for x in X[:, :7].split([5, 1, 1], dim=1)) for run, cache in runs]
        got, want = (torch.autograd.grad(each, model.k_proj.weight)[0] for each in sums)
        torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        caches = qkv.KVCache(), qkv.KVCache()
        for x in (X[:, :5], X[:, 5:6]):
            got, want = (run(x, cache=cache) for run, cache in zip((program, model), caches, strict=True))
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        assert caches[0]._parts[0].memory.dtype is torch.bfloat16
    with torch.inference_mode():
        cache = qkv.KVCache()
        got = [program(X[:, :5], cache=cache)]
    got.append(program(X[:, 5:6], cache=cache))
    torch.testing.assert_close(torch.cat(got, 1), model(X[:, :6], cache=qkv.KVCache()))


@pytest.mark.long
def test_a_cache_that_a_program_makes_and_one_made_while_recording() -> None:
    model = causal()

    def call(x: Tensor) -> Tensor:
        cache = qkv.KVCache()
        return model(x[:, :5], cache=cache) + model(x[:, 5:6], cache=cache)

    torch.testing.assert_close(compiled(call, backend="aot_eager")(X), call(X))


def test_handles_keep_nothing_alive() -> None:
    cache = qkv.KVCache()
    tensor = cache.handle.tensor
    assert tensor is not None and find(tensor) is cache
    assert copy.deepcopy(cache.handle).tensor is None
    assert Handle.of(cache).tensor != tensor
    del cache
    gc.collect()
    with pytest.raises(KeyError):
        find(tensor)


@pytest.mark.long
def test_by_inductor() -> None:
    model = nn.ModuleList([Block(causal()), Block(LAYERS["window"]())])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            for block in self.blocks:
                x = block(x, cache=cache)
            return x

    ours = Model()
    program = compiled(ours, backend="inductor")
    got, want = decode(program, Caches.for_model(ours)), decode(ours, Caches.for_model(ours))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert graphs() == 2
