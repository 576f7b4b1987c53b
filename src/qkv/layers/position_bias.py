"""Additive biases of the scores by relative position: T5's buckets, and the windows of Swin."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.arguments import described, require_count, require_flag, require_int
from qkv.layers.arguments import require_integers
from qkv.layers.constants import constant


class RelativePositionBias(nn.Module):
    """T5's bias: a learned number for each head and each bucket of distances ``j - i`` between a key and a query.

    Half of the buckets (of each direction) are for the shortest distances, one each; the rest grow logarithmically up
    to ``max_distance``, and the last has all greater ones.

    Args:
        num_heads: query heads.
        num_buckets: number of buckets.
        max_distance: the distance at which the last bucket begins.
        bidirectional: whether later keys have half of the buckets (encoders), or the bucket of distance 0 (decoders).
        device, dtype: of the parameter.

    The parameter is ``relative_attention_bias.weight (num_buckets, num_heads)``, named as in transformers' T5; one
    module serves all layers of a stack. It is initialised from a normal distribution of standard deviation 0.02.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for numbers out of range.

    Example:
        >>> import torch, qkv
        >>> bias = qkv.RelativePositionBias(8, bidirectional=False)
        >>> bias(5, 5).shape, bias(1, 6, offset=5).shape
        (torch.Size([1, 8, 5, 5]), torch.Size([1, 8, 1, 6]))
        >>> bias(1, 6, offset=torch.tensor([5, 3])).shape
        torch.Size([2, 8, 1, 6])
        >>> out = qkv.attention(*torch.randn(3, 1, 8, 5, 16).unbind(), bias=bias(5, 5), scale=1.0)

    Source: Raffel et al. 2020, section 2.1; transformers' ``T5Attention.compute_bias``. T5 does not scale its scores:
    layers have ``scale=1.0``.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        require_count(caller, "num_heads", num_heads)
        require_flag(caller, "bidirectional", bidirectional)
        require_count(caller, "num_buckets", num_buckets, 4 if bidirectional else 2)
        if bidirectional and num_buckets % 2:
            raise ValueError(f"{caller}: num_buckets must be even if bidirectional; got {num_buckets}.")
        exact = num_buckets // (4 if bidirectional else 2)
        require_count(
            caller, "max_distance", max_distance, exact + 1, suffix=f", more than the {exact} exact distances"
        )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameter, as the constructor does; needed after ``to_empty``."""
        nn.init.normal_(self.relative_attention_bias.weight, std=0.02)

    def forward(self, lq: int, lk: int, offset: int | Tensor = 0) -> Tensor:
        """The bias of lq queries and lk keys, ``(1, H, lq, lk)``, where query i has position ``i + offset``.

        Args:
            lq: number of queries.
            lk: number of keys.
            offset: position of the first query among the keys; integers ``(B,)``, one for each row, give a bias
                ``(B, H, lq, lk)``.

        Raises:
            TypeError: for an offset that is not an integer.
            ValueError: for negative lengths, and offsets of another shape or device.
        """
        caller, weight = type(self).__name__, self.relative_attention_bias.weight
        require_count(caller, "lq", lq, 0)
        require_count(caller, "lk", lk, 0)
        first = _offset_column(caller, offset, weight)
        # A bias is constant along its diagonals: each distance is looked up once, and rows are windows of distances.
        distances = torch.arange(-lq, lk, device=weight.device) - first
        by_distance = F.embedding(self._buckets(distances), weight).transpose(-1, -2).contiguous()
        rows, heads, count = by_distance.shape
        return by_distance.as_strided((rows, heads, lq, lk), (heads * count, count, 1, 1), 1).flip(-2).contiguous()

    def _buckets(self, distances: Tensor) -> Tensor:
        """The bucket of each distance ``j - i``."""
        buckets = self.num_buckets
        if self.bidirectional:
            buckets //= 2
            first, distances = torch.where(distances > 0, buckets, 0), distances.abs()
        else:
            first, distances = torch.zeros_like(distances), (-distances).clamp(min=0)
        exact = buckets // 2
        growth = (distances.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        wide = exact + (growth * (buckets - exact)).long()
        return first + torch.where(distances < exact, distances, wide.clamp(max=buckets - 1))

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


class WindowPositionBias(nn.Module):
    """Swin's bias: a learned number for each head and each offset in rows and columns between two patches of a window.

    Args:
        num_heads: query heads.
        window: ``(height, width)`` of the window, in patches; an int for a square one.
        device, dtype: of the parameter.

    The parameter is ``relative_position_bias_table ((2 height - 1) * (2 width - 1), num_heads)``, named as in Swin,
    timm and transformers. It is initialised from a truncated normal distribution of standard deviation 0.02.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for numbers out of range.

    Example:
        >>> import torch, qkv
        >>> bias = qkv.WindowPositionBias(4, window=7)
        >>> bias(49, 49).shape
        torch.Size([1, 4, 49, 49])
        >>> out = qkv.attention(*torch.randn(3, 10, 4, 49, 16).unbind(), bias=bias(49, 49))  # 10 windows

    Source: Swin Transformer, section 3.2; transformers' ``SwinRelativePositionBias``.
    """

    def __init__(
        self,
        num_heads: int,
        window: int | tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_count(type(self).__name__, "num_heads", num_heads)
        self.num_heads = num_heads
        self.window = _require_window(type(self).__name__, "window", window)
        offsets = math.prod(2 * side - 1 for side in self.window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameter, as the constructor does; needed after ``to_empty``."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, lq: int, lk: int, offset: int | Tensor = 0) -> Tensor:
        """The bias of the patches of a window, row by row: ``(1, H, lq, lk)``.

        Args:
            lq, lk: the number of patches of the window, both.
            offset: 0.

        Raises:
            ValueError: for other numbers.
        """
        _require_whole_window(self, self.window, lq, lk, offset)
        return _by_patches(self.relative_position_bias_table, self.window)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, window={self.window}"


class ContinuousWindowPositionBias(nn.Module):
    """Swin v2's bias: a small network of the offset between two patches, on a logarithmic scale, for any window.

    ``16 * sigmoid(network(sign(d) * log2(1 + 8 |d| / (size - 1)) / 3))``, where d is the offset in rows and columns.

    Args:
        num_heads: query heads.
        window: ``(height, width)`` of the window, in patches; an int for a square one.
        pretrained_window: the window of the training, whose offsets the network knows; ``window`` if None.
        hidden_dim: width of the network.
        device, dtype: of the parameters.

    Parameters are ``continuous_position_bias_mlp.0`` (weight and bias) and ``continuous_position_bias_mlp.2``
    (weight), named as in transformers' Swin v2; timm has ``cpb_mlp``. They are initialised as by ``nn.Linear``.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for numbers out of range.

    Example:
        >>> import qkv
        >>> bias = qkv.ContinuousWindowPositionBias(4, window=8, pretrained_window=6)
        >>> bias(64, 64).shape
        torch.Size([1, 4, 64, 64])

    Source: Swin Transformer v2, section 3.3; transformers' ``Swinv2SelfAttention``.
    """

    def __init__(
        self,
        num_heads: int,
        window: int | tuple[int, int],
        *,
        pretrained_window: int | tuple[int, int] | None = None,
        hidden_dim: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        require_count(caller, "num_heads", num_heads)
        require_count(caller, "hidden_dim", hidden_dim)
        self.num_heads = num_heads
        self.window = _require_window(caller, "window", window)
        self.pretrained_window = self.window
        if pretrained_window is not None:
            self.pretrained_window = _require_window(caller, "pretrained_window", pretrained_window)
        self.continuous_position_bias_mlp = nn.Sequential(
            nn.Linear(2, hidden_dim, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_heads, bias=False, device=device, dtype=dtype),
        )

    def reset_parameters(self) -> None:
        """Initialises the parameters, as the constructor does; needed after ``to_empty``."""
        for part in self.continuous_position_bias_mlp:
            if isinstance(part, nn.Linear):
                part.reset_parameters()

    def forward(self, lq: int, lk: int, offset: int | Tensor = 0) -> Tensor:
        """The bias of the patches of a window, row by row: ``(1, H, lq, lk)``.

        Args:
            lq, lk: the number of patches of the window, both.
            offset: 0.

        Raises:
            ValueError: for other numbers.
        """
        _require_whole_window(self, self.window, lq, lk, offset)
        weight = next(self.continuous_position_bias_mlp.parameters())
        offsets = constant(_log_offsets, self.window, self.pretrained_window, weight.device)
        table = self.continuous_position_bias_mlp(offsets.to(weight.dtype))
        return 16 * _by_patches(table, self.window).sigmoid()

    def extra_repr(self) -> str:
        return f"{self.num_heads}, window={self.window}, pretrained_window={self.pretrained_window}"


def _by_patches(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table of offsets ``(offsets, H)`` as the bias of each pair of patches, ``(1, H, patches, patches)``."""
    index = constant(_offset_index, window, table.device)
    return table.t()[:, index][None]


def _offset_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """``(patches, patches)``, the index of the offset from a key's patch to a query's."""
    height, width = window
    rows, columns = (
        part.flatten()
        for part in torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
    )
    down = rows[:, None] - rows + height - 1
    right = columns[:, None] - columns + width - 1
    return down * (2 * width - 1) + right


def _log_offsets(window: tuple[int, int], pretrained: tuple[int, int], device: torch.device) -> Tensor:
    """``(offsets, 2)``, the offsets in rows and columns on Swin v2's scale."""
    sides = [
        torch.arange(1 - side, side, device=device).float() / max(trained - 1, 1) * 8
        for side, trained in zip(window, pretrained, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
    return offsets.sign() * (offsets.abs() + 1).log2() / math.log2(8)


def _offset_column(caller: str, offset: int | Tensor, weight: Tensor) -> Tensor:
    """The offset of each row, ``(1 or B, 1)``."""
    if isinstance(offset, Tensor):
        shapes = [(), tuple(offset.shape[:1])]
        require_integers(caller, "offset", offset, shapes, weight, other="an int, or ", whose="the weights")
        return offset.long().reshape(-1, 1)
    require_int(caller, "offset", offset, suffix=", or integers (B,)")
    return torch.full((1, 1), offset, device=weight.device)


def _require_window(caller: str, name: str, window: object) -> tuple[int, int]:
    """The height and width of a window. Raises unless they are counts."""
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"{caller}: {name} must be (height, width) or an int; got {window}.")
    for side in sides:
        require_count(caller, f"each side of {name}", side)
    return (int(sides[0]), int(sides[1]))


def _require_whole_window(module: nn.Module, window: tuple[int, int], lq: int, lk: int, offset: int | Tensor) -> None:
    """Raises ValueError unless queries and keys are the patches of the window."""
    patches = math.prod(window)
    if lq != patches or lk != patches or isinstance(offset, Tensor) or offset != 0:
        raise ValueError(
            f"{type(module).__name__}: queries and keys must be the {patches} patches of a {window[0]} x {window[1]} "
            f"window, without an offset; got lq={lq}, lk={lk} and offset={described(offset)}."
        )
