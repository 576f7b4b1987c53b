"""User code under mypy, from outside of this repository: right code passes, and a typo in any of its lines is found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkv

PACKAGE = Path(qkv.__file__).parent

RIGHT = """
import torch
from torch import Tensor, nn
import qkv
from qkv import Mask
from qkv.cache import Cache
from qkv.convert import convert_layer, prune_heads
from qkv.layers.options import LayerOptions

x = torch.randn(1, 5, 64)
rotary = qkv.RotaryEmbedding(8, base=500.0, rotary_dim=4)
plain = qkv.Attention(64, 8, num_kv_heads=2, mask=Mask.causal(), rotary=rotary, dropout=0.1)
anything = qkv.Attention(64, 8, mask=None, out_bias=None, alibi=[0.5] * 8, backend="native", dtype=torch.bfloat16)
one = qkv.ScaledDotProductAttention(64, head_dim=16, value_dim=32)
many = qkv.MultiHeadAttention(64, 8, qk_norm=True, qk_norm_eps=1e-5)
cross = qkv.CrossAttention(64, 8, context_dim=48, num_kv_heads=4)
causal = qkv.CausalAttention(64, 8, mask=Mask.documents(torch.zeros(1, 5)), softcap=30.0)
window = qkv.SlidingWindowAttention(64, 8, window=4, causal=True, sink_tokens=1, sink_logits=True)
shared = qkv.MultiQueryAttention(64, 8, scale=0.5, device="cpu")
grouped = qkv.GroupedQueryAttention(64, 8, num_kv_heads=2, gate=True)
options: LayerOptions = {"num_kv_heads": 2, "bias": False}
more = [qkv.CausalAttention(64, 8, **options) for _ in range(2)]
theirs = nn.MultiheadAttention(64, 8, batch_first=True)
ours = qkv.SlidingWindowAttention.from_torch(theirs, window=4, causal=True).to_torch()
again: qkv.CausalAttention = qkv.CausalAttention.from_torch(theirs, rotary=rotary)
caches: list[Cache] = [qkv.KVCache(), qkv.SlidingKVCache(window=4), qkv.CrossKVCache()]
out: Tensor = causal(x, mask=Mask.padding(torch.tensor([3])), cache=caches[0])
other: Tensor = cross(x, torch.randn(1, 7, 48), cache=qkv.CrossKVCache())
weights: Tensor = window.attention_weights(x, mask=None)
copy = qkv.Attention(**plain.options())
width: int = plain.options()["embed_dim"]
fewer: qkv.Attention = prune_heads(convert_layer(many, 4, how="mean"), [0, 1])
heads: Tensor = qkv.attention(x[None], x[None], x[None], scale=0.5, softcap=30.0)
"""

TYPOS = [
    ("rotary_dim=4", "rotary_dims=4"),
    ("num_kv_heads=2, mask=Mask.causal()", "num_kv_head=2, mask=Mask.causal()"),
    ("mask=Mask.causal(), rotary", 'mask="causal", rotary'),
    ("dropout=0.1", "dropuot=0.1"),
    ("dtype=torch.bfloat16", 'dtype="bfloat16"'),
    ("value_dim=32", "values_dim=32"),
    ("qk_norm=True", 'qk_norm="yes"'),
    ("qk_norm_eps=1e-5", "num_kv_heads=8"),
    ("context_dim=48, num", "kdim=48, num"),
    ("softcap=30.0)\nwindow", "soft_cap=30.0)\nwindow"),
    ("window=4, causal=True, sink", "windows=4, causal=True, sink"),
    ("sink_logits=True", "sinks=True"),
    ("scale=0.5, device", 'scale="0.5", device'),
    ("gate=True", "gated=True"),
    ('"bias": False', '"biases": False'),
    ("batch_first=True)\nours", "batch_last=True)\nours"),
    ("window=4, causal=True).to_torch()", "window=4, cuasal=True).to_torch()"),
    (".to_torch()", ".to_pytorch()"),
    ("rotary=rotary)\ncaches", "rotary=True)\ncaches"),
    ("cache=caches[0]", "caches=caches[0]"),
    ("mask=Mask.padding(torch.tensor([3]))", "key_padding_mask=torch.tensor([3])"),
    ("mask=Mask.padding(torch.tensor([3]))", "mask=torch.tensor([3])"),
    ("causal(x, mask", "causal(x, x, x, mask"),
    ("other: Tensor", "other: int"),
    ("window.attention_weights(x, mask=None)", "window.attention_weight(x, mask=None)"),
    ('plain.options()["embed_dim"]', 'plain.options()["embed_dims"]'),
    ('how="mean"', 'how="means"'),
    ("softcap=30.0)\n", "soft_cap=30.0)\n"),
]
"""Replacements, each of which makes one line wrong; of the last occurrence."""


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


STUBS = {
    "torch/__init__.pyi": """
from typing import Any
from torch import nn as nn
class dtype: ...
class device: ...
class Tensor:
    def __getitem__(self, index: object) -> Tensor: ...
bfloat16: dtype
def randn(*size: int) -> Tensor: ...
def zeros(*size: int) -> Tensor: ...
def tensor(data: object) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
""",
    "torch/nn/__init__.pyi": """
from collections.abc import Callable
from typing import Any
from torch import Tensor
class Module:
    __call__: Callable[..., Any]
    def __getattr__(self, name: str) -> Tensor | Module: ...
class MultiheadAttention(Module):
    def __init__(self, embed_dim: int, num_heads: int, *, batch_first: bool = False) -> None: ...
def __getattr__(name: str) -> Any: ...
""",
}
"""As much of torch as the code takes: all of torch takes mypy half a minute."""


@pytest.mark.parametrize("torch", ["stubs", pytest.param("whole", marks=pytest.mark.long)])
def test_mypy_finds_every_typo_and_nothing_else(torch: str, tmp_path: Path) -> None:
    """One file: the code as it is, then once more as a function for each typo."""
    program, wanted = RIGHT, []
    body = RIGHT.partition("\nx = ")[2]
    for number, (right, typo) in enumerate(TYPOS):
        before, found, after = body.rpartition(right)
        assert found, right
        start = program.count("\n")
        program += f"\ndef typo_{number}() -> None:\n    x = " + (before + typo + after).replace("\n", "\n    ") + "\n"
        wanted.append(start + 3 + before.count("\n"))
    (tmp_path / "user.py").write_text(program)
    options = ["--strict", "--no-incremental", "--config-file=", "--follow-imports=silent"]
    if torch == "stubs":
        options.append("--no-site-packages")
        for name, stub in STUBS.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(stub)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = {int(line) for line in re.findall(r"^user\.py:(\d+): error", result.stdout, flags=re.MULTILINE)}
    assert lines == set(wanted), result.stdout + result.stderr
