"""A loss of a model whose padding is skipped: the mean over the targets that transformers takes, at the predictions
that it takes them from.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from integrations.transformers.one_line import SIZES
from integrations.transformers.unpadding import IDS, LEFT, PACKED, PADDED, RIGHT, tokens_seen
from torch import Tensor

import qkv
from qkv import kernels
from qkv.integrations.transformers import unpadding

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),  # of transformers' own making
]


def model(kind: str, head: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 99} | ({"num_key_value_heads": 2} if kind == "llama" else {})
    return head.from_config(transformers.AutoConfig.for_model(kind, **sizes, num_labels=3, pad_token_id=0)).eval()


def targets(keep: Tensor, prompt: int) -> Tensor:
    """Those of the real tokens of each row but its first few."""
    return IDS.masked_fill(~keep | (keep.cumsum(1) <= prompt), -100)


AS_IN = transformers.AutoModelForCausalLM
CASES: dict[str, tuple[Tensor, Tensor, bool]] = {
    "right": (RIGHT, targets(RIGHT, 0), True),
    "right, after a prompt": (RIGHT, targets(RIGHT, 2), True),
    "right, padding is a target": (RIGHT, IDS, False),
    "left": (LEFT, targets(LEFT, 0), False),
    "left, after a prompt of one": (LEFT, targets(LEFT, 1), True),
    "left, after a prompt": (LEFT, targets(LEFT, 2), True),
    "left, padding is a target": (LEFT, IDS, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_language_model(name: str) -> None:
    keep, labels, packs = CASES[name]
    theirs = model("llama", AS_IN)
    ours = qkv.accelerate(copy.deepcopy(theirs), unpad=True)
    want = theirs(IDS, attention_mask=keep.long(), labels=labels)
    scored = labels[:, 1:] != -100
    mean = F.cross_entropy(want.logits[:, :-1][scored].double(), labels[:, 1:][scored])
    with tokens_seen() as seen:
        got = ours(IDS, attention_mask=keep.long(), labels=labels)
        assert seen == [PACKED if packs else PADDED] * 2
        again = ours(IDS, keep.long(), None, None, None, labels)  # by position
        assert torch.equal(again.loss, got.loss) and seen[:2] == seen[2:]
        ours(IDS, attention_mask=keep.long())  # a call without labels
        assert seen[4:] == [PACKED] * 2
    for loss in (want.loss, got.loss):
        torch.testing.assert_close(loss.double(), mean, rtol=1e-5, atol=0)
    got.loss.backward()
    want.loss.backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("head", [transformers.AutoModelForMaskedLM, transformers.AutoModelForTokenClassification])
@pytest.mark.parametrize("keep", [LEFT, RIGHT], ids=["left", "right"])
def test_labels_of_the_token_itself(head: Any, keep: Tensor) -> None:
    theirs = model("bert", head)
    ours = qkv.accelerate(copy.deepcopy(theirs), unpad=True)
    for labels in (targets(keep, 0) % 3, targets(keep, 1)):
        labels = (labels % 3).masked_fill(labels == -100, -100)
        want = theirs(IDS, attention_mask=keep.long(), labels=labels).loss
        torch.testing.assert_close(ours(IDS, attention_mask=keep.long(), labels=labels).loss, want)


def test_labels_of_texts_do_not_matter() -> None:
    theirs = model("bert", transformers.AutoModelForSequenceClassification)
    ours = qkv.accelerate(copy.deepcopy(theirs), unpad=True)
    options = {"attention_mask": RIGHT.long(), "labels": torch.tensor([0, 1, 2, 0])}
    with tokens_seen() as seen:
        got = ours(IDS, **options)
    assert seen == [PACKED] * 2
    torch.testing.assert_close(got.loss, theirs(IDS, **options).loss)


def test_labels_are_forgotten_after_the_call_also_after_an_error() -> None:
    ours = qkv.accelerate(model("llama", AS_IN), unpad=True)
    options = {"attention_mask": LEFT.long(), "labels": targets(LEFT, 0)}
    ours(IDS, **options)
    assert not unpadding._calls.labels
    ours.lm_head.register_forward_pre_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours(IDS, **options)
    assert not unpadding._calls.labels and not unpadding._calls.packed


def test_unpad_by_itself_and_back() -> None:
    theirs = model("llama", AS_IN)
    ours = qkv.unpad(copy.deepcopy(theirs))
    options = {"attention_mask": LEFT.long(), "labels": targets(LEFT, 0)}
    torch.testing.assert_close(copy.deepcopy(ours)(IDS, **options).loss, theirs(IDS, **options).loss)
    qkv.unpad(ours, enabled=False)
    assert not ours._forward_hooks and not ours._forward_pre_hooks
