"""`DifferentialAttention`: the difference of two attention maps per head."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from qkv.arguments import require_finite, require_positive
from qkv.layers import transformers_modules
from qkv.layers.arguments import require_rotary
from qkv.layers.attention import Attention
from qkv.layers.cached_call import Inputs
from qkv.layers.head_norm import HeadNorm
from qkv.layers.options import Arguments, ConversionOptions, LayerOptions
from qkv.layers.rotary import RotaryEmbedding, rotate_both

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialArguments(Arguments, total=False):
    """All arguments of `DifferentialAttention`."""

    lambda_init: float
    sub_norm_eps: float


class RotaryHalves(nn.Module):
    """Rotates the two halves of a head as heads of their own."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary
        self.head_dim = 2 * rotary.head_dim

    @property
    def depends_on_length(self) -> bool:
        """As `RotaryEmbedding.depends_on_length`."""
        return self.rotary.depends_on_length

    def forward(self, x: Tensor, **where: Any) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(rotate_both(self.rotary, first, second, where), dim=-1)


class DifferentialAttention(Attention):
    """`Attention` with two maps per head: ``(1 - lambda_init) norm((softmax(s_1) - lambda softmax(s_2)) @ v)``.

    The query and the key of a head are two of half the width each, so that ``s_i = scale * q_i @ k_i.mT``; the value
    has the full width. Caches, groups and masks are those of `Attention`. ``lambda = exp(lambda_q1 @ lambda_k1) -
    exp(lambda_q2 @ lambda_k2) + lambda_init`` is learned, one for all heads; the norm is an RMSNorm of each head.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads, each with two maps.
        lambda_init: lambda at the start; ``0.8 - 0.6 exp(-0.3 l)`` in the l-th layer of the paper, from 0.
        sub_norm_eps: added to the mean square of the norm.
        **options: as in `Attention`; head_dim is the width of both halves together, ``rotary`` is for one of them and
            ``scale`` is ``1 / sqrt(head_dim / 2)`` if None.

    Parameters are those of `Attention`, and ``lambda_q1``, ``lambda_k1``, ``lambda_q2``, ``lambda_k2``,
    ``(head_dim / 2,)``, and ``sub_norm.weight``, ``(value_dim,)``.

    Raises:
        TypeError: as `Attention`.
        ValueError: as `Attention`, for an odd head_dim, and for qk_norm, sink_logits and dropout, which have no meaning
            in the papers below.

    Example:
        >>> import torch, qkv
        >>> layer = qkv.DifferentialAttention(64, 4, mask=qkv.Mask.causal(), rotary=qkv.RotaryEmbedding(8))
        >>> layer(torch.randn(1, 5, 64)).shape
        torch.Size([1, 5, 64])

    Source: Ye et al. 2024, "Differential Transformer", section 2.1. transformers' DiffLlama pairs head i with head
    ``i + num_heads / 2`` and learns no gain in the norm; `from_transformers` converts it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        lambda_init: float = 0.8,
        sub_norm_eps: float = 1e-5,
        **options: Unpack[LayerOptions],
    ) -> None:
        caller = type(self).__name__
        for name in ("qk_norm", "sink_logits", "dropout"):
            value = options.get(name)
            if value:
                raise ValueError(f"{caller}: {name} must be off, since two maps do not define it; got {value!r}.")
        require_finite(caller, "lambda_init", lambda_init)
        require_positive(caller, "sub_norm_eps", sub_norm_eps)
        rotary = options.pop("rotary", None)
        super().__init__(embed_dim, num_heads, **options)
        if self.head_dim % 2:
            raise ValueError(f"{caller}: head_dim must be even, the width of two queries; got {self.head_dim}.")
        if rotary is not None:
            require_rotary(caller, rotary, self.head_dim // 2, self.context_dim)
            self.rotary = RotaryHalves(rotary)  # type: ignore[assignment]
        self.lambda_init = lambda_init
        like = self.q_proj.weight
        for name in LAMBDAS:
            self.register_parameter(name, nn.Parameter(like.new_empty(self.head_dim // 2)))
        self.sub_norm = HeadNorm(self.value_dim, eps=sub_norm_eps, device=like.device, dtype=like.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `Attention.reset_parameters`; those of lambda are drawn with standard deviation 0.1, as in the paper."""
        with self._whole_parameters():
            super().reset_parameters()
            for name, parameter in self.named_parameters():  # absent while `Attention.__init__` runs
                if name in LAMBDAS:
                    nn.init.normal_(parameter, std=0.1)
                elif name == "sub_norm.weight":
                    nn.init.ones_(parameter)

    def difference(self) -> Tensor:
        """Lambda, the factor of the second map, in fp32 or higher."""
        q1, k1, q2, k2 = (self.get_parameter(name) for name in LAMBDAS)
        dtype = torch.promote_types(q1.dtype, torch.float32)
        first, second = ((q.to(dtype) * k.to(dtype)).sum().exp() for q, k in ((q1, k1), (q2, k2)))
        difference = first - second + self.lambda_init
        return difference if self._share is None else self._share.shared(difference)

    def _attend(self, inputs: Inputs) -> Tensor:
        first, second = (super(DifferentialAttention, self)._attend(one) for one in _halves(inputs))
        out: Tensor = self.sub_norm(first - self.difference().to(first.dtype) * second)
        return (1 - self.lambda_init) * out

    def record(self, *args: Any, **options: Any) -> Any:
        """Not of this layer, whose output is the difference of two maps.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__}: record is of layers with one map of weights; this layer has two.")

    def _weights(self, inputs: Inputs) -> Tensor:
        first, second = (super(DifferentialAttention, self)._weights(one) for one in _halves(inputs))
        return first - self.difference().to(first.dtype) * second

    @classmethod
    def from_transformers(cls, module: nn.Module, **options: Unpack[ConversionOptions]) -> Self:
        """As `Attention.from_transformers`, for a ``DiffLlamaAttention``."""
        return cls._converted(module, transformers_modules.read_differential(module), options)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Unpack[ConversionOptions]) -> NoReturn:
        """Raises ValueError: no ``nn.MultiheadAttention`` computes what this layer does."""
        raise ValueError("from_torch: nn.MultiheadAttention has one map per head; got a DifferentialAttention.")

    def to_torch(self) -> NoReturn:
        """Raises ValueError: no ``nn.MultiheadAttention`` computes what this layer does."""
        raise ValueError("to_torch: nn.MultiheadAttention has one map per head; got a DifferentialAttention.")

    def options(self) -> DifferentialArguments:
        """The arguments with which `DifferentialAttention` builds a layer like this one, with other weights."""
        options: DifferentialArguments = {
            **super().options(),
            "lambda_init": self.lambda_init,
            "sub_norm_eps": self.sub_norm.eps or 0.0,
        }
        if isinstance(self.rotary, RotaryHalves):
            options["rotary"] = self.rotary.rotary
        return options

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lambda_init={self.lambda_init}"


def _halves(inputs: Inputs) -> list[Inputs]:
    """The inputs of each of the two maps, which have the values in common."""
    pairs = zip(inputs.q.chunk(2, dim=-1), inputs.keys.k.chunk(2, dim=-1), strict=True)
    return [inputs._replace(q=q, keys=inputs.keys._replace(k=k)) for q, k in pairs]
