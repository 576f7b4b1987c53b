"""The text as byte-pair tokens."""

from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

PRIOR = 100


class Text(NamedTuple):
    """Training tokens and held-out tokens."""

    train: Tensor
    held_out: Tensor
    vocabulary: int


def encode(train: str, held_out: str, vocabulary: int) -> Text:
    """Tokenises both with a byte-pair encoding learnt from ``train``."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train.splitlines(keepends=True), vocab_size=vocabulary, show_progress=False)
    train_tokens, held_out_tokens = (torch.tensor(tokenizer.encode(part).ids) for part in (train, held_out))
    return Text(train_tokens, held_out_tokens, vocabulary)


def bigram_loss(text: Text) -> float:
    """The held-out loss, in nats, of a bigram model of the training text, smoothed with PRIOR unigram counts."""
    size = text.vocabulary
    pairs = torch.bincount(text.train[:-1] * size + text.train[1:], minlength=size**2).view(size, size)
    singles = torch.bincount(text.train, minlength=size) + 1
    probabilities = (pairs + PRIOR * singles / singles.sum()) / (pairs.sum(dim=1, keepdim=True) + PRIOR)
    return float(-probabilities[text.held_out[:-1], text.held_out[1:]].log().mean())
