"""Calls over ranks under `torch.compile`: what eager code gives, in few graphs, for every layout that comes along."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parallel import sharded
from parallel.ranks import Failure, Ranks, mesh_that_waits
from parallel.test_layers import LAYERS
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module

import qkv
from qkv import Mask, parallel

Of = Callable[[int], Ranks]
N = 41
FIRST, SECOND = (((0, 9), (30, 41)), ((9, 30),)), (((21, 41),), ((0, 21),))
"""of as many rows on each rank: what a program has learned of one must not serve the other"""


mesh = functools.partial(mesh_that_waits, 240)
"""One rank may have compiled long before the other."""


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Raises for what the compiler warns of, such as functions whose cache it does not use."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    texts = [str(one.message) for one in seen]
    assert not [text for text in texts if "Dynamo" in text], texts


class Graphs:
    """A backend of `torch.compile` that counts graphs with operators."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += any(node.op.startswith("call") for node in module.graph.nodes)
        return aot_eager(module, inputs)


def compiled_and_not(call: Callable[..., Tensor], *arguments: Any) -> int:
    """Compares a compiled call with the call, and gradients of its arguments. Returns the graphs."""
    torch._dynamo.reset()
    tensors = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
    graphs = Graphs()
    program = torch.compile(call, backend=graphs)
    with without_warnings():
        for _ in range(2):  # the second without compiling
            results = []
            for one in (call, program):
                out = one(*arguments)
                results.append([out.detach()])
                if tensors:
                    results[-1] += torch.autograd.grad((out * sharded.weights_like(out)).sum(), tensors)
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    return graphs.count


def of_layer(layer: nn.Module, layout: Any, with_gradients: bool) -> int:
    tokens = parallel.Tokens(layout, mesh())
    x = tokens.take(torch.randn(2, N, 24)).requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        return compiled_and_not(lambda x, tokens: layer(x, tokens=tokens), x, tokens)


@pytest.mark.parametrize(
    ("name", "layout", "graphs"),
    [
        ("causal", FIRST, 2),
        pytest.param("position bias", FIRST, 2, marks=pytest.mark.long),
        pytest.param("differential", FIRST, 5, marks=pytest.mark.long),
        pytest.param("latent", ((), ((0, N),)), 4, marks=pytest.mark.long),
    ],
    ids=["causal", "position bias", "differential", "latent"],
)
def test_a_compiled_layer_over_ranks_is_the_layer(ranks: Of, name: str, layout: Any, graphs: int) -> None:
    """One graph before attention and one after it, where the layer itself computes no more."""
    for found in ranks(2).run(of_layer, LAYERS[name](), layout, True):
        assert found <= graphs


def test_a_compiled_layer_without_gradients(ranks: Of) -> None:
    assert ranks(2).run(of_layer, LAYERS["rotary by length"](), FIRST, False) == [2, 2]


def of_layouts(mark: bool) -> None:
    layer = qkv.CausalAttention(24, 6, rotary=qkv.RotaryEmbedding(4))
    x = torch.randn(2, N, 24)
    if mark:
        parallelize_module(layer, mesh(), parallel.Context())
    torch._dynamo.reset()
    program = torch.compile(layer, backend="aot_eager")
    for layout in (FIRST, SECOND, FIRST):
        tokens = parallel.Tokens(layout, mesh())
        with parallel.over(tokens):
            given = {} if mark else {"tokens": tokens}
            found = tokens.join(program(tokens.take(x), **given).detach())
            torch.testing.assert_close(found, tokens.join(layer(tokens.take(x), **given).detach()))
    if mark:
        with pytest.raises(ValueError, match="got a call outside"):
            program(tokens.take(x))


@pytest.mark.parametrize("mark", [False, True], ids=["tokens", "over"])
def test_a_program_serves_other_layouts(ranks: Of, mark: bool) -> None:
    ranks(2).run(of_layouts, mark)


def of_functions() -> None:
    tokens = parallel.Tokens(FIRST, mesh())
    q, k, v = (tokens.take(x, dim=2).requires_grad_() for x in sharded.long_inputs(torch.float32, N)[:3])
    mask = Mask.causal(window=7) & Mask.documents(torch.arange(N)[None] // 15)
    for scheme in ("auto", "merge"):

        def attention(q: Tensor, k: Tensor, v: Tensor, scheme: str = scheme) -> Tensor:
            return 2 * parallel.attention(q * 3, k, v, tokens, mask=mask, scheme=scheme)

        def with_lse(q: Tensor, k: Tensor, v: Tensor, scheme: str = scheme) -> Tensor:
            out, lse = parallel.attention_with_lse(q * 3, k, v, tokens, mask=mask, scheme=scheme)
            return out + lse[..., None]

        assert compiled_and_not(attention, q, k, v) == 2
        assert compiled_and_not(with_lse, q, k, v) == 2

    group = mesh()

    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = parallel.merge(qkv.attention_with_lse(q[:, :, :5], k, v), group)
        return out + lse[..., None]

    assert compiled_and_not(merged, q, k, v) == 2
    assert compiled_and_not(lambda q: tokens.join(q + 1, dim=2) * tokens.join(q, dim=2), q) == 2
    assert compiled_and_not(lambda q: tokens.take(q * 2, dim=2), torch.randn(1, 2, N, 3, requires_grad=True)) == 1

    def explained(q: Tensor) -> Tensor:
        return q * sum(parallel.explain(q, k, v, tokens, mask=mask).sent["gather"])

    assert compiled_and_not(explained, q) == 1


def test_functions_are_called_between_graphs(ranks: Of) -> None:
    ranks(2).run(of_functions)


def of_caches(kind: str) -> None:
    layer, x = qkv.CausalAttention(24, 6, num_kv_heads=2, rotary=qkv.RotaryEmbedding(4)), torch.randn(1, N, 24)
    tokens = parallel.Tokens(FIRST, mesh())
    torch._dynamo.reset()
    program = torch.compile(layer, backend="aot_eager")
    with torch.no_grad(), without_warnings():
        results = []
        for call in (layer, program):
            cache = parallel.ShardedKVCache(mesh(), block=4)
            outs = []
            if kind == "a prompt over ranks":
                outs.append(tokens.join(call(tokens.take(x), cache=cache, tokens=tokens)))
            outs += [call(part, cache=cache) for part in x.split([5, 1, 1, 34], dim=1)]
            results.append([*outs, torch.tensor(cache.length)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", ["a prompt on all", "a prompt over ranks"])
def test_caches_over_ranks(ranks: Of, kind: str) -> None:
    ranks(2).run(of_caches, kind)


def _in_one_graph(what: str) -> None:
    tokens = parallel.Tokens(FIRST, mesh())
    layer, x = qkv.CausalAttention(24, 6), tokens.take(torch.randn(1, N, 24))
    heads, group = x.unflatten(2, (6, 4)).transpose(1, 2), mesh()
    calls: dict[str, Callable[[], Any]] = {
        "layer": lambda: layer(x, tokens=tokens),
        "attention": lambda: parallel.attention(heads, heads, heads, tokens),
        "merge": lambda: parallel.merge((heads, heads[..., 0]), group),
        "join": lambda: tokens.join(x),
    }
    torch._dynamo.reset()
    torch.compile(calls[what], backend="aot_eager", fullgraph=True)()


@pytest.mark.parametrize("what", ["layer", "attention", "merge", "join"])
def test_one_graph_of_all_is_refused_with_what_to_do(ranks: Of, what: str) -> None:
    for one in ranks(2).try_run(_in_one_graph, what):
        assert isinstance(one, Failure) and one.kind == "Unsupported", one
        assert "qkv: calls over ranks must be outside of graphs" in one.message
        assert "Compile without fullgraph" in one.message


class Exported(nn.Module):
    def __init__(self, layer: nn.Module, tokens: parallel.Tokens) -> None:
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x, tokens=self.tokens)
        return found


def _exported(by: str) -> None:
    tokens = parallel.Tokens(FIRST, mesh())
    model, x = Exported(qkv.CausalAttention(24, 6), tokens), tokens.take(torch.randn(1, N, 24))
    if by == "export":
        torch.export.export(model, (x,))
    else:
        torch.jit.trace(model, x)


@pytest.mark.parametrize("by", ["export", "trace"])
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_exported_and_traced_programs_are_refused(ranks: Of, by: str) -> None:
    for one in ranks(2).try_run(_exported, by):
        assert isinstance(one, Failure) and one.kind == "ValueError", one
        assert "CausalAttention: a call over ranks is no part of an exported or traced program" in one.message


def _of_transformers() -> None:
    from parallel.ranks import mesh
    from parallel.test_context import MODELS, marked

    model, tokens = marked(MODELS["Mistral"]()), parallel.Tokens(FIRST, mesh())
    torch._dynamo.reset()
    program = torch.compile(model, backend="aot_eager")
    with parallel.over(tokens):
        program(tokens.take(torch.zeros(1, N, dtype=torch.int64)), position_ids=tokens.positions[None], use_cache=False)


@pytest.mark.long
def test_a_compiled_model_of_transformers_is_refused(ranks: Of) -> None:
    for one in ranks(2).try_run(_of_transformers):
        assert isinstance(one, Failure) and one.kind == "ValueError", one
        assert "leave the model uncompiled" in one.message
