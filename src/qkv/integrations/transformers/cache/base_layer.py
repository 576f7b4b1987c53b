"""`HandledLayer`: base of our layers of a cache of transformers."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from qkv.cache.handle import Handled, require_readable


def capacity_for(tokens: int) -> int:
    """Capacity to allocate for this many tokens: 1/16 more, at least 64, so that copies are rare and little is unused.

    Prompts get spare capacity, too: reallocating all layers in the first step would fragment malloc's memory.
    """
    return tokens + max(tokens // 16, 64)


class HandledLayer(Handled, DynamicLayer):  # type: ignore[misc]
    """Base of our layers. Compiled programs append to them by operators, which find them by their handles."""

    def require_readable(self) -> None:
        """Ends a compiled graph in which tokens have been appended to the layer."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and self.handle.tensor is not None:
            require_readable(self.handle.tensor)

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        self.require_readable()
        return super().get_seq_length()  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that ``query_length`` new tokens get from `update`, and the position of the first."""
        self.require_readable()
        return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def _check_and_initialize(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raises a ValueError for shapes that do not match the cached tokens; initialises an empty layer."""
        for name, cached, new in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            if new.dim() != 4:
                raise ValueError(f"QKVCache: {name} must be (B, heads, L, width); got shape {tuple(new.shape)}.")
            if not length_of(cached):
                continue
            batch, heads, _, width = cached.shape
            if new.shape != (batch, heads, new.shape[2], width):
                raise ValueError(
                    f"QKVCache: {name} must be ({batch}, {heads}, L, {width}) like the cached ones; got shape "
                    f"{tuple(new.shape)}. Create a new cache for each model and batch."
                )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)


def length_of(cached: Tensor | None) -> int:
    """The number of cached tokens. Empty layers have None or an empty tensor of one dimension."""
    return cached.shape[2] if cached is not None and cached.dim() == 4 else 0
