"""Models that read text: their kinds by configuration, and tokens as they read."""

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qkv.models.language_model import LanguageModel, _kind

WORDS = {"<s>": 0, "the": 1, "king": 2, "s": 3, ",": 4}


def _wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece({"<s>": 0, "the": 1, "king": 2, "##s": 3, ",": 4}, unk_token="<s>"))
    made.decoder = decoders.WordPiece()
    return made


def _sentencepiece() -> Tokenizer:
    made = Tokenizer(models.Unigram([("<s>", 0.0), ("\u2581the", -1), ("\u2581king", -1), ("s", -1), (",", -1)], 0))
    made.decoder = decoders.Metaspace()
    return made


def _bytes() -> Tokenizer:
    made = Tokenizer(models.BPE({"<s>": 0, "\u0120the": 1, "\u0120king": 2, "s": 3, ",": 4}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return made


@pytest.mark.parametrize("make", [_wordpiece, _sentencepiece, _bytes])
def test_tokens_read_as_in_the_text(make: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), cls_token="<s>")
    model = LanguageModel("x", None, tokenizer)
    found = model.pieces(torch.tensor([[0, 1, 2, 3, 4]]))
    assert found[:4] == ("<s>", " the", " king", "s") and found[4].strip() == ","


@pytest.mark.parametrize(
    ("config", "architectures", "kind"),
    [
        (transformers.LlamaConfig, ["LlamaForCausalLM"], "language model"),
        (transformers.LlamaConfig, None, "language model"),
        (transformers.LlamaConfig, ["LlamaModel"], "encoder"),
        (transformers.LlamaConfig, ["LlamaForSequenceClassification"], "encoder"),
        (transformers.BertConfig, ["BertForMaskedLM"], "encoder"),
        (transformers.BertConfig, None, "encoder"),
        (transformers.BertConfig, ["BertLMHeadModel"], "language model"),
        (transformers.ModernBertConfig, ["ModernBertForMaskedLM"], "encoder"),
        (transformers.T5Config, ["T5ForConditionalGeneration"], "encoder-decoder"),
        (transformers.BartConfig, ["BartModel"], "encoder-decoder"),
        (transformers.BlipTextConfig, None, None),
    ],
)  # fmt: skip
def test_kinds_of_configurations(config: Any, architectures: list[str] | None, kind: str | None) -> None:
    made = config()
    made.architectures = architectures
    assert _kind(made) == kind
