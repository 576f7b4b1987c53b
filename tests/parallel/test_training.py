"""``examples/train_parallel.py``: over tp x cp, losses and weights are those that train.py has in one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.ranks import Failure, Ranks

Of = Callable[[int], Ranks]
EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ("--layers", "2", "--width", "32", "--heads", "4", "--length", "23", "--batch", "2")
NAMES = ("tp", "cp")
SETTINGS = (*TINY, "--text", str(EXAMPLES / "block.py"), "--learning-rate", "0.02", "--steps", "4")


def run(out: str, *options: str) -> list[float]:
    """Trains on this rank."""
    script = imported("train_parallel")
    losses: list[float] = script.train(script.parse([out, *SETTINGS, *options]))
    return losses


def learn(*options: str) -> dict[str, torch.Tensor]:
    """The gradients of the first step, whole, on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    script = imported("train_parallel")
    given = script.parse(["none", *SETTINGS, *options])
    shape = given.tp, torch.distributed.get_world_size() // given.tp
    training = script.Training(given, script.load_text(given)[0], init_device_mesh("cpu", shape, mesh_dim_names=NAMES))
    training.backward(script.pieces(training.text, given, seed=0))
    gradients = {name: one.grad for name, one in training.model.named_parameters()}
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in gradients.items()}


def imported(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def one_process(*options: str) -> Any:
    """The training of train.py."""
    script = imported("train")
    given = script.parse(["none", *SETTINGS, *options])
    return script.Training("qkv", given, script.load_text(given)[0])


def in_one_process(*options: str) -> tuple[list[float], dict[str, Any]]:
    """The losses and weights of train.py."""
    training = one_process(*options)
    return [training.step(step)[0] for step in range(training.options.steps)], training.model.state_dict()


@pytest.mark.parametrize(
    ("ranks_", "options"),
    [
        (2, ("--tp", "1", "--kv-heads", "2")),
        (2, ("--tp", "2", "--kv-heads", "1")),
        (3, ("--tp", "1", "--kv-heads", "4", "--window", "5")),
        (4, ("--tp", "2", "--kv-heads", "2")),
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_one_process(
    ranks: Of, ranks_: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    found = ranks(ranks_).run(run, str(tmp_path), *options)
    losses, weights = in_one_process(*options[2:])
    assert all(one == found[0] for one in found), "ranks report other losses"
    assert json.loads((tmp_path / "losses.json").read_text()) == found[0]
    torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=0)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        # Adam divides by the gradient's size, so rounding in one that is nearly 0 moves a weight by a whole step.
        changed = (saved[name] - weight).abs() > 1e-4
        assert changed.float().mean() < 0.01, name


@pytest.mark.parametrize("options", [("--tp", "1"), ("--tp", "2")], ids=str)
def test_gradients_are_sums_over_tokens_and_no_means(ranks: Of, options: tuple[str, ...]) -> None:
    """Losses would not show a mean: Adam's steps are the same for gradients of any size."""
    found = ranks(4).run(learn, *options, "--kv-heads", "2")
    training = one_process("--kv-heads", "2")
    training._loss(imported("train").pieces(training.tokens, training.options, seed=0)).backward()
    for name, parameter in training.model.named_parameters():
        for one in found:
            torch.testing.assert_close(one[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_wrong_numbers_of_processes_are_refused_once(ranks: Of, tmp_path: Path) -> None:
    found = ranks(3).try_run(run, str(tmp_path), "--tp", "2")
    assert all(isinstance(one, Failure) and one.kind == "SystemExit" for one in found)
    wanted = "train_parallel: --tp must divide the number of processes, 3; got 2."
    assert [one.message for one in found] == [wanted, "1", "1"]
    with pytest.raises(SystemExit, match=r"^train_parallel: processes are started by torchrun: torchrun --nproc"):
        imported("train_parallel").main([str(tmp_path)])


@pytest.mark.long
def test_torchrun_starts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "train_parallel.py"), str(tmp_path), *SETTINGS, "--tp", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("step     4: loss ") and len(json.loads((tmp_path / "losses.json").read_text())) == 4
