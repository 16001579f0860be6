"""`./run faults [--sample N] [--seed N] [--json] [--markdown FILE]`: kills and cuts at every step of real migrations."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import signal
import sys
import time
from collections import deque
from pathlib import Path

from tests.faults import results
from tests.faults.cases import CASES, Case, sample
from tests.faults.control import play_control
from tests.faults.figures import Figures, line
from tests.faults.play import Played, play
from tests.faults.scene import open_scene, shims_with_hooks
from tests.faults.table import with_matrix

SEED_BITS = 31


def main() -> int:
    options = _options()
    logging.disable(logging.WARNING)
    earlier = results.read(options.results) if options.results else []
    cases = results.still_to_play(_chosen(options), earlier)
    if options.list:
        for case in cases:
            print(f"{case.name}: {' or '.join(sorted(each.value for each in case.promises))}")
        return 0
    figures = asyncio.run(_run(cases, options, earlier))
    figures.played = results.merged(earlier, figures.played)
    print(figures.text(), file=sys.stderr)
    if options.markdown:
        options.markdown.write_text(with_matrix(options.markdown.read_text(), figures))
    if options.json:
        print(json.dumps(figures.document()))
    if figures.interrupted:
        return 130
    return 0 if figures.good else 1


def _chosen(options: argparse.Namespace) -> tuple[Case, ...]:
    if options.sample is None:
        cases = CASES
    else:
        seed = options.seed if options.seed is not None else secrets.randbits(SEED_BITS)
        print(f"a sample of {options.sample} by --seed {seed}", file=sys.stderr)
        cases = sample(options.sample, seed)
    return tuple(case for case in cases if options.only in case.name)


async def _run(cases: tuple[Case, ...], options: argparse.Namespace, earlier: list[Played]) -> Figures:
    figures = Figures()
    began_s = time.monotonic()
    waiting = deque(cases)

    async def work(program: Path, *, with_control: bool) -> None:
        async with open_scene(program) as scene:
            if with_control:
                figures.control = await play_control(scene)
                print(f"control: {figures.control.words}", file=sys.stderr, flush=True)
            while waiting:
                played = await play(scene, waiting.popleft())
                figures.played.append(played)
                if options.results:
                    results.write(options.results, results.merged(earlier, figures.played))
                print(f"{len(figures.played)}/{len(cases)} {line(played)}", file=sys.stderr, flush=True)

    with shims_with_hooks() as program:
        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(work(program, with_control=number == 0 and not options.no_control))
                for number in range(options.pairs)
            ]

            def end() -> None:
                # A coordinator that is interrupted winds its move back and answers: so the work that waits goes first.
                figures.interrupted = True
                waiting.clear()
                for worker in workers:
                    worker.cancel()

            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, end)
    figures.took_s = time.monotonic() - began_s
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run faults", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="so many cases instead of all")
    parser.add_argument("--seed", type=int, help="which ones; without it others each time")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name contains this")
    parser.add_argument(
        "--pairs", type=int, default=1, metavar="N", help="so many pairs of hosts at work at once (default 1)"
    )
    parser.add_argument("--no-control", action="store_true", help="leave the control out")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="put the matrix into this page of the documents"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="keep all results here; what is there and good is not played again",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
