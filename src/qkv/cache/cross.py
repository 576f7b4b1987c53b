"""`CrossKVCache`: the keys and values of a context."""

import weakref
from typing import Any

import torch
from torch import Tensor

from qkv import kernels
from qkv.cache.base import Cache, Keys, Owner, check_append
from qkv.masks import Mask


class CrossKVCache(Cache):
    """The projected context of a cross-attention, computed once and read at every decoding step.

    A layer that is given a context although its cache is full holds it against the one of these keys: the same tensor
    unchanged, or else the same numbers. (Tensors made under ``torch.inference_mode()`` do not say that they are
    unchanged; there it is cheaper not to give the context again.)

    Example:
        >>> import torch, qkv
        >>> layer = qkv.CrossAttention(16, 2)
        >>> cache, context = qkv.CrossKVCache(), torch.randn(1, 7, 16)
        >>> first = layer(torch.randn(1, 1, 16), context, cache=cache)
        >>> later = layer(torch.randn(1, 1, 16), cache=cache)
        >>> cache.length
        7
    """

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint: Tensor | None = None
        self._given: tuple[weakref.ref[Tensor], int] | None = None

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Refuses a layer other than the one whose keys are held.

        Raises:
            ValueError: for such a layer.
        """
        if self.length:
            self._require(owner)
        self._owners = (owner,)

    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Stores the keys ``(B, Hkv, L, D)`` and values ``(B, Hkv, L, Dv)`` of the context.

        Raises:
            ValueError: on a second append.
        """
        if self.length:
            raise ValueError(
                f"CrossKVCache: it already holds a context of {self.length} tokens; got {k.shape[2]} more. "
                "Make one cache for each layer and context."
            )
        check_append("CrossKVCache", k, v, None, None, None)
        self._fingerprint = self._given = None
        try:
            grown = [part.extend(x, k.shape[2]) for part, x in zip(self._parts, (k, v), strict=True)]
        except BaseException:  # as in a KVCache
            self.restore(0)
            raise
        return Keys(grown[0], grown[1], None)

    def keys(self) -> Keys:
        """What was stored.

        Raises:
            ValueError: before the first append.
        """
        k, v = [part.tensor for part in self._parts]
        if k is None or v is None or not self.length:
            raise ValueError("CrossKVCache: it is empty; call the layer with a context first.")
        return Keys(k, v, None)

    def remember(self, context: Tensor) -> None:
        """Notes which context, ``(B, L, width)``, the keys are of."""
        self._fingerprint = _fingerprint(context)
        self._note(context)

    def require(self, context: Tensor) -> None:
        """Refuses a context that the keys are not of.

        Raises:
            ValueError: for such a context.
            RuntimeError: for such a context, from a compiled program.
        """
        if self._given is not None and not torch.compiler.is_compiling():
            given, version = self._given
            if given() is context and context._version == version:
                return
        if self._fingerprint is None:
            raise ValueError(
                f"CrossKVCache: the {self.length} tokens held were appended without a context, so that none can be "
                "held against them; call the layer without one."
            )
        if context.shape[1] != self.length:
            raise ValueError(
                f"CrossKVCache: the cache holds a context of {self.length} tokens; got another of "
                f"{context.shape[1]}. Make one CrossKVCache for each layer and context."
            )
        if torch.compiler.is_compiling():
            torch._assert_async((_fingerprint(context) == self._fingerprint).all(), _ANOTHER_CONTEXT)
        elif _can_read(context):
            if not torch.equal(_fingerprint(context), self._fingerprint):
                raise ValueError(_ANOTHER_CONTEXT)
            self._note(context)

    def _note(self, context: Tensor) -> None:
        counts = not torch.compiler.is_compiling() and not context.is_inference()
        self._given = (weakref.ref(context), context._version) if counts else None

    def crop(self, length: int) -> None:
        """Forgets all tokens of the context but the first ``length``.

        Raises:
            TypeError: for a length that is no int.
            ValueError: for more tokens than are held, or fewer than none.
        """
        super().crop(length)
        if self._fingerprint is not None and length < self._fingerprint.shape[1]:
            self._fingerprint, self._given = self._fingerprint[:, :length].clone(), None

    def select(self, rows: Tensor) -> None:
        """As `Cache.select`; a context that is given again has these rows as well."""
        super().select(rows)
        if self._fingerprint is not None:
            self._fingerprint, self._given = self._fingerprint[rows.to(self._fingerprint.device)], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": None}


_ANOTHER_CONTEXT = (
    "CrossKVCache: it holds another context, of as many tokens as the one given. Make one CrossKVCache for each layer "
    "and context."
)


def _fingerprint(context: Tensor) -> Tensor:
    """``(B, L)``, numbers that two contexts ``(B, L, width)`` have in common only if they are the same in bits."""
    bits = context.detach().view(_SAME_SIZE[context.element_size()]).long()
    factors = torch.arange(1, bits.shape[2] + 1, device=bits.device) * _SPREAD
    factors = (factors ^ (factors >> 31)) * _SPREAD | 1
    return (bits * factors).sum(2)  # modulo 2^64


_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = 0x5851F42D4C957F2D
"""A multiplier of Knuth's, which spreads small numbers over all bits."""


def _can_read(tensor: Tensor) -> bool:
    """Whether numbers can be looked at: not where somebody records or transforms operators, or there are none."""
    return kernels.is_exact_tensor(tensor) and not (
        tensor.is_meta or kernels.is_tracing() or torch._C._are_functorch_transforms_active()
    )
