"""Complaints of users of FlexAttention."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from budget import assert_within_budget
from cases import Case, answer
from oracle import Rule
from peer import formula, gradient_terms
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import qkv
from qkv import Mask


def test_pytorch_148752_masks_and_scores_train_on_cpu(upstream: Callable[..., None]) -> None:
    """There is no backward pass on a CPU (pytorch/pytorch#148752, pytorch/pytorch#169224, pytorch/pytorch#145861,
    pytorch/pytorch#169646).
    """
    case = Case(
        "flex", lambda: Mask.causal(window=5), lambda: Rule(left=4, right=0), softcap=3.0, bias_shape=(6, 19, 19)
    )
    inputs, d_out = case.inputs(torch.float32), torch.randn(2, 6, 19, 13, generator=torch.Generator().manual_seed(0))

    def gradients(run: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
        return torch.autograd.grad(run(leaves), list(leaves.values()), d_out.to(dtype))

    got = gradients(lambda leaves: qkv.attention(**leaves, **case.options()), torch.float32)
    want, peer = (gradients(lambda leaves: formula(case, leaves)[0], dtype) for dtype in (torch.float64, torch.float32))
    # What torch's output is off by, of its largest, the terms of the gradients may be off by as well.
    exact = answer(case, torch.float32).out
    error = float((formula(case, inputs)[0] - exact).abs().max() / exact.abs().max())
    terms = gradient_terms(case, inputs, d_out)
    for name, *grads in zip(inputs, got, want, peer, strict=True):
        assert_within_budget(*grads, f"gradient of {name}", error * float(terms[name].abs().max()))
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    upstream(lambda: not flex_attention(q, k, v, enable_gqa=True).requires_grad)


def test_pytorch_141486_a_mask_serves_all_lengths_without_recompilation() -> None:
    """A window is recompiled at every step, and its mask rebuilt for every length, at quadratic cost
    (pytorch/pytorch#141486, pytorch/pytorch#134756, pytorch/pytorch#136196, meta-pytorch/attention-gym#34).
    """
    torch.compiler.reset()
    mask = Mask.causal(window=8)
    assert not mask.has_tensors
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def attend(q: Tensor) -> Tensor:
        return qkv.attention(q, q, q, mask=mask)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in range(20, 60, 5):
        q = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(compiled(q), attend(q))
    assert counter.frame_count <= 2, "once for the first length, once for all others"
    decoded = torch.randn(1, 2, 40, 8)
    whole = attend(decoded)
    for n in (1, 7, 8, 9, 39):
        step = qkv.attention(decoded[:, :, n : n + 1], *[decoded[:, :, : n + 1]] * 2, mask=mask, offset=n)
        torch.testing.assert_close(step, whole[:, :, n : n + 1])


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_transformers_40345_a_model_runs_on_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """``attn_implementation="flex_attention"`` needs a compiler and then fails on a CPU
    (huggingface/transformers#40345, facebookresearch/blt#6).
    """
    import transformers

    from qkv.integrations.transformers import attention as integration

    integration.register()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=97, **sizes, **heads, attn_implementation="eager")
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(3, 96, (2, 9))
    want = model.generate(ids, max_new_tokens=9, do_sample=False)
    model.set_attn_implementation("qkv")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), want)
