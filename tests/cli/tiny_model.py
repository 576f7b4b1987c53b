"""Models of a few thousand random numbers, with a tokenizer of a few words, saved as transformers saves them."""

from pathlib import Path
from typing import Any

WORDS = ("attention", "is", "a", "weighted", "sum", "of", "values", "where", "the", "from", "queries", "and", "keys")
SIZES = {"vocab_size": len(WORDS) + 2, "hidden_size": 48, "num_hidden_layers": 3, "eos_token_id": 1, "pad_token_id": 1}


def llama(**changes: Any) -> Any:
    """6 query heads in 2 groups, width 8."""
    from transformers import LlamaConfig

    sizes = {"intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**SIZES | sizes | changes)


def save(
    config: Any,
    folder: Path,
    *,
    chat_template: str | None = None,
    auto: str = "AutoModelForCausalLM",
    has_ends: bool = False,
    words: tuple[str, ...] = WORDS,
) -> str:
    """Saves a random model of ``config`` with its tokenizer, and returns the folder as ``--model`` takes it.

    Args:
        auto: the class of transformers that makes the model.
        has_ends: whether the tokenizer puts an ``<unknown>`` in front of a text and an ``<end>`` after it.
    """
    import torch
    import transformers

    torch.manual_seed(3)
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    tokenizer = _tokenizer(words, has_ends)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


def _tokenizer(known: tuple[str, ...], has_ends: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unknown>", "<end>", *known])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if has_ends:
        ends = [("<unknown>", 0), ("<end>", 1)]
        words.post_processor = processors.TemplateProcessing(single="<unknown> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unknown>", eos_token="<end>", pad_token="<end>")
