"""`sandshift demo`: a busy sandbox moves between two hosts on this machine, and the proof is printed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import click

from sandshift.cli.demo.scenario import Demo
from sandshift.cli.demo.settings import Settings
from sandshift.cli.demo.show import showing
from sandshift.cli.demo.summary import summary
from sandshift.cli.demo.workload import Workload
from sandshift.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED
from sandshift.cli.frame import Frame, fail, of_the_system
from sandshift.errors import Cancelled, SandshiftError
from sandshift.status import status_of


@click.command("demo")
@click.option(
    "--memory", "memory_mib", default=256, show_default=True, metavar="MIB", help="Memory of the sandbox."
)
@click.option(
    "--working-set",
    "working_set_mib",
    default=100,
    show_default=True,
    metavar="MIB",
    help="Memory that is rewritten.",
)
@click.option(
    "--dirty-rate",
    "dirty_mib_per_s",
    default=20,
    show_default=True,
    metavar="MIB/S",
    help="How fast it is rewritten.",
)
@click.option("--no-control", is_flag=True, help="Leave out the second, short move with encryption off.")
@click.option("--qemu", default="", metavar="PATH", help="Another QEMU than the installed one.")
@click.option(
    "--qemu-data", multiple=True, metavar="DIR", help="Where that QEMU's firmware is (its -L); repeatable."
)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=None, metavar="DIR", help="Guest image and templates."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--verbose", is_flag=True, help="After an error, tell its whole story.")
def demo(
    *,
    memory_mib: int,
    working_set_mib: int,
    dirty_mib_per_s: int,
    no_control: bool,
    qemu: str,
    qemu_data: tuple[str, ...],
    cache: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Move a busy sandbox between two hosts on this machine.

    Makes two hosts, a client and a switch out of network namespaces; starts a VM on host A with a counter service and a
    writer that keeps rewriting memory; moves it to host B while a client talks to it; and proves that the connection, the
    numbers and every page survived, and that nobody between the hosts could read them. Needs root. Leaves nothing.

    The exit status is 0 only if all of it is proven.
    """
    frame = Frame(config_path=None, namespace="", as_json=as_json, verbose=verbose)
    try:
        workload = Workload(working_set_mib=working_set_mib, dirty_mib_per_s=dirty_mib_per_s)
        settings = Settings(
            memory_mib=memory_mib,
            workload=workload,
            control=not no_control,
            cache_dir=cache.absolute() if cache else None,
            qemu=qemu,
            qemu_data_dirs=tuple(qemu_data),
        )
        figures = run_demo(settings, drawn=frame.draws)
    except Cancelled as interrupted:
        if as_json:
            click.echo(json.dumps(failed_figures(interrupted)))
        click.echo(f"sandshift: {interrupted.message}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except SandshiftError as error:
        if as_json:
            click.echo(json.dumps(failed_figures(error)))
        fail(replace(frame, as_json=False), error)
    except OSError as problem:
        refused = of_the_system(problem)
        if as_json:
            click.echo(json.dumps(failed_figures(refused)))
        fail(replace(frame, as_json=False), refused, cause=problem)
    click.echo(json.dumps(figures) if as_json else summary(figures))
    sys.exit(0 if figures["ok"] else EXIT_FAILED)


def failed_figures(error: SandshiftError) -> dict[str, object]:
    """The JSON of a demo that could not be run to its end: nothing is proven."""
    return {
        "ok": False,
        "reasons": ["a step failed"],
        "failure": error.message,
        "error": error.message,
        "code": status_of(error)[0].name,
    }


def run_demo(settings: Settings, *, drawn: bool) -> dict[str, object]:
    """Run it to its end, or to the end of its cleaning up. SIGINT and SIGTERM end it alike.

    Raises:
        Cancelled: it was interrupted. And what `Demo.run` raises.
    """
    with showing(drawn=drawn) as show:
        return asyncio.run(until_signalled(Demo(settings, show)))


async def until_signalled(demo: Demo) -> dict[str, object]:
    """The demo's figures; a signal cancels it, and it then cleans up before it ends."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(demo.run())

    def interrupt() -> None:
        demo.interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        if demo.interrupted:
            raise Cancelled("interrupted; everything that the demo made is gone") from None
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
