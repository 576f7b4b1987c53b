"""`Settings`: sizes of model, training and measurements."""

from typing import NamedTuple

from qkv.convert.heads.pooling import ConversionMethod


class Settings(NamedTuple):
    """The published study; tests use smaller sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    vocabulary: int = 1024

    num_layers: int = 4
    num_heads: int = 8
    head_dim: int = 16

    batch: int = 4
    length: int = 256
    """Sequence length in training and evaluation."""
    steps: int = 3600
    """Training steps of the multi-head model."""
    warmup: int = 100
    rate: float = 3e-3
    """Learning rate at the end of the warm-up."""

    num_kv_heads: tuple[int, ...] = (4, 2, 1)
    methods: tuple[ConversionMethod, ...] = ("mean", "first", "random", "aligned")
    percents: tuple[int, ...] = (0, 5, 10)
    """Uptraining in percent of ``steps``, after which the loss is measured."""

    context: int = 8192
    """Cached tokens in the decoding benchmark."""

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim
