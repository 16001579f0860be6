"""Coverage-guided fuzzing of the ttrpc library: ./run fuzz ttrpc [--json] [--inputs N] [--seed N].

Three parts with one fixed budget: the pure core with every oracle of `targets`; the same with planted bugs, each of which
has to be found; a real server over sockets. A finding ends the run with exit code 1 and the input that shows it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import coverage

from tests.fuzz import planted, sockets
from tests.fuzz.guided import Edges, Finding, Fuzzer, Target
from tests.fuzz.targets import REAL, SEEDS, ask, serve

INPUTS: Final = 12_000
PLANTED_INPUTS_MAX: Final = 6_000
SOCKET_INPUTS: Final = 400
COVERAGE_MIN: Final = 0.95
CORE: Final = tuple(str(module.__file__) for module in vars(REAL).values())


def both(modules: SimpleNamespace) -> Target:
    """Each input is run by a server and by a client."""

    def target(data: bytes) -> None:
        serve(data, modules)
        ask(data, modules)

    return target


def explore(inputs: int, seed: int) -> Fuzzer:
    """Fuzz the core as it is.

    Raises:
        Finding: a rule is broken.
    """
    fuzzer = Fuzzer(both(REAL), Edges(CORE), SEEDS, seed)
    fuzzer.run(inputs - fuzzer.inputs)
    return fuzzer


def branch_coverage(kept: list[bytes]) -> float:
    """What share of the core's branches the kept inputs take, as coverage.py counts them."""
    measured = coverage.Coverage(branch=True, include=list(CORE), data_file=None, config_file=False)
    target = both(REAL)
    measured.start()
    for data in kept:
        target(data)
    measured.stop()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        measured.json_report(outfile=str(report))
        totals = json.loads(report.read_text())["totals"]
    return float(totals["covered_branches"] / totals["num_branches"])


def find_planted(kept: list[bytes], seed: int) -> dict[str, bool]:
    """For each planted bug, whether it was found: by what the search has kept, or by going on from there."""
    found = {}
    for plant, modules in planted.each():
        target = both(modules)
        try:
            fuzzer = Fuzzer(target, Edges(planted.FILES), kept, seed)
            fuzzer.run(PLANTED_INPUTS_MAX)
        except Finding:
            found[plant.name] = True
        else:
            found[plant.name] = False
    return found


def run(inputs: int, seed: int) -> dict[str, Any]:
    """Everything, as the figures that are reported."""
    fuzzer = explore(inputs, seed)
    over_sockets = [*fuzzer.kept, *(fuzzer.next_input() for _ in range(SOCKET_INPUTS))][:SOCKET_INPUTS]
    found = find_planted(fuzzer.kept, seed)
    attacked = asyncio.run(sockets.attack(over_sockets, seed))
    return {
        "inputs": fuzzer.inputs + attacked,
        "branch_coverage": round(branch_coverage(fuzzer.kept), 4),
        "planted": len(found),
        "planted_found": sum(found.values()),
        "kept": len(fuzzer.kept),
        "seed": seed,
        "missed": sorted(name for name, was_found in found.items() if not was_found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="run fuzz ttrpc", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--inputs", type=int, default=INPUTS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        figures = run(options.inputs, options.seed)
    except (Finding, sockets.Unharmed) as finding:
        print(f"found: {finding}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    good = figures["branch_coverage"] >= COVERAGE_MIN and figures["planted_found"] == figures["planted"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
