"""`report`: the parts of a model that run on qkv, those that do not, and its calls."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations.transformers.one_line import IDS, LEFT, STEPS, generated, model
from torch import Tensor, nn

import qkv
from qkv import backends, kernels
from qkv.integrations import calls

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def subjects(parts: Any) -> list[str]:
    return [part.subject for part in parts]


def test_a_model_of_transformers_before_and_after() -> None:
    ours = model()
    before = qkv.report(ours)
    taken = ["attention", "cache", "rotary", "norms", "MLPs", "linear layers"]
    assert subjects(before.left) == [*taken, "padding"] and not before.taken
    assert "attn_implementation is 'sdpa'; qkv.accelerate(model) sets 'qkv'" in str(before)
    assert "No call of attention so far" in str(before)
    generated(qkv.accelerate(ours), IDS.clone())
    after = qkv.report(ours)
    assert subjects(after.taken) == [*taken[:3], "steps", "decoders", *taken[3:]]
    assert (after.routed, after.fallback) == (2 * STEPS, 0)
    assert str(after).splitlines() == [
        'attention      LlamaForCausalLM  qkv: attn_implementation="qkv"',
        "cache          LlamaForCausalLM  qkv: QKVCache in generate and with use_cache=True, unless one is given: "
        "2 AppendLayer",
        "rotary         2 modules         qkv: qkv's rotation in these modules alone",
        "steps          2 modules         qkv: few tokens in one call of the kernel, projections included",
        "decoders       2 layers          qkv: few tokens in one call of the kernel, norms and MLP too",
        "norms          5 norms           qkv: RMSNorm in one call of the kernel, without a gradient",
        "MLPs           2 MLPs            qkv: 1 to 16 tokens in one call of the kernel, without a gradient",
        "linear layers  15 linear layers  qkv: products as in qkv's own layers",
        "padding        2 layers          not: qkv.accelerate(model, unpad=True) skips it",
        "",
        "calls  where           query         key                  by",
        "2      LlamaAttention  (2, 4, 9, 8)  (2, 2, 9, 8)         qkv: composed: hidden_states has not 1 to 16 tokens",
        "8      LlamaAttention  (2, 4, 1, 8)  (2, 2, 10 to 13, 8)  qkv: one call of the kernel",
    ]
    assert qkv.report(copy.deepcopy(ours)).routed == 0


def test_what_was_left_to_torch_and_why() -> None:
    ours = qkv.accelerate(model()).double()
    ours(IDS)
    found = qkv.report(ours)
    assert (found.routed, found.fallback) == (0, 2) and "torch: the kernel has no fp64" in str(found)


def test_padding() -> None:
    ours = qkv.accelerate(model(), unpad=True)
    with torch.no_grad():
        cache = ours(IDS, attention_mask=LEFT).past_key_values
        ours(IDS[:, :1], attention_mask=F.pad(LEFT, (0, 1), value=1), past_key_values=cache)
    found = {by: counted.count for (where, by), counted in qkv.report(ours).calls.items() if "Decoder" in where}
    assert found == {"without padding": 2, "with padding: keys of earlier tokens, in a cache that is not empty": 2}


class Attend(nn.Module):
    """A module of somebody's own, with torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return F.scaled_dot_product_attention(x, x, x)


def test_a_model_of_torch() -> None:
    ours = qkv.accelerate(nn.Sequential(Attend(), Attend()))
    for length in (3, 5):
        ours(torch.randn(1, 2, length, 8))
    found = qkv.report(ours)
    assert subjects(found.taken) == ["torch's attention", "linear layers"] and not found.left
    assert found.routed == 4 and "(1, 2, 3 to 5, 8)" in str(found) and ":96 forward" not in str(found)
    assert len(found.calls) == 1


def test_a_block_counts_the_calls_of_models_on_qkv() -> None:
    ours = qkv.accelerate(model())
    with qkv.accelerate() as block:
        generated(ours)
    assert (block.routed, block.fallback) == (2 * STEPS, 0) == (qkv.report(ours).routed, 0)
    _, prompt, steps = str(block).splitlines()
    assert all("transformers.models.llama.modeling_llama:" in row for row in (prompt, steps))
    assert prompt.split()[-1] == steps.split()[-1] == "qkv"
    assert "(2, 4, 9, 8)  (2, 2, 9, 8)" in prompt and "(2, 4, 1, 8)  (2, 2, 10 to 13, 8)" in steps
    with qkv.accelerate() as empty:
        pass
    assert "neither of torch's on a CPU nor of qkv's in a model of transformers" in str(empty)


def test_counting_keeps_no_module_alive_and_does_not_grow() -> None:
    gc.collect()
    ours = qkv.accelerate(Attend())
    kinds = len(calls._tallies)
    for length in range(1, 20):
        ours(torch.randn(1, 1, length, 8))
    assert len(calls._tallies) == kinds + 1 and len(calls._tallies[ours]) == 1
    del ours
    gc.collect()
    assert len(calls._tallies) <= kinds


def test_only_modules_have_a_report() -> None:
    with pytest.raises(TypeError, match=r"report: model must be an nn\.Module; got str"):
        qkv.report("bert")  # type: ignore[arg-type]


def test_a_call_without_the_kernel_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_has_warned", False)
    q = torch.randn(1, 2, 3, 8)
    qkv.attention(q.double(), q.double(), q.double())
    with kernels.use("none here"):
        qkv.attention(q.double(), q.double(), q.double())  # which the kernel would not compute
        qkv.attention(q, q, q, backend="sdpa")
        with pytest.warns(RuntimeWarning, match="attention: qkv runs without its compiled kernel: none here") as warned:
            outs = [qkv.attention(q, q, q) for _ in range(2)]
    assert len(warned) == 1 and warned[0].filename == __file__ and torch.equal(*outs)
