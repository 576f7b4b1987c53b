"""`RotaryEmbedding`: rotary position embedding of queries and keys."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv import kernels
from qkv.arguments import described, require_count, require_finite, require_flag, require_int, require_positive
from qkv.layers.arguments import require_integers, require_vector
from qkv.layers.constants import Numbers, constant
from qkv.layers.plain import is_called_plainly
from qkv.layers.rotary_axes import axes_of_pairs, require_sections
from qkv.layers.rotary_config import rotary_options
from qkv.layers.rotary_scaling import RotaryScaling, geometric
from qkv.rotation import Rotation, positions_of


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by ``position * base ** (-2 i / rotary_dim)``: scores then depend on distances only.

    Args:
        head_dim: width of a head.
        base: base of the frequencies, ``theta`` in most configurations.
        rotary_dim: number of leading channels to rotate, even; all if None.
        interleaved: pairs are ``(0, 1), (2, 3), ...`` (RoFormer, GPT-J) if True, ``(i, i + rotary_dim / 2)``
            (GPT-NeoX, Llama and nearly all checkpoints of transformers) if False.
        position_scale: factor of the positions; ``1 / s`` interpolates to s times the trained length.
        frequencies: ``(rotary_dim / 2,)`` numbers instead of those from ``base`` and ``scaling``.
        scaling: how frequencies are changed for longer sequences: ``RotaryScaling.yarn(...)`` and others.
        sections: for multimodal positions ``(axes, B, L)``, the number of pairs that each axis rotates, together
            ``rotary_dim / 2``; Qwen2-VL has (time, height, width).
        interleaved_sections: whether pairs take turns between the axes (Qwen3-VL) or each axis has a block (Qwen2-VL).

    The module has no state: frequencies are computed from these arguments, in fp32 on the device of x, so that casts,
    ``meta`` construction and checkpoints do not affect them.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a rotary_dim that is odd or larger than head_dim, sections and scalings for another one, and
            frequencies of another length or on ``meta``.

    Example:
        >>> import torch, qkv
        >>> rotary = qkv.RotaryEmbedding(8)
        >>> rotary(torch.randn(1, 2, 5, 8), offset=3).shape
        torch.Size([1, 2, 5, 8])
        >>> rows = torch.tensor([[0, 1, 2], [7, 8, 9]])  # the same as offset=torch.tensor([0, 7])
        >>> rotary(torch.randn(2, 4, 3, 8), positions=rows).shape
        torch.Size([2, 4, 3, 8])

    Source: RoFormer, section 3.2; rotation in fp32 whatever the dtype, where transformers rotates in the dtype of q.
    Sections: Qwen2-VL, section 2.1; transformers' ``mrope_section``. The ``dynamic`` and ``longrope`` scalings depend
    on the length. Here it is that of each row, in this call: results depend neither on other rows nor on earlier calls.
    transformers takes the longest row of a batch, and in ``dynamic`` keeps the frequencies of the longest call until
    one of at most ``max_position_embeddings`` tokens. Both agree on a sequence that is fed from its start.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        position_scale: float = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
        scaling: RotaryScaling | None = None,
        sections: Sequence[int] | None = None,
        interleaved_sections: bool = False,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        require_count(caller, "head_dim", head_dim)
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        require_count(caller, "rotary_dim", rotary_dim, 0)
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"{caller}: rotary_dim must be even and at most head_dim={head_dim}; got {rotary_dim}.")
        require_positive(caller, "base", base)
        require_flag(caller, "interleaved", interleaved)
        require_finite(caller, "position_scale", position_scale)
        require_flag(caller, "interleaved_sections", interleaved_sections)
        self.head_dim = head_dim
        self.base = base
        self.rotary_dim = rotary_dim
        self.interleaved = interleaved
        self.position_scale = position_scale
        self.scaling = scaling
        self.sections = None
        if sections is not None:
            self.sections = require_sections(caller, sections, rotary_dim // 2, interleaved_sections)
        self.interleaved_sections = interleaved_sections
        self._custom: Numbers | None = None
        if scaling is not None:
            if not isinstance(scaling, RotaryScaling):
                raise TypeError(
                    f"{caller}: scaling must be a qkv.RotaryScaling or None; got {type(scaling).__name__}. "
                    "Use RotaryScaling.yarn(...) or another of its constructors."
                )
            if frequencies is not None:
                raise ValueError(f"{caller}: scaling changes the frequencies of base; pass scaling or frequencies.")
            scaling.require_fit(caller, base, rotary_dim)
        if frequencies is not None:
            given = require_vector(caller, "frequencies", frequencies, rotary_dim // 2, "one per pair of channels")
            self._custom = given._replace(dtype=torch.float32)

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, interleaved: bool | None = None
    ) -> "RotaryEmbedding":
        """The rotary embedding of a model of transformers.

        Args:
            config: the configuration of a text model, or the dict of its ``config.json``. Read are ``head_dim``, or
                ``hidden_size`` and ``num_attention_heads``; ``rope_parameters``, or ``rope_scaling`` with
                ``rope_theta`` and ``partial_rotary_factor``; ``max_position_embeddings`` and
                ``original_max_position_embeddings``.
            layer_type: for a model with a rotary embedding for each type of layer, the type: ``"full_attention"``, ...
            interleaved: how channels are paired. If None, as in transformers' code for this ``model_type``, since
                configurations do not say it; False for types unknown here.

        Raises:
            ValueError: for a configuration without rotary embeddings, an unknown ``rope_type``, a missing field, a
                layer_type that is missing or unknown, a model type whose rotation this class does not have, and a
                ``partial_rotary_factor`` that the model type ignores.
            TypeError: for fields of another type.

        Example:
            >>> import qkv
            >>> config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}
            >>> qkv.RotaryEmbedding.from_config(config)
            RotaryEmbedding(16, base=500000.0)
            >>> scaled = {**config, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
            >>> qkv.RotaryEmbedding.from_config(scaled)
            RotaryEmbedding(16, base=500000.0, scaling=RotaryScaling.linear(factor=4.0))
        """
        return cls(**rotary_options(f"{cls.__name__}.from_config", config, layer_type, interleaved))

    @property
    def frequencies(self) -> Tensor:
        """``(rotary_dim / 2,)``, the angle by which each pair of channels rotates per position, on the CPU.

        Those of short sequences, if ``scaling`` depends on the length.
        """
        return self.frequencies_on(torch.device("cpu")).clone()

    def forward(
        self,
        x: Tensor,
        offset: int | Tensor = 0,
        *,
        positions: Tensor | None = None,
        length: int | Tensor | None = None,
    ) -> Tensor:
        """Rotates the tokens of ``x (B, H, L, head_dim)`` by their positions.

        Args:
            x: queries or keys.
            offset: token i has position ``i + offset``; integers ``(B,)`` are one for each row.
            positions: integers ``(L,)``, or ``(B, L)`` for each row, instead of an offset. With sections, multimodal
                ones ``(axes, B, L)`` as well; fewer dimensions are the position on every axis (text).
            length: the length of the sequence, on which ``dynamic`` and ``longrope`` scalings depend; the greatest
                position of each row + 1 if None. For packed sequences, integers ``(L,)`` or ``(B, L)``: the length of
                each token's sequence.

        Raises:
            TypeError: for an offset, positions and a length that are not integers.
            ValueError: for those of another shape or device, both offset and positions, and an x whose width is not
                head_dim.
        """
        return self._rotated([x], offset, positions, length)[0]

    def _rotated(
        self,
        x: list[Tensor],
        offset: int | Tensor = 0,
        positions: Tensor | None = None,
        length: int | Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Tensors of the same tokens, rotated."""
        for one in x:
            self._require_width(one)
        rotation = self._rotation(x[0], offset, positions, length)
        if x[0].dim() == 4:
            return kernels.rotate(x, rotation)
        rows = [one.reshape(1, math.prod(one.shape[:-2]), *one.shape[-2:]) for one in x]
        return [row.view(one.shape) for row, one in zip(kernels.rotate(rows, rotation), x, strict=True)]

    def _rotation(
        self, x: Tensor, offset: int | Tensor, positions: Tensor | None, length: int | Tensor | None
    ) -> Rotation:
        """The rotation of the tokens of x."""
        if positions is None:
            first, offsets = self._offsets(x, offset)
        else:
            first, offsets = 0, None
            shapes = shapes_of_tokens(x)
            if self.sections is not None:
                shapes += [(len(self.sections), *shape) for shape in shapes[1:]]
            self._require_positions(x, offset, positions, shapes)
        axes = None
        if positions is not None and positions.dim() == 3:
            assert self.sections is not None
            axes = constant(axes_of_pairs, self.sections, self.interleaved_sections, x.device)
        rotation = Rotation(
            positions=positions,
            offset=first,
            offsets=offsets,
            axes=axes,
            frequencies=self.frequencies_on(x.device),
            position_scale=self.position_scale,
            attention_factor=self.attention_factor,
            interleaved=self.interleaved,
        )
        if not self.depends_on_length:
            return rotation
        if length is None and positions is None and offsets is None and not kernels.is_tracing():
            length = first + x.shape[-2]
        return rotation._replace(frequencies=self._frequencies_by_length(rotation, x, length))

    def _offsets(self, x: Tensor, offset: int | Tensor) -> tuple[int, Tensor | None]:
        """The offset as an int for all rows plus, if it is a tensor, one for each row."""
        if isinstance(offset, Tensor):
            shapes = [(), (x.shape[0],)] if x.dim() == 4 else [()]
            require_integers(type(self).__name__, "offset", offset, shapes, x, other="an int, or ")
            return 0, offset.reshape(-1)
        if type(offset) is not int:
            require_int(type(self).__name__, "offset", offset, suffix=", or integers (B,)")
        return offset, None

    @property
    def depends_on_length(self) -> bool:
        """Whether the length of the sequence changes frequencies, so that padding must not count."""
        return self.scaling is not None and self.scaling.depends_on_length

    def _frequencies_by_length(self, rotation: Rotation, x: Tensor, length: int | Tensor | None) -> Tensor:
        """Frequencies of sequences of this length, ``(..., L or 1, rotary_dim / 2)``."""
        assert self.scaling is not None
        short = rotation.frequencies
        assert short is not None
        if length is None:
            length = _lengths(positions_of(rotation, x))
        elif isinstance(length, Tensor):
            require_integers(type(self).__name__, "length", length, [(), *shapes_of_tokens(x)], x, other="an int, or ")
        else:
            require_int(type(self).__name__, "length", length, suffix=", or integers (L,) or (B, L)")
            if length <= self.scaling.max_short_length:
                return short
            length = torch.tensor(length, device=x.device)
        long = self.scaling.long_frequencies(self.base, self.rotary_dim, length)
        return torch.where(length[..., None] > self.scaling.max_short_length, long, short)

    @property
    def attention_factor(self) -> float:
        """Factor of rotated queries and keys."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    def frequencies_on(self, device: torch.device) -> Tensor:
        """Frequencies in fp32, regardless of the dtype of the module: bf16 represents integers up to 256 only."""
        return constant(*self.frequency_formula(device))

    def frequency_formula(self, device: torch.device) -> tuple[Any, ...]:
        """A function and its arguments, which give `frequencies_on`."""
        if self._custom is not None:
            return self._custom.formula(device)
        if self.scaling is not None:
            return _scaled, self.scaling, self.base, self.rotary_dim, device
        return geometric, self.base, self.rotary_dim, device

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"{type(self).__name__}: x must have width {self.head_dim}; got shape {tuple(x.shape)}.")

    def _require_positions(
        self, x: Tensor, offset: int | Tensor, positions: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        """Raises unless positions are integers of one of the shapes, and the offset is the default."""
        caller = type(self).__name__
        if isinstance(offset, Tensor) or offset != 0:
            raise ValueError(
                f"{caller}: positions replace an offset; got offset={described(offset)} as well. Pass one of them."
            )
        require_integers(caller, "positions", positions, shapes, x)

    def extra_repr(self) -> str:
        options: dict[str, tuple[Any, Any]] = {
            "base": (self.base, 10000.0),
            "rotary_dim": (self.rotary_dim, self.head_dim),
            "interleaved": (self.interleaved, False),
            "position_scale": (self.position_scale, 1.0),
            "frequencies": (None if self._custom is None else "custom", None),
            "scaling": (self.scaling, None),
            "sections": (self.sections, None),
            "interleaved_sections": (self.interleaved_sections, False),
        }
        given = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([str(self.head_dim), *given])


def rotate_both(rotary: nn.Module, q: Tensor, k: Tensor, where: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``rotary(q, **where)`` and ``rotary(k, **where)``, for queries and keys of the same tokens.

    In one call of the kernel, unless the module is hooked or has a ``forward`` of its own.
    """
    if (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward is RotaryEmbedding.forward
        and q.dtype is k.dtype
        and is_called_plainly(rotary)
    ):
        rotated_q, rotated_k = rotary._rotated([q, k], **where)
        return rotated_q, rotated_k
    return rotary(q, **where), rotary(k, **where)


def shapes_of_tokens(x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of one integer for each token of x: ``(L,)``, ``(B, L)`` and ``(1, L)``."""
    rows, tokens = x.shape[0], x.shape[-2]
    return [(tokens,), (rows, tokens), (1, tokens)] if x.dim() == 4 else [(tokens,)]


def _lengths(positions: Tensor) -> Tensor:
    """The greatest position of each row + 1, ``(1,)`` or ``(B, 1)``; 1 for rows without tokens."""
    if positions.dim() == 3:
        positions = positions.amax(0)
    return F.pad(positions.long(), (1, 0)).amax(-1, keepdim=True) + 1


def _scaled(scaling: RotaryScaling, base: float, rotary_dim: int, device: torch.device) -> Tensor:
    return scaling.frequencies(base, rotary_dim, device)
