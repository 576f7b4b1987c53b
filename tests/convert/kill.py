"""Kills conversions with SIGKILL and looks at what is left: ``python tests/convert/kill.py --times 50``.

At random moments, and at each operation on a file that Python reports to its audit hooks. After each kill the source
must be what it was, the place of the result must hold the old model or the new one in whole or nothing, an old one may
be missing there only where the system cannot exchange two folders, and the next run must succeed and tidy up. What is
left for good is at most a folder that was killed before its marker, or after: it has no file but an empty marker.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from convert import models

from qkv.convert import convert_checkpoint
from qkv.convert.files import staging
from qkv.convert.files.own_folder import MARKER, PREFIX

OPERATIONS = ("open", "os.", "shutil.", "fcntl.")


class Scene:
    """A source, and a place where an old model stands or none."""

    def __init__(self, folder: Path, is_replacing: bool, can_exchange: bool = True) -> None:
        self.source, self.out = folder / "source", folder / "out"
        self.is_replacing, self.can_exchange = is_replacing, can_exchange
        models.save(self.source, "llama", shards="300KB", hidden_size=128, vocab_size=600)
        self.source_before = models.digest(self.source)
        convert_checkpoint(self.source, folder / "old", 4)
        self.old = models.digest(folder / "old")
        started = time.monotonic()
        assert in_child(lambda: convert_checkpoint(self.source, folder / "new", 2))
        self.seconds = time.monotonic() - started
        self.new = models.digest(folder / "new")
        self._folder = folder

    def reset(self) -> None:
        for path in [*self._folder.glob("out"), *self._folder.glob(f"{PREFIX}*")]:
            shutil.rmtree(path)
        if self.is_replacing:
            shutil.copytree(self._folder / "old", self.out)

    def run(self) -> None:
        convert_checkpoint(self.source, self.out, 2, overwrite=self.is_replacing)

    def check(self) -> str:
        """Looks at what a killed run left, lets another follow, and returns what was there."""
        found = models.digest(self.out) if self.out.exists() else None
        allowed = [self.new, self.old if self.is_replacing else None, None if not self.can_exchange else self.new]
        assert found in allowed, "half a model, or the one that was to be replaced is gone"
        if found is None and self.is_replacing:
            (aside,) = self._folder.glob(f"{PREFIX}*/old")
            assert models.digest(aside) == self.old, "the model that was to be replaced is lost"
        convert_checkpoint(self.source, self.out, 2, overwrite=self.is_replacing or found is not None)
        assert models.digest(self.out) == self.new, "the next run went wrong"
        assert models.digest(self.source) == self.source_before, "the source changed"
        for left in self._folder.glob(f"{PREFIX}*"):
            files = {path.name: path.stat().st_size for path in left.rglob("*") if path.is_file()}
            assert files in ({}, {MARKER: 0}), f"not tidied up: {files}"
        return "nothing" if found is None else "the new model" if found == self.new else "the old model"


def in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Whether work in a process of its own came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the conversion failed by itself"
    return not os.WIFSIGNALED(status)


def kill_at_random(scene: Scene, times: int, seed: int) -> dict[str, int]:
    moments, found = random.Random(seed), {}
    for _ in range(times):
        scene.reset()
        in_child(scene.run, kill_after=moments.uniform(0, 1.2 * scene.seconds))
        left = scene.check()
        found[left] = found.get(left, 0) + 1
    return found


def kill_at_each_operation(scene: Scene, stride: int) -> int:
    """Returns how many operations there are."""

    def dying(at: int) -> None:
        count = 0

        def hook(event: str, arguments: object) -> None:
            nonlocal count
            if event.startswith(OPERATIONS):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        scene.run()

    at, ended = 1, False
    while not ended:
        scene.reset()
        ended = in_child(lambda: dying(at))
        scene.check()
        at += stride
    return at - stride


def reports(times: int, stride: int, seed: int) -> Iterator[str]:
    """Kills ``times`` at random and at every ``stride``-th operation, in each of three scenes."""
    for what in ("writing", "replacing a model", "replacing a model without an exchange"):
        can_exchange = "without" not in what
        no_exchange = patch.object(staging, "exchange", lambda *names: False)
        with tempfile.TemporaryDirectory() as folder, nullcontext() if can_exchange else no_exchange:
            scene = Scene(Path(folder), "replacing" in what, can_exchange)
            found = kill_at_random(scene, times, seed)
            yield f"{what}: killed {times} times in {scene.seconds:.3f} s, at random; left: {found}"
            yield f"{what}: killed at every {stride} of {kill_at_each_operation(scene, stride)} operations"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--times", type=int, default=50)
    arguments.add_argument("--stride", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    for line in reports(given.times, given.stride, given.seed):
        print(line)


if __name__ == "__main__":
    main()
