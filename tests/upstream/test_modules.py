"""Complaints of users who load, cast, wrap and shard attention modules."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv


def test_transformers_48892_constants_are_right_after_loading(tmp_path: object, upstream: Callable[..., None]) -> None:
    """A model built on ``meta`` and filled from its checkpoint has garbage in the buffers that are not saved: all keys
    match, and positions are wrong (huggingface/transformers#48892, huggingface/transformers#45902).
    """
    import transformers

    class Config(transformers.PreTrainedConfig):  # type: ignore[misc,name-defined]
        model_type = "loads_a_layer"

    class Model(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.attention = qkv.CausalAttention(64, 4, rotary=qkv.RotaryEmbedding(16), alibi=[0.5, 0.1, 0.02, 0.001])
            self.post_init()

    model, x = Model(Config()), 6 * torch.randn(1, 50, 64)
    with torch.device("meta"):
        layer = Model(Config()).attention.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    layer.load_state_dict(model.attention.state_dict())
    assert torch.equal(layer(x), model.attention(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(Model.from_pretrained(tmp_path).attention(x), model.attention(x))

    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.arange(1.0, 9.0), persistent=False)

    def lost() -> bool:
        with torch.device("meta"):
            module = Buffer()
        module.to_empty(device="cpu").load_state_dict({})
        return not torch.equal(module.frequencies, torch.arange(1.0, 9.0))

    upstream(lost)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_25681_positions_survive_a_module_in_low_precision(dtype: torch.dtype) -> None:
    """``module.to(bf16)`` rounds the frequencies of rotary positions, and distant tokens rotate by wrong angles
    (huggingface/transformers#25681, EleutherAI/gpt-neox#1003).
    """
    torch.manual_seed(0)
    x, rotary = torch.randn(1, 1, 1, 64).to(dtype), qkv.RotaryEmbedding(64)
    want = rotary(x.float(), 4096)
    got = qkv.RotaryEmbedding(64).to(dtype)(x, 4096)
    # The rotation itself is in fp32: the result is that of fp32, rounded once.
    assert torch.equal(got, want.to(dtype))


def test_pytorch_49828_weights_need_not_be_parameters() -> None:
    """A module that looks its weights up among its parameters fails where they are computed: MAML, weight drop, the
    replicas of DataParallel, FSDP (pytorch/pytorch#49828, lucidrains/BS-RoFormer#25).
    """
    layer, x = qkv.MultiHeadAttention(32, 4), torch.randn(2, 5, 32)
    want = layer(x)
    scale = torch.ones((), requires_grad=True)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
        weight = projection.weight * scale
        del projection.weight
        projection.weight = weight
    got = layer(x)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got.sum(), scale)[0].isfinite()


def test_helical_405_a_replaced_linear_layer_is_called(
    monkeypatch: pytest.MonkeyPatch, upstream: Callable[..., None]
) -> None:
    """``nn.MultiheadAttention`` reads the weights of its output projection and never calls it, so that adapters, hooks
    and simulated quantisation have no effect there (helicalAI/helical#405).
    """
    layer, x = qkv.MultiHeadAttention(32, 4), torch.randn(1, 5, 32)
    theirs, own = layer.to_torch(), nn.Linear.forward
    plain, before = theirs(x, x, x)[0], layer(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x.round()))
    q, k, v = (p(x).unflatten(2, (4, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), want)
    assert not torch.allclose(layer(x), before)
    upstream(lambda: torch.equal(theirs(x, x, x)[0], plain))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_pytorch_153472_jagged_tensors_have_causal_masks_windows_and_groups(upstream: Callable[..., None]) -> None:
    """Attention over jagged nested tensors fails from the inside for causal masks, groups and biases
    (pytorch/pytorch#153472).
    """
    parts = [torch.randn(length, 32) for length in (5, 2)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for layer in (
        qkv.MultiHeadAttention(32, 4),
        qkv.CausalAttention(32, 4, rotary=qkv.RotaryEmbedding(8)),
        qkv.GroupedQueryAttention(32, 4, 2),
        qkv.SlidingWindowAttention(32, 4, 2, alibi=[0.1] * 4),
    ):
        for got, part in zip(layer(x).unbind(), parts, strict=True):
            torch.testing.assert_close(got, layer(part[None])[0])
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)
    with pytest.raises(
        ValueError, match=r"only layers, such as qkv\.CausalAttention, take nested tensors.*varlen_attn"
    ):
        qkv.attention(q, q, q, mask=qkv.Mask.causal())

    def fails() -> bool:
        grouped: Tensor = F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
        return grouped is None

    upstream(fails)
