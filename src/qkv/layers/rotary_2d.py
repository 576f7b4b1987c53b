"""`RotaryEmbedding2d`: rotary position embedding by row and column, for patches of images."""

from typing import Any

import torch
from torch import Tensor

from qkv.arguments import require_count, require_flag
from qkv.layers.constants import constant
from qkv.layers.rotary import RotaryEmbedding, shapes_of_tokens
from qkv.layers.rotary_axes import axes_of_pairs
from qkv.layers.rotary_config import head_dim_of, select_parameters
from qkv.layers.rotary_scaling import geometric
from qkv.rotation import Rotation


class RotaryEmbedding2d(RotaryEmbedding):
    """Rotates one half of the pairs of channels by the row of a patch, and the other half by its column.

    Args:
        head_dim: width of a head, a multiple of 4.
        base: base of the frequencies.
        alternate: how the two axes share frequencies. If False, both have the ``head_dim / 4`` frequencies of a head
            of half the width (Qwen2-VL, and most others); if True, rows have the even ones of the ``head_dim / 2`` of
            a whole head and columns the odd ones (Pixtral).
        interleaved: how channels are paired, as in `RotaryEmbedding`.
        position_scale: factor of the positions.

    It is called as `RotaryEmbedding`, with positions ``(2, L)``, or ``(2, B, L)`` for each row of the batch, and no
    offset, which has no meaning in two dimensions. In a layer, pass
    ``layer(x, positions=RotaryEmbedding2d.grid(height, width))``. A token at ``(0, 0)``, such as a class token, is not
    rotated.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for a head_dim that is not a multiple of 4, and in calls without positions.

    Example:
        >>> import torch, qkv
        >>> rotary = qkv.RotaryEmbedding2d(8)
        >>> rotary(torch.randn(1, 2, 6, 8), positions=rotary.grid(2, 3)).shape
        torch.Size([1, 2, 6, 8])

    Source: Qwen2-VL, section 2.1, and Pixtral, section 2.2; transformers' vision towers.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        alternate: bool = False,
        interleaved: bool = False,
        position_scale: float = 1.0,
    ) -> None:
        super().__init__(head_dim, base=base, interleaved=interleaved, position_scale=position_scale)
        if head_dim % 4:
            raise ValueError(f"RotaryEmbedding2d: head_dim must be a multiple of 4; got {head_dim}.")
        require_flag("RotaryEmbedding2d", "alternate", alternate)
        self.alternate = alternate

    @classmethod
    def from_config(
        cls, config: Any, layer_type: str | None = None, *, interleaved: bool | None = None
    ) -> "RotaryEmbedding2d":
        """The rotary embedding of a vision tower of transformers: Qwen2-VL, Pixtral, and those like them.

        Args:
            config: the configuration of the tower, or its dict, with ``rope_parameters`` (or ``rope_theta``).
            layer_type: None; towers have one embedding for all layers.
            interleaved: how channels are paired; None means False, as in Qwen2-VL and Pixtral.

        Raises:
            ValueError: if these fields are missing, or ``rope_type`` is neither ``axial`` nor ``default``.

        Example:
            >>> import qkv
            >>> qkv.RotaryEmbedding2d.from_config({"model_type": "pixtral", "head_dim": 64, "rope_theta": 1e4})
            RotaryEmbedding2d(64, alternate=True)
        """
        caller = f"{cls.__name__}.from_config"
        fields = select_parameters(caller, config, layer_type)
        if fields["rope_type"] not in ("axial", "default"):
            raise ValueError(f"{caller}: rope_type must be 'axial' or 'default'; got {fields['rope_type']!r}.")
        model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
        return cls(
            head_dim_of(caller, config, "embed_dim", "hidden_size"),
            base=fields["rope_theta"],
            alternate=model_type == "pixtral",
            interleaved=bool(interleaved),
        )

    @staticmethod
    def grid(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
        """``(2, height * width)``, the row and the column of each patch of an image, row by row.

        Example:
            >>> import qkv
            >>> qkv.RotaryEmbedding2d.grid(2, 3).tolist()
            [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
        """
        require_count("RotaryEmbedding2d.grid", "height", height, 0)
        require_count("RotaryEmbedding2d.grid", "width", width, 0)
        patches = torch.arange(height * width, device=device)
        return torch.stack([patches // max(width, 1), patches % max(width, 1)])

    def _rotation(
        self, x: Tensor, offset: int | Tensor, positions: Tensor | None, length: int | Tensor | None
    ) -> Rotation:
        if positions is None:
            raise ValueError(
                f"{type(self).__name__}: positions must be the row and column of each token, (2, {x.shape[-2]}); got "
                "None. Pass positions=RotaryEmbedding2d.grid(height, width)."
            )
        self._require_positions(x, offset, positions, [(2, *shape) for shape in shapes_of_tokens(x)])
        return Rotation(
            positions=positions[:, None] if positions.dim() == 2 else positions,
            axes=constant(axes_of_pairs, (self.head_dim // 4, self.head_dim // 4), False, x.device),
            frequencies=self._frequencies(x.device),
            position_scale=self.position_scale,
            interleaved=self.interleaved,
        )

    def _frequencies(self, device: torch.device) -> Tensor:
        return constant(_alternate if self.alternate else _repeated, self.base, self.head_dim, device)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", alternate=True" if self.alternate else "")


def _repeated(base: float, head_dim: int, device: torch.device) -> Tensor:
    """The frequencies of half a head, for rows and again for columns."""
    return geometric(base, head_dim // 2, device).repeat(2)


def _alternate(base: float, head_dim: int, device: torch.device) -> Tensor:
    """The frequencies of a head, the even ones before the odd ones."""
    frequencies = geometric(base, head_dim, device)
    return torch.cat([frequencies[0::2], frequencies[1::2]])
