"""`peak_memory`: peak memory of one attention call, measured in a separate process."""

import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection

import torch

from qkv.bench.mechanisms import Mechanism
from qkv.models.errors import CommandError

BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024
"""The unit of ``ru_maxrss``."""


def peak_memory(mechanism: Mechanism, library: str) -> int | None:
    """Growth of a process's peak resident set during one call, in bytes; None where it cannot be measured.

    Includes torch's mask, the result, tensors saved for backward and temporaries, but not q, k and v. A warm-up call on
    a few tokens excludes the memory of code loaded on first use.

    Raises:
        CommandError: where the process runs out of memory.
    """
    if sys.platform == "win32" or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    # Children of the fork server start with a low peak and without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, mechanism, library, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        result: int | str = receiver.recv()
    except EOFError:
        process.join()
        result = f"its process ended with code {process.exitcode}"
    if isinstance(result, str):
        raise CommandError(
            f"{mechanism.name} attention fails on {library}, probably out of memory: {result}. "
            "Give a smaller --length, --batch or --heads."
        )
    return result


def _measure(sender: Connection, mechanism: Mechanism, library: str, threads: int) -> None:
    """Runs in the child process: sends the growth of its peak in bytes, or an error message."""
    if sys.platform == "win32":
        raise NotImplementedError("Windows has no fork server")
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles the interrupt and ends this process.
    torch.set_num_threads(threads)
    try:
        small, inputs = mechanism.on_few_tokens(), mechanism.inputs()
        small.prepare(library, small.inputs())()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mechanism.prepare(library, inputs)()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except (RuntimeError, MemoryError) as error:
        sender.send(str(error))
    else:
        sender.send((after - before) * BYTES_PER_UNIT)
