"""Writes the page of the study from the results."""

import math
from pathlib import Path
from typing import Any

from qkv.models.kv_cache_size import readable_bytes

NAMES = {"original": "3 KV heads, original", "mean": "1 KV head, mean", "aligned": "1 KV head, aligned"}


def write(results: dict[str, Any], page: Path) -> None:
    """Writes the page."""
    models = {name: results["models"][name] for name in NAMES if name in results["models"]}
    parts = (opening(results), losses(models), speed(results), texts(models), machine(results["machine"]))
    page.write_text("\n\n".join(parts) + "\n")


def opening(results: dict[str, Any]) -> str:
    """The setup of the experiment."""
    original = results["models"]["original"]
    return f"""# SmolLM2-135M with one key/value head

<!-- Written by run.py. -->

SmolLM2-135M-Instruct has 9 query heads on 3 key/value heads. `qkv convert` pools them to a single one, and
`qkv uptrain` trains the result for {results["minutes"]:g} minutes on a CPU: {original["steps"]} steps,
{original["tokens"]:,} tokens of Shakespeare's works, `{results["training"]}`. The original is trained for as many steps
as well: the text differs from the model's training data, so training lowers the loss even without conversion.

```
pip install -e '.[cli]'
python studies/multi_query_smollm2/run.py            # downloads weights and text once
python studies/multi_query_smollm2/run.py --report   # this page from results.json
```"""


def losses(models: dict[str, Any]) -> str:
    """Loss and perplexity before and after training, and the divergence after conversion."""
    rows = []
    for name, model in models.items():
        before, after = model["losses"]["converted"], model["losses"]["uptrained"]
        kl, agreement = model["divergence"]["kl"], model["divergence"]["agreement"]
        cells = (f"{before:.3f}", f"{math.exp(before):,.1f}", f"{after:.3f}", f"{math.exp(after):,.1f}")
        rows.append((NAMES[name], f"{kl:.3f}", f"{agreement:.1%}", *cells, f"{model['tokens_per_second']:,}"))
    held_out = models["original"]["held_out_tokens"]
    kept = [closed(models, name) for name in models if name != "original"]
    titles = ("model", "KL", "agreement", "loss", "perplexity", "loss, trained", "perplexity, trained", "tokens/s")
    return (
        f"## Predictions\n\nOn {held_out:,} held-out tokens of King Lear. KL and agreement compare a conversion with "
        "the original before training: KL(original || converted) in nats per token, and the share of tokens with the "
        "same most probable prediction. The last column is the training speed.\n\n"
        f"{table(titles, rows)}\n\n{' '.join(kept)}"
    )


def closed(models: dict[str, Any], name: str) -> str:
    """The gap between a conversion and the original, before and after training both."""
    before, after = (
        models[name]["losses"][when] - models["original"]["losses"][when] for when in ("converted", "uptrained")
    )
    return f"{NAMES[name]}: the gap to the original is {before:.3f} nats before training and {after:.3f} after it."


def speed(results: dict[str, Any]) -> str:
    """Cache size and time of a decoding step."""
    times = results["decoding"]
    rows = (
        (
            NAMES[name].partition(",")[0],
            readable_bytes(results["models"][name]["kv_bytes_per_token"]),
            f"{time['median_us'] / 1e3:.1f} ms",
            f"{time['low_us'] / 1e3:.1f} to {time['high_us'] / 1e3:.1f} ms",
        )
        for name, time in times.items()
    )
    titles = ("model", "KV cache per token", "decoding step", "quartiles")
    return (
        f"## Decoding\n\nIn float32, a step with {results['context']:,} cached tokens; medians of interleaved rounds.\n"
        f"\n{table(titles, rows)}"
    )


def texts(models: dict[str, Any]) -> str:
    """What each model generates from the same prompt."""
    parts = ["## Samples", 'Greedy, after "KING. My lords, what news is this from France? Speak, for".']
    for name, model in models.items():
        for when, text in zip(("", ", trained"), model["texts"], strict=True):
            parts.append(f"{NAMES[name]}{when}:\n\n```\n{text.strip()}\n```")
    return "\n\n".join(parts)


def machine(m: dict[str, Any]) -> str:
    """The machine and versions."""
    return (
        f"{m['date']}, {m['threads']} threads on {m['cores']} cores of {m['cpu']}, kernel for {m['kernel']}, "
        f"qkv {m['qkv']}, torch {m['torch']}."
    )


def table(titles: tuple[str, ...], rows: Any) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
