"""`sandshift migrate`: a running sandbox goes to another host, or says why it does not."""

from __future__ import annotations

import secrets
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sandshift.cli.exits import EXIT_FAILED, EXIT_UNDECIDED
from sandshift.cli.frame import (
    Frame,
    checked_name,
    existing_file,
    framed,
    one_line,
    sandbox_argument,
    session_id_of,
)
from sandshift.cli.frame import run as run_async
from sandshift.cli.options import DEADLINE_MAX_S, FiniteRange, migration_options, options_of
from sandshift.cli.sizes import show_bytes
from sandshift.fleet.host import Host

if TYPE_CHECKING:
    from sandshift.fleet.request import Migration
    from sandshift.fleet.result import MigrationResult

_SESSION_BYTES: Final = 4


@click.command(short_help="Move a running sandbox to another host.")
@sandbox_argument
@click.option(
    "--to",
    "to_path",
    required=True,
    metavar="FILE",
    callback=existing_file,
    help="Configuration of the destination host.",
)
@click.option("--check", is_flag=True, help="Only say what stands in the way. Nothing moves.")
@click.option(
    "--session",
    "session",
    metavar="ID",
    callback=session_id_of,
    help="Session id [default: a fresh one]. That of an earlier move finishes or undoes it.",
)
@click.option(
    "--timeout",
    "deadline_s",
    type=FiniteRange(min=0, min_open=True, max=DEADLINE_MAX_S),
    metavar="SECONDS",
    help="Give up a transfer that takes longer [default: migration.limits.transfer_deadline_s].",
)
@click.option(
    "--wait-for-containers",
    "containers_wait_s",
    type=FiniteRange(min=0, max=DEADLINE_MAX_S),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long its containers may take to be created at the destination, by whoever makes containers there.",
)
@click.option(
    "--as",
    "destination_id",
    default="",
    metavar="ID",
    callback=lambda _context, _parameter, value: value and checked_name("--as", value),
    help="The sandbox on the other host that waits for it, made there by containerd [default: one is made for the move].",
)
@click.option(
    "--keep-shim", is_flag=True, help="Leave the source's shim running afterwards: containerd owns it."
)
@migration_options
@framed
def migrate(
    frame: Frame,
    *,
    sandbox_id: str,
    to_path: Path,
    check: bool,
    session: str | None,
    deadline_s: float | None,
    containers_wait_s: float,
    keep_shim: bool,
    destination_id: str,
    **flags: Any,
) -> None:
    """Move SANDBOX to the host of --to while it runs.

    It ends with the sandbox running on exactly one of the two hosts. An interrupt (Ctrl-C) turns back where that is
    still possible. If this command dies, run it again with --session, anywhere: it finishes or undoes the move.

    Exit status: 0 moved; 1 not moved, it runs where it ran; 2 wrong command line; 3 a person must decide.
    """
    from sandshift.fleet.request import Migration  # noqa: PLC0415 - help and errors need none of it

    migration = Migration(
        source=frame.host(),
        destination=Host.load(to_path),
        sandbox_id=sandbox_id,
        session_id=session or fresh_session_id(sandbox_id),
        namespace=frame.namespace,
        options=options_of(flags),  # type: ignore[arg-type]
        deadline_s=deadline_s,
        close_source=not keep_shim,
        containers_wait_s=containers_wait_s,
        destination_id=destination_id,
    )
    if check:
        _check(frame, migration)
    else:
        _move(frame, migration, is_repeat=session is not None)


def fresh_session_id(sandbox_id: str) -> str:
    return f"{sandbox_id}-{secrets.token_hex(_SESSION_BYTES)}"


def _check(frame: Frame, migration: Migration) -> None:
    from sandshift.fleet.preflight import preflight  # noqa: PLC0415

    result = run_async(preflight(migration))
    where = f"sandbox {migration.sandbox_id}"
    lines = [f"{where} can move to host {migration.destination.name}"]
    if not result.ok:
        lines = [f"{where} cannot move to host {migration.destination.name}:"]
    lines += [f"  {each.side.word}: {each.blocker}" for each in result.found]
    lines += [f"  warning: {warning}" for warning in result.warnings]
    frame.emit(result.document(), "\n".join(lines))
    if not result.ok:
        raise SystemExit(EXIT_FAILED)


def _move(frame: Frame, migration: Migration, *, is_repeat: bool) -> None:
    from sandshift.cli.progress import Drawing  # noqa: PLC0415
    from sandshift.fleet.driver import migrate as drive  # noqa: PLC0415
    from sandshift.fleet.resume import migrate_or_resume  # noqa: PLC0415

    title = f"{migration.sandbox_id}: {migration.source.name} to {migration.destination.name}"
    migration.check()
    if not is_repeat and migration.source.has_shim(migration.namespace, migration.sandbox_id):
        frame.say(f"session {migration.session_id}")
    with Drawing(title=title, watched=frame.draws) as drawing:
        work = (migrate_or_resume if is_repeat else drive)(migration, on_update=drawing.show)
        result = run_async(work)
    tell(frame, result)


def tell(frame: Frame, result: MigrationResult) -> None:
    """The result, and the exit status that goes with it."""
    from sandshift.fleet.saga import Outcome  # noqa: PLC0415

    frame.emit(result.document(), summary(result) if result.moved else "")
    for warning in result.warnings:
        frame.say(f"warning: {one_line(warning)}")
    if result.moved:
        return
    click.echo(f"sandshift: {one_line(explanation(result))}", err=True)
    if frame.verbose and result.reason is not None:
        click.echo("".join(traceback.format_exception(result.reason)), err=True, nl=False)
    raise SystemExit(EXIT_UNDECIDED if result.outcome is Outcome.UNDECIDED else EXIT_FAILED)


def summary(result: MigrationResult) -> str:
    """A move that succeeded, for a person."""
    lines = [f"{result.sandbox_id} runs on host {result.destination}"]
    if result.total_ms is not None:
        lines.append(f"  total      {result.total_ms:.0f} ms")
    if result.blackout_ms is not None:
        parts = ", ".join(
            f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in result.blackout_parts_ms.items()
        )
        lines.append(f"  blackout   {result.blackout_ms:.0f} ms" + (f" ({parts})" if parts else ""))
    if result.passes:
        lines.append(f"  passes     {result.passes}")
        lines.append(f"  moved      {show_bytes(result.bytes_transferred)}")
    return "\n".join(lines)


def explanation(result: MigrationResult) -> str:
    """Why a sandbox has not moved, and where it is now."""
    from sandshift.fleet.saga import Outcome  # noqa: PLC0415

    why = result.reason.message if result.reason else "the session was undone"
    because = f"{result.failed_call}: {why}" if result.failed_call else why
    match result.outcome:
        case Outcome.UNDECIDED:
            return (
                f"sandbox {result.sandbox_id}: whether it moved is not known ({because}); run 'sandshift migrate"
                f" {result.sandbox_id} --session {result.session_id} --to CONFIG' again once both hosts answer, or see"
                f" 'sandshift session show {result.sandbox_id}'"
            )
        case Outcome.CRASHED:
            return f"sandbox {result.sandbox_id} runs nowhere any more: {because}"
        case Outcome.REFUSED:
            return f"sandbox {result.sandbox_id} was not moved and nothing has changed on host {result.source}: {because}"
        case _:
            return f"sandbox {result.sandbox_id} was not moved and runs on host {result.source}: {because}"
