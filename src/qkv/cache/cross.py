"""`CrossKVCache`: the keys and values of the context of cross-attention."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from qkv import kernels
from qkv.cache.base import Cache, Keys, Owner, autocast_reason, autocast_to, check_append
from qkv.cache.rows import place, require_is_token
from qkv.masks import Mask
from qkv.torch_internals import transforms_are_active


class CrossKVCache(Cache):
    """Keys and values of the context of cross-attention, computed once and read at every decoding step.

    A layer that is passed a context with a filled cache checks that it is the cached one: the same unmodified tensor,
    or equal numbers. (Inference tensors have no version counter, so their numbers are always compared; leaving the
    context out is cheaper.)

    Example:
        >>> import torch, qkv
        >>> layer = qkv.CrossAttention(16, 2)
        >>> cache, context = qkv.CrossKVCache(), torch.randn(1, 7, 16)
        >>> first = layer(torch.randn(1, 1, 16), context, cache=cache)
        >>> later = layer(torch.randn(1, 1, 16), cache=cache)
        >>> cache.length
        7
    """

    OPTIONAL_STATE = ("fingerprint",)
    of_context = True

    def __init__(self) -> None:
        super().__init__()
        self._fingerprint: Tensor | None = None
        self._context_ref: tuple[weakref.ref[Tensor], int] | None = None

    def admit(self, owner: Owner, mask: Mask) -> None:
        """Checks that a layer may use this cache, and records it as the owner.

        Raises:
            ValueError: if the cache contains keys of another layer.
        """
        if self.length:
            self._require(owner)
        self._own(owner)

    def append(self, k: Tensor, v: Tensor, is_token: Tensor | None = None) -> Keys:
        """As `Cache.append`, for the tokens of the context.

        Raises:
            ValueError: on a second append.
        """
        if self.length:
            raise ValueError(
                f"CrossKVCache: it already contains a context of {self.length} tokens; got {k.shape[2]} more. "
                "Make one cache per layer and context."
            )
        check_append("CrossKVCache", k, v, None, None, None)
        require_is_token("CrossKVCache", is_token, k)
        self._fingerprint = self._context_ref = self._rows = None
        count, parts = k.shape[2], zip(self._parts, (k, v), strict=True)
        try:
            if is_token is None:
                keys, values = [part.extend(x, count) for part, x in parts]
            else:
                rows = self._rows_or_equal(k)
                placement, longest = place(rows.lengths, count, is_token, keeps_padding=torch.compiler.is_compiling())
                keys, values = [part.put(x, placement, longest, longest) for part, x in parts]
                self._rows = rows.append(count, is_token)
        except BaseException:  # as in KVCache.append
            self._cut(0)
            raise
        self._autocast, self._dtype = autocast_to(k), k.dtype
        return Keys(keys, values, None, None if self._rows is None else self._rows.lengths)

    def keys(self) -> Keys:
        """The stored keys and values.

        Raises:
            ValueError: before the first append.
        """
        k, v = [part.tensor for part in self._parts]
        if k is None or v is None or not self.length:
            raise ValueError("CrossKVCache: it is empty; call the layer with a context first.")
        return Keys(k, v, None, None if self._rows is None else self._rows.lengths)

    def restrict(self, mask: Mask, keys: Keys, queries: int) -> Mask:
        """A mask over all columns of the context as one over its tokens, for ``queries`` queries."""
        if keys.lengths is None:
            return mask
        if mask.has_tensors:
            self._require_columns(mask, keys, queries)
            mask = mask.gather_keys(self._column_of_keys(keys), self.columns, (0, queries))
        return mask & Mask.padding(keys.lengths)

    def remember(self, context: Tensor) -> None:
        """Records the context ``(B, L, width)`` that the keys were computed from, for `require`."""
        self._fingerprint = _fingerprint(context)
        self._remember_identity(context)

    def require(self, context: Tensor) -> None:
        """Checks that the keys were computed from this context.

        Raises:
            ValueError: for another context.
            RuntimeError: for another context, in compiled code.
        """
        if self._context_ref is not None and not torch.compiler.is_compiling():
            reference, version = self._context_ref
            if reference() is context and context._version == version:
                return
        if self._fingerprint is None:
            raise ValueError(
                f"CrossKVCache: its {self.length} tokens were appended without a context to compare with; "
                "call the layer without one."
            )
        if context.shape[1] != self.columns:
            raise ValueError(
                f"CrossKVCache: it contains a context of {self.columns} tokens; got another of {context.shape[1]}. "
                "Make one CrossKVCache per layer and context."
            )
        if torch.compiler.is_compiling():
            torch._assert_async((_fingerprint(context) == self._fingerprint).all(), _ANOTHER_CONTEXT)
        elif _can_read_values(context):
            if not torch.equal(_fingerprint(context), self._fingerprint):
                raise ValueError(_ANOTHER_CONTEXT)
            self._remember_identity(context)

    def _remember_identity(self, context: Tensor) -> None:
        """Records the tensor and its version, so that `require` need not compare numbers."""
        has_version = not torch.compiler.is_compiling() and not context.is_inference()
        self._context_ref = (weakref.ref(context), context._version) if has_version else None

    def crop(self, length: int | Tensor) -> None:
        """As `Cache.crop`. A context passed later must be as short."""
        super().crop(length)
        if self._fingerprint is not None and self.columns < self._fingerprint.shape[1]:
            self._fingerprint, self._context_ref = self._fingerprint[:, : self.columns].clone(), None

    def select(self, rows: Tensor) -> None:
        """As `Cache.select`. A context passed later must have the selected rows."""
        super().select(rows)
        if self._fingerprint is not None:
            self._fingerprint, self._context_ref = self._fingerprint[rows.to(self._fingerprint.device)], None

    def _combine(self, other: Self, index: Tensor | None) -> None:
        super()._combine(other, index)
        self._fingerprint = self._context_ref = None  # no context has these rows

    def _more_state(self) -> dict[str, Tensor]:
        return {} if self._fingerprint is None else {"fingerprint": self._fingerprint.clone()}

    def _load_more(self, state: Mapping[str, Tensor]) -> None:
        fingerprint = state.get("fingerprint")
        self._fingerprint, self._context_ref = None if fingerprint is None else fingerprint.clone(), None

    def require_dtype(self, q: Tensor) -> None:
        """Raises ValueError for queries in another dtype than the keys, if torch.autocast is the reason."""
        cached = self._parts[0].memory
        if cached is None or cached.dtype is q.dtype:
            return
        reason = autocast_reason(self._autocast, cached.dtype, q)
        if reason:
            raise ValueError(f"CrossKVCache: q must be in {cached.dtype}, as the keys; got {q.dtype}. {reason}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_context_ref": None}


_ANOTHER_CONTEXT = (
    "CrossKVCache: it contains another context, of as many tokens as the one given. Make one CrossKVCache per layer "
    "and context."
)


def _fingerprint(context: Tensor) -> Tensor:
    """A hash ``(B, L)`` of the bits of each token of a context ``(B, L, width)``."""
    bits = context.detach().view(_SAME_SIZE[context.element_size()]).long()
    factors = torch.arange(1, bits.shape[2] + 1, device=bits.device) * _MULTIPLIER
    factors = (factors ^ (factors >> 31)) * _MULTIPLIER | 1
    return (bits * factors).sum(2)  # modulo 2^64


_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's multiplier of MMIX, which spreads small numbers over all bits."""


def _can_read_values(tensor: Tensor) -> bool:
    """Whether values can be read: of an exact tensor with data, outside of tracing and functorch transforms."""
    return kernels.is_exact_tensor(tensor) and not (tensor.is_meta or kernels.is_tracing() or transforms_are_active())
