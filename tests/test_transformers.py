"""transformers' models on `attn_implementation="qkv"`: the same numbers and the same text as on their own."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from qkv import Mask
from qkv.integrations import transformers as integration
from qkv.integrations import transformers_masks
from qkv.integrations.transformers_masks import MaskTensor, recognise

transformers = pytest.importorskip("transformers")
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
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
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


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generated_tokens_are_those_of_eager(model: Any, options: dict[str, Any]) -> None:
    ids, keep = batch("left")
    run = lambda model: model.generate(ids, attention_mask=keep, max_new_tokens=20, do_sample=False, **options)
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


def test_a_static_cache_is_read_at_its_valid_length() -> None:
    model, (ids, keep) = small("Llama")().eval(), batch("left")
    run = lambda model: model.generate(
        ids,
        attention_mask=keep,
        max_new_tokens=10,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(on(model, "qkv", run), on(model, "eager", run))


def test_masks_are_recognised_and_never_written_out() -> None:
    ids, keep = batch("left")
    for name in ("llama", "mistral, window of 7", "gemma2, softcap and alternating windows"):
        model = DECODERS[name]().eval()
        with mock.patch.object(MaskTensor, "dense", side_effect=AssertionError("written out")):
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
        theirs.packed_sequence_compatibility_function(window, positions, ids): Mask.causal(3) & Mask.documents(ids),
    }
    for function, want in functions.items():
        assert recognise(function) == want
        dense = theirs.sdpa_mask(1, 7, 7, mask_function=function, allow_is_causal_skip=False)
        assert torch.equal(dense, want.visible(7, 7).expand_as(dense))


def test_unknown_mask_functions_are_honoured_and_not_guessed() -> None:
    theirs = transformers.masking_utils
    diagonal = lambda batch, head, query, key: query == key
    assert recognise(diagonal) is None
    assert recognise(theirs.and_masks(theirs.causal_mask_function, diagonal)) is None
    assert recognise(theirs.or_masks(theirs.causal_mask_function, diagonal)) is None
    assert recognise(theirs.remap_positions_for_packed_sequence(theirs.causal_mask_function, torch.zeros(1, 1))) is None
    mask = transformers_masks.make_mask(2, 5, 5, mask_function=diagonal)
    assert type(mask) is torch.Tensor and torch.equal(mask[0, 0], torch.eye(5).bool())


def test_a_mask_tensor_is_the_dense_mask_to_whoever_computes_with_it() -> None:
    keep = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    lazy = transformers_masks.make_mask(2, 3, 7, q_offset=4, attention_mask=keep)
    want = transformers.masking_utils.sdpa_mask(2, 3, 7, q_offset=4, attention_mask=keep)
    assert isinstance(lazy, MaskTensor) and lazy.shape == want.shape and lazy.dtype == torch.bool
    assert torch.equal(lazy & True, want) and torch.equal(lazy[:, :, 1:], want[:, :, 1:])
    assert torch.equal(torch.where(lazy, 0.0, 1.0), torch.where(want, 0.0, 1.0))
    assert "Mask.band(left=None, right=0)" in repr(lazy)


def test_additive_masks_of_the_caller_are_a_bias() -> None:
    model, ids = small("Llama")().eval(), batch("left")[0]
    additive = torch.zeros(3, 1, 19, 19).masked_fill(torch.rand(3, 1, 19, 19) < 0.4, torch.finfo(torch.float32).min)
    additive[..., 0] = 0
    run = lambda model: model(ids, attention_mask=additive).logits.detach()
    torch.testing.assert_close(on(model, "qkv", run), on(model, "eager", run), rtol=1e-4, atol=1e-5)


def test_the_paged_cache_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=r"paged cache .*Got object"):
        integration.attend(torch.nn.Module(), q, q, q, None, cache=object())
