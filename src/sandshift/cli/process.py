"""`sandshift process`: further processes in a sandbox that runs."""

from __future__ import annotations

import secrets
from typing import Final

import click

from sandshift.cli.frame import Frame, checked_name, framed, sandbox_argument
from sandshift.cli.frame import run as run_async
from sandshift.cli.run import environment_of
from sandshift.cli.table import table
from sandshift.fleet.launch import run_process
from sandshift.fleet.shim_client import connect

_ID_BYTES: Final = 3


@click.group(short_help="Start further processes in a sandbox.")
def process() -> None:
    """Processes in a sandbox, outside any container."""


@process.command("run")
@click.option("--id", "process_id", metavar="NAME", help="Id of the process [default: a fresh one].")
@click.option(
    "--env",
    "environment",
    multiple=True,
    callback=environment_of,
    metavar="NAME=VALUE",
    help="For the process.",
)
@click.option("--cwd", default="", metavar="DIR", help="Working directory [default: /].")
@sandbox_argument
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@framed
def process_run(
    frame: Frame,
    *,
    sandbox_id: str,
    process_id: str | None,
    environment: dict[str, str],
    cwd: str,
    arguments: tuple[str, ...],
) -> None:
    """Start COMMAND in SANDBOX. Twice with the same --id is one start."""
    chosen = (
        checked_name("--id", process_id) if process_id is not None else f"p-{secrets.token_hex(_ID_BYTES)}"
    )

    async def work() -> int:
        shim = await connect(frame.host(), frame.namespace, sandbox_id)
        try:
            return await run_process(shim, arguments, process_id=chosen, environment=environment, cwd=cwd)
        finally:
            await shim.close()

    pid = run_async(work())
    frame.emit({"sandbox": sandbox_id, "process": chosen, "pid": pid}, chosen)


@process.command("ls")
@sandbox_argument
@framed
def process_ls(frame: Frame, *, sandbox_id: str) -> None:
    """List the processes that were started in SANDBOX."""

    async def work() -> list[dict[str, object]]:
        shim = await connect(frame.host(), frame.namespace, sandbox_id)
        try:
            status = await shim.status()
        finally:
            await shim.close()
        return [
            {
                "process": found.process_id,
                "pid": found.pid,
                "args": list(found.args),
                "exited": found.exited,
                "exit_code": found.exit_code if found.exited else None,
            }
            for found in status.processes
        ]

    found = run_async(work())
    rows = [
        [
            str(each["process"]),
            str(each["pid"]),
            f"exited {each['exit_code']}" if each["exited"] else "runs",
            " ".join(map(str, each["args"])) if isinstance(each["args"], list) else "",
        ]
        for each in found
    ]
    frame.emit(found, table(["PROCESS", "PID", "STATE", "COMMAND"], rows))
