"""Tests all families and writes docs/transformers.md: `PYTHONPATH=tests python -m families.sweep [--check]`."""

import logging
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from families.compare import NEW_TOKENS, Outcome, judge
from families.registry import families, short

from qkv.integrations.transformers.attention import register

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"

HEAD = """\
# Model families of transformers

Written by `make families` with transformers {version}, torch {torch}. Of the {total} modules of transformers that call
attention through its interface, {working} give the same results with `attn_implementation="qkv"` as with `"eager"`; the
other {untested} could not be tested, for the reasons listed.

How a family is tested (`tests/families`): the default configuration of its class is shrunk by a fixed rule; weights are
random, and large enough that attention is far from uniform. Outputs and the gradients of all parameters are compared
with an fp64 run of eager; the error may be at most twice that of eager and sdpa in fp32, plus the rounding of a sum
over the width. Models that take an attention mask are tested with left and right padding, and compared at real tokens.
Models that generate must give the same {tokens} greedy tokens as eager. *unpad*: tested with
`qkv.unpad` and right padding as well; it takes effect in {unpadded} families.

*padding leaks*: in this model, the output of eager for queries without visible keys (the mean of all values, where sdpa
and qkv give 0) reaches real tokens; it was compared with an eager that gives 0.
*error* is the largest error relative to the allowed one.

## What a model gets

`qkv.accelerate(model)` takes the following in one model, and `accelerate(model, enabled=False)` gives it back.
`attn_implementation="qkv"` after `qkv.register()` takes the first two. `qkv.report(model)` says what was taken of a
model, what not and why, and counts calls.

- **Attention** of models that use the AttentionInterface. Not of models with attention of their own, nor with
  `output_attentions` in the configuration.
- **The cache** that a model makes itself, in `generate` and in a call with `use_cache`: layers with and without
  windows, of latents, and of decoders in encoder-decoder models. Not one that is passed or named
  (`cache_implementation`). Within a compiled or traced call none is made: `generate` makes it before, and so do you, by
  `QKVCache(model)`. Layers of linear attention, with indexers, or of a model's own class stay transformers' own, beside
  ours in one cache.
- **Latents** of attention as in DeepSeek-V3: read as they are cached, where a module expands them as ours does.
- **Linear layers**: each `nn.Linear`, with its hooks. Not subclasses, quantised layers, `Conv1D`, and those with a
  forward that a library has set.
- **Padding**, by `unpad=True`: layers in which only attention mixes tokens; with a cache, the call that fills an empty
  one. Not later calls, int8 and static caches, and modules that read their cache by other means than `update`.

The cache of one call: `cache_implementation="qkv"` (with `cache_config={{"dtype": "int8"}}`) on any attention,
`"dynamic"` for transformers' own. That of all models on "qkv": `register(cache="int8")`, `register(cache=False)`.

## Families that work

| family | class | inputs | compared | error | notes |
|---|---|---|---|---|---|
"""

UNTESTED = """
## Families that could not be tested

The rule finds no small configuration, or no inputs on which eager runs and calls the interface.

| family | reason |
|---|---|
"""


def listed() -> dict[str, str]:
    """The working families on the page, and their model classes."""
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    names = {short(family): family for family in families()}
    return {names[name]: model for name, model in rows if name in names}


def page(outcomes: list[Outcome]) -> str:
    working = [outcome for outcome in outcomes if outcome.works]
    untested = [outcome for outcome in outcomes if not outcome.works]
    head = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        total=len(outcomes),
        working=len(working),
        untested=len(untested),
        tokens=NEW_TOKENS,
        unpadded=sum("unpad" in outcome.checks for outcome in working),
    )
    rows = [
        f"| {short(o.family)} | `{o.model}` | {', '.join(o.inputs)} | {', '.join(o.checks)} | {o.worst:.2f} "
        f"| {_cell('; '.join(o.notes))} |"
        for o in working
    ]
    reasons = [f"| {short(o.family)} | {_cell(o.reason)} |" for o in untested]
    return head + "\n".join(rows) + "\n" + UNTESTED + "\n".join(reasons) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:200]


def main() -> None:
    """Tests every family and writes the page; with ``--check``, only tests."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    register()
    outcomes = []
    for family in families():
        outcome = judge(family)
        outcomes.append(outcome)
        print(f"{short(family):32} {'works' if outcome.works else outcome.reason[:120]}", flush=True)
    lost = listed().keys() - {outcome.family for outcome in outcomes if outcome.works}
    broken = [outcome for outcome in outcomes if outcome.model and not outcome.works]
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page(outcomes))
    print(f"{sum(o.works for o in outcomes)} of {len(outcomes)} work; no longer: {', '.join(lost) or 'none'}")
    sys.exit(len(broken) + len(lost) > 0)


if __name__ == "__main__":
    main()
