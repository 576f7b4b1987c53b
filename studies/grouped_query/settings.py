"""The sizes of the study: of the model, its training and what is measured."""

from typing import NamedTuple

from qkv.convert.heads.pooling import ConversionMethod


class Settings(NamedTuple):
    """The study as it is published; tests give smaller sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    vocabulary: int = 1024

    num_layers: int = 4
    num_heads: int = 8
    head_dim: int = 16

    batch: int = 4
    length: int = 256
    """Tokens of a sequence, in training and in evaluation."""
    steps: int = 3600
    """Of the multi-head model."""
    warmup: int = 100
    rate: float = 3e-3
    """Learning rate where the warm-up ends."""

    num_kv_heads: tuple[int, ...] = (4, 2, 1)
    methods: tuple[ConversionMethod, ...] = ("mean", "first", "random", "aligned")
    percents: tuple[int, ...] = (0, 5, 10)
    """Of ``steps``: where the loss is measured after conversion."""

    context: int = 8192
    """Tokens in the cache of a decoding step."""

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.num_heads * self.head_dim
