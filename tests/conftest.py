"""Fixtures and hooks of all tests: instruction sets, the network, the order, and that no test is skipped silently."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; tests of threads set their own number
# A cache of the compiler: to find symbolic sizes in it takes longer than to compute with them.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import ctypes
import gc
import importlib.util
import platform
import re
import socket
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

SKIPS = {
    "needs a CUDA device": lambda: not _torch().cuda.is_available(),
    "the kernel is of another architecture": lambda: platform.machine() not in ("x86_64", "AMD64"),
    "the script builds wheels for Linux": lambda: sys.platform != "linux",
    "limits of address space are tested on Linux": lambda: sys.platform != "linux",
    "memory is measured on Linux": lambda: sys.platform != "linux",
    "memory is measured in forked processes": lambda: not hasattr(os, "fork"),
    "this torch has no varlen_attn": lambda: importlib.util.find_spec("torch.nn.attention.varlen") is None,
    "torch's OpenMP is no global library": lambda: (
        sys.platform == "win32" or not hasattr(ctypes.CDLL(None), "GOMP_parallel")
    ),
    "this torch has no DLPack exchange functions": lambda: not hasattr(_torch().Tensor, "__dlpack_c_exchange_api__"),
    "needs playwright, axe-playwright-python and Chromium": lambda: not _has_browser(),
    "needs /dev/full": lambda: sys.platform != "linux",
    "this system does not allow mounting": lambda: os.system("unshare --mount --map-root-user true 2>/dev/null") != 0,
}
"""The reasons for which a test may be skipped, up to a colon, and where each is true. Any other skip fails."""


def _has_browser() -> bool:
    from analysis.browser import is_here

    return is_here()


def _torch() -> Any:
    """Imported where it is used: the process that hands tests to workers starts in seconds less without it."""
    import torch

    return torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders tests of the same case one after another, so that a worker computes the oracle's answer once."""
    places = [place for place, item in enumerate(items) if _case(item)]
    ordered = sorted((items[place] for place in places), key=lambda item: (str(item.path), _case(item)))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without garbage collection, which would look through modules and tests again and again: all of them stay."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def _case(item: pytest.Item) -> str:
    """The name of the case of the grid that a test takes, or nothing."""
    from cases import Case

    case = _parameters(item).get("case")
    return case.name if isinstance(case, Case) else ""


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _refuse_unknown_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _refuse_unknown_skip(report)
    return report


def _refuse_unknown_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = re.sub(r"^Skipped: ", "", report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
    if not SKIPS.get(reason.partition(":")[0], lambda: False)():
        report.outcome = "failed"
        report.longrepr = f"skipped, for a reason that is not true here or not in SKIPS of tests/conftest.py: {reason}"


@pytest.fixture(autouse=True)
def solver_at_work(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes a ``solver`` runs on its instruction set, gradients that it takes included."""
    from solver import Solver

    solver = _parameters(request.node).get("solver")
    if not isinstance(solver, Solver):
        yield
        return
    with solver.at_work():
        yield


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests reach this machine alone, but for those that are marked ``network``."""
    if request.node.get_closest_marker("network"):
        yield
        return
    reached: list[object] = []
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            reached.append(address)
            raise ConnectionRefusedError(f"{address} is not this machine; mark the test `network`")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    yield
    assert not reached, f"the test would have reached {reached}; mark it `network`"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process only, initialised by a file, since a port may be in use."""
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection: what has gone has gone with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
