"""Our whole move against two bare QEMUs and a script: the same guest, the same kind of socket, the same encryption.

A/B alternating in one run. Total is from the start of the transfer (ours: the first TransferSandbox; bare: `migrate`) to
the guest running; blackout is destination's RESUME minus source's STOP, by QEMU's event stamps. What ours does before the
transfer (starting a shim and a QEMU on the destination, the checks) the bare script has done beforehand.

    python -m bench.migration [--pairs N] [--loads idle,dirty] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from bench._bare_mover import Bare
from bench._migration_figures import Pair, load_figures, table
from bench._movers import Mover, Ours, measure
from sandshift.cli.demo.lab import Lab, open_lab
from sandshift.cli.demo.workload import Workload
from sandshift.config import Places
from sandshift.errors import SandshiftError
from sandshift.image import build

PAIRS_DEFAULT = 15
MEMORY_BYTES = 256 << 20
LOADS = {
    "idle": Workload(working_set_mib=1, dirty_mib_per_s=0),
    "dirty": Workload(working_set_mib=100, dirty_mib_per_s=20),
}


async def main(pairs: int, loads: list[str]) -> dict[str, Any]:
    """All pairs of all loads; the JSON that the issue describes."""
    made: dict[str, Any] = {"pairs": pairs, "machine": machine()}
    await asyncio.to_thread(build.build, Path(Places().cache_dir))
    async with open_lab(overrides={"vm": {"memory_mib": MEMORY_BYTES >> 20}}) as lab:
        await measure(Ours(MEMORY_BYTES), lab, LOADS["idle"])  # builds the template, fills the caches
        for load in loads:
            made[load] = load_figures([await pair(lab, load, number, pairs) for number in range(pairs)])
    return made


async def pair(lab: Lab, load: str, number: int, pairs: int) -> Pair:
    """One move of each kind; who goes first alternates too."""
    kinds: dict[str, Mover] = {"ours": Ours(MEMORY_BYTES), "bare": Bare(MEMORY_BYTES)}
    order = ("ours", "bare") if number % 2 == 0 else ("bare", "ours")
    runs = {kind: await measure(kinds[kind], lab, LOADS[load]) for kind in order}
    told = ", ".join(
        f"{kind} {run.total_ms:.0f} ms (blackout {run.blackout_ms:.1f}, client {run.client_gap_ms:.0f})"
        for kind, run in sorted(runs.items(), reverse=True)
    )
    print(f"{load} {number + 1}/{pairs}: {told}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return Pair(runs["ours"], runs["bare"])


def machine() -> dict[str, object]:
    """Where this was measured."""
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench migration", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=PAIRS_DEFAULT, help=f"pairs of each load [{PAIRS_DEFAULT}]"
    )
    parser.add_argument("--loads", default=",".join(LOADS), help="which loads, by commas [idle,dirty]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    given.loads = given.loads.split(",")
    if given.pairs < 1:
        parser.error("--pairs must be at least 1")
    if unknown := set(given.loads) - set(LOADS):
        parser.error(f"--loads {','.join(sorted(unknown))}: there are {', '.join(LOADS)}")
    return given


if __name__ == "__main__":
    options = arguments()
    try:
        figures = asyncio.run(main(options.pairs, options.loads))
    except SandshiftError as error:
        sys.exit(f"bench migration: {error.message}")
    if options.json:
        print(json.dumps(figures))
    else:
        print(table({load: figures[load] for load in options.loads}))
