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
    """ "pass 3 · 187.4 MiB sent · 12.0 MiB left · 412.0 MiB/s · 20.1 MiB/s dirty"."""
    parts = [
        f"pass {progress.pass_number}",
        f"{show_bytes(progress.bytes_transferred)} sent",
        f"{show_bytes(progress.bytes_remaining)} left",
        f"{show_bytes(progress.bytes_per_s)}/s",
    ]
    if progress.dirty_bytes_per_s:
        parts.append(f"{show_bytes(progress.dirty_bytes_per_s)}/s dirty")
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

            console = Console(stderr=True)
            self._live = Live(console=console, refresh_per_second=_REFRESH_PER_S, transient=True)
            self._live.start()
            self._draw("getting ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, update: Update) -> None:
        """Take in one notification."""
        if update.progress is not None:
            self._draw(progress_text(update.progress))
        elif text := phase_text(update):
            self._draw(text)

    def _draw(self, text: str) -> None:
        if self._live is not None:
            from rich.text import Text  # noqa: PLC0415 - there already, see __enter__

            line = Text(f"{self._title}   {text}", no_wrap=True, overflow="ellipsis")
            self._live.update(line)
