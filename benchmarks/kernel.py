"""qkv against its peers, interleaved in one process, and against the limits of the machine.

    python benchmarks/kernel.py [NAME ...] [--rounds N]    measures cases whose name contains a NAME (default: all)

Prints a table; with all cases it writes results/PROCESSOR/kernel.json. Rates count useful work only: masked scores are
not counted as arithmetic, and decoding counts the bytes of keys and values that a step must read.
"""

import argparse

import torch
from harness import limits, machine
from harness.case import DTYPES, Case
from harness.limits import Limits
from harness.measurement import OURS, ROUNDS, Measurement, measure
from harness.peers import PEERS

CASES = [
    Case("full, 2048", 2048, 2048),
    *(Case(f"causal, {n}", n, n, "causal") for n in (512, 2048, 8192)),
    *(Case(f"causal window of 512, {n}", n, n, "causal", window=512) for n in (8192, 16384)),
    Case("as in layers, 4 of 512, 12 heads", 512, 512, batch=4, heads=12, kv_heads=12, heads_inside=True),
    Case(
        "as in layers, 16 of 512, 12 heads of 32",
        512,
        512,
        batch=16,
        heads=12,
        kv_heads=12,
        head_dim=32,
        heads_inside=True,
    ),
    Case("as in layers, 2048, 12 heads", 2048, 2048, heads=12, kv_heads=12, heads_inside=True),
    *(
        Case(
            f"{'backward, ' * backward}as in layers, causal, 1024, 32 heads of 128",
            1024,
            1024,
            "causal",
            heads=32,
            kv_heads=32,
            head_dim=128,
            backward=backward,
            heads_inside=True,
        )
        for backward in (False, True)
    ),
    Case("backward, full, 2048", 2048, 2048, backward=True),
    Case("backward, causal, 2048", 2048, 2048, "causal", backward=True),
    Case("backward, causal, 2048, 8 heads on 1", 2048, 2048, "causal", kv_heads=1, backward=True),
    Case("backward, causal window of 512, 16384", 16384, 16384, "causal", window=512, backward=True),
    *(
        Case(f"decoding, 4096 keys, 32 heads on {g}", 1, 4096, "causal", heads=32, kv_heads=g, head_dim=128)
        for g in (32, 8, 1)
    ),
    *(  # Groups of 4 are above (32 heads on 8); groups of 9 take the path of prefill.
        Case(f"decoding, 4096 keys, groups of {g}", 1, 4096, "causal", heads=8 * g, kv_heads=8, head_dim=128)
        for g in (3, 5, 6, 7, 8, 9)
    ),
    Case("decoding, 4096 keys, 9 heads of 64 on 3", 1, 4096, "causal", heads=9, kv_heads=3),
    Case("decoding, 16 of 512 keys, 32 heads on 8", 1, 512, "causal", batch=16, heads=32, kv_heads=8, head_dim=128),
    *(Case(f"{n} tokens proposed after 1024, 8 heads of 128", n, 1024, "causal", head_dim=128) for n in (2, 5, 8)),
    Case("short, 16", 16, 16),
    Case("packed, 32 of 16, 12 heads of 32", 512, 512, "packed", text=16, heads=12, kv_heads=12, head_dim=32),
    Case("short, 8 of 128, 12 heads", 128, 128, batch=8, heads=12, kv_heads=12),
]


def heading() -> str:
    """The first line of the table."""
    return (
        f"{'case':<40} {'dtype':<5} {'backend':<7} {OURS + ' us':>10} {'quartiles':>19} {'rate':>11} {'share':>6}"
        + "".join(f" {peer.NAME:>11}" for peer in PEERS)
    )


def line(row: Measurement, bounds: Limits) -> str:
    """A row of the table: qkv's time, rate and share of the limit, and each peer's time relative to qkv."""
    time, share = row.times[OURS], row.share(bounds)
    quartiles = f"{time['low_us']:.1f}-{time['high_us']:.1f}"
    rate = f"{row.rate(OURS):.1f} {'GB/s' if row.case.is_decoding else 'GF/s'}"
    ratios = [row.ratio(peer.NAME) for peer in PEERS]
    return (
        f"{row.case.name:<40} {row.dtype:<5} {row.backend!s:<7} {time['median_us']:>10.1f} {quartiles:>19} {rate:>11} "
        f"{'-' if share is None else f'{share:.0%}':>6}"
        + "".join(f" {'-' if ratio is None else f'{ratio:.2f}':>11}" for ratio in ratios)
    )


def skips(rows: list[Measurement]) -> list[str]:
    """Each reason for skipping a peer, with the cases."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        for peer, reason in row.skipped.items():
            cases.setdefault(f"{peer} {reason}", []).append(f"{row.case.name} in {row.dtype}")
    return [
        f"{reason} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})" for reason, names in cases.items()
    ]


def main() -> None:
    """Measures the cases asked for."""
    parser = argparse.ArgumentParser(description="qkv against its peers.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="measure the cases whose name contains it; all by default"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"measurements of each library ({ROUNDS}), at least 2"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles; got {arguments.rounds}.")
    cases = [case for case in CASES if not arguments.names or any(name in case.name for name in arguments.names)]
    if not cases:
        known = "\n  ".join(case.name for case in CASES)
        parser.error(f"no case name contains {' or '.join(arguments.names)}. Give a part of one of:\n  {known}")
    threads = torch.get_num_threads()
    bounds = limits.measure(threads)
    print(f"{bounds}\n{heading()}")
    rows: list[Measurement] = []
    for case in cases:
        for dtype in DTYPES:
            rows.append(measure(case, dtype, rounds=arguments.rounds))
            print(line(rows[-1], bounds), flush=True)
    print("\nSkipped:", *(skips(rows) or ["nothing"]), sep="\n  ")
    if not arguments.names:
        bounds = limits.larger(bounds, limits.measure(threads))
        machine.save("kernel", {"limits": bounds, "measurements": [row.as_json() for row in rows]})


if __name__ == "__main__":
    main()
