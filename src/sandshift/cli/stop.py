"""`sandshift stop`: ends sandboxes and removes all that their host has of them."""

from __future__ import annotations

from typing import Final

import click

from sandshift.cli.exits import EXIT_FAILED
from sandshift.cli.frame import Frame, checked_name, framed, one_line
from sandshift.cli.frame import run as run_async
from sandshift.errors import SandshiftError
from sandshift.fleet.launch import STOP_S
from sandshift.fleet.launch import stop as stop_sandbox

GRACE_MAX_S: Final = 3600


@click.command(short_help="Stop sandboxes and remove them.")
@click.argument("sandbox_ids", nargs=-1, required=True, metavar="SANDBOX...")
@click.option(
    "--timeout",
    "grace_s",
    type=click.IntRange(0, GRACE_MAX_S),
    default=STOP_S,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to power off before it is switched off.",
)
@framed
def stop(frame: Frame, *, sandbox_ids: tuple[str, ...], grace_s: int) -> None:
    """Stop each SANDBOX and remove it. One that cannot be stopped does not keep the others from it."""
    names = [checked_name("SANDBOX", each) for each in sandbox_ids]
    host = frame.host()
    results: list[dict[str, object]] = []
    for name in names:
        error = ""
        try:
            run_async(stop_sandbox(host, frame.namespace, name, grace_s=grace_s))
        except SandshiftError as problem:
            error = problem.message
            click.echo(f"sandshift: {one_line(error)}", err=True)
        else:
            frame.emit_text(name)
        results.append({"id": name, "host": host.name, "stopped": not error, "error": error})
    frame.emit(results)
    if any(result["error"] for result in results):
        raise SystemExit(EXIT_FAILED)
