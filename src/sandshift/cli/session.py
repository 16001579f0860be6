"""`sandshift session`: looking at a migration session, bringing its shim back, and an operator's last resort."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from sandshift.cli.exits import EXIT_FAILED
from sandshift.cli.frame import Frame, existing_file, framed, sandbox_argument, session_id_of
from sandshift.cli.frame import run as run_async
from sandshift.cli.table import table
from sandshift.fleet.host import Host
from sandshift.fleet.sessions import DANGERS, SideReport, force_resume, forceable, revive
from sandshift.fleet.sessions import show as show_side
from sandshift.fleet.shim_client import Shim, connect
from sandshift.session.statement import Cell

T = TypeVar("T")

_to_option = click.option(
    "--to",
    "to_path",
    metavar="FILE",
    callback=existing_file,
    help="Configuration of the other host: what it says is shown too.",
)


@click.group(short_help="Look at, finish or force a migration session.")
def session() -> None:
    """Migration sessions. 'sandshift migrate --session ID' finishes or undoes one."""


@session.command("show")
@sandbox_argument
@click.option(
    "--session",
    "session_id",
    metavar="ID",
    callback=session_id_of,
    help="Which session [default: the active one, or the last].",
)
@_to_option
@framed
def session_show(frame: Frame, *, sandbox_id: str, session_id: str | None, to_path: Path | None) -> None:
    """Show where the migration session of SANDBOX stands, and who holds the right to run."""
    hosts = [frame.host(), *([Host.load(to_path)] if to_path else [])]

    async def work() -> list[SideReport]:
        return [await show_side(host, frame.namespace, sandbox_id, session_id or "") for host in hosts]

    reports = run_async(work())
    _emit(frame, sandbox_id, reports)
    if all(report.problem for report in reports):
        click.echo(f"sandshift: {reports[0].problem}", err=True)
        raise SystemExit(EXIT_FAILED)


@session.command("resume")
@sandbox_argument
@framed
def session_resume(frame: Frame, *, sandbox_id: str) -> None:
    """Bring the shim of SANDBOX back, if it died: it finds its VM and goes on with its session.

    It starts no guest and decides nothing: 'sandshift migrate --session ID' then finishes or undoes the move.
    """
    report = run_async(revive(frame.host(), frame.namespace, sandbox_id))
    _emit(frame, sandbox_id, [report])


@session.command("force-resume")
@sandbox_argument
@click.option(
    "--session", "session_id", metavar="ID", required=True, callback=session_id_of, help="The session."
)
@click.option(
    "--yes-i-know-that-two-guests-may-run",
    "known",
    is_flag=True,
    help="Do not ask. You have made sure that the other host is off.",
)
@framed
def session_force_resume(frame: Frame, *, sandbox_id: str, session_id: str, known: bool) -> None:
    """Run the guest of SANDBOX here although the protocol cannot tell whether it runs on the other host.

    Last resort, for a host that is gone for good (docs/explanation/right-to-run.md lists the cases). It is written
    into the session's record and its report.
    """

    host = frame.host()
    cell = run_async(_with_shim(host, frame, sandbox_id, lambda shim: forceable(shim, session_id)))
    if not known:
        # Outside of any event loop: Ctrl-C here ends the command at once.
        _ask(frame, f"Session {session_id!r} of sandbox {sandbox_id} on host {host.name}", session_id, cell)
    run_async(_with_shim(host, frame, sandbox_id, lambda shim: force_resume(shim, session_id, cell)))
    frame.emit(
        {"sandbox": sandbox_id, "session": session_id, "forced": True, "cell_before": cell.name},
        f"{sandbox_id} runs on host {host.name}: forced, and written down in session {session_id}",
    )


async def _with_shim(host: Host, frame: Frame, sandbox_id: str, work: Callable[[Shim], Awaitable[T]]) -> T:
    shim = await connect(host, frame.namespace, sandbox_id)
    try:
        return await work(shim)
    finally:
        await shim.close()


def _ask(frame: Frame, what: str, session_id: str, cell: Cell) -> None:
    """Name the danger and have the session id typed. Ends the command if nobody can be asked or the answer is no."""
    if frame.as_json or not sys.stdin.isatty():
        raise click.UsageError(
            f"force-resume asks a person, and nobody is there to ask: {DANGERS[cell]}. Make sure that the"
            " other host is off, then add --yes-i-know-that-two-guests-may-run"
        )
    click.echo(f"{what} is {cell.name}.", err=True)
    click.echo(f"DANGER: {DANGERS[cell]}.", err=True)
    click.echo("Go on only if the other host is off, or its VM is proven gone.", err=True)
    typed = click.prompt(
        "Type the session id to run the guest here", default="", show_default=False, err=True
    )
    if typed != session_id:
        click.echo("sandshift: that is not the session id: nothing was done", err=True)
        raise SystemExit(EXIT_FAILED)


def _emit(frame: Frame, sandbox_id: str, reports: list[SideReport]) -> None:
    rows = [
        [
            report.host,
            report.side,
            report.session_id,
            "no answer" if report.problem else report.state + ("" if report.active else " (ended)"),
            report.cell + (" FORCED" if report.forced else ""),
            report.vm_state,
            report.failure or report.action,
        ]
        for report in reports
    ]
    header = ["HOST", "SIDE", "SESSION", "STATE", "RIGHT TO RUN", "VM", "REASON"]
    frame.emit(
        {"sandbox": sandbox_id, "sides": [report.document() for report in reports]}, table(header, rows)
    )
