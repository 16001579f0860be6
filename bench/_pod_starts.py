"""`ctr run` to the first output, under a real containerd: our runtime and the stock runc shim, in turns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.containerd.daemon import INSTALLED, RUNTIME, Containerd, containerd
from tests.containerd.image import NAME as IMAGE

RUNC = "io.containerd.runc.v2"
FIRST_S = 60.0
_STARTED = re.compile(r"started, ms: (\{.*\})")


def measure_starts(rounds: int) -> dict[str, Any]:
    """Medians, ms. The split's parts are those that our shim's log tells; `containerd and shim` is what is before, between and
    around them; the last one is from Task.Start to the first byte."""
    if not (INSTALLED / "new").exists():
        raise SystemExit("there is no containerd: ./run setup containerd fetches it")
    taken: dict[str, list[float]] = {"ours": [], "runc": []}
    splits: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="pod-", dir="/tmp") as folder,
        containerd("new", Path(folder)) as daemon,
    ):
        first_output_ms(daemon, RUNTIME, "warm")  # packs the image, makes the template
        for number in range(rounds):
            for kind, runtime in (("ours", RUNTIME), ("runc", RUNC)):
                took_ms, laps_ms = first_output_ms(daemon, runtime, f"{kind}{number}")
                taken[kind].append(took_ms)
                if kind == "ours":
                    splits.append(
                        {**laps_ms, "containerd, shim and first output": took_ms - sum(laps_ms.values())}
                    )
            told = ", ".join(f"{kind} {values[-1]:.0f} ms" for kind, values in taken.items())
            print(f"first output {number + 1}/{rounds}: {told}", file=sys.stderr, flush=True)
    return {
        "first_output_ms": {kind: round(median(values), 1) for kind, values in taken.items()},
        "first_output_split_ms": {
            part: round(median(split.get(part, 0.0) for split in splits), 1) for part in splits[0]
        },
    }


def first_output_ms(daemon: Containerd, runtime: str, name: str) -> tuple[float, dict[str, float]]:
    """Of one container, which goes on until its log has been read; and what our shim says of its start."""
    command = daemon.ctr_command(
        "run", "--rm", "--runtime", runtime, IMAGE, name, "sh", "-c", "echo here; exec sleep 1000"
    )
    began_s = time.monotonic()
    process = subprocess.Popen(
        command,
        env=daemon.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stdout.readline()
    took_ms = (time.monotonic() - began_s) * 1000
    if said != b"here\n":
        raise SystemExit(f"{runtime}: {process.stderr.read().decode(errors='replace')}")
    laps_ms = laps(daemon)
    daemon.ctr("task", "kill", "-s", "9", name)
    process.communicate(timeout=FIRST_S)
    return took_ms, laps_ms


def laps(daemon: Containerd) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in _STARTED.findall(daemon.shim_logs()):
        found.update(json.loads(line))
    return found
