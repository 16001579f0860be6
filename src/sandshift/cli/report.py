"""`sandshift report`: what an ended session took, phase by phase."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from sandshift.cli.frame import Frame, framed, session_id_of
from sandshift.cli.frame import run as run_async
from sandshift.errors import Damaged
from sandshift.fleet.reports import fetch_report

_INDENT: Final = "  "


@click.command(short_help="Show the report of an ended session.")
@click.argument("session_id", metavar="SESSION", callback=session_id_of)
@framed
def report(frame: Frame, *, session_id: str) -> None:
    """Show what the migration SESSION took on this host: passes, phases, the parts of the blackout, warnings.

    Reports outlive their shim; a host keeps its newest 1,000.
    """
    raw = run_async(fetch_report(frame.host(), frame.namespace, session_id))
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise Damaged(f"the report of session {session_id!r} on this host is damaged: {error}") from error
    frame.emit(document, "\n".join(outline(document)))


def outline(document: Any, depth: int = 0) -> list[str]:
    """A JSON document as indented lines, "name: value"; lists of numbers and words on one line."""
    pad = _INDENT * depth
    if isinstance(document, dict):
        lines = []
        for name, value in document.items():
            if _is_nested(value):
                lines += [f"{pad}{name}:", *outline(value, depth + 1)]
            else:
                lines.append(f"{pad}{name}: {_plain(value)}")
        return lines
    if isinstance(document, list):
        lines = []
        for value in document:
            if _is_nested(value):
                first, *rest = outline(value, depth + 1) or [""]
                lines += [f"{pad}- {first.strip()}", *rest]
            else:
                lines.append(f"{pad}- {_plain(value)}")
        return lines
    return [f"{pad}{_plain(document)}"]


def _is_nested(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, list) and any(isinstance(each, dict | list) for each in value)


def _plain(value: Any) -> str:
    match value:
        case None | "" | [] | {}:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list():
            return ", ".join(_plain(each) for each in value)
        case _:
            return str(value)
