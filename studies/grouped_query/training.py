"""Training, and going on with it after conversion: one schedule, in which a step alone decides what it does."""

import math

import torch
import torch.nn.functional as F
from model import LanguageModel
from settings import Settings
from torch import Tensor, nn
from torch.optim import AdamW


class Training:
    """A model under training.

    As in T5, and so in the paper, the learning rate falls with the square root of the step and knows no end, so that
    what goes on after conversion goes on with the same schedule, and 5% lie on the way to 10%. A step's batch depends
    on the seed and the step alone: all conversions of a model see the same.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, settings: Settings, seed: int) -> None:
        self.model, self.tokens, self.settings, self.seed = model, tokens, settings, seed
        self.optimizer = AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)

    def run(self, steps: range) -> None:
        """Takes the steps of these numbers."""
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
    """The mean loss, in nats, of all tokens of ``batch (B, L + 1)`` but the first ones; products in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(batch[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LanguageModel, tokens: Tensor, settings: Settings) -> float:
    """The mean loss over all tokens, in sequences that follow each other."""
    sequences = tokens.unfold(0, settings.length + 1, settings.length)
    losses = [cross_entropy(model, batch, settings) for batch in sequences.split(settings.batch)]
    sizes = [len(batch) for batch in sequences.split(settings.batch)]
    return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
