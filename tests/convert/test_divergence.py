"""`measure_divergence` against sums by hand, in Python's own numbers."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from convert import models

from qkv.convert import measure_divergence
from qkv.convert.divergence import ROWS

WORDS = 7


class Table(torch.nn.Module):
    """A model that predicts from the last token alone: its logits are the rows of a table."""

    device = torch.device("cpu")

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, token_ids, use_cache):
        assert not (self.training or use_cache or torch.is_grad_enabled())
        return SimpleNamespace(logits=self.rows[token_ids])


def softmax(logits):
    exponentials = [math.exp(logit) for logit in logits]
    return [number / math.fsum(exponentials) for number in exponentials]


def by_hand(before, after, texts):
    """The four means, in the order of `Divergence`."""
    terms = []
    for text in texts.tolist():
        for token, following in pairwise(text):
            p, q = softmax(before[token].tolist()), softmax(after[token].tolist())
            kl = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            same = p.index(max(p)) == q.index(max(q))
            terms.append((kl, same, -math.log(p[following]), -math.log(q[following])))
    return [math.fsum(column) / len(terms) for column in zip(*terms, strict=True)]


@pytest.mark.parametrize("length", [2, 5, ROWS + 2])
def test_means_are_those_by_hand(length):
    torch.manual_seed(length)
    before, after = 3 * torch.randn(2, WORDS, WORDS)
    after[:3] = before[:3] + 0.1
    texts = torch.randint(WORDS, (3, length))
    found = measure_divergence(Table(before), Table(after), texts)
    assert found.num_tokens == 3 * (length - 1)
    # Logits are exact in fp64; a mean of few terms of size 10 errs by a few units of 2e-15.
    assert found[1:] == pytest.approx(by_hand(before, after, texts), rel=0, abs=1e-13)
    assert found.perplexity_before == math.exp(found.loss_before)
    assert found.perplexity_after == math.exp(found.loss_after)


def test_divergence_is_from_the_original():
    """0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1); with p and q swapped it would be 0.368."""
    even, uneven = torch.zeros(2, 2), torch.tensor([0.9, 0.1]).log().expand(2, 2)
    found = measure_divergence(Table(even), Table(uneven), torch.tensor([[0, 0]]))
    assert found.kl == pytest.approx(0.5108256, abs=1e-6)


def test_a_model_does_not_diverge_from_itself_and_stays_in_training():
    model = models.build("llama").train()
    found = measure_divergence(model, model, models.IDS)
    assert (found.kl, found.agreement, model.training) == (0, 1, True)
    shifted = models.logits(model.eval())[:, :-1].double().log_softmax(-1)
    loss = -shifted.gather(2, models.IDS[:, 1:, None]).mean()
    # The model computes the same in fp32 both times.
    assert found.loss_before == found.loss_after == pytest.approx(loss.item(), rel=1e-12)


def test_perplexity_overflows_to_infinity():
    found = measure_divergence(Table(torch.eye(2)), Table(torch.eye(2) * 1e4), torch.tensor([[0, 1]]))
    assert (found.loss_after, found.perplexity_after) == (1e4, math.inf)
    assert math.isnan(found._replace(loss_after=math.nan).perplexity_after)


def test_an_error_restores_training_mode():
    model = models.build("llama").train()
    with pytest.raises(IndexError):
        measure_divergence(model, model, models.IDS + 40)
    assert model.training


@pytest.mark.parametrize("shape", [(5,), (1, 1), (0, 5), (1, 2, 3)])
def test_texts_must_have_something_to_predict(shape):
    model = Table(torch.zeros(WORDS, WORDS))
    with pytest.raises(ValueError, match=r"must be \(B, L\) with B >= 1 and L >= 2; got shape \("):
        measure_divergence(model, model, torch.zeros(shape, dtype=torch.long))


def test_vocabularies_must_be_the_same():
    with pytest.raises(ValueError, match=r"the same vocabulary; got logits of shapes \(1, 2, 7\) and \(1, 2, 8\)"):
        measure_divergence(Table(torch.zeros(9, 7)), Table(torch.zeros(9, 8)), torch.tensor([[0, 1, 2]]))
