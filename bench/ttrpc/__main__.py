"""ttrpc against its peers, in pairs in one run: ./run bench ttrpc [--json] [--seconds S] [--rounds N].

Every peer has one server per measurement that lives for all rounds; in each round every peer's client runs once, so that a
slow moment of the machine meets all of them. The figures are medians of the rounds. The sequential measurement runs
client and server on one core, which is the steadiest; the others may use all cores. Every unary call carries a deadline.
Every process that is measured asks for a high priority, which root gets: then other work disturbs them less, and all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.ttrpc.measures import KINDS, SEQUENTIAL
from tests.interop.toolchain import go_program

ROUNDS: Final = 7
SECONDS: Final = 0.7
CLIENT_S_MAX: Final = 60.0
START_RUNS: Final = 9
PRIORITY: Final = -15
FIGURES: Final = {
    "sequential": ("sequential_p50_us", "p50_us"),
    "concurrent64": ("concurrent64_per_s", "per_s"),
    "stream64": ("stream64_per_s", "per_s"),
    "stream64k": ("stream64k_per_s", "per_s"),
}
"""What each measurement is called in the result, and which of its numbers it is."""
GOALS: Final = (
    # (what, figure, ours, peer, at least or at most, factor)
    ("sequential p50, of grpcio aio's", "sequential_p50_us", "ours", "grpcio_aio", "at most", 1 / 5),
    ("sequential p50, of Go's", "sequential_p50_us", "ours", "go", "at most", 3.5),
    ("sequential p50 with uvloop, of Go's", "sequential_p50_us", "ours_uvloop", "go", "at most", 1.5),
    ("64 concurrent, of grpcio aio's", "concurrent64_per_s", "ours", "grpcio_aio", "at least", 14.0),
    ("64 concurrent, of Go's", "concurrent64_per_s", "ours", "go", "at least", 0.75),
    ("64 concurrent with uvloop, of Go's", "concurrent64_per_s", "ours_uvloop", "go", "at least", 1.0),
    ("stream of 64 B, of Go's", "stream64_per_s", "ours", "go", "at least", 1.5),
    ("stream of 64 KiB, of Go's", "stream64k_per_s", "ours", "go", "at least", 0.9),
)
IMPORT_MS_MAX: Final = 70.0
RSS_MIB_MAX: Final = 25.0
_START: Final = """
import time
start = time.perf_counter()
import ttrpc
took = time.perf_counter() - start
status = open("/proc/self/status").read()
print(took * 1000, int(status.partition("VmRSS:")[2].split()[0]) / 1024)
"""


def peers(go: Path) -> dict[str, list[str]]:
    """How to start each; `serve SOCKET` or `KIND SOCKET SECONDS` follows."""
    python = [sys.executable, "-m"]
    return {
        "ours": [*python, "bench.ttrpc.ours", "asyncio"],
        "ours_uvloop": [*python, "bench.ttrpc.ours", "uvloop"],
        "grpcio_aio": [*python, "bench.ttrpc.grpcio_aio", "-"],
        "grpclib": [*python, "bench.ttrpc.grpclib_peer", "-"],
        "go": [str(go)],
    }


def pinned(kind: str) -> list[str]:
    """One core for both ends of the sequential measurement: the last that this process may use."""
    if kind != SEQUENTIAL:
        return []
    return ["taskset", "-c", str(max(os.sched_getaffinity(0)))]


def ask_for_priority() -> None:
    """In a process that is to be measured, which has a session of its own: Linux shares the CPU among sessions first."""
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(PRIORITY))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)


MEASURED: Final[dict[str, Any]] = {"start_new_session": True, "preexec_fn": ask_for_priority}


@contextlib.contextmanager
def serving(command: Sequence[str], path: Path) -> Iterator[None]:
    """A server of a peer, ended by its own process."""
    process = subprocess.Popen([*command, "serve", str(path)], stdout=subprocess.PIPE, **MEASURED)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield
    finally:
        process.kill()
        process.wait()


def client(name: str, command: Sequence[str], kind: str, path: Path, seconds: float) -> dict[str, float]:
    arguments = ["bench", str(path), kind] if name == "go" else [kind, str(path)]
    run = subprocess.run(
        [*command, *arguments, str(seconds)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=CLIENT_S_MAX,
        **MEASURED,
    )
    result: dict[str, float] = json.loads(run.stdout)
    return result


def measure(kind: str, commands: dict[str, list[str]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every peer's figure of every round."""
    figures: dict[str, list[float]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, command in commands.items():
            stack.enter_context(serving([*pinned(kind), *command], folder / name))
        for turn in range(rounds):
            for name, command in commands.items():
                result = client(name, [*pinned(kind), *command], kind, folder / name, seconds)
                figures[name].append(result[FIGURES[kind][1]])
            print(f"{kind}: round {turn + 1} of {rounds}", file=sys.stderr)
    return figures


def start_up() -> tuple[float, float]:
    """Milliseconds to import the library, and the process's MiB afterwards; medians of fresh processes.

    As an installed library is imported: with compiled modules, whatever this process's environment says of them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as compiled:
        environment["PYTHONPYCACHEPREFIX"] = compiled
        runs = [
            [
                float(number)
                for number in subprocess.check_output(
                    [sys.executable, "-c", _START], env=environment, **MEASURED
                ).split()
            ]
            for _ in range(START_RUNS + 1)
        ][1:]
    return statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)


def compare(rounds: int, seconds: float) -> dict[str, Any]:
    """All figures, as the JSON has them."""
    commands = peers(go_program())
    import_ms, rss_mib = start_up()
    result: dict[str, Any] = {}
    for kind in KINDS:
        figures = measure(kind, commands, rounds, seconds)
        result[FIGURES[kind][0]] = {
            name: round(statistics.median(values), 1) for name, values in figures.items()
        }
    result["import_ms"] = round(import_ms, 1)
    result["rss_mib"] = round(rss_mib, 1)
    return result


def goals(result: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """Each goal: what, the ratio that was measured, the bound, and whether it is met."""
    judged = []
    for what, figure, ours, peer, sense, factor in GOALS:
        ratio = result[figure][ours] / result[figure][peer]
        judged.append(
            (what, ratio, sense, factor, ratio <= factor if sense == "at most" else ratio >= factor)
        )
    for what, name, bound in (
        ("import, ms", "import_ms", IMPORT_MS_MAX),
        ("RSS, MiB", "rss_mib", RSS_MIB_MAX),
    ):
        judged.append((what, result[name], "at most", bound, result[name] <= bound))
    return judged


def main() -> int:
    parser = argparse.ArgumentParser(prog="run bench ttrpc", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each client's run")
    options = parser.parse_args()
    result = compare(options.rounds, options.seconds)
    report = sys.stderr if options.json else sys.stdout
    for name, values in result.items():
        print(f"{name}: {values}", file=report)
    for what, ratio, sense, factor, met in goals(result):
        print(f"{'met   ' if met else 'MISSED'} {what}: {ratio:.2f}, goal {sense} {factor:.2f}", file=report)
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
