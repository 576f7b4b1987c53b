"""`peak_memory`: how much memory one call takes at its peak, measured in a process of its own."""

import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection

import torch

from qkv.bench.mechanisms import Mechanism
from qkv.models.errors import CommandError

BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024
"""Of ``ru_maxrss``."""


def peak_memory(mechanism: Mechanism, library: str) -> int | None:
    """Bytes by which the largest resident set of a process grows in a call; None where that cannot be measured.

    Queries, keys and values do not count. The mask that torch is given does, and so do the result, what is kept for a
    backward pass and what is needed in between. The process has called the same on a few tokens before, since code that
    is new to a process takes memory as well.

    Raises:
        CommandError: where the memory of the machine does not suffice.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    # Children of a process that has run nothing: each starts without peaks and without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, mechanism, library, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        found: int | str = receiver.recv()
    except EOFError:
        process.join()
        found = f"its process ended with code {process.exitcode}"
    if isinstance(found, str):
        raise CommandError(
            f"{mechanism.name} attention cannot run on {library}, for lack of memory as it seems: {found}. "
            "Give a smaller --length, --batch or --heads."
        )
    return found


def _measure(sender: Connection, mechanism: Mechanism, library: str, threads: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that waits is interrupted as well, and ends this one.
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
