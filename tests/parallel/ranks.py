"""Real processes of a gloo group, started once for each number of ranks, to which tests send functions."""

import contextlib
import functools
import gc
import multiprocessing
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 30.0
"""Seconds after which a collective that a rank does not join is an error."""

PRELOADED = [
    *("torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"),
    *("torch._dynamo.backends.debugging", "torch._inductor.compile_fx", "transformers.models.mistral.modeling_mistral"),
]
"""What takes seconds to import, once for all ranks; nothing that imports qkv, of which a test may have another copy."""


class Failure(NamedTuple):
    """What a rank raised."""

    kind: str
    message: str
    trace: str


class Ranks:
    """Processes with one rank each. A function that is sent to them is found by its name, as by pickle."""

    def __init__(self, count: int, timeout: float = TIMEOUT) -> None:
        self.count, self.timeout = count, timeout
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._folder = ""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on each rank. Raises AssertionError if one fails."""
        results = self.try_run(function, *args)
        failed = [f"rank {rank}:\n{one.trace}" for rank, one in enumerate(results) if isinstance(one, Failure)]
        assert not failed, "\n".join(failed)
        return results

    def try_run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`, with a `Failure` for each rank that raises or is gone."""
        results = self._results(function, args)
        if len({one[:2] if isinstance(one, Failure) else None for one in results}) > 1:
            self.stop()  # some may stand at another collective than the others
        return results

    def refused(self, function: Callable[..., Any], *args: Any) -> list[Failure]:
        """The errors of a call that all ranks refuse before a collective, so that they go on, whatever each names."""
        results = self._results(function, args)
        failures = [one for one in results if isinstance(one, Failure) and one.kind in ("ValueError", "TypeError")]
        if len(failures) < self.count:
            self.stop()
            raise AssertionError(f"refused by {len(failures)} of {self.count} ranks: {results}")
        return failures

    def _results(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self._start()
        message = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(message)
        return [self._receive(connection) for connection in self._connections]

    def _receive(self, connection: Connection) -> Any:
        try:
            if connection.poll(self.timeout + 240):  # compilers take minutes on a busy machine
                return pickle.loads(connection.recv_bytes())
            return Failure("TimeoutError", "the rank does not answer", "the rank does not answer")
        except EOFError:
            return Failure("EOFError", "the rank is gone", "the rank is gone")

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.stop()
        self._folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        finders = [_name(finder) for finder in sys.meta_path]
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (rank, self.count, str(Path(self._folder) / "group"), self.timeout, theirs, finders)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def stop(self) -> None:
        """Ends the processes; the next call starts others."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._connections = [], []


def _name(finder: object) -> str:
    return getattr(finder, "__name__", type(finder).__name__)


def _serve(rank: int, count: int, file: str, timeout: float, connection: Connection, finders: list[str]) -> None:
    """What a rank does until its pipe is closed."""
    gc.freeze()  # which would look through all that is imported, and so copy memory that ranks share
    # The tests may have been told to import another copy of the library than the installed one.
    sys.meta_path[:] = [finder for finder in sys.meta_path if _name(finder) in finders]
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    with contextlib.suppress(EOFError, OSError):
        while True:
            received = connection.recv_bytes()
            result: Any
            try:
                function, args = pickle.loads(received)
                torch.manual_seed(0)
                result = function(*args)
            except BaseException as error:
                result = Failure(type(error).__name__, str(error), traceback.format_exc())
            connection.send_bytes(pickle.dumps(result))


@functools.cache
def mesh(*shape: int, names: tuple[str, ...] = ("ranks",)) -> Any:
    """A mesh of all ranks, in a process of one; of one dimension without a shape."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape or (distributed.get_world_size(),), mesh_dim_names=names)


@functools.cache
def mesh_that_waits(seconds: int) -> Any:
    """A mesh of all ranks, which wait so long for each other."""
    from torch import distributed
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(distributed.new_group(timeout=timedelta(seconds=seconds)), "cpu")
