"""`measure_divergence`: how far a converted model's predictions are from the original's."""

import math
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32
"""Rows of logits that are compared at once, in fp64."""


class Divergence(NamedTuple):
    """What `measure_divergence` returns: means over all tokens that have a token before them."""

    num_tokens: int
    kl: float
    """KL(original || converted), in nats."""
    agreement: float
    """How often both find the same token the most probable, from 0 to 1."""
    loss_before: float
    """The original's, in nats."""
    loss_after: float
    """The converted model's."""

    @property
    def perplexity_before(self) -> float:
        return _perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        return _perplexity(self.loss_after)


def measure_divergence(original: Any, converted: Any, token_ids: Tensor) -> Divergence:
    """Compares the predictions of two causal language models of transformers on a text.

    With ``p`` and ``q`` the probabilities of original and converted model for what follows a position::

        kl          mean over positions of  sum_w p(w) (log p(w) - log q(w))
        agreement   mean over positions of  argmax p = argmax q
        loss        mean over positions of  -log p(the token that follows), and of -log q

    Args:
        original, converted: models of the same vocabulary, which are switched to ``eval()`` for the time being.
        token_ids: ``(B, L)``, texts of whole length: every token but the first is predicted.

    Raises:
        ValueError: for tokens of another shape, texts of fewer than two tokens, and vocabularies that differ.

    `predict` and `compare` are the same in two steps, for models that do not fit into memory together.

    Example:
        >>> from qkv.convert import measure_divergence
        >>> measure_divergence(model, converted, tokenizer(text, return_tensors="pt").input_ids)  # doctest: +SKIP
    """
    return compare(predict(original, token_ids), predict(converted, token_ids), token_ids)


def _perplexity(loss: float) -> float:
    """Infinite where it is above what fp64 can hold."""
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def predict(model: Any, token_ids: Tensor) -> Tensor:
    """The logits ``(B, L - 1, vocabulary)`` for every token but the first, in at least fp32, on the CPU."""
    if token_ids.dim() != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            "measure_divergence: token_ids must be (B, L) with a text of at least two tokens, the second of which is "
            f"predicted; got shape {tuple(token_ids.shape)}."
        )
    training = model.training
    try:
        with torch.no_grad():
            logits: Tensor = model.eval()(token_ids.to(model.device), use_cache=False).logits[:, :-1]
    finally:
        model.train(training)
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))


def compare(before: Tensor, after: Tensor, token_ids: Tensor) -> Divergence:
    """The divergence of two models from their logits as `predict` gives them."""
    if before.shape != after.shape:
        raise ValueError(
            "measure_divergence: original and converted must have one vocabulary; "
            f"their logits have shapes {tuple(before.shape)} and {tuple(after.shape)}."
        )
    tokens = token_ids[:, 1:].flatten().cpu()
    sums = torch.zeros(4, dtype=torch.float64)
    pieces = (flat.split(ROWS) for flat in (before.flatten(0, 1), after.flatten(0, 1), tokens))
    for p, q, following in zip(*pieces, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        losses = (F.nll_loss(log, following, reduction="sum") for log in (log_p, log_q))
        sums += torch.stack([kl, same, *losses])
    return Divergence(len(tokens), *(sums / len(tokens)).tolist())
