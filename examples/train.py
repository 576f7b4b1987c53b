"""Trains a small GPT of qkv layers on a text: bytes as tokens, grouped-query attention, rotary embedding, windows.

    python examples/train.py OUT                      on Shakespeare's works, with qkv
    python examples/train.py OUT --compare            with torch's attention as well, step by step in turns
    python examples/train.py OUT --text my.txt --dtype bfloat16 --window 64

OUT gets checkpoint.pt, loss.json and, with matplotlib, loss.svg. After an interruption, the same command resumes from
the checkpoint, with the bits of a run without one: batches and learning rates depend on the step alone.

bfloat16 is autocast: products in bf16, weights in fp32, since an update is often smaller than the last bit of a weight
in bf16. It pays on processors that multiply bf16 (AVX-512 BF16, AMX); on others, fp32 is the faster.

Expect little of --compare at the default sizes: with 256 tokens, three quarters of a step are products of matrices,
which both leave to torch, and a tenth is attention. Longer sequences gain more.
"""

import argparse
import importlib.util
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from block import Decoder
from generate import generate
from torch import Tensor, nn
from torch_attention import use_torch

from qkv.models.errors import CommandError
from qkv.models.shakespeare import works

VOCABULARY = 256
WARM_UP = 0.05
"""Share of the steps with a rising learning rate."""
LAST_RATE = 0.1
"""The last learning rate, relative to the peak."""
HELD_OUT_BATCHES = 4
HELD_OUT = 20
"""One byte in this many, the last of a text, is held out."""
PEERS = ("qkv", "torch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or resumes, and prints losses, tokens per second and a continuation."""
    options = parse(arguments)
    train, held_out = load_text(options)
    runs = {peer: Training(peer, options, train) for peer in (PEERS if options.compare else [options.peer])}
    make_folder(options.out)
    checkpoint = options.out / "checkpoint.pt"
    history = resume(checkpoint, runs, options)
    while len(history["train"][options.peer]) < options.steps:
        step = len(history["train"][options.peer])
        for peer, run in runs.items():
            loss, seconds = run.step(step)
            history["train"][peer].append(loss)
            history["seconds"][peer].append(seconds)
        if (step + 1) % options.save_steps == 0 or step + 1 == options.steps:
            for peer, run in runs.items():
                history["held_out"][peer].append([step + 1, run.evaluate(held_out)])
            save(checkpoint, {"options": recorded(options), "history": history, **states(runs)})
            print(describe(history, options), flush=True)
    write_curve(options.out, history)
    print(continuation(runs[options.peer], options))


def make_folder(path: Path) -> None:
    """Makes the folder of a run, unless it exists. Ends the program if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"out: cannot make the folder {path}: {error.strerror}.")


class Training:
    """A decoder with its optimizer.

    Args:
        peer: "qkv", or "torch" for torch's attention with the same weights.
        options: of the command line.
        tokens: ``(L,)`` to train on.
    """

    def __init__(self, peer: str, options: argparse.Namespace, tokens: Tensor) -> None:
        torch.manual_seed(options.seed)
        self.model = decoder(options)
        if peer == "torch":
            use_torch(self.model, options.length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.options, self.tokens = options, tokens

    def step(self, number: int) -> tuple[float, float]:
        """Trains on the batch of a step; returns its loss, in nats a byte, and seconds."""
        batch = pieces(self.tokens, self.options, seed=number)
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, self.options)
        loss = self._loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> float:
        """The mean loss on the same few pieces each time."""
        losses = [self._loss(pieces(tokens, self.options, seed=-1 - number)) for number in range(HELD_OUT_BATCHES)]
        return float(torch.stack(losses).mean())

    def _loss(self, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def decoder(options: argparse.Namespace) -> Decoder:
    """The model, with random weights."""
    return Decoder(
        VOCABULARY,
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        window=options.window,
    )


def pieces(tokens: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """A batch ``(B, L + 1)`` that depends on the seeds alone."""
    generator = torch.Generator().manual_seed(1_000_003 * options.seed + seed)
    starts = torch.randint(len(tokens) - options.length, (options.batch, 1), generator=generator)
    return tokens[starts + torch.arange(options.length + 1)]


def rate(step: int, options: argparse.Namespace) -> float:
    """The learning rate: rises for `WARM_UP` of the steps, then falls as a cosine to `LAST_RATE` of the peak."""
    warm_up = max(1.0, WARM_UP * options.steps)
    progress = min(1.0, max(0.0, (step - warm_up) / max(1.0, options.steps - warm_up)))
    falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
    return float(options.learning_rate * min(1.0, (step + 1) / warm_up) * falling)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, or to resume in")
    parser.add_argument("--text", type=Path, help="a file of bytes; default: Shakespeare's works, downloaded once")
    parser.add_argument("--steps", type=int, default=600, help="steps to train (600)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (6)")
    parser.add_argument("--width", type=int, default=384, help="of the hidden states (384)")
    parser.add_argument("--heads", type=int, default=6, help="query heads (6)")
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values; default: --heads")
    parser.add_argument("--window", type=int, help="keys that a token sees; default: all before it")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step (16)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak (1e-3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (float32)")
    parser.add_argument("--save-steps", type=int, default=50, help="steps between checkpoints (50)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--peer", choices=PEERS, default="qkv", help="whose attention trains (qkv)")
    parser.add_argument("--compare", action="store_true", help="train both, from the same weights, in turns")
    options = parser.parse_args(arguments)
    options.kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    for name, value in vars(options).items():
        is_number = isinstance(value, (int, float)) and name not in ("seed", "compare")
        if is_number and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be finite and above 0; got {value}")
    if options.width % (2 * options.heads):
        need = f"a multiple of twice --heads, {2 * options.heads}, since rotary embedding turns pairs"
        parser.error(f"--width must be {need}; got {options.width}")
    if options.heads % options.kv_heads:
        parser.error(f"--kv-heads must divide --heads, {options.heads}; got {options.kv_heads}")
    return options


def load_text(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The tokens to train on, and those held out."""
    if options.text is None:
        try:
            parts = [part.encode() for part in works()]
        except CommandError as error:
            stop(f"{error} Or give a file with --text.")
    else:
        try:
            whole = options.text.read_bytes()
        except OSError as error:
            stop(f"--text: cannot read {options.text}: {error.strerror}.")
        parts = [whole[: -(len(whole) // HELD_OUT)], whole[-(len(whole) // HELD_OUT) :]]
    for part, name in zip(parts, ("train on", "hold out"), strict=True):
        if len(part) <= options.length:
            stop(
                f"--text must have more than --length, {options.length}, bytes to {name}; got {len(part)}. "
                "Give a longer text, or a smaller --length."
            )
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return train, held_out


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a run depends on."""
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "save_steps")}
    return kept | {"text": None if options.text is None else str(options.text.resolve())}


def resume(checkpoint: Path, runs: dict[str, Training], options: argparse.Namespace) -> dict[str, Any]:
    """Loads the checkpoint, if there is one, into the runs; returns losses and times so far."""
    if not checkpoint.exists():
        return {part: {peer: [] for peer in runs} for part in ("train", "held_out", "seconds")}
    state = torch.load(checkpoint, weights_only=True)
    now, then = recorded(options), state["options"]
    if changed := [f"--{name.replace('_', '-')}" for name in now if now[name] != then.get(name)]:
        stop(
            f"{options.out} has a run with another {', '.join(changed)}. "
            "Give the same options to resume it, or another folder."
        )
    for peer, run in runs.items():
        run.model.load_state_dict(state["models"][peer])
        run.optimizer.load_state_dict(state["optimizers"][peer])
    history: dict[str, Any] = state["history"]
    return history


def states(runs: dict[str, Training]) -> dict[str, Any]:
    """The state of all runs."""
    return {
        "models": {peer: run.model.state_dict() for peer, run in runs.items()},
        "optimizers": {peer: run.optimizer.state_dict() for peer, run in runs.items()},
    }


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all: at any moment, ``path`` is the last one or the new one."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def describe(history: dict[str, Any], options: argparse.Namespace) -> str:
    """Losses and tokens per second, in a line."""
    words = [f"step {len(history['train'][options.peer]):>5}"]
    speeds = {}
    for peer, seconds in history["seconds"].items():
        speeds[peer] = options.batch * options.length / median(seconds)
        loss, (_, held_out) = history["train"][peer][-1], history["held_out"][peer][-1]
        words.append(f"{peer}: loss {loss:.4f}, held out {held_out:.4f}, {speeds[peer]:,.0f} tokens/s")
    if len(speeds) > 1:
        words.append(f"qkv {speeds['qkv'] / speeds['torch']:.3f} times as fast")
    return "; ".join(words)


def write_curve(out: Path, history: dict[str, Any]) -> None:
    """Writes loss.json, and loss.svg where matplotlib is installed."""
    (out / "loss.json").write_text(json.dumps(history) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("loss.svg is not drawn: matplotlib is not installed. Run pip install matplotlib.")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    for peer, losses in history["train"].items():
        (line,) = panel.plot(range(1, len(losses) + 1), losses, linewidth=0.8, alpha=0.6, label=f"{peer}, training")
        steps, held_out = zip(*history["held_out"][peer], strict=True)
        panel.plot(steps, held_out, "o-", markersize=3, color=line.get_color(), label=f"{peer}, held out")
    panel.set(xlabel="step", ylabel="loss, nats a byte")
    panel.legend(frameon=False)
    figure.savefig(out / "loss.svg")


def continuation(run: Training, options: argparse.Namespace) -> str:
    """What the model writes after a line break, over caches."""
    model = decoder(options)
    model.load_state_dict(run.model.state_dict())
    torch.manual_seed(options.seed)
    text = generate(model.eval(), torch.tensor([[ord("\n")]]), options.length, temperature=0.8, top_p=0.95)
    return bytes(text[0].tolist()).decode(errors="replace")


def stop(message: str) -> NoReturn:
    """Exits with an error message."""
    raise SystemExit(f"train: {message}")


if __name__ == "__main__":
    main()
