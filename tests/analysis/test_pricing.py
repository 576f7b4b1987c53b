"""`price`: losses, compared with those of eager attention under masks written out; and a model left as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from families.compare import draw_weights
from families.small import BART, MODELS, SIZES, build, decoder
from torch import Tensor, nn

import qkv
from qkv.analysis import pricing
from qkv.analysis.pricing import Price, losses, price
from qkv.convert import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

DECODERS = [name for name in MODELS if name not in ("bert", "bart")]
IDS = torch.randint(3, 96, (2, 23), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones_like(IDS)
KEEP[1, :6] = 0
WINDOW, SINKS = 5, 2


@contextmanager
def windowed(layers: list[nn.Module], window: int, sinks: int) -> Iterator[None]:
    """Adds a window to the masks that eager attention is handed."""

    def narrow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        query, key = (torch.arange(n) for n in mask.shape[2:])
        hidden = (key <= query[:, None] - window) & (key >= sinks)
        return args, {**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

    handles = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eager_loss(model: Any, layers: list[nn.Module], window: int = WINDOW, sinks: int = SINKS, **inputs: Any) -> Tensor:
    """In fp64."""
    model.set_attn_implementation("eager")
    with windowed(layers, window, sinks), torch.no_grad():
        logits = model(IDS, use_cache=False, **inputs).logits[:, :-1].double()
    loss = F.cross_entropy(logits.mT, IDS[:, 1:], reduction="none")
    keep = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    return loss.masked_fill(~(keep[:, 1:] & keep[:, :-1]), torch.nan)


def assert_near(got: Tensor, want: Tensor) -> None:
    """Losses of fp32, of 20 to 60 products each way."""
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4, equal_nan=True)


def assert_prices(model: Any, found: Price, **inputs: Any) -> None:
    layers = [model.get_submodule(name) for name in found.layers]
    want = eager_loss(model, [], **inputs)
    assert_near(found.loss, want)
    for layer, increase in zip(layers, found.increase, strict=True):
        loss = eager_loss(model, [layer], **inputs)
        assert (loss - want).nan_to_num().abs().max() > 1e-2, "a window that changes nothing tests nothing"
        assert_near(increase, loss - want)
    for some in found.together:
        assert_near(some.loss, eager_loss(model, [layers[index] for index in some.layers], **inputs))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_prices_are_those_of_masks_written_out(name: str, padded: bool) -> None:
    model = build(name)
    inputs = {"attention_mask": KEEP} if padded else {}
    found = price(model, IDS, window=WINDOW, sink_tokens=SINKS, together=[0, 1, 2], **inputs)
    assert_prices(model, found, **inputs)
    cheapest = found.by_layer.argsort().tolist()
    assert found.cheapest == tuple(cheapest)
    assert [some.layers for some in found.together] == [(), (cheapest[0],), (0, 1)]
    assert not found.increase[..., : WINDOW - 1].nan_to_num().any(), "nothing is hidden from these"


@contextmanager
def shared_heads(layers: list[nn.Module], kv_heads: int) -> Iterator[None]:
    """Gives the KV heads of each group the mean of their weights."""
    parameters = [p for layer in layers for linear in (layer.k_proj, layer.v_proj) for p in linear.parameters()]
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        groups = parameter.data.unflatten(0, (kv_heads, -1, 8))
        groups.copy_(groups.mean(1, keepdim=True).expand_as(groups))
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2"])
def test_prices_of_fewer_heads_are_those_of_weights_that_groups_share(name: str) -> None:
    model = build(name)
    found = price(model, IDS, kv_heads=1, together=[2])
    assert found.change == "1 KV head by mean pooling"
    layers = [model.get_submodule(name) for name in found.layers]
    want = eager_loss(model, [])
    for layer, increase in zip(layers, found.increase, strict=True):
        with shared_heads([layer], 1):
            loss = eager_loss(model, [])
        assert (loss - want).abs().max() > 1e-2
        assert_near(increase, loss - want)
    with shared_heads(layers, 1):
        assert_near(found.together[0].loss, eager_loss(model, []))


def test_heads_that_are_alike_when_turned_cost_nothing_aligned() -> None:
    model = build("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        turn = torch.linalg.qr(torch.randn(8, 8))[0]
        k, v = attention.k_proj.weight.data, attention.v_proj.weight.data
        k[8:], v[8:] = k[:8], turn @ v[:8]
    assert price(model, IDS, kv_heads=1, pooling="aligned").increase.abs().max() < 1e-3
    assert price(model, IDS, kv_heads=1).increase.abs().max() > 1e-2


def test_layers_that_share_keys_are_computed_as_a_whole() -> None:
    options = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds, "sliding_window": 9}
    model = decoder("gemma4_text", **options, **shared)().eval()
    draw_weights(model)
    assert_prices(model, price(model, IDS, window=WINDOW, sink_tokens=SINKS, together=[3]))


def test_what_is_below_a_changed_layer_is_computed_once() -> None:
    model = decoder("llama", num_hidden_layers=5)().eval()
    calls = [0] * 5

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(index))
    found: list[int] = []
    price(model, IDS, window=WINDOW, together=[0], on_progress=found.append)
    assert calls == [2, 3, 4, 5, 7]  # once as they are, the last twice, to see that layers need outputs alone
    assert found == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_losses_of_many_tokens_are_those_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = build(name), 8
    monkeypatch.setattr(pricing, "LOGITS_AT_ONCE", 2 * some * 97 + 96)
    ids = torch.randint(3, 96, (2, 2 * some + 2), generator=torch.Generator().manual_seed(1))
    want = F.cross_entropy(model(ids).logits[:, :-1].double().mT, ids[:, 1:], reduction="none")
    for length in (2, some, some + 1, some + 2, ids.shape[1]):
        assert_near(losses(model, ids[:, :length]), want[:, : length - 1])
    with pytest.raises(ValueError, match=r"losses: input_ids must be a tensor \(B, L\) of integers, two"):
        losses(model, ids[:, :1])


def test_layers_that_see_as_few_keys_already_have_no_price() -> None:
    with pytest.raises(ValueError, match="must change a layer; all of MistralForCausalLM see as few keys"):
        price(build("mistral"), IDS, window=7)
    found = price(build("gemma2"), IDS, window=7, together=[1])
    assert found.layers == ("model.layers.1.self_attn",) and found.together[0].layers == (0,)
    assert len(price(build("gemma2"), IDS, window=6).layers) == 2
    with pytest.raises(ValueError, match="together must be at most 1, the layers; got 2"):
        price(build("gemma2"), IDS, window=7, together=[2])


@pytest.mark.parametrize("change", [{"window": WINDOW, "sink_tokens": SINKS}, {"kv_heads": 1}], ids=str)
@pytest.mark.parametrize("place", ["layers.0", "layers.1", "layers.3", "layers.1.self_attn", "layers.2.mlp", "norm"])
def test_hooks_are_called_as_ever(place: str, change: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder("llama", num_hidden_layers=4)().eval()
    draw_weights(model)
    model.model.get_submodule(place).register_forward_hook(
        lambda module, args, out: (out[0] * 1.3, *out[1:]) if isinstance(out, tuple) else out * 1.3
    )
    found = price(model, IDS, **change)
    want = eager_loss(model, [])
    for name, increase in zip(found.layers, found.increase, strict=True):
        layer = model.get_submodule(name)
        with shared_heads([layer], 1) if "kv_heads" in change else windowed([layer], WINDOW, SINKS):
            assert_near(increase, eager_loss(model, []) - want)


@pytest.mark.parametrize("kind", ["opt", "bart"])
def test_heads_on_a_part_of_the_base_model(kind: str) -> None:
    if kind == "opt":
        config = transformers.OPTConfig(
            **SIZES, ffn_dim=64, num_attention_heads=6, word_embed_proj_dim=48, attn_implementation="eager"
        )
        model: Any = transformers.OPTForCausalLM(config).eval()
    else:
        model = transformers.BartForCausalLM(transformers.BartConfig(**BART, attn_implementation="eager")).eval()
    draw_weights(model)
    assert_prices(model, price(model, IDS, window=WINDOW, sink_tokens=SINKS, together=[2]))


BOTH = {
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART, attn_implementation="eager")
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=97, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6, attn_implementation="eager"
        )
    ),
    "t5gemma": lambda: transformers.T5GemmaForConditionalGeneration(_t5gemma()),
}


def _t5gemma() -> Any:
    part = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    part |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 11}
    return transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=97, attn_implementation="eager")


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", BOTH)
def test_prices_of_encoder_decoders_are_of_the_layers_of_their_decoders(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of the decoder is as long as that of the encoder, so that no length tells layers apart."""
    monkeypatch.setattr(pricing, "LOGITS_AT_ONCE", 2 * 97 * 5)
    torch.manual_seed(0)
    model = BOTH[name]().eval()
    draw_weights(model)
    texts = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    if padded:
        texts |= {"attention_mask": KEEP, "decoder_attention_mask": KEEP.flip(1)}

    def eager(changed: list[str]) -> Tensor:
        model.set_attn_implementation("eager")

        def narrow(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = "mask" if "mask" in kwargs else "attention_mask"
            mask = kwargs[given]
            query, key = (torch.arange(n) for n in mask.shape[2:])
            hidden = (key <= query[:, None] - WINDOW) & (key >= SINKS)
            return args, {**kwargs, given: mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}

        hooks = [model.get_submodule(one).register_forward_pre_hook(narrow, with_kwargs=True) for one in changed]
        with torch.no_grad():
            logits = model(**texts, use_cache=False).logits[:, :-1].double()
        for hook in hooks:
            hook.remove()
        loss = F.cross_entropy(logits.mT, texts["decoder_input_ids"][:, 1:], reduction="none")
        keep = texts.get("decoder_attention_mask", torch.ones_like(IDS)).bool()
        return loss.masked_fill(~(keep[:, 1:] & keep[:, :-1]), torch.nan)

    found = price(model, **texts, window=WINDOW, sink_tokens=SINKS, together=[2])
    want = eager([])
    assert len(found.layers) == 2 and all("decoder" in layer for layer in found.layers)
    assert_near(found.loss, want)
    for layer, increase in zip(found.layers, found.increase, strict=True):
        changed = eager([layer]) - want
        assert changed.nan_to_num().abs().max() > 1e-3
        assert_near(increase, changed)
    assert_near(found.together[0].loss, eager(list(found.layers)))
    assert_near(losses(model, **texts), want)


def test_an_interrupt_brings_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama", num_hidden_layers=4)().eval()
    draw_weights(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    want = price(model, IDS, window=WINDOW, together=[1, 2])

    def stop_after(number: int) -> Any:
        def on_progress(done: int) -> None:
            if done == number:
                raise KeyboardInterrupt

        return on_progress

    for number, layers, together in ((2, 1, 0), (4, 3, 0), (6, 4, 1)):  # the loss that just ended is not yet kept
        with pytest.raises(KeyboardInterrupt) as caught:
            price(model, IDS, window=WINDOW, together=[1, 2], on_progress=stop_after(number))
        assert isinstance(caught.value, pricing.PriceInterrupted)
        found = caught.value.price
        assert found.layers == want.layers[:layers] and found.unmeasured == 4 - layers
        assert torch.equal(found.increase, want.increase[:layers]) and torch.equal(found.loss, want.loss)
        assert [some.layers for some in found.together] == [some.layers for some in want.together[:together]]
        assert found.note == f"interrupted: {layers} of 4 layers measured, in the order of their calls"
    with pytest.raises(KeyboardInterrupt) as plain:
        price(model, IDS, window=WINDOW, on_progress=stop_after(1))
    assert not isinstance(plain.value, pricing.PriceInterrupted)
    assert want.note is None
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_losses_of_recurrent_layers_after_padding() -> None:
    """Whose states are those of the padding too, in eager as well."""
    options = {"num_attention_heads": 6, "lru_width": 48, "attention_window_size": 8}
    config = transformers.RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, **options)
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    draw_weights(model)
    assert_near(losses(model, IDS, attention_mask=KEEP), eager_loss(model, [], attention_mask=KEEP))


def test_losses_that_are_not_finite() -> None:
    model = build("llama")

    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(1, torch.tensor([10, 11]), torch.nan)

    handle = model.model.norm.register_forward_hook(spoil)
    assert losses(model, IDS)[:, 10:12].isposinf().all()
    assert losses(model, IDS).isfinite().sum() == 2 * 20
    with pytest.raises(ValueError, match="must have a finite loss at each token; 4 are not"):
        price(model, IDS, window=WINDOW)
    handle.remove()
    assert losses(model, IDS).isfinite().all()


def test_the_model_is_as_it_was() -> None:
    model = build("llama")
    model.lm_head.forward = forward = model.lm_head.forward
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    want = model(IDS).logits
    price(model, IDS, window=WINDOW)
    with pytest.raises(ValueError, match="together must be at most 2"):
        price(model, IDS, window=WINDOW, together=[3])
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert after == before
    assert model.lm_head.forward is forward
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("how", ["accelerated", "with gradients", "bf16", "inference mode"])
def test_models_in_any_state(how: str) -> None:
    model = build("qwen3")
    want = price(model, IDS, window=WINDOW)
    if how == "accelerated":
        qkv.accelerate(model)
    if how == "bf16":
        model = model.bfloat16()
    with torch.inference_mode(how == "inference mode"):
        found = price(model, IDS, window=WINDOW)
    assert not found.loss.requires_grad
    tolerance = 0.2 if how == "bf16" else 2e-5
    torch.testing.assert_close(found.increase, want.increase, rtol=0, atol=tolerance)


def test_calls_that_are_refused() -> None:
    model, encoder, both, compiled = build("llama"), build("bert"), build("bart"), build("llama")
    for layer in compiled.model.layers:
        layer.compile(backend="eager")
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=8, num_labels=97)
    classifier = transformers.LlamaForTokenClassification(config).eval()
    t5, wrapped = BOTH["t5"]().eval(), nn.Sequential(build("llama")).eval()
    another = "model must be, or contain, a model of transformers; got Linear"
    refused: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: price(nn.Linear(2, 2), IDS, window=4),
            TypeError,
            another,
        ),
        (lambda: price(model.train(), IDS, window=4), ValueError, "in evaluation mode"),
        (lambda: price(model.eval(), IDS, window=23), ValueError, "a window of 23 cuts nothing of 23 tokens"),
        (lambda: price(model, IDS, window=0), ValueError, "window must be at least 1"),
        (lambda: price(model, IDS, window="4"), TypeError, "window must be an int"),
        (lambda: price(model, IDS, window=4, sink_tokens=-1), ValueError, "sink_tokens must be at least 0"),
        (lambda: price(model, IDS, window=4, together=[3]), ValueError, "together must be at most 2"),
        (lambda: price(model, IDS), ValueError, "give either window or kv_heads; got None and None"),
        (lambda: price(model, IDS, window=4, kv_heads=1), ValueError, "give either window or kv_heads; got 4 and 1"),
        (lambda: price(model, IDS, kv_heads=1, sink_tokens=4), ValueError, "sink_tokens belong to a window; got 4"),
        (lambda: price(model, IDS, kv_heads=4), CheckpointError, r"must divide the model's 2 KV heads \(2, 1\); got 4"),
        (lambda: price(build("gpt2"), IDS, kv_heads=1), ValueError, "gpt2 becomes gpt_bigcode with fewer KV heads"),
        (lambda: price(build("deepseek_v3"), IDS, kv_heads=1), CheckpointError, "model_type must be one of llama"),
        (lambda: price(model, IDS[0], window=4), ValueError, r"input_ids must be a tensor \(B, L\)"),
        (lambda: price(model.model, IDS, window=4), ValueError, "must be a causal language model, with a head"),
        (lambda: price(compiled, IDS, window=4), ValueError, "must not be compiled, .*; model.layers.0 is"),
        (
            lambda: price(model, IDS, window=4, sink_tokens=19),
            ValueError,
            "4 and 19 sink tokens cuts nothing",
        ),
        (lambda: price(model, IDS, window=4, together=3), TypeError, "together must be a sequence of counts; got int"),
        (lambda: price(model, IDS, window=4, labels=IDS), ValueError, "labels must not be given"),
        (lambda: price(model, IDS, window=4, inputs_embeds=IDS), ValueError, "inputs_embeds must not be given"),
        (lambda: price(wrapped, IDS, window=4), TypeError, "a model of transformers itself; got Sequential, which"),
        (lambda: losses(wrapped, IDS), TypeError, "losses: model must be a model of transformers itself"),
        (lambda: price(model, IDS, kv_heads=1, pooling="x"), ValueError, "pooling must be one of mean, .* got 'x'"),
        (lambda: price(model, IDS[:0], window=4), ValueError, "of integers, two tokens or more"),
        (lambda: price(model, IDS.float(), window=4), ValueError, "of integers, two tokens or more"),
        (lambda: price(model, IDS, kv_heads=2), ValueError, "kv_heads must be fewer than the model's 2; got 2"),
        (lambda: price(encoder, IDS, window=4), ValueError, "must be a causal language model, with a head"),
        (lambda: price(both, IDS, window=4), ValueError, "must be a causal language model, with a head"),
        (lambda: price(classifier, IDS, window=4), ValueError, "got LlamaForTokenClassification"),
        (lambda: price(t5, IDS, window=4), ValueError, "decoder_input_ids must be a tensor"),
        (
            lambda: price(t5, IDS, decoder_input_ids=IDS, kv_heads=1),
            ValueError,
            "kv_heads must be None for an encoder-decoder",
        ),
        (
            lambda: price(t5, IDS, decoder_input_ids=IDS[:, :9], window=9),
            ValueError,
            "a window of 9 cuts nothing of 9 tokens",
        ),
    ]
    for call, kind, message in refused:
        with pytest.raises(kind, match=message):
            call()
