"""`unpad` packs arguments known to have one row per token; layers that take or return anything else run padded."""

from typing import Any

import pytest
import torch
import transformers
from integrations.transformers.unpadding import PACKED, PADDED, RIGHT, bert, hidden, llama, tokens_seen
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from qkv import kernels
from qkv.integrations.transformers.masks import make_mask
from qkv.integrations.transformers.unpadding import unpad

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),  # of transformers' own making
]


def call(layer: nn.Module, x: Tensor, keep: Tensor, **options: Any) -> Any:
    """A layer of a decoder, by itself."""
    length = x.shape[1]
    mask = make_mask(len(x), length, length, attention_mask=keep, mask_function=causal_mask_function)
    return layer(x, attention_mask=mask, **options)


def rotation(model: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = model.rotary_emb(torch.zeros(1), positions)
    return found


def compared(model: Any, keep: Tensor, **options: Any) -> list[tuple[int, int]]:
    """What a layer's attention computes where it is unpadded; its results are those of before at real tokens."""
    x, layer = torch.randn(*keep.shape, 32), model.layers[0]
    want = call(layer, x, keep, **options)
    unpad(model)
    with tokens_seen() as seen:
        got = call(layer, x, keep, **options)
    torch.testing.assert_close(got[keep], want[keep], atol=4e-6, rtol=4e-5)
    return seen


def test_positions_of_one_row_and_of_each() -> None:
    positions = torch.arange(11)[None]
    for given in (positions, positions.expand(4, -1), positions + torch.arange(4)[:, None]):
        model = llama()
        seen = compared(model, RIGHT, position_embeddings=rotation(model, given), position_ids=given)
        assert seen == [PACKED]


@pytest.mark.parametrize("batch", [3, 4])
def test_positions_in_three_dimensions_are_not_taken_for_rows(batch: int) -> None:
    """``position_ids (3, B, L)`` of a batch of 3 begin like ``(B, L)``."""
    model, length = llama(), batch
    keep = torch.arange(length) < torch.arange(1, batch + 1)[:, None]
    three = torch.arange(length).expand(3, batch, length)
    embeddings = rotation(model, torch.arange(length)[None])
    assert compared(model, keep, position_embeddings=embeddings, position_ids=three) == [(batch, length)]


def test_a_square_batch_runs_padded() -> None:
    keep = torch.arange(5) < torch.tensor([5, 3, 1, 2, 4])[:, None]
    model = llama()
    assert compared(model, keep, position_embeddings=rotation(model, torch.arange(5)[None])) == [(5, 5)]


OTHERS = {
    "a tensor of tokens": torch.randn(4, 11),
    "a tensor of the batch": torch.randn(4),
    "tensors in a tuple": (torch.randn(4, 11, 2),),
    "a dictionary": {"of": torch.randn(4, 11)},
    "an object": object(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_unknown_arguments_run_padded(name: str) -> None:
    model = llama()
    embeddings = rotation(model, torch.arange(11)[None])
    assert compared(model, RIGHT, position_embeddings=embeddings, visual_pos=OTHERS[name]) == [PADDED]


@pytest.mark.parametrize("number", [7, 0.5, torch.tensor(7)], ids=str)
def test_numbers_passed_to_layers_do_not_prevent_packing(number: object) -> None:
    """As the trainer of transformers passes to a model, which passes it to its layers."""
    model = unpad(llama())
    with tokens_seen() as seen:
        hidden(model, RIGHT, use_cache=False, num_items_in_batch=number)
    assert seen == [PACKED] * 3


def test_chunks_of_the_feed_forward_divide_the_padded_length() -> None:
    model = bert(chunk_size_feed_forward=11)
    want = hidden(model, RIGHT)
    unpad(model)
    with tokens_seen() as seen:
        got = hidden(model, RIGHT)
    assert seen == [PADDED] * 3 and torch.equal(got, want)


@pytest.mark.parametrize("more", ["a tensor", "another length"])
def test_a_layer_that_returns_more_than_its_tokens(more: str) -> None:
    kind = transformers.models.bert.modeling_bert.BertLayer

    class Telling(kind):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            out = super().forward(hidden_states, attention_mask, **options)
            return (out, hidden_states.mean(dim=1)) if more == "a tensor" else out[:, ::2]

    Telling.forward.__module__ = kind.forward.__module__  # or it would not be packed at all
    model = bert()
    for layer in model.encoder.layer:
        layer.__class__ = Telling
    x = torch.randn(4, 11, 32)
    mask = make_mask(4, 11, 11, attention_mask=RIGHT, mask_function=causal_mask_function)
    want = model.encoder.layer[0](x, mask)
    unpad(model)
    got = model.encoder.layer[0](x, mask)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def deepstack(indexes: list[int]) -> Any:
    """A model that adds features of its images between the layers of its text."""
    text = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={
            **vision,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": indexes,
        },
        image_token_id=100,
        video_token_id=101,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    torch.manual_seed(0)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("indexes", [[], [0, 1, 2]], ids=["none", "each layer"])
def test_features_of_images_between_layers_meet_the_padded_batch(indexes: list[int]) -> None:
    model = deepstack(indexes)
    image = [102, *[100] * 4, 103]
    ids = torch.tensor([[5, 6, *image, 7, 8, 9, 10], [5, *image, 7, 8, 0, 0, 0]])
    keep = torch.ones_like(ids)
    keep[1, 9:] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": keep,
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 100).int(),
        "use_cache": False,
    }

    def run(implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        out = model(**inputs).logits[keep.bool()]
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    want = run("eager")
    unpad(model)
    with tokens_seen() as seen:
        got = run("qkv")
    assert seen.count((1, int(keep.sum()))) == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 + 1e-5 * float(b.abs().max()), rtol=1e-4)
