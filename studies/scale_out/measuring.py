"""`measured` and `compute`: bytes and times over ranks, and the speed of the kernel."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calls import Call, scores
from settings import Settings

import qkv
from qkv import Mask

SEPARATE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
"""A command in a network of its own, as root in it; it needs no rights outside."""


def measured(settings: Settings) -> dict[str, Any]:
    """``wire``: for each of `calls`, and for `long_window`, the bytes that all ranks send, forward and backward.
    ``links``: by Gbit/s, for each of `calls` the seconds of its exchanges.
    """
    worker = Path(__file__).with_name("worker.py")
    with tempfile.TemporaryDirectory(prefix="qkv-study-") as folder:
        command = [*SEPARATE, sys.executable, str(worker), folder, json.dumps(settings._asdict())]
        if subprocess.run(command).returncode:
            raise SystemExit("scale_out: the measurement failed; its error is above.")
        found: dict[str, Any] = json.loads((Path(folder) / "measured.json").read_text())
    return found


def compute(settings: Settings) -> float:
    """Floating-point operations a second of processor time, of one thread: causal attention in fp32, forward."""
    heads, kv_heads, width = settings.heads, min(settings.kv_heads), settings.width
    q, k, v = (torch.randn(1, count, settings.tokens, width) for count in (heads, kv_heads, kv_heads))
    before, fastest = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    try:
        for _ in range(settings.repeats):
            start = time.process_time()
            qkv.attention(q, k, v, mask=Mask.causal())
            fastest = min(fastest, time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    call = Call("gather", "causal", "even", settings.tokens, 1, heads, kv_heads, width, settings.window)
    return 4 * width * sum(scores(call)) / fastest
