"""SmolLM2-135M over 4 ranks: its logits of a long text, and its greedy tokens with a sharded cache."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from budget import assert_within_budget
from parallel.ranks import Ranks, mesh
from parallel.sharded import joined
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM

import qkv
from qkv import Mask, parallel
from qkv.cache import Cache
from qkv.models.default_weights import SMOLLM2_135M, cached_weights
from qkv.models.language_model import load
from qkv.models.progress import Progress
from qkv.models.shakespeare import works
from qkv.models.source import gguf_source
from qkv.parallel.runs import zigzag

pytestmark = [pytest.mark.long, pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # of transformers' own
RANKS, TOKENS = 4, 4096
PROMPT, STEPS, BLOCK = 448, 64, 16
"""The blocks of the prompt and of the steps are as many on each rank."""


class Files(NamedTuple):
    """The model in a folder, and a text."""

    folder: Path
    ids: Tensor


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = load(gguf_source(cached_weights(SMOLLM2_135M, Progress())), torch.float32, Progress())
    loaded.model.save_pretrained(folder)
    _, held_out = works()
    return Files(folder, loaded.tokenizer(held_out[: 8 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Four ranks that may wait for each other as long as a model takes."""
    started = Ranks(RANKS, timeout=1800)
    yield started
    started.stop()


def opened(folder: Path, attention: str) -> Any:
    """The model in fp32."""
    qkv.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


@torch.no_grad()
def states_of_rank(folder: Path, ids: Tensor) -> Tensor:
    """The last hidden states of this rank's tokens."""
    model, ranks = opened(folder, "qkv").model, mesh()
    parallelize_module(model, ranks, {"layers.*.self_attn": parallel.Context()})
    tokens = parallel.Tokens.best(ids.shape[1], ranks, Mask.causal())
    with parallel.over(tokens):
        states: Tensor = model(tokens.take(ids), position_ids=tokens.positions[None], use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def test_logits_are_those_of_one_process(ranks: Ranks, files: Files) -> None:
    """Hidden states come from ranks; the head, which reads each token by itself, is applied here."""
    found = joined(ranks.run(states_of_rank, *files), zigzag(TOKENS, RANKS), dim=1)
    model = opened(files.folder, "sdpa")
    sdpa = model.model(files.ids, use_cache=False).last_hidden_state
    head = copy.deepcopy(model.lm_head)
    exact = model.double().model(files.ids, use_cache=False).last_hidden_state
    errors = []
    for part in range(0, TOKENS, 512):
        rows = slice(part, part + 512)
        ours, theirs = head(found[:, rows]), head(sdpa[:, rows])
        want = model.lm_head(exact[:, rows])
        assert_within_budget(ours, want, theirs, f"logits {rows}")
        errors.append([(one.double() - want).abs().max().item() for one in (ours, theirs)])
    worst = torch.tensor(errors).amax(0).tolist()
    print(f"largest errors of logits: {worst[0]:.2g} over {RANKS} ranks, {worst[1]:.2g} by sdpa in one process")


def greedy(folder: Path, ids: Tensor, make_cache: Callable[[], Cache]) -> tuple[list[int], int]:
    """The most likely tokens after a prompt, one after the other, and the bytes of all caches."""
    model = opened(folder, "qkv")
    blocks: list[tuple[nn.Module, nn.Module, Cache]] = [
        (block, qkv.CausalAttention.from_transformers(block.self_attn).eval(), make_cache())
        for block in model.model.layers
    ]
    written: list[int] = []
    with torch.no_grad():
        while len(written) < STEPS:
            x = model.model.embed_tokens(torch.tensor([written[-1:]]) if written else ids)
            for block, layer, cache in blocks:
                x = x + layer(block.input_layernorm(x), cache=cache)
                x = x + block.mlp(block.post_attention_layernorm(x))
            written.append(int(model.lm_head(model.model.norm(x[:, -1])).argmax()))
    return written, sum(cache.nbytes for _, _, cache in blocks)


def greedy_over_ranks(folder: Path, ids: Tensor) -> tuple[list[int], int]:
    """The same on this rank, with its part of the keys."""
    ranks = mesh()
    return greedy(folder, ids, lambda: parallel.ShardedKVCache(ranks, block=BLOCK, capacity=PROMPT + STEPS))


def test_greedy_tokens_with_a_sharded_cache_are_those_of_one_process(ranks: Ranks, files: Files) -> None:
    """Capacities are given, so that memory does not grow by halves: what is allocated is the peak."""
    prompt = files.ids[:, :PROMPT]
    written, whole_bytes = greedy(files.folder, prompt, lambda: qkv.KVCache(capacity=PROMPT + STEPS))
    for tokens, nbytes in ranks.run(greedy_over_ranks, files.folder, prompt):
        assert tokens == written
        assert nbytes * RANKS == whole_bytes
    with torch.no_grad():  # by sdpa, in one pass
        model = opened(files.folder, "sdpa")
        logits = model(torch.cat([prompt, torch.tensor([written])], dim=1)).logits[0, PROMPT - 1 : -1]
    assert logits.argmax(-1).tolist() == written
