"""The report of `qkv convert`, as text and as a JSON document."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import qkv
from qkv.cli.printing import counted, print_command, print_line, print_table
from qkv.cli.reports import verdict
from qkv.cli.reports.layers import DTYPES, LENGTH, describe, describe_kinds, kv_bytes, layers_as_json
from qkv.convert import CheckpointPlan, Inspection
from qkv.convert.files.safetensors import TORCH_DTYPES
from qkv.integrations.transformers.latent_decoders import TYPE_PREFIX
from qkv.models.divergence import Compared
from qkv.models.kv_cache_size import readable_bytes

SAMPLE_WINDOWS = 4
"""Windows that a text has at least on which they are measured."""


class ConvertReport(NamedTuple):
    """A conversion, and where it was written."""

    model: str
    out: Path | None
    """None if nothing was written."""
    plan: CheckpointPlan
    before: Inspection
    after: Inspection
    window: int | None
    """That was set; None without."""

    @property
    def changed(self) -> int:
        """Tensors that are not copied."""
        return sum(output.compute is not None for output in self.plan.conversion.outputs.values())

    @property
    def dtype(self) -> str:
        """Of the result's keys and values."""
        return DTYPES[self.after.dtype]


def as_json(report: ConvertReport, compared: Compared | str, command: list[str]) -> dict[str, Any]:
    """The report for `json.dumps`; sizes in bytes, losses in nats a token."""
    plan = report.plan
    return {
        "versions": {"qkv": qkv.__version__},
        "model": report.model,
        "out": None if report.out is None else str(report.out),
        "pooling": plan.conversion.pooling,
        "tensors": {"changed": report.changed, "all": len(plan.conversion.outputs)},
        "copied": list(map(str, plan.copied)),
        "not_copied": list(map(str, (*plan.skipped_weights, *plan.skipped_links))),
        "before": _inspection_as_json(report, report.before),
        "after": _inspection_as_json(report, report.after),
        "compared": _compared_as_json(compared),
        "usable": _is_usable(report, compared),
        "next": command,
    }


def _inspection_as_json(report: ConvertReport, found: Inspection) -> dict[str, Any]:
    width = TORCH_DTYPES[report.after.dtype].itemsize
    return {
        "model_type": found.model_type,
        "encoder": layers_as_json(found.encoder),
        "layers": layers_as_json(found.layers),
        "parameters": found.parameters,
        "attention_parameters": found.attention_parameters,
        "kv_cache": {
            "dtype": report.dtype,
            "bytes_per_token": kv_bytes(found, 1, 1, width),
            "length": LENGTH,
            "bytes": kv_bytes(found, LENGTH, 1, width),
        },
    }


def _compared_as_json(compared: Compared | str) -> dict[str, Any]:
    if isinstance(compared, str):
        return {"why_not": compared}
    found = compared.divergence
    return {
        "text": compared.sample,
        "tokens": found.num_tokens,
        "loss": {"before": verdict.finite(found.loss_before), "after": verdict.finite(found.loss_after)},
        "kl": verdict.finite(found.kl),
        "agreement": found.agreement,
    }


def print_changes(report: ConvertReport, console: Console) -> None:
    """Prints what was changed, and the sizes before and after."""
    plan, before, after = report.plan, report.before, report.after
    title = f"would convert {report.model}" if report.out is None else f"wrote {report.out}"
    console.print(Text(title, style="bold"), soft_wrap=True)  # whole, whatever the length of a name
    for found, becomes in ((before, ""), (after, "becomes ")):
        own = [layer for layer in found.layers if not layer.cross]
        for kind in [describe(own[0])] if len(set(own)) == 1 else describe_kinds(own):
            print_line(f"  {becomes}{kind}", console)
    if plan.conversion.pooling is not None:
        print_line(f"  heads pooled: {plan.conversion.pooling}", console)
    tensors, copied = counted(len(plan.conversion.outputs), "tensor"), counted(len(plan.copied), "other file")
    print_line(f"  {report.changed} of {tensors} changed, {copied} copied", console)
    if before.model_type != after.model_type:
        print_line(f"  model type {before.model_type} becomes {after.model_type}", console)
    if plan.skipped_weights:
        names = ", ".join(map(str, plan.skipped_weights))
        print_line(f"  not copied (weights of the original model): {names}", console)
    if plan.skipped_links:
        names = ", ".join(map(str, plan.skipped_links))
        print_line(f"  not copied (links to folders, dangling links): {names}", console)
    console.print()
    print_table(f"Parameters, and the KV cache in {report.dtype}", _sizes(report), console)


def _sizes(report: ConvertReport) -> Table:
    before, after = report.before, report.after
    table = Table("", box=None, pad_edge=False)
    for title in ("before", "after", "of before"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, old, new in (
        ("  parameters", before.parameters, after.parameters),
        ("  in attention", before.attention_parameters, after.attention_parameters),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.1%}")
    lengths = {"  KV cache a token": 1}
    if any(layer.window != other.window for layer, other in zip(before.layers, after.layers, strict=True)):
        lengths[f"  KV cache of {LENGTH:,} tokens"] = LENGTH
    width = TORCH_DTYPES[after.dtype].itemsize
    for name, length in lengths.items():
        old, new = (kv_bytes(found, length, 1, width) for found in (before, after))
        table.add_row(name, readable_bytes(old), readable_bytes(new), f"{new / old:.1%}")
    return table


def print_comparison(report: ConvertReport, compared: Compared | str, command: list[str], console: Console) -> None:
    """Prints how far predictions diverge, whether the result is usable, and the next command."""
    console.print()
    if isinstance(compared, str):
        print_line(f"  predictions not compared: {compared}", console)
    else:
        found = compared.divergence
        tokens = counted(found.num_tokens, "token")
        print_line(f"  predictions of {tokens} of {compared.sample}", console)
        for line in (
            f"loss {found.loss_before:.3f} -> {found.loss_after:.3f} nats a token",
            f"perplexity {found.perplexity_before:,.1f} -> {found.perplexity_after:,.1f}",
            f"KL divergence {found.kl:.3f} nats a token, same most probable token: {found.agreement:.1%}",
        ):
            print_line(f"    {line}", console)
    print_line(f"  {describe_usable(report, compared)}", console, "bold")
    console.print()
    print_line(_about_next(report, compared), console)
    print_command(command, console)


def describe_usable(report: ConvertReport, compared: Compared | str) -> str:
    """Whether the result is usable, in words."""
    if isinstance(compared, str):
        return "not known whether it is usable"
    if _cuts_nothing(report, compared):
        return (
            f"not known whether it is usable: a window of {report.window} cuts nothing of "
            f"{counted(compared.length, 'token')}"
        )
    return verdict.describe(compared.divergence.loss_before, compared.divergence.loss_after, "until trained")


def _is_usable(report: ConvertReport, compared: Compared | str) -> bool | None:
    if isinstance(compared, str) or _cuts_nothing(report, compared):
        return None
    return verdict.is_usable(compared.divergence.loss_before, compared.divergence.loss_after)


def _cuts_nothing(report: ConvertReport, compared: Compared) -> bool:
    return report.window is not None and report.window >= compared.length


def _is_encoder_decoder(report: ConvertReport) -> bool:
    return bool(report.after.encoder)


def next_command(report: ConvertReport, compared: Compared | str) -> list[str]:
    """What to do with the result that was written, as arguments."""
    if report.out is None:
        raise AssertionError("a dry run has no result")
    if _is_encoder_decoder(report):
        return ["qkv", "inspect", str(report.out)]
    if not isinstance(compared, str):
        if report.window is not None and _cuts_nothing(report, compared):
            longer = str(SAMPLE_WINDOWS * report.window)
            return ["qkv", "see", report.model, "--against", str(report.out), "--text", "TEXT", "--tokens", longer]
        if _is_unchanged(compared):
            is_latent = report.after.model_type.startswith(TYPE_PREFIX)  # has no KV heads for the demo to compare
            return ["qkv", "inspect", str(report.out)] if is_latent else verdict.demo_command(report.out)
    return verdict.uptrain_command(report.out, report.model)


def _is_unchanged(compared: Compared) -> bool:
    return abs(compared.increase) < verdict.SAME


def _about_next(report: ConvertReport, compared: Compared | str) -> str:
    """The line above the next command."""
    if report.out is None:
        return "Next, to write it:"
    if _is_encoder_decoder(report):
        return (
            "qkv uptrain trains causal language models; train this one by transformers' Seq2SeqTrainer, after "
            "qkv.integrations.transformers.grouped_decoders.register(). Next:"
        )
    if not isinstance(compared, str):
        if _cuts_nothing(report, compared):
            return "Next, to compare them on a longer text:"
        if _is_unchanged(compared):
            return "Next:"
    return "Next, to train it on TEXT, a file like what it will read, of a million characters or more:"
