"""A migration's progress on a terminal: one line that changes, and a line for each phase that passed."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sandshift.cli.sizes import show_bytes
from sandshift.fleet.result import Progress, Update

if TYPE_CHECKING:
    from rich.live import Live

PHASE_TEXTS: Final = {
    ("source", "SETUP_DONE"): "connected: memory begins to flow",
    ("source", "BLACKOUT_STARTED"): "the guest has stopped on the source",
    ("source", "OFFLINE_DONE"): "everything has left the source",
    ("destination", "DONE"): "the destination has everything",
    ("destination", "BLACKOUT_EXITED"): "the guest runs on the destination",
    ("source", "RECOVERY_DONE"): "the guest runs on the source again",
}
_REFRESH_PER_S: Final = 8


def phase_text(update: Update) -> str:
    """What a phase means, in words; empty for one that needs none."""
    if update.state != "SUCCESS":
        said = f": {update.message}" if update.message else ""
        return f"{update.side.word}: {update.phase.lower()} ({update.state.lower().replace('_', ' ')}){said}"
    text = PHASE_TEXTS.get((update.side.word, update.phase), "")
    if update.blackout_ms is not None:
        text += f", after {update.blackout_ms} ms"
    return text


def progress_text(progress: Progress) -> str:
    """ "pass 3 · 187.4 MiB of 256.0 MiB · 412.0 MiB/s · 20.1 MiB/s dirty · 12.0 MiB left"."""
    parts = [
        f"pass {progress.pass_number}",
        f"{show_bytes(progress.bytes_transferred)} of {show_bytes(progress.bytes_total)}",
        f"{show_bytes(progress.bytes_per_s)}/s",
        f"{show_bytes(progress.dirty_bytes_per_s)}/s dirty",
        f"{show_bytes(progress.bytes_remaining)} left",
    ]
    if progress.throttle_percent:
        parts.append(f"guest slowed by {progress.throttle_percent} %")
    return " · ".join(parts)


class Drawing:
    """Draws updates on stderr while the `with` lasts; does nothing if nobody watches.

    `show` only stores what to draw: a thread of rich's draws, so the blackout does not wait for a terminal.
    """

    def __init__(self, *, title: str, watched: bool) -> None:
        self._title = title
        self._watched = watched
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._watched:
            from rich.console import Console  # noqa: PLC0415 - 18 ms, only where somebody watches
            from rich.live import Live  # noqa: PLC0415

            self._live = Live(
                self._title, console=Console(stderr=True), refresh_per_second=_REFRESH_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, update: Update) -> None:
        """Take in one notification."""
        if self._live is None:
            return
        if update.progress is not None:
            self._live.update(f"{self._title}   {progress_text(update.progress)}")
        elif text := phase_text(update):
            self._live.update(f"{self._title}   {text}")
