"""`measure_divergence`: KL divergence, agreement and loss of a converted model against the original."""

import math
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32
"""Rows of logits per fp64 comparison."""


class Divergence(NamedTuple):
    """Means over all predicted tokens: every token except the first of each text."""

    num_tokens: int
    kl: float
    """KL(original || converted), in nats."""
    agreement: float
    """Share of positions, 0 to 1, with the same most probable token."""
    loss_before: float
    """Of the original, in nats."""
    loss_after: float
    """Of the converted model, in nats."""

    @property
    def perplexity_before(self) -> float:
        """Of the original."""
        return _perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """Of the converted model."""
        return _perplexity(self.loss_after)


def measure_divergence(original: Any, converted: Any, token_ids: Tensor) -> Divergence:
    """Compares the predictions of two causal language models of transformers on a text.

    With ``p`` and ``q`` the next-token probabilities of the original and the converted model::

        kl          mean over positions of  sum_w p(w) (log p(w) - log q(w))
        agreement   mean over positions of  argmax p = argmax q
        loss        mean over positions of  -log p(next token), and of -log q(next token)

    Args:
        original, converted: models with the same vocabulary. They run in ``eval()`` and keep their training mode.
        token_ids: ``(B, L)`` without padding.

    Raises:
        ValueError: for another shape, fewer than two tokens, and vocabularies that differ.

    For models that do not fit into memory together, call ``predict`` on each and ``compare`` on the logits.

    Example:
        >>> from qkv.convert import measure_divergence
        >>> measure_divergence(model, converted, tokenizer(text, return_tensors="pt").input_ids)  # doctest: +SKIP
    """
    return compare(predict(original, token_ids), predict(converted, token_ids), token_ids)


def _perplexity(loss: float) -> float:
    """``exp(loss)``, inf where fp64 overflows."""
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def predict(model: Any, token_ids: Tensor) -> Tensor:
    """The logits ``(B, L - 1, vocabulary)`` of every token except the first, in at least fp32, on the CPU."""
    if token_ids.dim() != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            f"measure_divergence: token_ids must be (B, L) with B >= 1 and L >= 2; got shape {tuple(token_ids.shape)}."
        )
    training = model.training
    try:
        with torch.no_grad():
            logits: Tensor = model.eval()(token_ids.to(model.device), use_cache=False).logits[:, :-1]
    finally:
        model.train(training)
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))


def compare(before: Tensor, after: Tensor, token_ids: Tensor) -> Divergence:
    """The divergence of two models from their logits, as returned by `predict`."""
    if before.shape != after.shape:
        raise ValueError(
            "measure_divergence: original and converted must have the same vocabulary; "
            f"got logits of shapes {tuple(before.shape)} and {tuple(after.shape)}."
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
