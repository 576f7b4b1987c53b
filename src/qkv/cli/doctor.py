"""`qkv doctor`: what this installation runs on, and what it lacks."""

import importlib.metadata
import json
import os
import platform
import sys
from typing import Annotated, Any, NamedTuple

import torch
import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qkv
from qkv import kernels
from qkv.cli.printing import print_line, print_table
from qkv.models.language_model import quiet

EXTRAS = ("", "transformers", "plots", "cli")
"""The extras whose packages are listed; the others are for work on qkv."""


class Version(NamedTuple):
    """The version of Python or of a package, and those that pyproject.toml admits, which are those tested."""

    name: str
    found: str | None
    """None if it is not installed"""
    tested: str

    @property
    def is_tested(self) -> bool:
        """Whether it is installed, in a version that is admitted."""
        return self.found is not None and SpecifierSet(self.tested).contains(self.found, prereleases=True)


def doctor(
    as_document: Annotated[bool, typer.Option("--json", help="Print only a JSON document on standard output.")] = False,
) -> None:
    """Show what qkv runs on: kernel, instruction set, threads, versions.

    Prints why there is no kernel, if so; the versions of Python and of the packages that qkv works with, and whether
    they are in the range that is tested; and what `register` adds to transformers. Exits with 0 whatever it finds.
    """
    found = {
        "qkv": qkv.__version__,
        "kernel": _kernel(),
        "threads": {"torch": torch.get_num_threads(), "cores": _cores()},
        "versions": [{**each._asdict(), "is_tested": each.is_tested} for each in versions()],
        "transformers": _registered(),
    }
    if as_document:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _print(found, Console(file=sys.stdout))


def versions() -> list[Version]:
    """Python, and the packages that qkv requires, alone and with its extras."""
    about = importlib.metadata.metadata("qkv")
    found = [Version("python", platform.python_version(), about["Requires-Python"])]
    for text in importlib.metadata.requires("qkv") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if requirement.name != "qkv" and any(marker is None or marker.evaluate({"extra": extra}) for extra in EXTRAS):
            found.append(Version(requirement.name, _installed(requirement.name), _range(requirement.specifier)))
    return found


def _range(specifier: SpecifierSet) -> str:
    """As in pyproject.toml, the lower bound first.

    Example:
        >>> _range(SpecifierSet("<3,>=2.9"))
        '>=2.9,<3'
    """
    return ",".join(sorted(map(str, specifier), reverse=True))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kernel() -> dict[str, Any]:
    absence = kernels.absence()
    return {
        "isa": None if absence else kernels.loaded().isa,
        "compiler": None if absence else kernels.loaded().compiler,
        "supported": kernels.supported_isas(),
        "has_fast_path": absence is None and kernels.loaded().fast_forward is not None,
        "absence": absence,
    }


def _registered() -> dict[str, Any]:
    """What transformers has of qkv after registration in this process, or the error."""
    try:
        with quiet():
            from transformers import CONFIG_MAPPING, AttentionInterface

            from qkv.integrations.transformers import grouped_decoders, latent_decoders, register

            register()
            grouped_decoders.register()
            latent_decoders.register()
    except Exception as error:  # whatever an untested version raises is what is reported
        return {"attention": [], "model_types": [], "error": f"{type(error).__name__}: {error}"}
    return {
        "attention": [name for name in AttentionInterface().valid_keys() if name == "qkv"],
        "model_types": sorted(name for name in CONFIG_MAPPING if name.startswith("qkv_")),
        "error": None,
    }


def _print(found: dict[str, Any], console: Console) -> None:
    kernel, threads, registered = found["kernel"], found["threads"], found["transformers"]
    console.print(Text(f"qkv {found['qkv']}", style="bold"))
    absent = f"none, torch's kernels run instead: {kernel['absence']}"
    lines = {
        "kernel": absent if kernel["absence"] else f"{kernel['isa']} (here: {', '.join(kernel['supported'])})",
        "built by": kernel["compiler"] or "nothing",
        "fast path": "yes" if kernel["has_fast_path"] else "no, it takes the kernel and DLPack's functions of torch",
        "threads": f"{threads['torch']} of torch, {threads['cores']} cores",
        "attention": ", ".join(registered["attention"]) or "not registered",
        "model types": ", ".join(registered["model_types"]) or "none",
    }
    if registered["error"]:
        lines["transformers"] = registered["error"]
    for name, line in lines.items():
        print_line(f"  {name:<12} {line}", console)
    console.print()
    table = Table(box=None, pad_edge=False)
    for title in ("", "installed", "tested", ""):
        table.add_column(title, no_wrap=True)
    for each in found["versions"]:
        remark = "" if each["is_tested"] else "not tested" if each["found"] else "missing"
        table.add_row(f"  {each['name']}", each["found"] or "-", each["tested"], Text(remark, style="red"))
    print_table("Versions", table, console)
