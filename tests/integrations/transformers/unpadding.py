"""Small models, a padded batch for them, and what their attention computes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qkv.integrations.transformers import attention as integration

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
LENGTHS = (11, 4, 1, 7)
IDS = torch.randint(3, 99, (4, 11), generator=torch.Generator().manual_seed(0))
RIGHT = torch.arange(11) < torch.tensor(LENGTHS)[:, None]
LEFT = RIGHT.flip(1)


def bert(**options: Any) -> Any:
    return build("bert", intermediate_size=48, **options)


def llama(**options: Any) -> Any:
    return build("llama", intermediate_size=48, num_key_value_heads=2, **options)


def modern(**options: Any) -> Any:
    return build("modernbert", intermediate_size=48, local_attention=4, pad_token_id=0, **options)


def build(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    integration.register()
    config = transformers.AutoConfig.for_model(kind, **SIZES, **options)
    return transformers.AutoModel.from_config(config, attn_implementation="qkv").eval()


@contextmanager
def tokens_seen() -> Iterator[list[tuple[int, int]]]:
    """The batch and the queries of each call of attention."""
    seen: list[tuple[int, int]] = []

    def attend(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((query.shape[0], query.shape[2]))
        return integration.attend(module, query, *args, **options)

    transformers.AttentionInterface.register(integration.NAME, attend)
    try:
        yield seen
    finally:
        integration.register()


PADDED, PACKED = (4, 11), (1, sum(LENGTHS))
"""The batch and length that a layer is given, and what attention computes of them."""


def hidden(model: Any, keep: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, attention_mask=keep.long(), **options).last_hidden_state
    return found
