"""`sandshift ls`: the sandboxes of one host, or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from sandshift.cli.frame import Frame, existing_file, framed
from sandshift.cli.frame import run as run_async
from sandshift.cli.sizes import show_bytes
from sandshift.cli.table import table
from sandshift.fleet.host import Host
from sandshift.fleet.listing import Listed, list_sandboxes

HEADER: Final = ("ID", "STATE", "HOST", "MEMORY", "ADDRESSES", "SESSION")


@click.command(short_help="List the sandboxes of this host.")
@click.option(
    "--also",
    multiple=True,
    metavar="FILE",
    callback=lambda context, parameter, values: tuple(
        existing_file(context, parameter, each) for each in values
    ),
    help="Configuration of a further host; may be repeated.",
)
@click.option("--all-namespaces", is_flag=True, help="Not only those of --namespace.")
@framed
def ls(frame: Frame, *, also: tuple[Path, ...], all_namespaces: bool) -> None:
    """List the sandboxes of this host, as their own shims say."""
    hosts = [frame.host(), *(Host.load(path) for path in also)]

    async def work() -> list[Listed]:
        return [found for host in hosts for found in await list_sandboxes(host)]

    listed = [found for found in run_async(work()) if all_namespaces or found.namespace == frame.namespace]
    rows = [_row(found) for found in listed]
    frame.emit([found.document() for found in listed], table(HEADER, rows))
    for found in listed:
        if found.problem:
            frame.say(f"sandshift: {found.problem}")


def _row(found: Listed) -> list[str]:
    session = found.status.session
    return [
        found.sandbox_id,
        found.state,
        found.host,
        show_bytes(found.status.memory_bytes) if found.status.memory_bytes else "",
        ",".join(found.addresses),
        f"{session.session_id} ({session.state})" if session.active else "",
    ]
