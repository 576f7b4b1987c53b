"""Trains the GPT of train.py over several processes: heads over some of them, tokens over the others.

    torchrun --nproc-per-node 4 examples/train_parallel.py OUT              tokens over 4
    torchrun --nproc-per-node 4 examples/train_parallel.py OUT --tp 2       heads over 2, tokens over 2

The mesh is tp x cp. Processes of the same place in cp have the same tokens: each computes some heads of attention
(`qkv.parallel.Heads`) and some channels of the MLP (torch's `ColwiseParallel` and `RowwiseParallel`), and all have the
same results. Processes of the same place in tp have the same weights and other tokens of each sequence
(`qkv.parallel.Tokens`); attention fetches the keys that they see (`qkv.parallel.Context`). The losses are those of one
process, up to rounding. OUT gets losses.json, and model.pt with the whole weights, for `block.Decoder`.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NoReturn

import torch
import torch.nn.functional as F
from block import Decoder
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from train import decoder, load_text, make_folder, pieces, rate

from qkv import Mask, parallel

PRINT_STEPS = 10
"""Steps between lines of the log."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on all processes; the first of them prints and writes."""
    options = parse(arguments)
    if "RANK" not in os.environ:
        stop("processes are started by torchrun: torchrun --nproc-per-node 4 examples/train_parallel.py OUT")
    distributed.init_process_group("gloo")
    try:
        train(options)
    finally:
        distributed.destroy_process_group()


def train(options: argparse.Namespace) -> list[float]:
    """Trains on this process of an initialised group; returns the losses of all tokens, step by step."""
    ranks = distributed.get_world_size()
    if ranks % options.tp:
        stop(f"--tp must divide the number of processes, {ranks}; got {options.tp}.")
    mesh = init_device_mesh("cpu", (options.tp, ranks // options.tp), mesh_dim_names=("tp", "cp"))
    text, _ = load_text(options)
    run = Training(options, text, mesh)
    losses, seconds = [], []
    for step in range(options.steps):
        start = time.perf_counter()
        losses.append(run.step(step))
        seconds.append(time.perf_counter() - start)
        if is_first() and ((step + 1) % PRINT_STEPS == 0 or step + 1 == options.steps):
            speed = options.batch * options.length / median(seconds)
            print(f"step {step + 1:>5}: loss {losses[-1]:.4f}, {speed:,.0f} tokens/s", flush=True)
    weights = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_first():
        make_folder(options.out)
        (options.out / "losses.json").write_text(json.dumps(losses) + "\n")
        torch.save(weights, options.out / "model.pt")
    return losses


class Training:
    """The part of a process in training a decoder.

    Args:
        options: of the command line.
        text: ``(L,)``, the tokens to train on, whole on each process.
        mesh: of processes, ``("tp", "cp")``.
    """

    def __init__(self, options: argparse.Namespace, text: Tensor, mesh: DeviceMesh) -> None:
        torch.manual_seed(options.seed)  # the same weights everywhere
        self.model = over_mesh(decoder(options), mesh)
        # An operation takes either plain tensors or DTensors, so the optimizer updates them apart.
        self.kinds = [
            [one for one in self.model.parameters() if isinstance(one, DTensor) is cut] for cut in (False, True)
        ]
        groups = [{"params": kind} for kind in self.kinds]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.options, self.text, self.cp = options, text, mesh["cp"]
        self.tokens = parallel.Tokens.best(options.length, self.cp, Mask.causal(options.window))

    def step(self, number: int) -> float:
        """Trains on the batch of a step; returns its loss, in nats a byte."""
        batch = pieces(self.text, self.options, seed=number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, self.options)
        loss = self.backward(batch)
        self.clip(1.0)
        self.optimizer.step()
        distributed.all_reduce(loss, group=self.cp.get_group())
        return loss.item()

    def backward(self, batch: Tensor) -> Tensor:
        """Leaves the gradients of the whole loss in the parameters; returns this process's part of the loss."""
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.model.parameters():
            sum_over(self.cp, parameter)
        return loss.detach()

    def loss(self, batch: Tensor) -> Tensor:
        """This process's part of the mean over all tokens: labels are shifted before they are dealt out."""
        inputs, labels = self.tokens.take(batch[:, :-1]), self.tokens.take(batch[:, 1:])
        with parallel.over(self.tokens):
            logits = self.model(inputs)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        part: Tensor = total / (self.options.batch * self.options.length)
        return part

    def clip(self, most: float) -> None:
        """Scales the gradients of the whole model to a norm of at most ``most``, as ``clip_grad_norm_``."""
        norms = [nn.utils.get_total_norm([one.grad for one in kind if one.grad is not None]) for kind in self.kinds]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        for kind in self.kinds:
            nn.utils.clip_grads_with_norm_(kind, most, torch.stack(whole).norm())


def over_mesh(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """The model with heads and channels over ``tp``, whose attention reads the tokens of ``cp``."""
    cut = {
        "blocks.*.attention": parallel.Heads(),
        "blocks.*.gate": ColwiseParallel(),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], cut)
    parallelize_module(model, mesh["cp"], {"blocks.*.attention": parallel.Context()})
    return model


def sum_over(cp: DeviceMesh, parameter: Tensor) -> None:
    """Sums a gradient over the processes that have other tokens.

    Each has the gradient of its own part of the loss, and the loss is the sum of the parts: a sum is due, and no mean.
    Over ``tp``, styles have summed it already. DDP and FSDP divide by their number of processes: with them, the line is
    ``(loss * cp.size()).backward()``, where the loss is such a part.
    """
    if parameter.grad is not None:
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        distributed.all_reduce(own, group=cp.get_group())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="train_parallel", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--tp", type=int, default=1, help="processes that share heads; the others share tokens (1)")
    parser.add_argument("--text", type=Path, help="a file of bytes; default: Shakespeare's works, downloaded once")
    parser.add_argument("--steps", type=int, default=50, help="steps to train (50)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (6)")
    parser.add_argument("--width", type=int, default=384, help="of the hidden states (384)")
    parser.add_argument("--heads", type=int, default=6, help="query heads (6)")
    parser.add_argument("--kv-heads", type=int, default=2, help="heads of keys and values (2)")
    parser.add_argument("--window", type=int, help="keys that a token sees; default: all before it")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (4)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak (1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and name != "seed" and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0; got {value}")
    return options


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return distributed.get_rank() == 0


def stop(message: str) -> NoReturn:
    """Exits with an error message, once for all processes."""
    if distributed.is_initialized() and not is_first():
        raise SystemExit(1)
    raise SystemExit(f"train_parallel: {message}")


if __name__ == "__main__":
    main()
