"""`RotaryEmbedding`, compared with complex numbers as in the paper, and with transformers."""

import pytest
import torch

import qkv


def rotated_by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """RoFormer, section 3.2.1: each pair of channels is a complex number, times ``exp(i * position * theta)``."""
    width = x.shape[-1]
    theta = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    rotation = torch.polar(torch.ones(len(positions), width // 2, dtype=torch.float64), positions[:, None] * theta)
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * rotation).flatten(-2)


@pytest.mark.parametrize("offset", [0, 5, 1000])
def test_interleaved_pairs_rotate_as_complex_numbers(offset: int) -> None:
    x = torch.randn(2, 3, 7, 8)
    want = rotated_by_complex_numbers(x, torch.arange(7) + offset, 500.0)
    got = qkv.RotaryEmbedding(8, base=500.0, interleaved=True)(x, offset)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def test_both_pairings_are_equal_up_to_the_order_of_channels() -> None:
    x, order = torch.randn(2, 3, 7, 8), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves, pairs = qkv.RotaryEmbedding(8), qkv.RotaryEmbedding(8, interleaved=True)
    torch.testing.assert_close(halves(x[..., order], 3), pairs(x, 3)[..., order])


def test_equals_llama_in_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=48, num_attention_heads=6, head_dim=8, max_position_embeddings=64)
    q, positions = torch.randn(2, 6, 7, 8), torch.arange(4, 11)[None]
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(qkv.RotaryEmbedding(8)(q, 4), want)


def test_scores_depend_on_distance_alone() -> None:
    rotary, q, k = qkv.RotaryEmbedding(8).double(), *(torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))
    scores = [(rotary(q, 9 + shift) @ rotary(k, 4 + shift).mT).item() for shift in (0, 1, 50)]
    assert max(scores) - min(scores) < 1e-5  # positions times frequencies are fp32


def test_rotary_dim_leaves_the_other_channels_unchanged() -> None:
    x = torch.randn(2, 3, 7, 8)
    got = qkv.RotaryEmbedding(8, rotary_dim=4)(x, 3)
    assert torch.equal(got[..., 4:], x[..., 4:])
    torch.testing.assert_close(got[..., :4], qkv.RotaryEmbedding(4)(x[..., :4], 3))


def test_position_scale_and_frequencies() -> None:
    x = torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(qkv.RotaryEmbedding(8, position_scale=0.25)(x, 20), qkv.RotaryEmbedding(8)(x, 5))
    slower = qkv.RotaryEmbedding(8, frequencies=qkv.RotaryEmbedding(8).frequencies / 4)
    torch.testing.assert_close(slower(x, 20), qkv.RotaryEmbedding(8)(x, 5))


def test_positions_beyond_the_precision_of_bf16_stay_apart() -> None:
    rotary = qkv.RotaryEmbedding(8).bfloat16()
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)[:, :, :1].expand(-1, -1, 2, -1)
    out = rotary(x, 256)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[:, :, 0], out[:, :, 1])  # 256 and 257 are the same bf16
