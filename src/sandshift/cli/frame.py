"""What every command shares: its options, how it ends, and how errors are told.

An error is one line on stderr, "sandshift: <sentence>", and status 1; a command line that is wrong gives status 2;
an interrupt 130. `--verbose` adds the exception's own story. `--json` prints exactly one JSON document on stdout, also
when the command fails: then it is `{"error": ..., "code": ...}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from sandshift.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED
from sandshift.errors import Rejected, SandshiftError
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host
from sandshift.identifiers import identifier

T = TypeVar("T")
Command = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Frame:
    """How this invocation was asked to behave."""

    config_path: Path | None
    namespace: str
    as_json: bool
    verbose: bool

    def host(self) -> Host:
        """The host of `--config`. Raises Rejected, naming file and key."""
        return Host.load(self.config_path)

    def emit(self, document: object, text: str = "") -> None:
        """The command's result: the document with `--json`, else the text."""
        if self.as_json:
            click.echo(json.dumps(document, ensure_ascii=False))
        elif text:
            click.echo(text)

    def emit_text(self, text: str) -> None:
        """A part of the result for a person, as soon as it is known; nothing with `--json`."""
        if not self.as_json:
            click.echo(text)

    def say(self, text: str) -> None:
        """A remark for a person, on stderr; nothing with `--json`."""
        if not self.as_json:
            click.echo(text, err=True)

    @property
    def draws(self) -> bool:
        """Whether progress may be drawn: a person is watching."""
        return not self.as_json and sys.stderr.isatty()


def existing_file(_context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A path option whose file must be there."""
    if value is None:
        return None
    path = Path(value)
    try:
        is_there = path.is_file()
    except OSError as error:
        raise click.BadParameter(f"{value} cannot be looked at: {error.strerror}", param=parameter) from None
    if not is_there:
        raise click.BadParameter(
            f"{value} is not a file: give the path of a host's config.toml", param=parameter
        )
    return path.absolute()


def framed(command: Command) -> Command:
    """Give a command the shared options and pass it its `Frame` first; errors end as this module says."""

    @click.option(
        "--config",
        "config_path",
        metavar="FILE",
        callback=existing_file,
        help="Configuration of the host [default: $SANDSHIFT_CONFIG, else /etc/sandshift/config.toml].",
    )
    @click.option(
        "--namespace",
        default=NAMESPACE_DEFAULT,
        show_default=True,
        metavar="NAME",
        callback=lambda _context, _parameter, value: checked_name("--namespace", value),
        help="Namespace of the sandbox, as containerd has them.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    @click.option("--verbose", is_flag=True, help="After an error, tell its whole story.")
    @functools.wraps(command)
    def invoked(
        *,
        config_path: Path | None,
        namespace: str,
        as_json: bool,
        verbose: bool,
        **arguments: Any,
    ) -> object:
        frame = Frame(config_path, namespace, as_json, verbose)
        with told(frame):
            return command(frame, **arguments)

    return invoked


@contextlib.contextmanager
def told(frame: Frame) -> Iterator[None]:
    """Turn an error into its line and its exit status."""
    try:
        yield
    except SandshiftError as error:
        fail(frame, error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted(as_json=frame.as_json)
    except BrokenPipeError:
        # Who read our output has gone, as in `sandshift logs | head`: nothing is left to tell.
        _write_no_more()
        raise SystemExit(EXIT_FAILED) from None
    except OSError as error:
        fail(frame, of_the_system(error), cause=error)


def interrupted(*, as_json: bool) -> NoReturn:
    """Say so and end with status 130."""
    if as_json:
        _echo_document({"error": "interrupted", "code": "CANCELLED"})
    click.echo("sandshift: interrupted", err=True)
    raise SystemExit(EXIT_INTERRUPTED) from None


def _echo_document(document: object) -> None:
    """A document in place of the result. A stdout that takes nothing, as on a full disk, leaves the line on stderr."""
    try:
        click.echo(json.dumps(document, ensure_ascii=False))
    except OSError:
        _write_no_more()


def _write_no_more() -> None:
    """What is still buffered for stdout goes nowhere: Python would try once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_the_system(error: OSError) -> Rejected:
    """An error of the system's, such as a full disk, as ours: with the file that it is about."""
    return Rejected(f"{error.filename or 'the system'}: {error.strerror or error}")


def fail(frame: Frame, error: SandshiftError, *, cause: BaseException | None = None) -> NoReturn:
    """Tell the error and end with status 1."""
    from sandshift.status import status_of  # noqa: PLC0415 - loads protobuf: only a failure pays for it

    message = readable(error.message)
    if frame.as_json:
        _echo_document({"error": message, "code": status_of(error)[0].name})
    click.echo(f"sandshift: {one_line(message)}", err=True)
    if frame.verbose:
        click.echo("".join(traceback.format_exception(cause or error)), err=True, nl=False)
    raise SystemExit(EXIT_FAILED)


def readable(text: str) -> str:
    """The text with a sign in place of what is not UTF-8: a file's name may be any bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def one_line(message: str) -> str:
    """A message as one line: a shim may have quoted QEMU, which writes several."""
    return " ".join(message.split())


def run(work: Coroutine[object, object, T]) -> T:
    """Run a command's asynchronous part. SIGTERM does what Ctrl-C does: the command winds back and says so."""

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    return asyncio.run(interruptible())


def checked_name(option: str, value: str) -> str:
    """A name that follows containerd's rule for ids. Raises click.BadParameter, naming the option."""
    try:
        return identifier("", value)
    except Rejected as error:
        raise click.BadParameter(error.message.strip(), param_hint=option) from None


def sandbox_argument(command: Command) -> Command:
    """The SANDBOX argument, checked."""
    return click.argument(
        "sandbox_id",
        metavar="SANDBOX",
        callback=lambda _context, _parameter, value: checked_name("SANDBOX", value),
    )(command)


def session_id_of(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Check a session id option."""
    if value is None:
        return None
    from sandshift.session.ids import session_id  # noqa: PLC0415

    try:
        return session_id(value)
    except Rejected as error:
        raise click.BadParameter(error.message) from None
