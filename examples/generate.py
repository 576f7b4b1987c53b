"""Samples from a decoder over caches, with temperature, top-k and top-p.

    python examples/generate.py

trains the decoder of `block.py` on its own source code for half a minute, and lets it continue that.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from block import Decoder
from torch import Tensor


def choose(logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Draws a token ``(B,)`` from each row of logits ``(B, vocabulary)``.

    Args:
        logits: of the next token.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; all if None.
        top_p: keeps the most likely tokens whose probabilities sum to at least p, of those that are left.

    Raises:
        ValueError: for a temperature below 0 or not finite, a top_k below 1, and a top_p that is not above 0.
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"choose: temperature must be finite and at least 0; got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"choose: top_k must be at least 1, or None for all tokens; got {top_k}.")
    if not top_p > 0.0:
        raise ValueError(f"choose: top_p must be above 0, and 1 for all tokens; got {top_p}.")
    if temperature == 0.0:
        return logits.argmax(-1)
    ordered, tokens = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drawn = probabilities.masked_fill(before >= top_p, 0.0).multinomial(1)
    return tokens.gather(1, drawn)[:, 0]


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: int | None = None,
) -> Tensor:
    """The prompt ``(B, L)`` and up to ``count`` tokens after it; rows that came to ``stop`` are filled with it."""
    caches, tokens, new = model.make_caches(), prompt, prompt
    is_over = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(count):
        logits = model(new, caches)[:, -1]
        chosen = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        if stop is not None:
            chosen = chosen.masked_fill(is_over, stop)
            is_over |= chosen == stop
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], dim=1)
        if is_over.all():
            break
    return tokens


def train(model: Decoder, text: Tensor, steps: int, *, batch: int = 8, length: int = 48) -> float:
    """Trains on random pieces of a text ``(L,)``; returns the last loss."""
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.tensor(torch.nan)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (batch, 1))
        pieces = text[starts + torch.arange(length + 1)]
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(steps: int = 200) -> None:
    """Trains and prints a continuation."""
    source = Path(__file__).with_name("block.py").read_bytes()
    model = Decoder(vocabulary=256)
    print(f"loss {train(model, torch.tensor(list(source)), steps):.2f}")
    prompt = torch.tensor([list(b"class Block(nn.Module):\n")])
    print(
        bytes(generate(model, prompt, 200, temperature=0.5, top_k=20, top_p=0.9)[0].tolist()).decode(errors="replace")
    )


if __name__ == "__main__":
    main()
