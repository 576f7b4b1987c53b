"""`RotaryScaling`: how rotary frequencies are changed for sequences longer than those of the training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from qkv.arguments import require_count, require_finite, require_flag, require_positive
from qkv.layers.arguments import require_vector


class RotaryScaling:
    """How the frequencies of a `RotaryEmbedding` are changed for longer sequences than the model was trained on.

    A frozen value, built by one of the constructors below, whose names and arguments are those of a configuration of
    transformers (``rope_parameters``). `RotaryEmbedding.from_config` reads one.

    Raises:
        TypeError, ValueError: by the constructors, for factors that are not positive and lengths that are not counts.

    Example:
        >>> import qkv
        >>> qkv.RotaryScaling.linear(4.0)
        RotaryScaling.linear(factor=4.0)
        >>> scaling = qkv.RotaryScaling.yarn(4.0, original_max_position_embeddings=32768)
        >>> round(scaling.attention_factor, 4)
        1.1386
        >>> qkv.RotaryEmbedding(64, base=1e6, scaling=scaling).frequencies.shape
        torch.Size([32])

    Source: transformers, ``modeling_rope_utils.ROPE_INIT_FUNCTIONS``, with the same bits, except that ``dynamic`` and
    ``longrope`` use the length of each row, not that of the longest one in the batch (see `RotaryEmbedding`).
    """

    depends_on_length: ClassVar[bool] = False
    """Whether frequencies depend on the length of the sequence: in ``dynamic`` and ``longrope``."""
    attention_factor: float = 1.0
    """The factor of the rotated channels of queries and of keys; other than 1 in ``yarn`` and ``longrope``."""

    @staticmethod
    def linear(factor: float) -> "RotaryScaling":
        """Position interpolation: frequencies divided by ``factor``.

        Source: Chen et al. 2023, "Extending context window of large language models via positional interpolation".
        """
        return _Linear(_positive("linear", "factor", factor))

    @staticmethod
    def dynamic(factor: float, *, max_position_embeddings: int) -> "RotaryScaling":
        """NTK-aware scaling by the length n: base times ``(factor * n / max - factor + 1) ** (d / (d - 2))``.

        d is the rotary_dim. Sequences of up to ``max_position_embeddings`` tokens are not scaled. Keys that a cache
        holds keep the rotation of the length at which they were appended, as in transformers.
        """
        require_count("RotaryScaling.dynamic", "max_position_embeddings", max_position_embeddings)
        return _Dynamic(_positive("dynamic", "factor", factor), max_position_embeddings)

    @staticmethod
    def yarn(
        factor: float,
        *,
        original_max_position_embeddings: int,
        attention_factor: float | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
    ) -> "RotaryScaling":
        """YaRN: slow pairs of channels are interpolated by ``factor``, fast ones are kept, with a ramp between.

        Args:
            factor: longest length over ``original_max_position_embeddings``.
            original_max_position_embeddings: the length of the training.
            attention_factor: ``0.1 log(factor) + 1`` if None; with ``mscale`` and ``mscale_all_dim`` (DeepSeek), the
                ratio of ``0.1 mscale log(factor) + 1`` for the two.
            beta_fast, beta_slow: rotations over the length of the training, at which the ramp begins and ends.
            truncate: whether the ends of the ramp are rounded to whole pairs.

        Source: Peng et al. 2023, section 3.
        """
        caller = "RotaryScaling.yarn"
        _positive("yarn", "factor", factor)
        require_count(caller, "original_max_position_embeddings", original_max_position_embeddings)
        for name, number in (("beta_fast", beta_fast), ("beta_slow", beta_slow)):
            require_positive(caller, name, number)
        for name, optional in (
            ("attention_factor", attention_factor),
            ("mscale", mscale),
            ("mscale_all_dim", mscale_all_dim),
        ):
            if optional is not None:
                require_finite(caller, name, optional, suffix=" or None")
        require_flag(caller, "truncate", truncate)
        if attention_factor is None:
            attention_factor = _mscale(factor, 1.0)
            if mscale and mscale_all_dim:
                attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        return _Yarn(factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, attention_factor)

    @staticmethod
    def longrope(
        *,
        short_factor: Tensor | Sequence[float],
        long_factor: Tensor | Sequence[float],
        original_max_position_embeddings: int,
        factor: float | None = None,
        attention_factor: float | None = None,
    ) -> "RotaryScaling":
        """LongRoPE: each pair of channels has a divisor, one for short sequences and one for long ones.

        Args:
            short_factor: ``(rotary_dim / 2,)`` divisors for up to ``original_max_position_embeddings`` tokens.
            long_factor: the divisors for more tokens.
            original_max_position_embeddings: the length of the training.
            factor: longest length over ``original_max_position_embeddings``; for the attention factor alone.
            attention_factor: if None, ``sqrt(1 + log(factor) / log(original_max_position_embeddings))``, and 1 without
                a factor.

        A cache that grows past ``original_max_position_embeddings`` holds keys of both kinds, as in transformers. Pass
        ``length=`` to `RotaryEmbedding`, or fill the cache again, for one kind.

        Source: Ding et al. 2024; Phi-3.
        """
        caller = "RotaryScaling.longrope"
        require_count(caller, "original_max_position_embeddings", original_max_position_embeddings)
        if factor is not None:
            require_positive(caller, "factor", factor, suffix=" or None")
        if attention_factor is not None:
            require_finite(caller, "attention_factor", attention_factor, suffix=" or None")
        else:
            attention_factor = 1.0
            if factor is not None and factor > 1.0:
                attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
        count = short_factor.numel() if isinstance(short_factor, Tensor) else len(short_factor)
        what = "one per pair of channels"
        short = require_vector(caller, "short_factor", short_factor, count, what).values
        long = require_vector(caller, "long_factor", long_factor, count, what).values
        if not all(number > 0 for number in short + long):
            raise ValueError(f"{caller}: short_factor and long_factor must be positive; got {short} and {long}.")
        return _LongRope(short, long, original_max_position_embeddings, attention_factor)

    @staticmethod
    def llama3(
        factor: float, *, low_freq_factor: float, high_freq_factor: float, original_max_position_embeddings: int
    ) -> "RotaryScaling":
        """Llama 3.1: wavelengths over ``original / low_freq_factor`` grow by ``factor``.

        Those under ``original / high_freq_factor`` are kept, and those between are interpolated.

        Source: Llama 3.1's ``apply_scaling``.
        """
        caller = "RotaryScaling.llama3"
        _positive("llama3", "factor", factor)
        require_positive(caller, "low_freq_factor", low_freq_factor)
        require_positive(caller, "high_freq_factor", high_freq_factor)
        if not low_freq_factor < high_freq_factor:
            raise ValueError(
                f"{caller}: low_freq_factor must be less than high_freq_factor; "
                f"got {low_freq_factor} and {high_freq_factor}."
            )
        require_count(caller, "original_max_position_embeddings", original_max_position_embeddings)
        return _Llama3(factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)

    def require_fit(self, caller: str, base: float, rotary_dim: int) -> None:
        """Raises ValueError unless frequencies of this base and number can be scaled so."""

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        """``(rotary_dim / 2,)``, in fp32; of a short sequence, if they depend on the length."""
        raise NotImplementedError

    def long_frequencies(self, base: float, rotary_dim: int, lengths: Tensor) -> Tensor:
        """``(..., rotary_dim / 2)`` for sequences of ``lengths (...)``, longer than `max_short_length`."""
        raise NotImplementedError

    @property
    def max_short_length(self) -> int:
        """The greatest length with `frequencies`, where they depend on it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        arguments = ", ".join(f"{name}={_short_repr(value)}" for name, value in given.items())
        return f"RotaryScaling.{type(self).__name__[1:].lower()}({arguments})"


@dataclass(frozen=True, repr=False)
class _Linear(RotaryScaling):
    factor: float

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        return geometric(base, rotary_dim, device) / self.factor


@dataclass(frozen=True, repr=False)
class _Dynamic(RotaryScaling):
    factor: float
    max_position_embeddings: int

    depends_on_length: ClassVar[bool] = True

    def require_fit(self, caller: str, base: float, rotary_dim: int) -> None:
        if rotary_dim <= 2:
            raise ValueError(f"{caller}: rotary_dim must be at least 4 for {self!r}; got {rotary_dim}.")

    @property
    def max_short_length(self) -> int:
        return self.max_position_embeddings

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        return geometric(base, rotary_dim, device)

    def long_frequencies(self, base: float, rotary_dim: int, lengths: Tensor) -> Tensor:
        stretch = (self.factor * lengths.float() / self.max_position_embeddings) - (self.factor - 1)
        bases = base * stretch ** (rotary_dim / (rotary_dim - 2))
        frequencies: Tensor = 1.0 / bases[..., None] ** exponents(rotary_dim, lengths.device)
        return frequencies


@dataclass(frozen=True, repr=False)
class _Yarn(RotaryScaling):
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float = 1.0

    def require_fit(self, caller: str, base: float, rotary_dim: int) -> None:
        if base <= 1:
            raise ValueError(f"{caller}: base must be greater than 1 for {self!r}; got {base}.")

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        wavelengths = base ** exponents(rotary_dim, device)
        kept, interpolated = 1.0 / wavelengths, 1.0 / (self.factor * wavelengths)
        first, last = self._ramp(base, rotary_dim)
        pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
        share = 1 - ((pairs - first) / (last - first)).clamp(0, 1)  # rounded twice, as transformers does
        return interpolated * (1 - share) + kept * share

    def _ramp(self, base: float, rotary_dim: int) -> tuple[float, float]:
        """The pairs at which interpolation begins and is complete."""
        first, last = (
            rotary_dim
            * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(base))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        return first, last + 0.001 if first == last else last


@dataclass(frozen=True, repr=False)
class _LongRope(RotaryScaling):
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float = 1.0

    depends_on_length: ClassVar[bool] = True

    def require_fit(self, caller: str, base: float, rotary_dim: int) -> None:
        if len(self.short_factor) != rotary_dim // 2:
            raise ValueError(
                f"{caller}: scaling must have {rotary_dim // 2} factors, one for each pair of rotary_dim={rotary_dim} "
                f"channels; got {len(self.short_factor)}."
            )

    @property
    def max_short_length(self) -> int:
        return self.original_max_position_embeddings

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        return _divided(self.short_factor, base, rotary_dim, device)

    def long_frequencies(self, base: float, rotary_dim: int, lengths: Tensor) -> Tensor:
        return _divided(self.long_factor, base, rotary_dim, lengths.device).expand(*lengths.shape, -1)


@dataclass(frozen=True, repr=False)
class _Llama3(RotaryScaling):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, base: float, rotary_dim: int, device: torch.device) -> Tensor:
        given, length = geometric(base, rotary_dim, device), self.original_max_position_embeddings
        wavelengths = 2 * math.pi / given
        share = (length / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - share) * given / self.factor + share * given
        slowed = torch.where(wavelengths > length / self.low_freq_factor, given / self.factor, between)
        return torch.where(wavelengths < length / self.high_freq_factor, given, slowed)


def exponents(rotary_dim: int, device: torch.device) -> Tensor:
    """``2 i / rotary_dim`` for each pair i."""
    return torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim


def geometric(base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """``1 / base ** (2 i / rotary_dim)`` for each pair i, with the bits of transformers."""
    frequencies: Tensor = 1.0 / base ** exponents(rotary_dim, device)
    return frequencies


def _divided(divisors: tuple[float, ...], base: float, rotary_dim: int, device: torch.device) -> Tensor:
    """`geometric`, with a divisor for each pair."""
    factors = torch.tensor(divisors, dtype=torch.float32, device=device)
    frequencies: Tensor = 1.0 / (factors * base ** exponents(rotary_dim, device))
    return frequencies


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's factor for longer contexts."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _short_repr(value: object) -> str:
    """The value; of many numbers, the first two and the last."""
    if isinstance(value, tuple) and len(value) > 4:
        return f"({value[0]!r}, {value[1]!r}, ..., {value[-1]!r})"
    return repr(value)


def _positive(kind: str, name: str, number: float) -> float:
    require_positive(f"RotaryScaling.{kind}", name, number)
    return number
