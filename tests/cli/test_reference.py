"""docs/reference/cli.md tells every command and every option, and none that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sandshift.cli.main import COMMANDS, cli

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/cli.md").read_text()
SHARED = {"--config", "--namespace", "--json", "--verbose", "--help"}


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                assert found is not None
                yield f"{name} {inner}", found
        else:
            yield name, command


ALL = dict(commands())


def section(name: str) -> str:
    """The part of the page under the heading that names the command."""
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    found = [part for part in parts if f"sandshift {name}" in part.partition("\n")[0]]
    assert len(found) == 1, f"{name} has {len(found)} headings"
    return found[0]


@pytest.mark.parametrize("name", ALL)
def test_every_option_of_the_command_is_on_the_page(name: str) -> None:
    options = {
        option
        for parameter in ALL[name].params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if option.startswith("--")
    }
    missing = [option for option in options - SHARED if option not in section(name)]
    assert missing == []


def test_the_page_names_no_option_that_is_not_there() -> None:
    real = {option for command in ALL.values() for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", PAGE))
    assert named - real - SHARED == set()
