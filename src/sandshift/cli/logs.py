"""`sandshift logs`: what a process of a sandbox has written, byte for byte."""

from __future__ import annotations

import sys
from typing import Final

import click

from sandshift.cli.frame import Frame, framed, sandbox_argument
from sandshift.cli.frame import run as run_async
from sandshift.errors import NotFound, Rejected
from sandshift.fleet.launch import INIT_PROCESS
from sandshift.fleet.launch import logs as read_logs
from sandshift.fleet.shim_client import Shim, connect

STREAMS: Final = {"both": 0, "stdout": 1, "stderr": 2}
STDERR: Final = 2


@click.command("logs", short_help="Show what a process of a sandbox has written.")
@sandbox_argument
@click.argument("process_id", required=False, metavar="[PROCESS]")
@click.option("-f", "--follow", is_flag=True, help="Go on until the process ends.")
@click.option(
    "--stream", type=click.Choice(list(STREAMS)), default="both", show_default=True, help="Which output."
)
@framed
def logs_command(frame: Frame, *, sandbox_id: str, process_id: str | None, follow: bool, stream: str) -> None:
    """Show what PROCESS of SANDBOX has written: its stdout on stdout, its stderr on stderr.

    Without PROCESS the one that 'sandshift run' started, or the only one.
    """
    run_async(_logs(frame, sandbox_id, process_id, STREAMS[stream], follow=follow))


async def _logs(frame: Frame, sandbox_id: str, process_id: str | None, stream: int, *, follow: bool) -> None:
    shim = await connect(frame.host(), frame.namespace, sandbox_id)
    try:
        chosen = process_id or await _only_process(shim)
        document: dict[str, object] = {
            "sandbox": sandbox_id,
            "process": chosen,
            "exited": False,
            "exit_code": None,
        }
        output: list[dict[str, object]] = []
        async for part in read_logs(shim, chosen, stream=stream, follow=follow):
            if frame.as_json and part.data:
                text = part.data.decode(errors="replace")
                output.append({"stream": part.stream, "offset": part.offset, "text": text})
            elif part.data:
                _write(part.stream, part.data)
            if part.exited:
                document |= {"exited": True, "exit_code": part.exit_code}
    finally:
        await shim.close()
    if frame.as_json:
        frame.emit(document | {"output": output})


def _write(stream: int, data: bytes) -> None:
    target = sys.stderr if stream == STDERR else sys.stdout
    target.buffer.write(data)
    target.buffer.flush()


async def _only_process(shim: Shim) -> str:
    """The process that is meant when none is named."""
    names = [found.process_id for found in (await shim.status()).processes]
    if not names:
        raise NotFound(
            f"sandbox {shim.sandbox_id} has no process: start one with 'sandshift process run {shim.sandbox_id} -- COMMAND'"
        )
    if INIT_PROCESS in names:
        return INIT_PROCESS
    if len(names) > 1:
        raise Rejected(
            f"sandbox {shim.sandbox_id} has several processes: name one of {', '.join(sorted(names))}"
        )
    return names[0]
