"""Decoding by compiled models of transformers: tokens are appended in place, and a step is compiled once."""

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

import qkv
from qkv import QKVCache
from qkv.integrations.transformers.cache import AppendLayer
from qkv.integrations.transformers.steps import cached_layers

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own making

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones_like(IDS)
KEEP[0, :3] = 0

CACHED = {"qkv.cached_layers", "qkv.cached_module"}
"""Operators that append to a cache."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield


def llama(layers: int = 1, **options: Any) -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, eos_token_id=None, **options))
    return qkv.accelerate(model.eval())


def program_of(model: Any) -> Any:
    return torch.compile(model.forward, backend="eager")


class Operators:
    """A backend that runs graphs as they are, and counts our operators in each."""

    def __init__(self) -> None:
        self.found: list[Counter[str]] = []

    def __call__(self, graph: Any, inputs: object) -> Any:
        names = (str(node.target) for node in graph.graph.nodes)
        self.found.append(Counter(name for name in names if name.startswith("qkv.")))
        return graph.forward


def operators_of(model: Any, **options: Any) -> tuple[Any, Operators]:
    """A compiled forward, and the operators in its graphs."""
    operators = Operators()
    return torch.compile(model.forward, backend=operators, fullgraph=True, **options), operators


def logits(run: Any, cache: Any, keep: torch.Tensor, prompt: int = 5) -> torch.Tensor:
    """Of a prompt and of the tokens after it, one by one."""
    stops = [prompt, *range(prompt + 1, IDS.shape[1] + 1)]
    parts = [
        run(
            IDS[:, start:stop].clone(), attention_mask=keep[:, :stop].clone(), past_key_values=cache, use_cache=True
        ).logits
        for start, stop in zip([0, *stops], stops, strict=False)
    ]
    return torch.cat(parts, dim=1)


def graphs() -> int:
    """The number of graphs compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def generate(model: Any, ids: torch.Tensor = IDS, keep: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    keep = torch.ones_like(ids) if keep is None else keep
    tokens: torch.Tensor = model.generate(ids, attention_mask=keep, do_sample=False, **options)
    return tokens


@pytest.mark.long
def test_a_step_is_compiled_once_in_generate() -> None:
    model = llama()
    want = generate(model, max_new_tokens=64), generate(model, keep=KEEP, max_new_tokens=8, num_beams=2)
    model.forward = program_of(model)
    cache = QKVCache(model)
    assert torch.equal(generate(model, max_new_tokens=64, past_key_values=cache), want[0])
    assert graphs() <= 3  # a prompt; a step, once more for lengths that change
    assert torch.equal(generate(model, max_new_tokens=64), want[0])
    assert graphs() <= 3
    assert torch.equal(generate(model, keep=KEEP, max_new_tokens=8, num_beams=2), want[1])
    assert not counters["graph_break"]


def test_tokens_are_appended_in_place_and_found_by_eager_code() -> None:
    model = llama()
    program, cache, eager = program_of(model), QKVCache(model), QKVCache(model)
    runs = ((program, cache), (model.forward, eager))

    def step(start: int, stop: int) -> None:
        got, want = (run(IDS[:, start:stop], past_key_values=each, use_cache=True).logits for run, each in runs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    step(0, 3)
    memory = [layer._keys.memory for layer in cache.layers]
    step(3, 4)
    step(4, 5)
    assert all(layer._keys.memory is one for layer, one in zip(cache.layers, memory, strict=True))
    for mine, theirs in zip(cache.layers, eager.layers, strict=True):
        assert isinstance(mine, AppendLayer)
        assert mine.get_seq_length() == theirs.get_seq_length() == 5
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    for each in (cache, eager):
        each.crop(-1)
    step(4, 5)
    for each in (cache, eager):
        each.reorder_cache(torch.tensor([1, 0]))
        each.reorder_cache(torch.tensor([1, 0]))
    step(5, 6)
    for mine, theirs in zip(cache.layers, eager.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_an_update_that_a_program_follows_appends_in_place() -> None:
    """As for a layer that is watched, and so not one operator. Guards read ``keys``, which makes views."""
    layer, new = AppendLayer(), torch.randn(2, 2, 1, 8)
    update = torch.compile(layer.update, backend="eager", fullgraph=True)
    memories = []
    for count in (1, 2, 3):
        keys, values = update(new, -new)
        assert torch.equal(keys, torch.cat([new] * count, dim=2))
        assert torch.equal(values, torch.cat([-new] * count, dim=2))
        memories.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(memories)) == 1 and layer.get_seq_length() == 3


@pytest.mark.long
def test_steps_compiled_and_not_take_turns() -> None:
    model = llama()
    program, cache = program_of(model), QKVCache(model)
    want = model(IDS, use_cache=False).logits
    parts = [
        run(IDS[:, start:stop], past_key_values=cache, use_cache=True).logits
        for run, start, stop in ((model.forward, 0, 3), (program, 3, 4), (program, 4, 5), (model.forward, 5, 6))
    ]
    parts += [program(IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_gradients_concatenate() -> None:
    model = llama().requires_grad_(True)
    program, cache = program_of(model), QKVCache(model)
    with torch.enable_grad():
        first = program(IDS[:, :5], past_key_values=cache, use_cache=True).logits
        second = program(IDS[:, 5:6], past_key_values=cache, use_cache=True).logits
        weight = model.model.layers[0].self_attn.k_proj.weight
        got = torch.autograd.grad(first.sum() + second.sum(), weight)[0]
        want = torch.autograd.grad(model(IDS[:, :6], use_cache=False).logits.sum(), weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_two_models_in_one_process() -> None:
    one, two = llama(), llama(rope_theta=500.0)
    for model in (one, two):
        want = generate(model, max_new_tokens=5)
        model.forward = program_of(model)
        assert torch.equal(generate(model, max_new_tokens=5), want)


def test_a_module_with_our_cache_is_one_operator_which_takes_padding() -> None:
    model = llama()
    program, operators = operators_of(model)
    for keep in (torch.ones_like(IDS), KEEP):
        got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
        torch.testing.assert_close(got[keep.bool()], want[keep.bool()], rtol=1e-4, atol=1e-5)
    assert len(operators.found) <= 3
    assert all(found == {"qkv.kind_of_mask": 1, "qkv.cached_layers": 1} for found in operators.found)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "window", "two masks", "norms", "packed", "granite"])
def test_each_kind_of_module_and_cache(kind: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": None}
    torch.manual_seed(0)
    config: Any = {
        "int8": lambda: transformers.LlamaConfig(**sizes, **heads),
        "window": lambda: transformers.MistralConfig(**sizes, **heads, sliding_window=4),
        "two masks": lambda: transformers.Gemma2Config(**sizes, **heads, sliding_window=4),
        "norms": lambda: transformers.Qwen3Config(**sizes, **heads),
        "packed": lambda: transformers.Phi3Config(**sizes, **heads),
        "granite": lambda: transformers.GraniteConfig(**sizes, num_attention_heads=4, attention_multiplier=0.3),
    }[kind]()
    model = qkv.accelerate(transformers.AutoModelForCausalLM.from_config(config).eval())
    program, operators = operators_of(model)
    for keep in (torch.ones_like(IDS), KEEP):
        caches = [QKVCache(model, dtype="int8" if kind == "int8" else None) for _ in range(2)]
        got, want = logits(program, caches[0], keep), logits(model.forward, caches[1], keep)
        torch.testing.assert_close(got[keep.bool()], want[keep.bool()], rtol=1e-3, atol=1e-4)
    assert len(operators.found) <= 4
    expected = ("qkv.cached_module", 2) if kind == "granite" else ("qkv.cached_layers", 1)
    assert all(found[expected[0]] == expected[1] for found in operators.found)


@pytest.mark.long
def test_a_gated_mlp_in_16_bits_is_one_operator() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    stock = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, num_attention_heads=4))
    model = qkv.accelerate(stock.to(torch.bfloat16).eval())
    program, operators = operators_of(model)
    keep = torch.ones_like(IDS)
    got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert operators.found[-1] == {"qkv.kind_of_mask": 1, "qkv.cached_module": 1, "qkv.module": 1}


@pytest.mark.long
def test_what_is_watched_trained_or_cached_otherwise_is_followed() -> None:
    watched, seen = llama(), []
    watched.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    trained = llama().train()
    for model, cache in (
        (watched, QKVCache(watched)),
        (trained, QKVCache(trained)),
        (llama(), transformers.DynamicCache()),
    ):
        program, operators = operators_of(model)
        want = model(IDS, use_cache=False).logits
        got = program(IDS, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all(found.keys().isdisjoint(CACHED) for found in operators.found)
    static = llama()
    want = generate(static, max_new_tokens=5)
    static.forward = program_of(static)
    assert torch.equal(generate(static, max_new_tokens=5, cache_implementation="static"), want)


def halve(module: Any, args: object, out: torch.Tensor) -> torch.Tensor:
    return out / 2


def replace_parameter(model: Any) -> None:
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(2 * linear.weight)


def replace_layer(model: Any) -> None:
    model.model.layers[1] = twin = copy.deepcopy(model.model.layers[0])
    twin.self_attn.layer_idx = 1


def replace_forward(model: Any) -> None:
    linear = model.model.layers[0].self_attn.o_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)


LATER = {
    "hook": lambda model: model.model.layers[0].self_attn.q_proj.register_forward_hook(halve),
    "hook of a layer": lambda model: model.model.layers[1].register_forward_hook(halve),
    "hook before": lambda model: model.model.layers[1].mlp.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "scaling": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
    "parameter": replace_parameter,
    "numbers": lambda model: model.model.layers[0].mlp.down_proj.weight.mul_(2),
    "layer": replace_layer,
    "forward": replace_forward,
    "given back": lambda model: qkv.accelerate(model.model.layers[0], enabled=False),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name != "layer")) for name in LATER])
def test_what_is_changed_later_is_noticed(name: str) -> None:
    """The program asks nothing of its layers, and is compiled once for a prompt and once for a step."""
    model = llama(layers=2)
    program, operators = operators_of(model)
    keep = torch.ones_like(IDS)
    before = logits(program, QKVCache(model), keep)
    torch.testing.assert_close(before, logits(model.forward, QKVCache(model), keep), rtol=1e-4, atol=1e-5)
    compiled = len(operators.found)
    LATER[name](model)
    got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(got, before, rtol=1e-4, atol=1e-5) == (name == "given back")
    assert len(operators.found) == compiled and all(found["qkv.cached_layers"] == 1 for found in operators.found)


@pytest.mark.long
def test_a_later_change_of_what_layers_return_is_refused() -> None:
    model = llama(layers=2)
    program = program_of(model)
    program(IDS, past_key_values=QKVCache(model), use_cache=True)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out.double())
    with pytest.raises(
        RuntimeError, match=r"must return tensors like their input, \(2, 9, 32\) in torch.float32, as .*"
    ):
        program(IDS, past_key_values=QKVCache(model), use_cache=True)
    model.model.layers[1].register_forward_hook(lambda module, args, out: (out.float(),))
    with pytest.raises(RuntimeError, match="when it was compiled; got tuple"):
        program(IDS, past_key_values=QKVCache(model), use_cache=True)


def test_a_layer_that_returns_its_input_does_not_share_it() -> None:
    """Programs write to memory that no operator returns."""
    model = llama()
    program = torch.compile(lambda *given: torch.ops.qkv.cached_layers(*given), backend="eager")
    x = torch.randn(1, 2, 32)
    model.model.layers[0].register_forward_hook(lambda module, args, out: args[0])
    cache = QKVCache(model)
    handles = model.model.forward.handle.tensor, cache.handle.tensor
    tables = [torch.ones(1, 2, 8)] * 2
    out = program(*handles, "layers", "past_key_values", [0], x, tables, [0], [], [], [-1], [])
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


@pytest.mark.long
def test_a_watched_layer_between_others_is_followed() -> None:
    model, seen = llama(layers=4), []
    model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(1))
    keep = torch.ones_like(IDS)
    operators = Operators()
    program = torch.compile(model.forward, backend=operators)
    got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert operators.found and all(found["qkv.cached_layers"] == 2 for found in operators.found)
    assert len(seen) == 2 * 5


@pytest.mark.long
def test_another_release_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a name that tells what a program has read is gone, layers are operators one by one."""
    model = llama(layers=2)
    monkeypatch.setattr(cached_layers, "example_of", lambda node: node.meta["gone"])
    program, operators = operators_of(model)
    keep = torch.ones_like(IDS)
    got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(found["qkv.cached_layers"] == 0 and found["qkv.cached_module"] == 2 for found in operators.found)


def test_parameters_that_a_program_writes_before() -> None:
    """Compilers write at the end of a program, and hand what they will have written to those who read it."""
    model, twin = llama(layers=2), llama(layers=2)

    def call(model: Any, cache: Any) -> torch.Tensor:
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
        out: torch.Tensor = model(IDS, past_key_values=cache, use_cache=True).logits
        return out

    want = call(twin, QKVCache(twin))
    program = torch.compile(lambda cache: call(model, cache), backend="aot_eager")
    torch.testing.assert_close(program(QKVCache(model)), want, rtol=1e-4, atol=1e-5)
    weights = [each.model.layers[1].mlp.down_proj.weight for each in (model, twin)]
    assert torch.equal(*weights)


def in_memory(model: Any) -> torch.Tensor:
    """The memory of which a weight of a model is made a view."""
    linear = model.model.layers[1].mlp.down_proj
    memory = linear.weight.detach().clone().flatten()
    linear.weight = nn.Parameter(memory.view_as(linear.weight), requires_grad=False)
    return memory


@pytest.mark.parametrize("of", ["parameter", "memory"])
def test_parameters_that_a_program_writes_after(of: str) -> None:
    """They are inputs of the operator, so that no compiler writes to them before it has run."""
    model = llama(layers=2)
    memory = in_memory(model)
    read: list[list[Any]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        node = next(node for node in graph.graph.nodes if str(node.target).startswith("qkv.cached_layers"))
        read.append([inputs[[*graph.graph.find_nodes(op="placeholder")].index(each)] for each in node.args[-1]])
        return graph.forward

    def call(cache: Any) -> torch.Tensor:
        out: torch.Tensor = model(IDS, past_key_values=cache, use_cache=True).logits
        weight = model.model.layers[1].mlp.down_proj.weight
        (weight if of == "parameter" else memory).mul_(3)
        return out

    want = model(IDS, use_cache=False).logits
    torch.testing.assert_close(torch.compile(call, backend=backend)(QKVCache(model)), want, rtol=1e-4, atol=1e-5)
    ((tensor,),) = read
    assert tensor.data_ptr() == memory.data_ptr()


@pytest.mark.long
def test_the_length_of_another_cache_is_read_in_the_same_graph() -> None:
    model = llama()
    other = QKVCache(model)
    model(IDS[:, :4], past_key_values=other, use_cache=True)

    def call(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        return out + other.get_seq_length()

    got = torch.compile(call, backend="eager", fullgraph=True)(IDS, QKVCache(model))
    torch.testing.assert_close(got, call(IDS, QKVCache(model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["program", "caller"])
def test_parameters_that_are_not_those_of_the_model(by: str) -> None:
    model = llama()
    given = {name: 3 * weight for name, weight in model.named_parameters()}

    def call(ids: torch.Tensor, cache: Any, weights: Any) -> torch.Tensor:
        weights = {name: 2 * weight for name, weight in model.named_parameters()} if by == "program" else weights
        options = {"past_key_values": cache, "use_cache": True}
        out: torch.Tensor = torch.func.functional_call(model, weights, (ids,), options).logits
        return out

    got = torch.compile(call, backend="aot_eager")(IDS, QKVCache(model), given)
    torch.testing.assert_close(got, call(IDS, QKVCache(model), given), rtol=1e-4, atol=1e-5)


def test_a_part_that_a_program_replaces() -> None:
    """The program puts it into the module at its end."""
    model, twin = llama(layers=2), llama(layers=2)
    parts = [copy.deepcopy(each.model.layers[0].mlp) for each in (model, twin)]
    for part in parts:
        part.down_proj.weight.mul_(3)

    def call(model: Any, part: Any, cache: Any) -> torch.Tensor:
        model.model.layers[1].mlp = part
        out: torch.Tensor = model(IDS, past_key_values=cache, use_cache=True).logits
        return out

    want = call(twin, parts[1], QKVCache(twin))
    program = torch.compile(lambda cache: call(model, parts[0], cache), backend="aot_eager")
    torch.testing.assert_close(program(QKVCache(model)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_copies_of_models_and_caches_have_handles_of_their_own() -> None:
    model = llama()
    cache = QKVCache(model)
    want = model(IDS[:, :6], use_cache=False).logits
    model(IDS[:, :5], past_key_values=cache, use_cache=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        program, operators = operators_of(twin)
        for each in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            got = program(IDS[:, 5:6], past_key_values=each, use_cache=True).logits
            torch.testing.assert_close(got, want[:, 5:], rtol=1e-4, atol=1e-5)
            assert (each.get_seq_length(), cache.get_seq_length()) == (6, 5)
        assert operators.found and all(found["qkv.cached_layers"] == 1 for found in operators.found)


def test_a_length_read_after_a_call_is_the_length_after_it() -> None:
    model = llama()

    def call(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        return out + cache.get_seq_length()

    caches = QKVCache(model), QKVCache(model)
    program = torch.compile(call, backend="eager")
    torch.testing.assert_close(program(IDS, caches[0]), call(IDS, caches[1]), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()  # which would find the program of before
    with pytest.raises(Exception, match="the state of a cache must be read or changed in a graph of its own"):
        torch.compile(call, backend="eager", fullgraph=True)(IDS, QKVCache(model))


@pytest.mark.long
def test_the_programs_of_inductor() -> None:
    """Which orders operators, frees and reuses memory, and does not merge equal operators."""
    config = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model = qkv.accelerate(transformers.MistralForCausalLM(config).eval())
    program = torch.compile(model.forward, fullgraph=True)
    for keep in (torch.ones_like(IDS), KEEP):
        got, want = logits(program, QKVCache(model), keep), logits(model.forward, QKVCache(model), keep)
        torch.testing.assert_close(got[keep.bool()], want[keep.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_model_that_is_given_back_is_followed() -> None:
    model = llama()
    want = model(IDS, use_cache=False).logits
    for enabled, operators_in_graph in ((True, True), (False, False), (True, True)):
        qkv.accelerate(model, enabled=enabled)
        program, operators = operators_of(model)
        cache = QKVCache(model) if enabled else transformers.DynamicCache()
        got = program(IDS, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all(("qkv.cached_layers" in found) == operators_in_graph for found in operators.found)


@pytest.mark.long
def test_a_refused_call_changes_nothing() -> None:
    model = llama()
    program, cache = program_of(model), QKVCache(model)
    want = model(IDS, use_cache=False).logits
    program(IDS[:, :5], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"keys must be \(2, 2, L, 8\) like the cached ones; got shape \(1, 2, 1, 8\)"):
        program(IDS[:1, 5:6], past_key_values=cache, use_cache=True)
    got = program(IDS[:, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, want[:, 5:6], rtol=1e-4, atol=1e-5)
