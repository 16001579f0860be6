"""`./run conformance [--json]`: the suite on real VMs and on fake ones, and the mutants that it must catch."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandshift.conformance.cases import CASES
from sandshift.conformance.runner import FAILED, PASSED, SKIPPED, Result, Suite, Verdict, select
from sandshift.conformance.target import Target
from tests.conformance import mutants
from tests.conformance.fakes import House, scratch_folder
from tests.conformance.mutant import Mutant, caught_by

CELL = "cell "


@dataclass
class Figures:
    """What the run ends with."""

    results: dict[str, Result] = field(default_factory=dict)
    tried: list[Mutant] = field(default_factory=list)
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.survivors and not any(one.count(FAILED) for one in self.results.values())

    def document(self) -> dict[str, Any]:
        """`cells` and `promises` count what has been tried and not skipped on at least one target."""
        verdicts = [verdict for result in self.results.values() for verdict in result.verdicts]
        held = {verdict.case.name: verdict.case.line for verdict in verdicts if verdict.outcome != SKIPPED}
        cells = {name.rsplit(" (", 1)[0] for name in held if name.startswith(CELL)}
        promises = {line for line in held.values() if line.startswith("4.")}
        document: dict[str, Any] = {
            each: sum(result.count(each) for result in self.results.values())
            for each in (PASSED, FAILED, SKIPPED)
        }
        document |= {
            "cells": len(cells),
            "promises": len(promises),
            "mutants": len(self.tried),
            "mutants_caught": len(self.tried) - len(self.survivors),
            "survivors": [f"{one.about}: {one.name}" for one in self.survivors],
            "failures": [
                f"{target}: {verdict}"
                for target, result in self.results.items()
                for verdict in result.verdicts
                if verdict.outcome == FAILED
            ],
            "targets": {target: str(result) for target, result in self.results.items()},
        }
        return document


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run_suite(target: Target, only: str) -> Result:
    def told(verdict: Verdict) -> None:
        say(str(verdict))

    return await Suite(target).run(select(only), told)


async def run_mutants(house: House, only: str, figures: Figures) -> None:
    for mutant in mutants.everyone():
        if only and only not in mutant.name and not any(only in name for name in mutant.cases):
            continue
        noticed = await caught_by(mutant, house)
        figures.tried.append(mutant)
        if not noticed:
            figures.survivors.append(mutant)
        what = f"caught by {noticed!r}" if noticed else "SURVIVES"
        say(f"mutant  {mutant.name} [{mutant.about}]: {what}")


async def run(arguments: argparse.Namespace) -> Figures:
    figures = Figures()
    with scratch_folder() as folder:
        async with House(Path(folder)) as house:
            say(f"fake VMs: {len(CASES)} cases")
            figures.results["fake VMs"] = await run_suite(house, arguments.only)
            if not arguments.no_mutants:
                await run_mutants(house, arguments.only, figures)
    if not arguments.no_vms:
        from tests.conformance.real import RealHouse  # noqa: PLC0415 - needs root and QEMU

        say("real VMs")
        async with RealHouse() as real:
            figures.results["real VMs"] = await run_suite(real, arguments.only)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run conformance", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="cases whose name holds it, or matches the glob"
    )
    parser.add_argument("--no-vms", action="store_true", help="fake VMs alone")
    parser.add_argument("--no-mutants", action="store_true", help="the suite alone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    began_s = time.monotonic()
    figures = asyncio.run(run(arguments))
    document = figures.document() | {"took_s": round(time.monotonic() - began_s, 1)}
    if arguments.json:
        print(json.dumps(document))
    else:
        for line in document["failures"]:
            print(line)
        print(
            f"{document['passed']} passed, {document['failed']} failed, {document['skipped']} skipped; "
            f"{document['mutants_caught']} of {document['mutants']} mutants caught"
        )
    return 0 if figures.good else 1


if __name__ == "__main__":
    sys.exit(main())
