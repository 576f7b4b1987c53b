"""transformers' models on `attn_implementation="qkv"`: the same numbers and the same text as on their own."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from families import compare as families

from qkv import Mask
from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers import masks
from qkv.integrations.transformers.masks import MaskTensor, recognise_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}


def small(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**{**SMALL, **options}), attn_implementation="eager"
    )


DECODERS = {
    "llama": small("Llama"),
    "mistral, window of 7": small("Mistral", sliding_window=7),
    "qwen2": small("Qwen2"),
    "qwen3, norms": small("Qwen3"),
    "gemma2, softcap and alternating windows": small("Gemma2", sliding_window=7, query_pre_attn_scalar=8),
    "gpt-oss, learned sinks": small("GptOss", sliding_window=7, num_local_experts=2, num_experts_per_tok=1),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=6, attn_implementation="eager")
    ),
    "gpt-neox, partial rotary": small("GPTNeoX"),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = DECODERS[request.param]().eval()
    families.draw_weights(model)
    return model


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, keep = torch.randint(3, 96, (3, 19), generator=torch.Generator().manual_seed(4)), torch.ones(3, 19).long()
    keep[1, :6] = 0
    keep[2, :11] = 0
    return ids, keep if side == "left" else keep.flip(1)


def on(model: Any, implementation: str, run: Callable[[Any], Any]) -> Any:
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)
    return run(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding_are_those_of_eager(model: Any, side: str) -> None:
    ids, keep = batch(side)
    run = lambda model: model(ids, attention_mask=keep).logits.detach()[keep.bool()]
    torch.testing.assert_close(on(model, "qkv", run), on(model, "eager", run), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True},
    ],
    ids=str,
)
def test_generated_tokens_are_those_of_eager(model: Any, options: dict[str, Any]) -> None:
    ids, keep = batch("left")
    run = lambda model: model.generate(ids, attention_mask=keep, max_new_tokens=20, **{"do_sample": False, **options})
    assert torch.equal(on(model, "qkv", run), on(model, "eager", run))


def test_chunked_prefill_equals_the_full_pass(model: Any) -> None:
    ids = batch("left")[0]

    def run(model: Any) -> torch.Tensor:
        cache, logits = transformers.DynamicCache(config=model.config), []
        for a, b in ((0, 8), (8, 9), (9, 16), (16, 19)):
            logits.append(model(ids[:, a:b], past_key_values=cache).logits)
        return torch.cat(logits, dim=1).detach()

    whole = on(model, "qkv", lambda model: model(ids).logits.detach())
    torch.testing.assert_close(on(model, "qkv", run), whole, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_are_those_of_eager(model: Any) -> None:
    ids, keep = batch("right")

    def run(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, attention_mask=keep, labels=ids.masked_fill(keep == 0, -100)).loss
        return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]

    for got, want in zip(on(model, "qkv", run), on(model, "eager", run), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_packed_sequences_see_themselves_alone() -> None:
    model, ids = small("Mistral", sliding_window=7)().eval(), batch("left")[0]
    positions = torch.cat([torch.arange(8), torch.arange(11)]).expand(3, -1)
    run = lambda model: model(ids, position_ids=positions, use_cache=False).logits.detach()
    got = on(model, "qkv", run)
    torch.testing.assert_close(got, on(model, "eager", run), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, 8:], model(ids[:, 8:]).logits.detach(), rtol=1e-4, atol=1e-5)


def test_output_attentions_are_the_true_weights() -> None:
    model, (ids, keep) = small("Llama")().eval(), batch("left")
    run = lambda model: model(ids, attention_mask=keep, output_attentions=True).attentions
    for got, want in zip(on(model, "qkv", run), on(model, "eager", run), strict=True):
        rows = keep.bool()[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[rows], want[rows], rtol=1e-4, atol=1e-6)


def test_encoders_and_cross_attention_are_those_of_eager() -> None:
    ids, keep = batch("right")
    sizes = {"vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **heads, max_position_embeddings=64, attn_implementation="eager")
    ).eval()
    run = lambda model: model.generate(ids, attention_mask=keep, max_new_tokens=10, do_sample=False, num_beams=2)
    assert torch.equal(on(bart, "qkv", run), on(bart, "eager", run))
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64
        )
    ).eval()
    run = lambda model: model(ids, attention_mask=keep).last_hidden_state.detach()[keep.bool()]
    torch.testing.assert_close(on(bert, "qkv", run), on(bert, "eager", run), rtol=1e-4, atol=1e-5)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6)
    ).eval()
    run = lambda model: model(ids, attention_mask=keep, decoder_input_ids=ids).logits.detach()
    torch.testing.assert_close(on(t5, "qkv", run), on(t5, "eager", run), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("drafter", ["prompt", "model"])
def test_assisted_generation_gives_the_tokens_of_eager(model: Any, drafter: str) -> None:
    ids = batch("left")[0][:1]
    drafts = {"assistant_model": small("Llama")().eval()} if drafter == "model" else {"prompt_lookup_num_tokens": 3}
    run = lambda model: model.generate(ids, max_new_tokens=20, do_sample=False, **drafts)
    assert torch.equal(on(model, "qkv", run), on(model, "eager", run))


def test_a_quantized_cache_is_read_as_eager_reads_it() -> None:
    model, (ids, keep) = small("Llama")().eval(), batch("left")
    families.draw_weights(model)
    options: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):  # the oldest release has none without a package more
        options = {}
    run = lambda model: model.generate(ids, attention_mask=keep, max_new_tokens=20, do_sample=False, **options)
    assert torch.equal(on(model, "qkv", run), on(model, "eager", run))


def test_a_cached_prefix_is_continued(model: Any) -> None:
    ids = batch("left")[0]

    def run(model: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :12], past_key_values=cache)
        return model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)

    assert torch.equal(on(model, "qkv", run), on(model, "eager", run))


def test_checkpointed_training_draws_the_same_dropout_again() -> None:
    model, (ids, keep) = small("Mistral", sliding_window=7, attention_dropout=0.3)().train(), batch("right")

    def run(model: Any) -> list[torch.Tensor]:
        loss = model(ids, attention_mask=keep, labels=ids.masked_fill(keep == 0, -100)).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    plain, other = on(model, "qkv", run), on(model.eval(), "qkv", run)
    model.train().gradient_checkpointing_enable()
    for got, want in zip(on(model, "qkv", run), plain, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(plain[0], other[0])


# Of the quick tests, test_tracing.py compiles a decoder without softcap as well.
@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.long), "gemma2, softcap and alternating windows"]
)
def test_a_compiled_decoder_is_one_graph_and_gives_the_logits_of_eager(name: str) -> None:
    model, (ids, keep) = DECODERS[name]().eval(), batch("left")
    families.draw_weights(model)
    run = lambda forward: forward(ids, attention_mask=keep, use_cache=False).logits.detach()[keep.bool()]
    compiled = lambda model: run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(on(model, "qkv", compiled), on(model, "eager", run), rtol=1e-4, atol=1e-5)


def test_a_prefix_that_sees_itself_is_honoured() -> None:
    model = families.build(transformers.PaliGemmaForConditionalGeneration)
    ids = batch("right")[0] % 40 + 3
    kinds = (torch.arange(19) >= 8).long().expand(3, -1)
    outcome = families.Outcome("paligemma")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds, "labels": ids}
    families.compare(model, inputs, outcome)
    assert outcome.reference == "eager fp64"


def test_masks_are_recognised_and_never_materialised() -> None:
    ids, keep = batch("left")
    for name in ("llama", "mistral, window of 7", "gemma2, softcap and alternating windows"):
        model = DECODERS[name]().eval()
        with mock.patch.object(MaskTensor, "materialize", side_effect=AssertionError("materialized")):
            on(model, "qkv", lambda model: model.generate(ids, attention_mask=keep, max_new_tokens=5))


def test_each_mask_function_of_transformers_becomes_the_mask_that_shows_the_same() -> None:
    theirs = transformers.masking_utils
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    window = theirs.sliding_window_causal_mask_function(3)
    functions = {
        theirs.causal_mask_function: Mask.causal(),
        theirs.bidirectional_mask_function: Mask.full(),
        window: Mask.causal(3),
        theirs.sliding_window_bidirectional_mask_function(2): Mask.band(2, 2),
        theirs.and_masks(window, theirs.packed_sequence_mask_function(ids)): Mask.causal(3) & Mask.documents(ids),
    }
    if hasattr(theirs, "packed_sequence_compatibility_function"):  # not in the oldest release
        packed = theirs.packed_sequence_compatibility_function(window, positions, ids)
        functions[packed] = Mask.causal(3) & Mask.documents(ids)
    for function, want in functions.items():
        assert recognise_mask(function, range(7)) == want
        dense = theirs.sdpa_mask(1, 7, 7, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(dense, want.visible(7, 7).expand_as(dense))


@pytest.mark.parametrize(("padding", "fields"), [([0, 2], {"document_ids"}), ([0, 0], {"chunk"}), ([1, 1], {"chunk"})])
def test_chunks_are_recognised_at_any_cache_length(padding: list[int], fields: set[str]) -> None:
    theirs = transformers.masking_utils
    function = theirs.chunked_causal_mask_function(3, torch.tensor(padding))
    for q_offset, kv_offset, lq, lk in ((0, 0, 9, 9), (5, 3, 2, 4), (6, 4, 1, 3)):
        mask = recognise_mask(function, range(kv_offset, kv_offset + lk))
        assert mask is not None and fields == {
            name for name in ("chunk", "document_ids", "allow") if getattr(mask, name) is not None
        }
        dense = theirs.sdpa_mask(2, lq, lk, q_offset, kv_offset, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(mask.visible(lq, lk, q_offset - kv_offset).expand_as(dense), dense)


@pytest.mark.parametrize(
    ("blocks", "is_prefix"),
    [
        ([[0, 0, 0, -1, -1], [0, -1, -1, -1, -1]], True),  # PaliGemma: the image and the prompt
        ([[-1, -1, -1, -1, -1], [4, 4, 4, 4, 4]], True),
        ([[0, 0, 0, -1, -1], [-1, 0, 0, -1, -1]], False),  # Gemma 3: an image within the text
        ([[0, 0, 1, -1, -1], [0, 0, 0, -1, -1]], False),
    ],
)
def test_a_block_from_the_first_token_on_is_a_prefix(blocks: list[list[int]], is_prefix: bool) -> None:
    theirs = transformers.masking_utils
    if not hasattr(theirs, "blockwise_overlay"):  # not in the oldest release
        return
    function = theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(torch.tensor(blocks)))
    mask = recognise_mask(function, range(5))
    assert (mask is not None) == is_prefix
    dense = theirs.sdpa_mask(2, 5, 5, mask_function=function, allow_is_causal_skip=False)
    if mask is not None:
        assert torch.equal(mask.visible(5, 5), dense)
    assert torch.equal(masks.make_mask(2, 5, 5, mask_function=function) == 0, dense)


def test_an_empty_window_is_not_recognised() -> None:
    assert recognise_mask(transformers.masking_utils.sliding_window_causal_mask_function(0), range(7)) is None


def test_unknown_mask_functions_are_honoured_and_not_guessed() -> None:
    theirs = transformers.masking_utils
    diagonal = lambda batch, head, query, key: query == key
    assert recognise_mask(diagonal, range(7)) is None
    assert recognise_mask(theirs.and_masks(theirs.causal_mask_function, diagonal), range(7)) is None
    assert recognise_mask(theirs.or_masks(theirs.causal_mask_function, diagonal), range(7)) is None
    if hasattr(theirs, "remap_positions_for_packed_sequence"):  # not in the oldest release
        remapped = theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, torch.zeros(1, 1))
        assert recognise_mask(remapped, range(7)) is None
    mask = masks.make_mask(2, 5, 5, mask_function=diagonal)
    assert torch.equal(mask[0, 0] == 0, torch.eye(5).bool())


def test_operations_on_a_mask_tensor_see_the_additive_mask() -> None:
    keep = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    for dtype in (torch.float32, torch.bfloat16):
        lazy = masks.make_mask(2, 3, 7, q_offset=4, attention_mask=keep, dtype=dtype)
        want = transformers.masking_utils.eager_mask(2, 3, 7, q_offset=4, attention_mask=keep, dtype=dtype)
        assert isinstance(lazy, MaskTensor) and lazy.shape == want.shape and lazy.dtype == dtype
        assert torch.equal(lazy + 0, want) and torch.equal(lazy[:, :, 1:], want[:, :, 1:])
        assert torch.equal(torch.where(lazy == 0, 0.0, 1.0), torch.where(want == 0, 0.0, 1.0))
    assert "Mask.causal()" in repr(lazy)


def test_additive_masks_of_the_caller_are_a_bias() -> None:
    model, ids = small("Llama")().eval(), batch("left")[0]
    additive = torch.zeros(3, 1, 19, 19).masked_fill(torch.rand(3, 1, 19, 19) < 0.4, torch.finfo(torch.float32).min)
    additive[..., 0] = 0
    run = lambda model: model(ids, attention_mask=additive).logits.detach()
    torch.testing.assert_close(on(model, "qkv", run), on(model, "eager", run), rtol=1e-4, atol=1e-5)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allow: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~allow, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def test_only_keys_chosen_by_an_indexer_are_visible() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    indices = torch.stack([torch.randperm(9)[:3] for _ in range(10)]).view(2, 5, 3)
    allow = torch.zeros(2, 5, 9).scatter(-1, indices, 1).bool()[:, None]
    got, _ = integration.attend(torch.nn.Module(), q, k, v, None, indices=indices)
    torch.testing.assert_close(got, dense_attention(q, k, v, allow))

    module = torch.nn.Module()
    module.indexer = torch.nn.Module()
    module.indexer.block_size = 4
    blocks = torch.tensor([[[[0, -1]] * 5, [[2, 1]] * 5]] * 2)
    allow = torch.zeros(2, 4, 5, 9).bool()
    allow[:, :2, :, :4] = True
    allow[:, 2:, :, 4:] = True
    got, _ = integration.attend(module, q, k, v, None, block_indices=blocks)
    torch.testing.assert_close(got, dense_attention(q, k, v, allow))


def test_sinks_of_each_query_absorb_their_share() -> None:
    q, k, v, sinks = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 4, 5, 1)
    scores = q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    got = integration.attend(torch.nn.Module(), q, k, v, None, sinks=sinks, output_attentions=True)
    torch.testing.assert_close(got[0], (weights @ v.repeat_interleave(2, dim=1)).transpose(1, 2))
    torch.testing.assert_close(got[1], weights)


def test_without_a_mask_all_keys_are_visible_unless_the_call_is_causal() -> None:
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = True
    full, triangle = torch.ones(5, 5).bool(), torch.ones(5, 5).tril().bool()
    for is_causal, allow in ((None, full), (False, full), (True, triangle)):
        got, _ = integration.attend(module, q, k, v, None, is_causal=is_causal)
        torch.testing.assert_close(got, dense_attention(q.expand(3, -1, -1, -1), k, v, allow))


def test_the_lowest_number_of_the_dtype_in_an_additive_mask_hides() -> None:
    q = torch.randn(1, 2, 4, 8)
    least = torch.finfo(torch.float32).min
    additive = torch.zeros(1, 1, 4, 4)
    additive[..., 1, :] = least
    additive[..., 2, 2:] = least - 1
    got, _ = integration.attend(torch.nn.Module(), q, q, q, additive)
    want = dense_attention(q, q, q, additive == 0)
    torch.testing.assert_close(got, want.nan_to_num(0))


def test_a_mask_of_another_length_is_an_error() -> None:
    q = torch.randn(2, 2, 3, 8)
    mask = masks.make_mask(2, 5, 3, attention_mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match=r"dense allow must fit \(2, 2, 3, 3\); got shape \(2, 1, 5, 3\)"):
        integration.attend(torch.nn.Module(), q, q, q, mask)


# What models pass for flash attention alone, or what the mask says already.
MEANT_FOR_OTHERS = {
    *("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("position_ids", "deterministic"),
}


def test_every_argument_that_a_model_passes_is_known() -> None:
    known = set(inspect.signature(integration.compute_attention).parameters) | MEANT_FOR_OTHERS
    calls = 0
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in re.findall(r" = attention_interface\(\n(.*?)\n +\)\n", path.read_text(), re.DOTALL):
            unknown = set(re.findall(r"^ +(\w+)=", call, re.MULTILINE)) - known
            assert not unknown, f"{path.name} passes {unknown} to its attention function"
            calls += 1
    assert calls > 300


def test_the_paged_cache_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"paged cache .*got object"):
        integration.attend(torch.nn.Module(), q, q, q, None, cache=object())
