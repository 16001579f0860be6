"""`sandshift conformance`: holds two shims, of any make, to the contract of the Migration service."""

from __future__ import annotations

import math

import click

from sandshift.cli.exits import EXIT_FAILED
from sandshift.cli.frame import Frame, framed
from sandshift.cli.frame import run as run_async


def _limits(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """`NAME=SECONDS`, as the configuration of the shims has it."""
    limits = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            seconds = float(number)
        except ValueError:
            seconds = math.nan
        if not name or not equals or not math.isfinite(seconds) or seconds <= 0:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER with a number above 0, as in stall_s=2")
        limits[name] = seconds
    return limits


@click.command(short_help="Hold two shims to the Migration service's contract.")
@click.option("--source", required=True, metavar="SOCKET", help="Shim of a sandbox that runs and may move.")
@click.option("--destination", required=True, metavar="SOCKET", help="Shim that awaits the same sandbox.")
@click.option(
    "--reset",
    default="",
    metavar="COMMAND",
    help="Makes fresh shims behind both sockets; without it the cases after the first whole move are skipped.",
)
@click.option(
    "--restart",
    default="",
    metavar="COMMAND",
    help="Kills and starts one side's shim; run with 'source' or 'destination' as last word.",
)
@click.option(
    "--guest",
    default="",
    metavar="COMMAND",
    help="Makes the guest end or write by itself; run with 'reboot', 'poweroff' or 'write' as last word.",
)
@click.option(
    "--silence",
    default="",
    metavar="COMMAND",
    help="Keeps one side's VM from answering; run with 'source' or 'destination', and 'on' or 'off', as last words.",
)
@click.option(
    "--pin",
    default="",
    metavar="COMMAND",
    help="As --reset, with a sandbox whose annotation says that it must not move.",
)
@click.option(
    "--source-events",
    default="",
    metavar="PATH",
    help="Where the source's shim sends its events (TTRPC_ADDRESS).",
)
@click.option("--destination-events", default="", metavar="PATH", help="Where the destination's does.")
@click.option(
    "--bundle",
    default="",
    metavar="PATH",
    help="Bundle of a container that writes numbered lines of eight digits until it is killed.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=_limits,
    help="A limit that both shims have; short ones are waited for. May be repeated.",
)
@click.option(
    "--only", default="", metavar="PATTERN", help="Cases whose name holds this, or matches the glob."
)
@click.option("--list", "list_only", is_flag=True, help="Print the cases and run none.")
@framed
def conformance(
    frame: Frame,
    *,
    source: str,
    destination: str,
    reset: str,
    restart: str,
    guest: str,
    silence: str,
    pin: str,
    source_events: str,
    destination_events: str,
    bundle: str,
    limits: dict[str, float],
    only: str,
    list_only: bool,
) -> None:
    """Run the black-box suite of the Migration service: every state and call, both revisions, every promise.

    One line a case, then 'N passed, N failed, N skipped'. The exit status is 0 if none failed.
    """
    from sandshift.conformance.runner import FAILED, Suite, select  # noqa: PLC0415 - loads protobuf
    from sandshift.conformance.side import Side  # noqa: PLC0415
    from sandshift.conformance.target import Sockets  # noqa: PLC0415

    cases = select(only)
    if not cases:
        raise click.BadParameter(f"no case matches {only!r}", param_hint="--only")
    if list_only:
        lines = [f"{case.name} [{case.line}]" for case in cases]
        frame.emit(
            [{"case": case.name, "contract": case.line, "revision": case.revision} for case in cases],
            "\n".join(lines),
        )
        return
    events = {Side.SOURCE: source_events, Side.DESTINATION: destination_events}
    target = Sockets(source, destination, reset, restart, guest, silence, pin, limits, events, bundle)
    result = run_async(Suite(target).run(cases, lambda verdict: frame.emit_text(str(verdict))))
    frame.emit(result.document(), str(result))
    if result.count(FAILED):
        raise SystemExit(EXIT_FAILED)
