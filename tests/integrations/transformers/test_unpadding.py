"""`unpad`: what a model returns at real tokens, and the cases that it leaves alone.

All families of transformers on which it takes effect are compared by `make families`, gradients included, a sample of
them by families/test_families.py.
"""

import copy
import functools
import pickle
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from integrations.transformers.unpadding import (
    IDS,
    LEFT,
    LENGTHS,
    PACKED,
    PADDED,
    RIGHT,
    bert,
    build,
    hidden,
    llama,
    modern,
    tokens_seen,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import bidirectional_mask_function

import qkv
from qkv import kernels
from qkv.integrations.transformers import unpadding
from qkv.integrations.transformers.cache import QKVCache
from qkv.integrations.transformers.cache_argument import cache_name
from qkv.integrations.transformers.masks import make_mask
from qkv.integrations.transformers.unpadding import unpad

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),  # of transformers' own making
]

BOTH_WAYS = {"mask_function": bidirectional_mask_function}
NO_CACHE = {"use_cache": False}
NARROW = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
KINDS = [(bert, {}), (modern, {}), (llama, NO_CACHE), (llama, {})]


@pytest.mark.parametrize(("make", "options"), KINDS)
@pytest.mark.parametrize("keep", [LEFT, RIGHT], ids=["left", "right"])
def test_real_tokens_alone_are_computed(make: Any, options: Any, keep: Tensor) -> None:
    model = make()
    with torch.no_grad():
        want = hidden(model, keep, **options)
        unpad(model)
        with tokens_seen() as seen:
            got = hidden(model, keep, **options)
    assert seen == [PACKED] * 3
    assert got.shape == want.shape
    # Two orders of adding up a few dozen numbers of the order of one.
    torch.testing.assert_close(got[keep], want[keep], atol=2e-6, rtol=2e-5)


def test_padded_positions_of_the_output_are_zero() -> None:
    model = unpad(bert())
    out = hidden(model, RIGHT)
    assert (out[~RIGHT] == 0).all() and out.shape == (4, 11, 32)


def test_a_text_of_padding_only() -> None:
    keep = RIGHT.clone()
    keep[1] = False
    model = unpad(bert())
    with torch.no_grad(), tokens_seen() as seen:
        got = hidden(model, keep)
        alone = hidden(model, RIGHT)
    assert seen[0] == (1, sum(LENGTHS) - LENGTHS[1])
    assert (got[1] == 0).all()
    torch.testing.assert_close(got[2], alone[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    def gradients(model: Any) -> list[Tensor]:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = hidden(model, RIGHT, use_cache=False)[RIGHT].square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    want, model = gradients(llama()), unpad(llama())
    with tokens_seen() as seen:
        got = gradients(model)
    assert seen[0] == PACKED
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)


def holes(keep: Tensor) -> Tensor:
    holed = keep.clone()
    holed[0, 5] = False
    return holed


RUN_PADDED = {
    "no padding": (bert, torch.ones_like(RIGHT), {}),
    "nothing but padding": (bert, torch.zeros_like(RIGHT), {}),
    "padding between tokens": (bert, holes(RIGHT), {}),
    "hidden states": (bert, RIGHT, {"output_hidden_states": True}),
    "weights": (bert, RIGHT, {"output_attentions": True}),
}


@pytest.mark.parametrize("name", RUN_PADDED)
def test_calls_that_run_padded(name: str) -> None:
    make, keep, options = RUN_PADDED[name]
    model = make()
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=keep.long(), **options)
        unpad(model)
        with tokens_seen() as seen:
            got = model(input_ids=IDS, attention_mask=keep.long(), **options)
    assert seen == [PADDED] * 3
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    for key in ("hidden_states", "attentions"):
        for a, b in zip(got.get(key) or (), want.get(key) or (), strict=True):
            assert torch.equal(a, b)


def test_hidden_states_requested_by_the_configuration() -> None:
    model = unpad(bert())
    model.config.output_hidden_states = True
    out = model(input_ids=IDS, attention_mask=RIGHT.long())
    assert [state.shape for state in out.hidden_states] == [(4, 11, 32)] * 4


def test_a_cross_attending_layer_of_as_many_keys() -> None:
    model = bert(is_decoder=True, add_cross_attention=True)
    memory = {"encoder_hidden_states": torch.randn(4, 11, 32), "use_cache": False}
    with torch.no_grad():
        want = hidden(model, RIGHT, **memory)
        unpad(model)
        with tokens_seen() as seen:
            got = hidden(model, RIGHT, **memory)
    assert seen == [PADDED] * 6 and torch.equal(got, want)


CACHES: dict[str, tuple[Any, bool]] = {
    "ours": (QKVCache, True),
    "theirs": (lambda config: DynamicCache(config=config), True),
    "int8": (lambda config: QKVCache(config, dtype=torch.int8), False),
    "static": (lambda config: StaticCache(config=config, max_cache_len=14), False),
}


@pytest.mark.parametrize("make", [llama, lambda: build("gemma2", sliding_window=5, **NARROW)], ids=["full", "window"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_prompt_is_packed_into_an_empty_cache_and_steps_read_it(kind: str, make: Any) -> None:
    model = make()
    make_cache, is_packed = CACHES[kind]
    found: list[list[Tensor]] = []
    for _ in range(2):
        cache, keep, states = make_cache(model.config), LEFT, []
        with torch.no_grad(), tokens_seen() as seen:
            for ids in (IDS, IDS[:, :1], IDS[:, :2]):
                keep = LEFT if ids is IDS else torch.cat([keep, torch.ones_like(ids, dtype=torch.bool)], dim=1)
                inputs = {"input_ids": ids, "attention_mask": keep.long(), "past_key_values": cache}
                states.append(model(**inputs).last_hidden_state[keep[:, -ids.shape[1] :]])
        found.append(states)
        unpad(model)
    assert (seen[0] == PACKED) == is_packed and seen[-1] == (4, 2)
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
    assert cache.get_seq_length() == 14


def test_a_module_that_reads_its_cache_itself_runs_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.get(cache_name())
        if cache is not None:
            cache.get_seq_length()
        return actual(self, hidden_states, **kwargs)

    actual = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    forward.__module__ = LlamaAttention.__module__
    unpadding._only_appends.cache_clear()
    model = unpad(llama())
    with tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PADDED] * 3
    reasons = [by for _, by in qkv.report(model).calls if by.startswith("with padding")]
    assert reasons == ["with padding: LlamaAttention reads its cache itself"]
    unpadding._only_appends.cache_clear()


def test_a_layer_that_runs_again_with_padding_appends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return actual(self, *args, **kwargs), torch.ones(1)

    model = unpad(llama())
    layer = model.layers[0]
    actual, cache = LlamaDecoderLayer.forward, QKVCache(model.config)
    monkeypatch.setattr(unpadding, "_is_tokenwise", lambda module: True)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", functools.wraps(actual)(forward))
    states, mask = torch.randn(4, 11, 32), make_mask(4, 11, 11, attention_mask=RIGHT)
    angles = model.rotary_emb(states, torch.arange(11)[None])
    with tokens_seen() as seen:
        out, _ = layer(states, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
    assert seen == [PACKED, PADDED] and out.shape == (4, 11, 32) and cache.get_seq_length() == 11


def test_another_attention_implementation() -> None:
    model = unpad(bert())
    model.set_attn_implementation("sdpa")
    got = hidden(model, RIGHT)
    assert torch.equal(got, hidden(unpad(model, enabled=False), RIGHT))


@pytest.mark.parametrize("missing", ["kernel", "fp64"])
def test_calls_that_the_kernel_does_not_support_run_padded(missing: str) -> None:
    model = unpad(bert())
    if missing == "fp64":
        model.double()
    library = "none here" if missing == "kernel" else kernels.loaded()
    with kernels.use(library), tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PADDED] * 3


def test_layers_with_layerdrop_run_padded_in_training() -> None:
    model = build(
        "bart", d_model=32, encoder_layerdrop=1.0, decoder_layerdrop=0.0, decoder_ffn_dim=16, encoder_ffn_dim=16
    )
    unpad(model).train()
    with tokens_seen() as seen:
        out = model(input_ids=IDS, attention_mask=RIGHT.long(), use_cache=False)
    assert out.encoder_last_hidden_state.shape == (4, 11, 32)
    assert PACKED not in seen
    model.eval()
    with tokens_seen() as seen:
        model(input_ids=IDS, attention_mask=RIGHT.long(), use_cache=False)
    assert seen.count(PACKED) == model.config.encoder_layers


def test_layers_with_masks_of_different_padding() -> None:
    """Each layer leaves out what its own mask hides."""
    model = modern()
    masks = {
        kind: make_mask(4, 11, 11, attention_mask=keep, **BOTH_WAYS)
        for kind, keep in {"full_attention": RIGHT, "sliding_attention": LEFT}.items()
    }
    assert len({*model.config.layer_types}) == 2
    with torch.no_grad():
        want = model(input_ids=IDS, attention_mask=dict(masks)).last_hidden_state
        unpad(model)
        with tokens_seen() as seen:
            got = model(input_ids=IDS, attention_mask=dict(masks)).last_hidden_state
    assert seen == [PACKED] * 3
    assert RIGHT[0].all()  # the only text whose tokens no layer lets meet padding
    torch.testing.assert_close(got[0], want[0], atol=2e-6, rtol=2e-5)


def test_unpad_twice_and_undo() -> None:
    model = unpad(unpad(bert()))
    with tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PACKED] * 3
    unpad(model, enabled=False)
    with tokens_seen() as seen:
        hidden(model, RIGHT)
    assert seen == [PADDED] * 3
    hooks = [module._forward_pre_hooks or module._forward_hooks for module in model.modules()]
    assert not any(hooks)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_packed_and_independent(copied: Any) -> None:
    model = unpad(bert())
    other = copied(model)
    with tokens_seen() as seen:
        torch.testing.assert_close(hidden(other, RIGHT), hidden(model, RIGHT), rtol=0, atol=0)
    assert seen == [PACKED] * 6
    unpad(other, enabled=False)
    with tokens_seen() as seen:
        hidden(other, RIGHT)
    with tokens_seen() as also:
        hidden(model, RIGHT)
    assert seen == [PADDED] * 3 and also == [PACKED] * 3


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_call_leaves_nothing_behind(interruption: type[BaseException]) -> None:
    model = unpad(bert())
    broken = mock.patch.object(torch.nn.functional, "dropout", side_effect=interruption)
    with broken, tokens_seen() as seen, pytest.raises(interruption):
        model.encoder(torch.randn(4, 11, 32), attention_mask=make_mask(4, 11, 11, attention_mask=RIGHT, **BOTH_WAYS))
    assert seen == [PACKED]
    whole = torch.ones_like(RIGHT)
    with torch.no_grad():
        got = hidden(model, whole)
        assert torch.equal(got, hidden(unpad(model, enabled=False), whole))


def test_threads_do_not_share_a_packing() -> None:
    model = unpad(bert())
    alone = [hidden(model, keep).detach() for keep in (LEFT, RIGHT)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def run(n: int) -> None:
        for _ in range(20):
            found[n].append(hidden(model, (LEFT, RIGHT)[n]).detach())

    threads = [threading.Thread(target=run, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, alone[n]) for n, outs in found.items() for out in outs)


def test_a_model_within_another_module() -> None:
    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = bert()

    embedder = unpad(Embedder())
    with tokens_seen() as seen:
        hidden(embedder.encoder, RIGHT)
    assert seen == [PACKED] * 3


def test_a_compiled_model() -> None:
    model = unpad(bert())
    want = hidden(model, RIGHT).detach()
    with torch.no_grad():
        got = torch.compile(model, backend="eager")(input_ids=IDS, attention_mask=RIGHT.long()).last_hidden_state
    torch.testing.assert_close(got[RIGHT], want[RIGHT], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(2, 2), "got Linear, which contains none"),
        (lambda: build("t5", d_model=32, d_kv=8, d_ff=16), "got T5Model, T5Stack"),
        (lambda: build("deepseek_v32", intermediate_size=16, moe_intermediate_size=16, n_routed_experts=4), "got Deep"),
    ],
    ids=["no model", "a bias of positions", "an indexer"],
)
def test_models_without_supported_layers_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"unpad: model must .* mix tokens only in attention; {name}"):
        unpad(make())


@pytest.mark.parametrize(("model", "got"), [(None, "NoneType"), ("bert", "str"), (nn.Linear, "the class Linear")])
def test_only_modules_are_accepted(model: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"unpad: model must be an nn.Module; got {got}"):
        unpad(model)
