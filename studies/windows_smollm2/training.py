"""`trained`: a model with windows in all layers, one with windows in half of them, and the original, trained alike."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from settings import Settings

from qkv.cli import main as qkv

QKV = (sys.executable, "-c", "import sys; sys.argv[0] = 'qkv'; from qkv.cli import main; sys.exit(main())")
"""The command in a process of its own, which gives its memory back."""
Save = Callable[[], None]

ORIGINAL, ALL, HALF = "original", "windows in all layers", "windows in the cheapest half"


def trained(
    original: Path, folder: Path, text: Path, half: Sequence[int], settings: Settings, done: dict[str, Any], save: Save
) -> None:
    """Converts and trains what is not done yet, for as many steps each, and has each report saved.

    Args:
        original: folder of the model.
        folder: where the others go.
        half: the layers of `HALF`.
        done: reports by model, to which those of this run are added.
        save: called after each.
    """
    # With windows in all layers goes first: its number of steps in the given time applies to all.
    for name, layers in ((ALL, None), (HALF, half), (ORIGINAL, None)):
        if name in done:
            continue
        model = original if name == ORIGINAL else folder / name.replace(" ", "-")
        if name != ORIGINAL:
            where = [] if layers is None else ["--layers", ",".join(map(str, layers))]
            if qkv(["convert", str(original), str(model), "--window", str(settings.window), *where, "--overwrite"]):
                raise SystemExit(1)
        length = ("--max-steps", str(done[ALL]["steps"])) if ALL in done else ("--minutes", str(settings.minutes))
        done[name] = uptrain(model, text, folder / f"{model.name}-uptrained", (*settings.training, *length))
        save()


def uptrain(model: Path, text: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Runs qkv uptrain in a process of its own and returns its report."""
    command = [*QKV, "uptrain", model, text, out, *options, "--save-steps", "1000000"]
    subprocess.run(list(map(str, command)), check=True)
    report: dict[str, Any] = json.loads((out / "uptraining.json").read_text())
    return report
