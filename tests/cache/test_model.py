"""`Caches`: which layers of a model they find, what a failed call leaves, refusals, copies, and files."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import qkv
from qkv import Caches, Mask

E = 16
X = torch.randn(2, 12, E, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, mask: Mask, context: bool) -> None:
        super().__init__()
        rotary = qkv.RotaryEmbedding(4)
        self.attention = qkv.Attention(E, 4, num_kv_heads=2, mask=mask, rotary=rotary)
        self.cross = qkv.CrossAttention(E, 4, context_dim=8) if context else None
        self.mlp = nn.Linear(E, E)

    def forward(self, x: Tensor, context: Tensor | None, options: dict[str, Any]) -> Tensor:
        x = x + self.attention(x, **options)
        if self.cross is not None:
            x = x + self.cross(x, context, cache=options["cache"])
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        masks = (Mask.causal(), Mask.causal(4), Mask.causal(3, sink_tokens=2))
        self.blocks = nn.ModuleList([Block(mask, context=i == 1) for i, mask in enumerate(masks)])
        self.eval()

    def forward(
        self, x: Tensor, context: Tensor | None = None, cache: Caches | None = None, mask: Mask | None = None
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, context, {"cache": cache, "mask": mask})
        return x


NAMES = ["blocks.0.attention", "blocks.1.attention", "blocks.1.cross", "blocks.2.attention"]


def filled(model: Model, count: int = 6, **options: Any) -> Caches:
    caches = Caches.for_model(model, **options)
    model(X[:, :count], CONTEXT, caches)
    return caches


def assert_consistent(caches: Caches, length: int) -> None:
    assert caches.length == length
    for cache in caches.values():
        assert cache.length == (5 if cache.of_context and cache.length else length)


@torch.no_grad()
def test_each_layer_gets_the_cache_that_it_needs() -> None:
    model = Model()
    caches = Caches.for_model(model)
    assert list(caches) == NAMES
    assert [repr(cache).partition(":")[0] for cache in caches.values()] == [
        "KVCache()",
        "SlidingKVCache(window=4)",
        "CrossKVCache()",
        "SlidingKVCache(window=3, sink_tokens=2)",
    ]
    reserved = Caches.for_model(model, capacity=4, dtype=torch.int8)
    assert [repr(cache).partition(":")[0] for cache in reserved.values()] == [
        "Int8KVCache(capacity=4)",
        "Int8KVCache(capacity=4)",  # no shorter than its window
        "CrossKVCache()",
        "SlidingKVCache(window=3, sink_tokens=2, dtype=torch.int8)",
    ]
    for options in ({"alibi": [1.0] * 4}, {"position_bias": qkv.RelativePositionBias(4)}):
        layer = qkv.Attention(E, 4, mask=Mask.causal(3, sink_tokens=2), **options)  # type: ignore[arg-type]
        assert type(layer.make_cache()) is qkv.KVCache
    chunks = Mask.causal() & Mask.chunked(4)
    assert type(qkv.Attention(E, 4, mask=chunks).make_cache()) is qkv.KVCache


@torch.no_grad()
def test_decoding_by_all_caches_is_the_whole_text() -> None:
    model = Model()
    want, caches = model(X, CONTEXT), Caches.for_model(model)
    parts = [model(x, CONTEXT if i < 2 else None, caches) for i, x in enumerate(X.split([5, 1, 4, 1, 1], dim=1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-5)
    assert_consistent(caches, 12)
    assert caches.lengths.tolist() == [12, 12]
    assert caches.nbytes == sum(cache.nbytes for cache in caches.values())
    weights = model.blocks[0].attention.attention_weights(X[:, :1], cache=copy.copy(caches))
    assert weights.shape == (2, 4, 1, 13)


@torch.no_grad()
def test_indexing_and_repr() -> None:
    model = Model()
    caches = filled(model)
    layer = model.blocks[1].attention
    assert len(caches) == 4
    assert caches[layer] is caches["blocks.1.attention"] is dict(caches.items())["blocks.1.attention"]
    assert layer in caches and "blocks.1.cross" in caches
    assert "blocks" not in caches and model not in caches and qkv.CausalAttention(E, 2) not in caches
    assert repr(caches).splitlines() == [
        f"Caches: 4 layers, {caches.nbytes:,} bytes",
        "  blocks.0.attention: KVCache(): 2 rows of 6 tokens, 2,048 bytes",
        "  blocks.1.attention: SlidingKVCache(window=4): 2 rows of 6 tokens, 1,024 bytes",
        "  blocks.1.cross: CrossKVCache(): 2 rows of 5 tokens, 1,280 bytes",
        "  blocks.2.attention: SlidingKVCache(window=3, sink_tokens=2): 2 rows of 6 tokens, 1,024 bytes",
    ]
    caches.crop(torch.tensor([6, 5]))
    assert "KVCache(): 2 rows of 5 to 6 tokens" in repr(caches)
    for wrong in ("blocks.0", qkv.CausalAttention(E, 2), model):
        with pytest.raises(KeyError, match=r"with blocks\.0\.attention, .*, blocks\.2\.attention; got .*bind\(model\)"):
            caches[wrong]


def test_wrapped_layers_have_the_names_of_the_model() -> None:
    wraps: list[Callable[[nn.Module], nn.Module]] = [
        lambda model: torch.compile(model),  # type: ignore[return-value]
        nn.DataParallel,
        checkpoint_wrapper,
    ]
    for wrap in wraps:
        assert list(Caches.for_model(wrap(Model()))) == NAMES
        model = Model()
        model.blocks[1] = wrap(model.blocks[1])
        model.blocks[2].attention = wrap(model.blocks[2].attention)
        caches = Caches.for_model(model)
        assert list(caches) == NAMES
        assert model.blocks[0].attention in caches
    layer = qkv.Attention(E, 4, sink_logits=True)
    nn.utils.parametrize.register_parametrization(layer, "sink_logits", nn.Identity())
    assert type(layer) is not qkv.Attention
    assert list(Caches.for_model(layer)) == [""]
    assert layer in Caches.for_model(layer)


def ddp(model: Model) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: Model) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block, qkv.Attention, qkv.CrossAttention})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model: Model) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in (*(block.attention for block in model.blocks), *model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


@pytest.mark.filterwarnings("ignore")  # of torch's own making
@pytest.mark.parametrize(
    "wrap", [pytest.param(ddp, marks=pytest.mark.long), fsdp1, fsdp2], ids=lambda wrap: wrap.__name__
)
@torch.no_grad()
def test_replicated_and_sharded_models_decode_from_caches(
    one_process: None, wrap: Callable[[Model], nn.Module]
) -> None:
    want, model = Model()(X, CONTEXT), wrap(Model())
    caches = Caches.for_model(model)
    assert list(caches) == NAMES
    parts = [model(x, CONTEXT if i == 0 else None, caches) for i, x in enumerate(X.split([5, 1, 6], dim=1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-5)
    assert_consistent(caches, 12)


class Interruption(nn.Module):
    """Raises at the n-th call."""

    def __init__(self, module: nn.Module, at: int) -> None:
        super().__init__()
        self.module, self.left = module, at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.module(*args, **kwargs)


LAYERS: dict[str, Callable[[Model], tuple[nn.Module, str]]] = {
    "first layer": lambda model: (model.blocks[0].attention, "out_proj"),
    "window": lambda model: (model.blocks[1].attention, "out_proj"),
    "context": lambda model: (model.blocks[1].cross, "out_proj"),
    "last layer": lambda model: (model.blocks[2].attention, "v_proj"),
}
BETWEEN: dict[str, Callable[[Model], tuple[nn.Module, str]]] = {
    "after the first layer": lambda model: (model.blocks[0], "mlp"),
    "before the last layer": lambda model: (model.blocks[1], "mlp"),
}


def interrupt(model: Model, place: tuple[nn.Module, str], *args: Any) -> None:
    module, name = place
    whole = getattr(module, name)
    setattr(module, name, Interruption(whole, 1))
    with pytest.raises(KeyboardInterrupt):
        model(*args)
    setattr(module, name, whole)


@pytest.mark.parametrize("filled_with", [0, 5])
@pytest.mark.parametrize("place", LAYERS)
@torch.no_grad()
def test_a_call_in_which_a_layer_raises_appends_nothing(place: str, filled_with: int) -> None:
    model = Model()
    want, caches = model(X, CONTEXT), Caches.for_model(model)
    if filled_with:
        model(X[:, :filled_with], CONTEXT, caches)
    part, where = X[:, filled_with : filled_with + 3], LAYERS[place](model)
    interrupt(model, where, part, CONTEXT, caches)
    # Either the next call or any look at the caches finds them as before.
    torch.testing.assert_close(
        model(part, CONTEXT, copy.copy(caches)), want[:, filled_with : filled_with + 3], rtol=1e-4, atol=1e-5
    )
    interrupt(model, where, part, CONTEXT, caches)
    torch.testing.assert_close(
        model(part, CONTEXT, caches), want[:, filled_with : filled_with + 3], rtol=1e-4, atol=1e-5
    )
    interrupt(model, where, X[:, :2], CONTEXT, caches)
    assert_consistent(caches, filled_with + 3)
    interrupt(model, where, X[:, :2], CONTEXT, caches)
    caches.select(torch.tensor([0, 1, 1]))
    assert_consistent(caches, filled_with + 3)
    rest = X[[0, 1, 1], filled_with + 3 :]
    torch.testing.assert_close(model(rest, None, caches), want[[0, 1, 1], filled_with + 3 :], rtol=1e-4, atol=1e-5)


def fail_in_transaction(model: Model, where: tuple[nn.Module, str], caches: Caches) -> None:
    with caches.transaction():
        interrupt(model, where, X[:, 5:8], None, caches)
        raise ZeroDivisionError


@pytest.mark.parametrize("place", BETWEEN)
@torch.no_grad()
def test_a_call_that_fails_between_layers_is_refused_or_undone(place: str) -> None:
    model = Model()
    want, caches = model(X, CONTEXT), filled(model, 5)
    where = BETWEEN[place](model)
    with pytest.raises(ZeroDivisionError):
        fail_in_transaction(model, where, caches)
    assert_consistent(caches, 5)
    interrupt(model, where, X[:, 5:8], None, caches)
    assert caches.length == 5
    apart = r"same tokens; got \d+ of blocks\..*attention and \d+ of blocks\..*crop\(5\) removes them"
    for refused in (
        lambda: model(X[:, 5:8], None, caches),
        lambda: caches.select(torch.tensor([0])),
        caches.mark,
        caches.state_dict,
    ):
        with pytest.raises(ValueError, match=apart):
            refused()
    caches.crop(caches.length)
    assert_consistent(caches, 5)
    torch.testing.assert_close(model(X[:, 5:], None, caches), want[:, 5:], rtol=1e-4, atol=1e-5)
    caches = Caches.for_model(model)
    interrupt(model, where, X[:, :5], CONTEXT, caches)
    with pytest.raises(ValueError, match=r"got 0 of .* and 5 of .*reset\(\) removes all"):
        model(X[:, :5], CONTEXT, caches)
    caches.reset()
    torch.testing.assert_close(model(X, CONTEXT, caches), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_a_model_tries_again_goes_on() -> None:
    model = Model()
    want, caches = model(X, CONTEXT), filled(model, 5)
    layer = model.blocks[1].attention
    fine = layer.forward

    def again(x: Tensor, **options: Any) -> Tensor:
        with pytest.raises(ValueError, match="must be"):
            fine(x[..., :4], **options)
        return fine(x, **options)

    layer.forward = again
    for i in range(5, 8):
        torch.testing.assert_close(model(X[:, i : i + 1], None, caches), want[:, i : i + 1], rtol=1e-4, atol=1e-5)
    assert_consistent(caches, 8)


@torch.no_grad()
def test_layers_called_twice_in_a_call_are_refused() -> None:
    model = Model()
    model.blocks.append(model.blocks[1])
    caches = Caches.for_model(model)
    assert list(caches) == NAMES
    with pytest.raises(ValueError, match=r"once; got a second call of blocks\.1\.attention, before blocks\.0\.att"):
        model(X, CONTEXT, caches)
    layer = qkv.CausalAttention(E, 4)
    tied = nn.ModuleList([layer, layer])
    caches = Caches.for_model(tied)
    layer(X, cache=caches)
    with pytest.raises(ValueError, match=r"second call of 0, which occurs several times in the model.*of its own"):
        layer(X, cache=caches)
    layer(X, cache=caches[layer])  # alone, it is not counted


@torch.no_grad()
def test_layers_of_an_encoder_stay_empty() -> None:
    model = nn.ModuleDict({"encoder": qkv.Attention(E, 4), "decoder": Model()})
    caches = Caches.for_model(model)
    model["encoder"](X)
    want = model["decoder"](X, CONTEXT)
    for part, count in zip(X.split([5, 7], dim=1), (5, 12), strict=True):
        got = model["decoder"](part, CONTEXT, caches)
        assert caches.length == count
    torch.testing.assert_close(got, want[:, 5:], rtol=1e-4, atol=1e-5)
    assert caches["encoder"].length == 0
    with pytest.raises(ValueError, match=r"got 0 of encoder and 5 of decoder\.blocks\.0"):
        model["encoder"](X, cache=caches)
    assert caches.length == 12


@torch.no_grad()
def test_refusals_leave_everything_as_it_was() -> None:
    model = Model()
    caches = filled(model, 10)
    other, k = Caches.for_model(model), torch.zeros(1, 2, 1, 4)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, r"SlidingKVCache: length of crop must be at least", lambda: caches.crop(1)),
        (ValueError, "between 0 and 10", lambda: caches.crop(11)),
        (TypeError, "length of crop must be an int", lambda: caches.crop(1.0)),  # type: ignore[arg-type]
        (ValueError, "between 0 and 0, the tokens in the cache; got 1", lambda: other.crop(1)),
        (ValueError, "rows of select must be", lambda: caches.select(torch.tensor([2]))),
        (ValueError, r"KVCache\.repeat: count must be at least 1; got 0", lambda: caches.repeat(0)),
        (TypeError, "other of join must be Caches.*got KVCache", lambda: caches.join(caches.values()[0])),  # type: ignore[arg-type]
        (
            ValueError,
            r"must be of a model with blocks\.0.*; got one with the layer",
            lambda: caches.join(Caches.for_model(qkv.CausalAttention(E, 2))),
        ),
        (ValueError, "rows of replace must be 0 different ones", lambda: caches.replace(torch.tensor([1]), other)),
        (ValueError, "with blocks.*; got one with the layer", lambda: caches.bind(qkv.CausalAttention(E, 2))),
        (ValueError, "the state must be of a model with .*; got x.keys", lambda: caches.load_state_dict({"x.keys": k})),
        (
            ValueError,
            "KVCache: the state must have keys, values; got keys",
            lambda: caches.load_state_dict({"blocks.0.attention.keys": k}),
        ),
        (
            ValueError,
            r"its 10 tokens are keys of another layer, blocks\.0\.attention Attention\(16, num_heads=4\)",
            lambda: model.blocks[1].attention(X[:, :1], cache=caches["blocks.0.attention"]),
        ),
        (
            ValueError,
            r"for, with blocks\..*; got CausalAttention\(16, num_heads=2\).*bind\(model\)",
            lambda: qkv.CausalAttention(E, 2)(X, cache=caches),
        ),
        (ValueError, "contains another context", lambda: model(X[:, :1], CONTEXT + 1, caches)),
    ]
    before = {name: tensor.clone() for name, tensor in caches.state_dict().items()}
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
        after = caches.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before), message
    layer = qkv.Attention(E, 4)
    caches = Caches.for_model(layer)
    layer(X, cache=caches)
    with pytest.raises(ValueError, match="the mask must not show keys after the query"):
        layer(X, cache=caches)
    with caches.transaction(), pytest.raises(RuntimeError, match=r"crop must be called outside of transaction\(\)"):
        caches.crop(3)
    for wrong, kind, message in (
        ((X,), TypeError, "model must be a module; got Tensor"),
        ((nn.Linear(2, 2),), ValueError, "must contain attention layers of qkv; got Linear"),
        ((model, 1.5), TypeError, "capacity must be an int, or None to grow; got 1.5"),
        ((model, 0), ValueError, "capacity must be at least 1, or None to grow; got 0"),
        (
            (model, None, torch.bfloat16),
            ValueError,
            'dtype must be torch.int8 or "int8", or None .*; got torch.bfloat16',
        ),
    ):
        with pytest.raises(kind, match=message):
            Caches.for_model(*wrong)  # type: ignore[arg-type]


def saved(caches: Caches) -> Caches:
    file = io.BytesIO()
    torch.save(caches, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, Caches)
    return loaded


@torch.no_grad()
def test_copies_alone_and_with_the_model() -> None:
    model = Model()
    want, caches = model(X, CONTEXT), filled(model, 5)

    def go_on(model: Model, caches: Caches) -> None:
        for part, end in ((X[:, 5:6], 6), (X[:, 6:], 12)):
            got = model(part, None, caches)
            torch.testing.assert_close(got, want[:, end - part.shape[1] : end], rtol=1e-4, atol=1e-5)

    for twin in (copy.copy(caches), copy.deepcopy(caches), copy.deepcopy(copy.deepcopy(caches))):
        go_on(model, twin)
    for pair in (copy.deepcopy((model, caches)), copy.deepcopy((caches, model))[::-1]):
        go_on(*pair)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be of the model that they are for"):
            copy.deepcopy(model)(X, None, pair[1])
    go_on(*pickle.loads(pickle.dumps((model, caches))))
    for loaded in (pickle.loads(pickle.dumps(caches)), saved(caches)):
        with pytest.raises(ValueError, match=r"got Attention\(16, num_heads=4\)\. For a copy .* call bind\(model\)"):
            model(X[:, 5:], None, loaded)
        loaded.bind(model)
        go_on(model, loaded)
    twin, unbound = copy.deepcopy(model), copy.copy(caches)
    unbound.bind(twin)
    go_on(twin, unbound)
    go_on(model, caches)


@torch.no_grad()
def test_deep_copies_of_deep_copies_do_not_collect_owners() -> None:
    layer, cache = qkv.CausalAttention(E, 4), qkv.KVCache()
    layer(X, cache=cache)
    for _ in range(12):
        cache = copy.deepcopy(cache)
    assert len(cache._owners) + len(cache._copied_owners or ()) <= 2
    layer(X, cache=cache)


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_state_dicts_in_files(tmp_path: Any, dtype: torch.dtype | None, padded: bool) -> None:
    model = Model()
    caches = Caches.for_model(model, dtype=dtype)
    keep = torch.tensor([[0, 0, *[1] * 7], [1] * 9] if padded else [[1] * 9] * 2, dtype=torch.bool)
    model(X[:, :9], CONTEXT, caches, Mask.padding(keep))
    safetensors.torch.save_file(caches.state_dict(), tmp_path / "caches.safetensors")
    state = safetensors.torch.load_file(tmp_path / "caches.safetensors")
    loaded, given = Caches.for_model(model, dtype=dtype), {name: x.clone() for name, x in state.items()}
    loaded.load_state_dict(state)
    assert torch.equal(loaded.lengths, caches.lengths)
    for part in (X[:, 9:10], X[:, 10:]):
        assert torch.equal(model(part, None, loaded), model(part, None, caches))
    with pytest.raises(ValueError, match="contains another context"):
        model(X[:, 9:10], CONTEXT + 1, loaded)
    assert all(torch.equal(state[name], given[name]) for name in state)
    loaded.load_state_dict({})
    assert loaded.length == 0
    assert loaded.state_dict() == {}


@torch.no_grad()
def test_states_that_do_not_fit_are_refused() -> None:
    def of(cache: Any, count: int = 8) -> dict[str, Tensor]:
        cache.append(*torch.zeros(2, 1, 2, count, 4))
        return dict(cache.state_dict())

    kv, window, int8 = of(qkv.KVCache()), of(qkv.SlidingKVCache(4)), of(qkv.Int8KVCache())
    codes = qkv.SlidingKVCache(4, dtype="int8")
    flags = torch.ones(1, 8, dtype=torch.bool)
    cases = [
        (qkv.KVCache(), int8, "KVCache: the state must have keys, values; got dtype, key_scales"),
        (qkv.Int8KVCache(), kv, "the state must have dtype, key_scales, keys, value_scales, values; got keys, values"),
        (codes, window, "must have dropped, dtype, key_scales, keys, sink_tokens, value_scales, values, window; got d"),
        (
            qkv.SlidingKVCache(4),
            of(copy.copy(codes)),
            "have dropped, keys, sink_tokens, values, window; got dropped, dtype",
        ),
        (qkv.SlidingKVCache(5), window, "state must be of window=5 and sink_tokens=0; got 4 and 0"),
        (qkv.KVCache(capacity=7), kv, "must have at most 7 tokens, the capacity; got 8"),
        (qkv.KVCache(), {**kv, "values": kv["values"][:, :, 1:]}, r"keys, values of the state must be \(B, heads, L"),
        (qkv.KVCache(), {**kv, "is_token": flags.int()}, r"is_token of the state must be boolean \(1, columns\)"),
        (qkv.KVCache(), {**kv, "is_token": flags[:, 1:]}, r"must count the tokens stored, up to 8 in a row; got \[7\]"),
    ]
    for cache, state, message in cases:
        with pytest.raises(ValueError, match=message):
            cache.load_state_dict(state)
        assert cache.length == 0
    with pytest.raises(TypeError, match="keys must be a tensor; got list"):
        qkv.KVCache().load_state_dict({"keys": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [None, torch.int8])
@torch.no_grad()
def test_caches_filled_under_autocast_say_so(dtype: torch.dtype | None) -> None:
    model = Model()
    filled_under, filled_without = Caches.for_model(model, dtype=dtype), filled(model, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        model(X[:, :5], CONTEXT, filled_under)
        model(X[:, 5:6], None, filled_under)
        with pytest.raises(ValueError, match=r"autocast casts to torch\.bfloat16 now, and did not when the cache was"):
            model(X[:, 5:6], None, filled_without)
    message = r"filled under torch\.autocast, in torch\.bfloat16: call the layer under it as well, or reset it"
    with pytest.raises(ValueError, match=message):
        model(X[:, 6:7], None, filled_under)
    cross = model.blocks[1].cross
    with pytest.raises(ValueError, match=f"CrossKVCache: q must be in torch.bfloat16.*{message}"):
        cross(X, cache=filled_under["blocks.1.cross"])
    assert_consistent(filled_under, 6)
    model(X[:, 5:6], None, filled_without)


@torch.no_grad()
def test_a_mark_undoes_calls_and_operations_on_rows() -> None:
    model = Model()
    want, caches = model(X, CONTEXT), filled(model, 5)
    mark = caches.mark()
    model(X[:, 5:], None, caches)  # further than the windows reach back
    caches.select(torch.tensor([1, 1, 0]))
    caches.join(filled(model, 4))
    caches.restore(mark)
    assert_consistent(caches, 5)
    torch.testing.assert_close(model(X[:, 5:], None, caches), want[:, 5:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_reads_the_cache_of_another() -> None:
    torch.manual_seed(0)
    first, second = qkv.CausalAttention(E, 4), qkv.CrossLayerAttention(E, 4, mask=Mask.causal())
    caches, one = Caches.for_model(nn.ModuleList([first, second])), qkv.KVCache()
    assert list(caches) == ["0"]
    for part in X.split([5, 1, 6], dim=1):
        want = second(first(part, cache=one), cache=one)
        assert torch.equal(second(first(part, cache=caches), cache=caches[first]), want)
    with pytest.raises(ValueError, match=r"got CrossLayerAttention.*reads another one's cache takes that, caches\[lay"):
        second(X, cache=caches)


@torch.no_grad()
def test_nested_tensors() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([qkv.CausalAttention(E, 4), qkv.Attention(E, 4, mask=Mask.causal(4))])
    caches, texts = Caches.for_model(layers), [X[0, :7], X[1, :2]]
    for count in (0, 3):
        parts = [text[:count] if count else text for text in texts]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged)
        for layer in layers:
            x = layer(x, cache=caches)
    assert caches.lengths.tolist() == [10, 4]


@torch.no_grad()
def test_rows_that_all_leave_make_room_for_another_batch() -> None:
    model = Model()
    caches = filled(model, 9)
    caches.select(torch.tensor([], dtype=torch.int64))
    assert caches.length == 0 and caches.lengths.shape == (0,)
    caches.join(filled(model, 5))
    model(X[:, 5:7], None, caches)
    assert_consistent(caches, 7)
    caches.reset()
    model(X[:1], CONTEXT[:1], caches)
    assert_consistent(caches, 12)


def in_pages(model: Model, pool: qkv.PagePool) -> Caches:
    """Caches in pages where the model has ones without a window."""
    made = {
        name: qkv.PagedKVCache(pool) if type(cache) is qkv.KVCache else cache
        for name, cache in Caches.for_model(model).items()
    }
    caches = Caches(made)
    caches.bind(model)
    return caches


def crop_too_far(caches: Caches) -> None:
    caches.crop(2)


def load_without_a_window(caches: Caches) -> None:
    state = {key: x for key, x in caches.state_dict().items() if not key.startswith(NAMES[3])}
    caches.load_state_dict({**state, f"{NAMES[3]}.keys": X})


def join_another_window(caches: Caches) -> None:
    other = copy.copy(caches)
    other._caches[NAMES[3]] = qkv.SlidingKVCache(9)
    caches.join(other)


def replace_by_another_window(caches: Caches) -> None:
    other = copy.copy(caches)
    other._caches[NAMES[3]] = qkv.SlidingKVCache(9)
    caches.replace(torch.tensor([1, 0]), other)


@pytest.mark.parametrize(
    "refused", [crop_too_far, load_without_a_window, join_another_window, replace_by_another_window]
)
@torch.no_grad()
def test_what_one_layer_refuses_leaves_the_pages_of_another(refused: Callable[[Caches], None]) -> None:
    model, pool = Model(), qkv.PagePool(page_size=4)
    caches = in_pages(model, pool)
    for x in X.repeat(1, 2, 1)[:, :20].split([10, 10], dim=1):
        model(x, CONTEXT, caches)
    paged, used = caches[NAMES[0]], pool.used
    assert isinstance(paged, qkv.PagedKVCache)
    want = paged.keys().gathered().k
    with pytest.raises(ValueError, match="SlidingKVCache"):
        refused(caches)
    model(X.flip(0), CONTEXT, in_pages(model, pool))  # another request, which takes free pages
    other = in_pages(model, pool)
    model(X + 1, CONTEXT, other)
    assert torch.equal(paged.keys().gathered().k, want)
    assert pool.used == used + other[NAMES[0]].nbytes // pool.page_nbytes
    assert paged.pool is pool


@torch.no_grad()
def test_a_mark_keeps_the_pages_that_a_crop_drops() -> None:
    cache, (k, v) = qkv.PagedKVCache(page_size=4), torch.randn(2, 2, 2, 20, 8)
    cache.append(k, v)
    mark = cache.mark()
    cache.crop(3)
    cache.append(v, k)
    cache.restore(mark)
    keys = cache.keys().gathered()
    assert torch.equal(keys.k, k)
    assert torch.equal(keys.v, v)
    del mark
    assert cache.pool.used == 2 * 5


@pytest.mark.parametrize("lengths", [(1, 1), (6, 6), (9, 9), (1, 4)])
@torch.no_grad()
def test_rows_that_are_all_replaced_have_the_same_columns_in_all_layers(lengths: tuple[int, int]) -> None:
    model, found = Model(), []
    for make in (Caches.for_model, lambda model: in_pages(model, qkv.PagePool(page_size=4))):
        caches, other = make(model), make(model)
        model(X[:, :6], CONTEXT, caches)
        model(X[:, : max(lengths)], CONTEXT, other)
        other.crop(torch.tensor(lengths))
        caches.replace(torch.tensor([1, 0]), other)
        assert len({cache.columns for cache in caches.values() if not cache.of_context}) == 1
        parts = [model(X[:, 6:9], None, caches)]
        caches.join(copy.copy(caches))
        caches.select(torch.tensor([3, 0]))
        parts.append(model(X[:, 9:10], None, caches))
        caches.crop(min(lengths) + 3)
        parts.append(model(X[:, 10:11], None, caches))
        found.append(torch.cat(parts, dim=1))
        assert len({cache.columns for cache in caches.values() if not cache.of_context}) == 1
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_model_decodes_from_caches() -> None:
    torch._dynamo.reset()
    model = Model()
    model.blocks = model.blocks[::2]  # tracing takes seconds
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want, caches = model(X), Caches.for_model(compiled)
    parts = [compiled(part, cache=caches) for part in X[:, :7].split([5, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want[:, :7], rtol=1e-4, atol=1e-5)
    assert_consistent(caches, 7)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_a_compiled_model_with_a_context_and_unequal_rows(backend: str) -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    want, caches = model(X, CONTEXT), Caches.for_model(compiled)
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
        part = compiled(X[:, start:stop], CONTEXT if start == 0 else None, caches)
        torch.testing.assert_close(part, want[:, start:stop], rtol=1e-4, atol=1e-5)
    for lengths in ((8, 7), (9, 9)):
        caches.crop(torch.tensor(lengths))
        first, second = lengths
        new = torch.stack([X[0, first : first + 2], X[1, second : second + 2]])
        wanted = torch.stack([want[0, first : first + 2], want[1, second : second + 2]])
        torch.testing.assert_close(compiled(new, None, caches), wanted, rtol=1e-4, atol=1e-5)
    assert caches.lengths.tolist() == [11, 11]


@pytest.mark.parametrize(
    "make",
    [
        lambda: qkv.CausalAttention(8, 2),
        lambda: qkv.SlidingWindowAttention(8, 2, window=3, causal=True),
        lambda: qkv.CrossAttention(8, 2),
        lambda: qkv.LatentAttention(16, 2, kv_rank=4, nope_dim=4, rope_dim=2),
    ],
    ids=["growing", "sliding", "cross", "latent"],
)
def test_a_layer_makes_a_cache_of_a_dtype_that_there_is(make: Callable[[], Any]) -> None:
    layer = make()
    assert type(layer.make_cache(dtype="int8")) is type(layer.make_cache(dtype=torch.int8))
    assert repr(layer.make_cache(dtype="int8")) == repr(layer.make_cache(dtype=torch.int8))
    for dtype in ("int4", torch.float16, 8):
        with pytest.raises(ValueError, match=rf'{type(layer).__name__}: dtype must be torch.int8 or "int8", or None'):
            layer.make_cache(dtype=dtype)
