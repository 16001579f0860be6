"""The `sandshift` command. Each command lives in its own module and is loaded when it is called, or asked for help."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NoReturn

import click

from sandshift import VERSION

PROGRAM: Final = "sandshift"
COMMANDS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "run": ("sandshift.cli.run:run", "Start a sandbox, and a process in it."),
        "process": ("sandshift.cli.process:process", "Start further processes in a sandbox."),
        "ls": ("sandshift.cli.ls:ls", "List the sandboxes of this host."),
        "logs": ("sandshift.cli.logs:logs_command", "Show what a process of a sandbox has written."),
        "stop": ("sandshift.cli.stop:stop", "Stop sandboxes and remove them."),
        "migrate": ("sandshift.cli.migrate:migrate", "Move a running sandbox to another host."),
        "session": ("sandshift.cli.session:session", "Look at, finish or force a migration session."),
        "report": ("sandshift.cli.report:report", "Show the report of an ended session."),
        "image": ("sandshift.cli.image:image", "Build and list guest images."),
        "conformance": (
            "sandshift.cli.conformance:conformance",
            "Hold two shims to the Migration service's contract.",
        ),
        "demo": ("sandshift.cli.demo.command:demo", "Move a busy sandbox between two hosts on this machine."),
    }
)
"""Name -> where the command is, and its line in the help: listing them loads none of them."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (target, _help) in COMMANDS.items() if _is_there(target)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS or not _is_there(COMMANDS[cmd_name][0]):
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, COMMANDS[name][1]) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _is_there(target: str) -> bool:
    return importlib.util.find_spec(target.partition(":")[0]) is not None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="sandshift")
def cli() -> None:
    """VM sandboxes that move between Linux hosts while they run.

    Every command takes --json for one JSON document instead of text; all but demo take --config for the host they are about.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs the command line and ends the process with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        _check_words(words)
        cli.main(words, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Exit as wanted:
        raise SystemExit(wanted.exit_code) from None
    except click.ClickException as error:
        raise SystemExit(_tell_usage(error, as_json=as_json)) from None
    except (click.Abort, KeyboardInterrupt):
        from sandshift.cli.frame import interrupted  # noqa: PLC0415 - the help does without asyncio

        interrupted(as_json=as_json)
    raise SystemExit(0)


def _check_words(words: Sequence[str]) -> None:
    """What a guest and a shim are told is text. Raises UsageError, naming the word."""
    for number, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            from sandshift.cli.frame import readable  # noqa: PLC0415 - as above

            raise click.UsageError(
                f"word {number} of the command line, {readable(word)!r}, is not UTF-8"
            ) from None


def _tell_usage(error: click.ClickException, *, as_json: bool) -> int:
    """A command line that is wrong: one line that says what, and where help is."""
    message = " ".join(error.format_message().split())
    if as_json:
        click.echo(json.dumps({"error": message, "code": "INVALID_ARGUMENT"}))
    context = error.ctx if isinstance(error, click.UsageError) else None
    remedy = f" (see '{context.command_path} --help')" if context else ""
    click.echo(f"{PROGRAM}: {message}{remedy}", err=True)
    return error.exit_code
