"""All families, and docs/transformers.md that lists them: `PYTHONPATH=tests python -m families.sweep [--check]`."""

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
attention through its interface, {working} run with `attn_implementation="qkv"` as they do with `"eager"`; the other
{left} are left out, each with its reason.

How a family is tried (`tests/families`): one rule shrinks the default configuration of its class; weights are random,
and large enough that attention is far from uniform. Outputs and the gradients of all parameters are compared with an
fp64 run of eager, and may be twice as far from it as eager and sdpa are in fp32, plus the rounding of a sum over the
width. Where the model takes an attention mask, this is done with padding on the left and on the right, and compared at
real tokens. Where it generates, {tokens} greedy tokens must be the same as eager's. *unpad*: the same holds, padding on
the right, where `qkv.integrations.transformers.unpadding.unpad` lets the model compute real tokens alone; it takes
effect in {unpadded} families.

*padding leaks*: what eager gives to queries that see no key (the mean of all values, where sdpa and qkv give 0) reaches
real tokens in this model; it was compared with an eager that gives 0 as well.
*error* is the largest error as a share of what is allowed.

## Families that work

| family | class | inputs | compared | error | notes |
|---|---|---|---|---|---|
"""

LEFT = """
## Families left out

For these the rule found no small configuration or no inputs on which eager runs and calls the interface.

| family | reason |
|---|---|
"""


def listed() -> dict[str, str]:
    """The families that the page says to work, and the class of each."""
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    names = {short(family): family for family in families()}
    return {names[name]: model for name, model in rows if name in names}


def page(outcomes: list[Outcome]) -> str:
    working = [outcome for outcome in outcomes if outcome.works]
    left = [outcome for outcome in outcomes if not outcome.works]
    head = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        total=len(outcomes),
        working=len(working),
        left=len(left),
        tokens=NEW_TOKENS,
        unpadded=sum("unpad" in outcome.checks for outcome in working),
    )
    rows = [
        f"| {short(o.family)} | `{o.model}` | {', '.join(o.inputs)} | {', '.join(o.checks)} | {o.worst:.2f} "
        f"| {_cell('; '.join(o.notes))} |"
        for o in working
    ]
    reasons = [f"| {short(o.family)} | {_cell(o.reason)} |" for o in left]
    return head + "\n".join(rows) + "\n" + LEFT + "\n".join(reasons) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:200]


def main() -> None:
    """Runs every family and writes the page, or with ``--check`` leaves it as it is."""
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
