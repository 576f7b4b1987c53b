"""`Training`: training and uptraining on one schedule, in which batch and learning rate depend only on the step."""

import math

import torch
import torch.nn.functional as F
from model import LanguageModel
from settings import Settings
from torch import Tensor, nn
from torch.optim import AdamW


class Training:
    """A model with its optimizer.

    As in T5 and the paper, the learning rate falls with the inverse square root of the step and has no end, so
    uptraining continues the same schedule, and 5% is a prefix of 10%. Batches depend only on seed and step, so all
    conversions of a model see the same data.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, settings: Settings, seed: int) -> None:
        self.model, self.tokens, self.settings, self.seed = model, tokens, settings, seed
        self.optimizer = AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)

    def run(self, steps: range) -> None:
        """Runs the given steps."""
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            batch = self._batch(step)
            loss = cross_entropy(self.model, batch, self.settings)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def _rate(self, step: int) -> float:
        progress = (step + 1) / self.settings.warmup
        return self.settings.rate * min(progress, 1 / math.sqrt(progress))

    def _batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        length = self.settings.length + 1
        starts = torch.randint(len(self.tokens) - length, (self.settings.batch, 1), generator=generator)
        return self.tokens[starts + torch.arange(length)]


def cross_entropy(model: LanguageModel, batch: Tensor, settings: Settings) -> Tensor:
    """The mean loss, in nats, of the tokens of ``batch (B, L + 1)`` after the first; products in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LanguageModel, tokens: Tensor, settings: Settings) -> float:
    """The mean loss over all tokens, in consecutive sequences."""
    sequences = tokens.unfold(0, settings.length + 1, settings.length)
    losses = [cross_entropy(model, batch, settings) for batch in sequences.split(settings.batch)]
    sizes = [len(batch) for batch in sequences.split(settings.batch)]
    return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
