"""All measurements over ranks, each a fork of this process, in a network of its own: `measuring.py` starts it there.

    worker.py FOLDER SETTINGS

The bytes that ranks send are counted by the loopback device of the network. For times, each rank enters a namespace
with one device, eth0, behind a link of so many Gbit/s in both directions. FOLDER/measured.json has the results.
"""

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from calls import Call, calls, long_window
from settings import Settings
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qkv import parallel

CLONE_NEWNET = 0x40000000


def main() -> None:
    """Measures bytes, then times for each rate of links."""
    folder, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    run("ip link set lo up")
    found: dict[str, Any] = {"wire": on_ranks(wire, settings, folder)}
    make_network(settings.ranks)
    found["links"] = {}
    for rate in settings.rates:
        for rank in range(settings.ranks):
            shape = f"tbf rate {rate}gbit burst 256kb latency 50ms"
            run(f"ip netns exec r{rank} tc qdisc replace dev eth0 root {shape}")  # what the rank sends
            run(f"tc qdisc replace dev v{rank} root {shape}")  # what it receives
        found["links"][str(rate)] = on_ranks(links, settings, folder, namespaces=True)
    (folder / "measured.json").write_text(json.dumps(found))


def run(command: str) -> None:
    """Runs a command."""
    subprocess.run(command.split(), check=True)


def make_network(ranks: int) -> None:
    """A namespace for each rank, with one device, all of which meet at a bridge."""
    for command in ("mount -t tmpfs none /run", "mkdir /run/netns", "ip link add bridge type bridge"):
        run(command)
    run("ip link set bridge up")
    for rank in range(ranks):
        inside = f"ip netns exec r{rank} ip"
        run(f"ip netns add r{rank}")
        run(f"ip link add v{rank} type veth peer name eth0 netns r{rank}")
        run(f"ip link set v{rank} master bridge up")
        run(f"{inside} link set lo up")
        run(f"{inside} address add 10.0.0.{rank + 1}/24 dev eth0")
        run(f"{inside} link set eth0 up")


def on_ranks(
    measure: Callable[[Settings, DeviceMesh], Any], settings: Settings, folder: Path, *, namespaces: bool = False
) -> Any:
    """What a function returns on rank 0."""
    context = multiprocessing.get_context("fork")  # torch is imported once
    (folder / "group").unlink(missing_ok=True)
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=one_rank, args=(measure, rank, settings, folder, namespaces, queue))
        for rank in range(settings.ranks)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(f"scale_out: a rank failed in {measure.__name__}; its error is above.")
    return queue.get()


def one_rank(
    measure: Callable[[Settings, DeviceMesh], Any],
    rank: int,
    settings: Settings,
    folder: Path,
    namespaces: bool,
    queue: Any,
) -> None:
    """What a rank does."""
    if namespaces:
        with Path(f"/run/netns/r{rank}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'group'}",
        rank=rank,
        world_size=settings.ranks,
        timeout=timedelta(minutes=5),
    )
    found = measure(settings, init_device_mesh("cpu", (settings.ranks,)))
    if rank == 0:
        queue.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


def wire(settings: Settings, mesh: DeviceMesh) -> list[list[float | None]]:
    """For each call the bytes of a forward and of a backward pass, of all ranks together."""
    found: list[list[float | None]] = []
    with without_attention():
        for call in calls(settings):
            run, _ = prepared(call, mesh)
            out: list[Tensor] = []
            forward = counted("lo", lambda run=run, out=out: out.append(run()))
            found.append([forward, counted("lo", lambda out=out: out[0].sum().backward())])
        run, _ = prepared(long_window(settings), mesh)
        found.append([counted("lo", run), None])
    return found


def counted(device: str, run: Callable[[], Any]) -> float:
    """The bytes that a device sends while all ranks run, without those of the barriers around it."""
    numbers = []
    for work in (lambda: None, run):
        distributed.barrier()
        distributed.barrier()
        before = transmitted(device)
        distributed.barrier()
        work()
        distributed.barrier()
        distributed.barrier()
        numbers.append(transmitted(device) - before)
    return numbers[1] - numbers[0]


def transmitted(device: str) -> int:
    """The bytes that a network device of this namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == device:
            return int(fields.split()[8])
    raise LookupError(device)


def links(settings: Settings, mesh: DeviceMesh) -> list[float]:
    """For each call the seconds of its exchanges: the slowest rank's, of the fastest call."""
    found = []
    with without_attention(), torch.no_grad():
        for call in calls(settings):
            run, _ = prepared(call, mesh)
            run()
            seconds = []
            for _ in range(settings.repeats):
                distributed.barrier()
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            slowest = torch.tensor(seconds)
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            found.append(slowest.min().item())
    return found


def without_attention() -> Any:
    """A context in which calls exchange what they do, and return zeros that depend on it."""
    return mock.patch("qkv.parallel.calls._solver", return_value=zeros)


def zeros(q: Tensor, keys: Sequence[Tensor], options: Any, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """In place of attention."""
    k, v = keys
    out = q * 0 + (k.sum() + v.sum()) * 0
    return out, out.sum(-1) if wants_lse else None


def prepared(call: Call, mesh: DeviceMesh) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """The call on this rank, and its inputs."""
    tokens = getattr(parallel.Tokens, call.layout)(call.tokens, mesh)
    shapes = (call.heads, call.kv_heads, call.kv_heads)
    leaves = tuple(torch.zeros(1, heads, tokens.rows, call.width, requires_grad=True) for heads in shapes)
    return lambda: parallel.attention(*leaves, tokens, mask=call.visible, scheme=call.scheme), leaves


if __name__ == "__main__":
    main()
