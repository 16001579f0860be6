"""`./run explore [--all] [--json]`: what was searched, and what was found."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass

from tests.explore.facts import Bounds
from tests.explore.guards import GUARDS, Guard
from tests.explore.search import Found, search
from tests.explore.side import Faults
from tests.explore.story import Story
from tests.explore.walk import Walked, replay, walk_for
from tests.explore.world import UNREAD_MAX, Rules, World

GUARD_PATIENCE_STATES = 40_000
"""How much further a dropped guard is searched for harm done at once, once a recovery was found to fail."""
WALK_S = 30.0


@dataclass(frozen=True)
class Set:
    """One exhaustive search: how much may go wrong in it."""

    bounds: Bounds
    going_back: bool = False
    """In recoveries the destination's VM refuses every start: they go back from HELD wherever the source can run."""
    channel_survives: bool = False
    """A new shim process may find the channel where its VM process kept it."""
    channel_repeats: bool = False
    """A frame may come again after it was read."""

    @property
    def name(self) -> str:
        extra = ", going back" * self.going_back + ", channel may survive a crash" * self.channel_survives
        extra += ", channel may repeat frames" * self.channel_repeats
        return f"crashes {self.bounds.crashes}, deaths {self.bounds.deaths}, refusals {self.bounds.refusals}{extra}"

    def world(self) -> World:
        faults = Faults(self.bounds.cost, channel_survives_crash=self.channel_survives)
        return World(self.bounds, Rules(faults), channel_repeats=self.channel_repeats)


FIRST = (Set(Bounds(0, 0, 0)), Set(Bounds(1, 0, 1)), Set(Bounds(0, 1, 0)))
ALL = (
    *FIRST,
    Set(Bounds(0, 0, 1), channel_repeats=True),
    Set(Bounds(1, 0, 1), channel_survives=True),
    Set(Bounds(1, 1, 0), going_back=True),
    Set(Bounds(2, 0, 1)),
    Set(Bounds(1, 1, 1)),
)


def main() -> int:
    options = _options()
    if options.seed is not None:
        walked = replay(options.seed)
        wrong = "".join(f"\n{story}" for story in walked.violations) or "nothing wrong"
        _say(f"seed {options.seed}: {walked.steps} steps: {wrong}")
        return 1 if walked.violations else 0
    began = time.monotonic()
    sets = (
        []
        if options.guards_only
        else [(one, _search(one, options)) for one in (ALL if options.all else FIRST)]
    )
    walked = walk_for(options.walks, options.first_seed)
    _say(
        f"walks: {walked.walks} with {walked.steps} steps, {walked.recoveries} recoveries; seeds from {walked.first_seed}"
    )
    guards = [(guard, _drop(guard, options)) for guard in GUARDS]
    report = _report(sets, walked, guards, time.monotonic() - began)
    for story in _stories(sets, walked):
        _say("VIOLATION", str(story))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _say(
            f"{report['states']} states, {report['violations']} violations, "
            f"{report['guards_found']} of {report['guards']} dropped guards found"
        )
    return 0 if not report["violations"] and report["guards_found"] == report["guards"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run explore", description="Exhaustive search of the right-to-run protocol."
    )
    parser.add_argument("--all", action="store_true", help="every set, not only the first ones")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, progress on stderr")
    parser.add_argument(
        "--guards-only", action="store_true", help="only drop the guards, one after the other"
    )
    parser.add_argument("--stories", action="store_true", help="tell for each dropped guard how it was found")
    parser.add_argument(
        "--walks", type=float, default=WALK_S, metavar="SECONDS", help="CPU time for random walks"
    )
    parser.add_argument(
        "--first-seed", type=int, default=time.time_ns() % 1_000_000_000, help="of the random walks"
    )
    parser.add_argument("--seed", type=int, help="replay one random walk and nothing else")
    return parser.parse_args()


def _search(one: Set, options: argparse.Namespace) -> Found:
    del options
    found = search(
        one.world(), destination_refuses=one.going_back, progress=lambda n: _say(f"  {one.name}: {n} states")
    )
    rate = round(found.states / max(found.cpu_s, 0.001))
    _say(
        f"{one.name}: {found.states} states, {found.transitions} transitions, {found.recoveries} recoveries "
        f"(at most {found.calls_max} calls), {found.cpu_s:.0f} s of CPU ({rate} states/s): "
        f"{'VIOLATION' if found.violations else 'holds'}"
    )
    return found


def _drop(guard: Guard, options: argparse.Namespace) -> Found:
    found = search(World(guard.bounds, guard.rules()), patience_states=GUARD_PATIENCE_STATES)
    verdict = found.violations[0].what if found.violations else "not found"
    expected = "" if guard.can_be_found else " (none expected: with receipts nothing depends on it)"
    _say(f"without: {guard.name}: {verdict} after {found.states} states{expected}")
    if options.stories and found.violations:
        _say(str(found.violations[0]))
    return found


def _stories(sets: list[tuple[Set, Found]], walked: Walked) -> list[Story]:
    return [story for _, found in sets for story in found.violations] + walked.violations


def _report(
    sets: list[tuple[Set, Found]], walked: Walked, guards: list[tuple[Guard, Found]], seconds: float
) -> dict[str, object]:
    findable = [(guard, found) for guard, found in guards if guard.can_be_found]
    return {
        "states": sum(found.states for _, found in sets),
        "transitions": sum(found.transitions for _, found in sets),
        "bounds": [
            {
                **one.bounds._asdict(),
                "going_back": one.going_back,
                "channel_survives_crash": one.channel_survives,
                "channel_repeats": one.channel_repeats,
                "unread_frames_per_direction": UNREAD_MAX,
                "calls": "unlimited",
                "states": found.states,
                "transitions": found.transitions,
                "recoveries": found.recoveries,
                "recovery_calls_max": found.calls_max,
                "cpu_s": round(found.cpu_s, 1),
                "violations": len(found.violations),
            }
            for one, found in sets
        ],
        "walks": {
            "walks": walked.walks,
            "steps": walked.steps,
            "recoveries": walked.recoveries,
            "first_seed": walked.first_seed,
            "failing_seeds": walked.failing_seeds,
        },
        "violations": len(_stories(sets, walked)),
        "guards": len(findable),
        "guards_found": sum(bool(found.violations) for _, found in findable),
        "guard_results": [
            {
                "guard": guard.name,
                "rule": guard.rule,
                "expected": guard.can_be_found,
                "found": bool(found.violations),
                "harm": found.violations[0].what if found.violations else None,
                "events": len(found.violations[0].events) if found.violations else None,
            }
            for guard, found in guards
        ],
        "seconds": round(seconds, 1),
    }


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
