"""What the demo looks like while it runs: drawn for a person at a terminal, plain lines for everybody else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from sandshift.cli.demo.workload import MIB
from sandshift.fleet.result import Progress, Update

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_MINUTE_S: Final = 60


class Show(Protocol):
    """Told what happens, as it happens. Never blocks for long: it is called on the event loop during a move."""

    def step(self, text: str) -> None:
        """A new step begins; the one before it is done."""
        ...

    def update(self, update: Update) -> None:
        """A notification of the move."""
        ...


class Lines:
    """A line per step on stderr."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def step(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    def update(self, update: Update) -> None:
        if update.progress is None:
            self.step(f"  {update.side.word}: {update.phase.lower().replace('_', ' ')}")


class Drawn:
    """Steps with a spinner, and how the transfer goes."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._step: TaskID | None = None
        self._transfer: TaskID | None = None

    def step(self, text: str) -> None:
        self.finish()
        self._transfer = None
        self._step = self._bar.add_task(text, total=None)

    def update(self, update: Update) -> None:
        if update.progress is None:
            return
        if self._transfer is None:
            self._transfer = self._bar.add_task("", total=update.progress.bytes_total or None)
        done = update.progress.bytes_total - update.progress.bytes_remaining
        self._bar.update(self._transfer, completed=done, description=f"  {progress_note(update.progress)}")

    def finish(self) -> None:
        """What was begun is done."""
        for task in (self._step, self._transfer):
            if task is not None:
                self._bar.update(task, completed=1, total=1)


def progress_note(progress: Progress) -> str:
    """How a transfer is going, in a few words."""
    return (
        f"pass {progress.pass_number}, {progress.bytes_transferred / MIB:.0f} MiB sent,"
        f" {progress.bytes_remaining / MIB:.0f} MiB left, written at {progress.dirty_bytes_per_s / MIB:.0f} MiB/s"
    )


@contextlib.contextmanager
def showing(*, drawn: bool) -> Iterator[Show]:
    """The show for this run. `drawn`: somebody watches a terminal."""
    if not drawn:
        yield Lines()
        return
    from rich.console import Console  # noqa: PLC0415 - 18 ms that only a terminal pays for
    from rich.progress import Progress as Bar  # noqa: PLC0415
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=5) as bar:
        show = Drawn(bar)
        yield show
        show.finish()
