"""Questions of fresh readers: each answer is two clicks from the start page at most.

One click leads to a page that the start page links to, the next to a heading of it, which its contents list.
"""

import re
from typing import NamedTuple

import pytest
from repository.test_docs import DOCS, _anchors, _links


class Question(NamedTuple):
    """What somebody wants to know, and where the answer is."""

    asked: str
    page: str
    anchor: str
    """of a heading; empty for what stands above the first"""
    answer: str
    """words of it, a pattern"""


QUESTIONS = (
    Question(
        "Which cache for a context of 128k tokens?",
        "guides/cache.md",
        "for-a-context-of-128k-tokens",
        r"int8.*windows in some layers.*fewer KV heads",
    ),
    Question("What does window=512 count?", "guides/windows.md", "what-does-window512-count", "512 keys at most, with"),
    Question(
        "How do I convert only layers 3 to 9?",
        "guides/windows.md",
        "write-the-model",
        "qkv convert MODEL OUT --window 256 --layers 3-9",
    ),
    Question(
        "I have a boolean mask from nn.MultiheadAttention: do I invert it?",
        "from/torch.md",
        "differences",
        r"boolean masks \| True = ignore \| True = may attend",
    ),
    Question(
        "A call says that my queries need an offset: which one, after 100 cached tokens?",
        "why/offsets.md",
        "",
        r"at the cached length \| what the cache returns",
    ),
    Question(
        "I run code with window_size=(4096, 0) of flash-attn: what is that here?",
        "from/flash-attn.md",
        "",
        r"`window_size=\(W, 0\)` is `window=W \+ 1`",
    ),
    Question(
        "How much memory does the KV cache of my model take?",
        "guides/cache.md",
        "bytes",
        r"2 \* layers \* KV heads \* head_dim",
    ),
    Question(
        "Is my call on the fast kernel, and if not, why not?",
        "guides/speed.md",
        "which-backend-runs",
        r"qkv\.explain\(",
    ),
    Question(
        "The model that I converted writes nonsense: is that a bug, and what now?",
        "guides/kv-heads.md",
        "what-can-go-wrong",
        "writes nonsense.*expected before training",
    ),
    Question(
        "Training stopped in the middle: do I start again?",
        "guides/kv-heads.md",
        "train",
        "qkv uptrain.*resumes after an interruption",
    ),
    Question(
        "Twenty users share a system prompt: is it stored twenty times?",
        "guides/serve.md",
        "a-prompt-that-all-share",
        "Six full pages are stored once",
    ),
    Question(
        "Does it work with torch.compile, FSDP and autocast?",
        "guides/train.md",
        "compilation-checkpointing-autocast",
        r"fullgraph=True\)` \| yes.*autocast.*yes.*FSDP, DDP \| yes",
    ),
    Question(
        "How do I get attention weights?",
        "see.md",
        "attention-weights",
        r"qkv\.attention_weights\(q, k.*layer\.attention_weights\(",
    ),
    Question(
        "How do I pad prompts on the left?",
        "guides/cache.md",
        "prompts-of-different-lengths",
        r'padding_side="left".*mask=qkv\.Mask\.padding\(keep\), cache=cache',
    ),
    Question(
        "How do I use it on several machines?",
        "guides/many-machines.md",
        "",
        r"`qkv\.parallel\.Heads\(\)`.*Tokens\.best.*torchrun --nnodes 4",
    ),
    Question(
        "What is not faster?", "guides/speed.md", "what-is-not-faster", r"fp64 \| no kernel.*a GPU \| qkv has no kernel"
    ),
    Question(
        "How do I turn it off?",
        "guides/models.md",
        "turn-it-off",
        r"`qkv\.accelerate\(model, enabled=False\)`.*`qkv\.unregister\(\)`",
    ),
    Question(
        "Which instruction set runs, and how do I choose another?",
        "guides/speed.md",
        "which-instruction-set-runs",
        r"`avx2`.*qkv --version.*QKV_ISA=avx2",
    ),
    Question(
        "My model is from x-transformers with kv_heads: may I load its weights?",
        "from/x-transformers.md",
        "weights",
        "the order of query heads",
    ),
    Question(
        "I get other numbers on another machine: is something broken?",
        "why/same-bits.md",
        "",
        "other bits.*another processor with another instruction set",
    ),
)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.asked)
def test_the_answer_is_two_clicks_away(question: Question) -> None:
    page = DOCS / question.page
    start = (DOCS / "index.md").read_text()
    visible = re.sub(r"^```\{toctree\}\n.*?^```", "", start, flags=re.MULTILINE | re.DOTALL)
    assert question.page in _links(visible), "the start page links to it in its text"
    assert re.search(question.answer, _section(page.read_text(), question.anchor), flags=re.DOTALL)
    assert not question.anchor or question.anchor in _anchors(page)


def _section(text: str, anchor: str) -> str:
    """What stands below a heading, up to the next; without one, what stands before the first of second order."""
    parts = re.split(r"^##+ (.*)$", re.sub(r"(?s)```.*?```", _kept, text), flags=re.MULTILINE)
    if not anchor:
        return parts[0]
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in parts[1::2]]
    return parts[2 + 2 * slugs.index(anchor)]


def _kept(fence: re.Match[str]) -> str:
    """A fence whose lines cannot be taken for headings."""
    return re.sub(r"^#", " #", fence[0], flags=re.MULTILINE)


def test_there_are_enough_questions_on_enough_pages() -> None:
    assert len(QUESTIONS) >= 20 and len({question.page for question in QUESTIONS}) >= 11


def test_questions_of_the_start_page_lead_to_answers_that_are_asked_for_here() -> None:
    table = _section((DOCS / "index.md").read_text(), "questions")
    links = re.findall(r"^\| [^|]+\? \| \[[^]]+\]\(([^)#]+)(?:#([^)]+))?\) \|$", table, flags=re.MULTILINE)
    assert len(links) == 10
    assert set(links) <= {(question.page, question.anchor) for question in QUESTIONS}
