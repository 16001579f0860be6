"""`./run sim [--seconds N] [--seed N] [--json]`: histories in virtual time, until something is wrong or time is up."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from pathlib import Path

from tests.sim.history import run

SECONDS_DEFAULT = 30.0
BAD_SEEDS = Path(__file__).with_name("bad_seeds.txt")
SEED_BITS = 31


def bad_seeds() -> list[int]:
    """Seeds that failed once, in the order in which they were found."""
    lines = (line.split("#")[0].strip() for line in BAD_SEEDS.read_text().splitlines())
    return [int(line) for line in lines if line]


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets of words is part of a story that replays.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    options = _options()
    if options.seed is not None:
        history = run(options.seed)
        print(history)
        return 1 if history.violations else 0
    return _search(options)


def _search(options: argparse.Namespace) -> int:
    began_s = time.monotonic()
    first = options.first_seed if options.first_seed is not None else secrets.randbits(SEED_BITS)
    seeds = bad_seeds()
    report: dict[str, object] = {}
    failing: list[int] = []
    outcomes: dict[str, int] = {}
    histories = faults = violations = 0
    while time.monotonic() - began_s < options.seconds:
        history = run(seeds.pop(0) if seeds else first + histories)
        histories += 1
        faults += len(history.faults)
        outcomes[history.outcome] = outcomes.get(history.outcome, 0) + 1
        if history.violations:
            violations += len(history.violations)
            failing.append(history.seed)
            print(history, file=sys.stderr)
    report = {
        "histories": histories,
        "violations": violations,
        "failing_seeds": failing,
        "first_seed": first,
        "faults": faults,
        "outcomes": outcomes,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    if options.json:
        print(json.dumps(report))
    else:
        per_minute = histories / max(time.monotonic() - began_s, 1e-9) * 60
        said = ", ".join(f"{count} {outcome or 'broken off'}" for outcome, count in sorted(outcomes.items()))
        print(
            f"{histories} histories from seed {first} ({per_minute:.0f} a minute) with {faults} faults: {said}"
        )
        print(f"{violations} violations" + (f"; ./run sim --seed {failing[0]}" if failing else ""))
    return 1 if failing else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run sim", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS_DEFAULT, help="how long (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="replay this history and tell it")
    parser.add_argument("--first-seed", type=int, help="count from here instead of from a random seed")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
