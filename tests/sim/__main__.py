"""`./run sim [--seconds N] [--seed N] [--json]`: histories in virtual time, until something is wrong or time is up."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Played:
    """What is kept of a history."""

    seed: int
    outcome: str
    faults: int
    violations: int


def _play_share(number: int, first: int, options: argparse.Namespace) -> list[Played]:
    """What one of `options.jobs` processes plays: its part of the seeds, one after another, until time is up."""
    until_s = time.monotonic() + options.seconds
    played: list[Played] = []
    seeds = itertools.chain(
        bad_seeds()[number :: options.jobs], itertools.count(first + number, options.jobs)
    )
    while time.monotonic() < until_s:
        history = run(next(seeds))
        if history.violations:
            print(f"{history}\n", end="", file=sys.stderr, flush=True)
        played.append(Played(history.seed, history.outcome, len(history.faults), len(history.violations)))
    return played


def _search(options: argparse.Namespace) -> int:
    began_s = time.monotonic()
    first = options.first_seed if options.first_seed is not None else secrets.randbits(SEED_BITS)
    with ProcessPoolExecutor(options.jobs) as pool:
        shares = [pool.submit(_play_share, number, first, options) for number in range(options.jobs)]
        played = [one for share in shares for one in share.result()]
    failing = [one.seed for one in played if one.violations]
    violations = sum(one.violations for one in played)
    faults = sum(one.faults for one in played)
    outcomes = Counter(one.outcome for one in played)
    seconds = time.monotonic() - began_s
    if options.json:
        report = {
            "histories": len(played),
            "violations": violations,
            "failing_seeds": failing,
            "first_seed": first,
            "faults": faults,
            "outcomes": outcomes,
            "jobs": options.jobs,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(report))
    else:
        per_minute = len(played) / max(seconds, 1e-9) * 60
        said = ", ".join(f"{count} {outcome or 'broken off'}" for outcome, count in sorted(outcomes.items()))
        print(
            f"{len(played)} histories from seed {first} ({per_minute:.0f} a minute) with {faults} faults: {said}"
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
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that play (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
