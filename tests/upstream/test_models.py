"""Requests of users of whole models: unpadding, and traced programs that apply padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from qkv import kernels
from qkv.integrations.transformers import attention as integration
from qkv.integrations.transformers.unpadding import unpad

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

IDS, ONES = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0)), torch.ones(2, 12).long()
KEEP = (torch.arange(12) < torch.tensor([[12], [5]])).long()


def bert() -> Any:
    integration.register()
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6}
    config = transformers.BertConfig(**sizes, intermediate_size=64)
    model = transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


def real(model: Any) -> Tensor:
    found: Tensor = model(IDS, attention_mask=KEEP)["last_hidden_state"][KEEP.bool()]
    return found


@pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
def test_cosmos_rl_635_code_between_packed_layers_sees_the_padded_batch() -> None:
    """Padding is packed away for a whole model, and features added between its layers no longer fit their tokens.

    Also huggingface/transformers#2483: a model is shortened by cutting the list of its layers.
    """
    reference, model = bert(), bert()
    reference.set_attn_implementation("eager")
    unpad(model)
    for each in (reference, model):
        each.encoder.layer[1].register_forward_hook(lambda _, args, out: out + torch.arange(12)[:, None] / 12)
        each.encoder.layer = each.encoder.layer[:3]
    torch.testing.assert_close(real(model), real(reference), atol=2e-5, rtol=1e-4)


def test_transformers_28610_a_traced_model_applies_padding(upstream: Callable[[Callable[[], bool]], None]) -> None:
    """A model traced with an example without padding attends to the padding of all later calls.

    Also pytorch/pytorch#117752.
    """
    model = bert()
    model.set_attn_implementation("eager")
    want = real(model)

    def traced(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        program = torch.jit.trace(model, (IDS, ONES), strict=False, check_trace=False)
        return program(IDS, KEEP)["last_hidden_state"][KEEP.bool()]

    torch.testing.assert_close(traced("qkv"), want, atol=2e-5, rtol=1e-4)
    upstream(lambda: not torch.allclose(traced("sdpa"), want, atol=2e-5))
