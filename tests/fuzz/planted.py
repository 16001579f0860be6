"""Bugs put in on purpose, each of a kind that was seen in a real implementation: the fuzzer has to find them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

from tests.fuzz.targets import REAL


@dataclass(frozen=True, slots=True)
class Plant:
    """One change of one line."""

    name: str
    module: str
    right: str
    wrong: str


PLANTS: Final = (
    Plant("the limit is exclusive", "frames", "if length > maximum:", "if length >= maximum:"),
    Plant(
        "the rest of a dropped frame is read as frames",
        "frames",
        "self._left = length\n",
        "self._left = length // 2\n",
    ),
    Plant(
        "a large frame is lost when the buffer moves",
        "frames",
        "needed = max(needed, HEADER_BYTES",
        "needed = max(needed, -HEADER_BYTES",
    ),
    Plant(
        "data on a unary call kills the server (Go)",
        "server_calls",
        "        if inbox is None:\n",
        "        if inbox is None and not data:\n",
    ),
    Plant("late data is answered (Go)", "server_calls", "elif stream_id > self.last_stream_id:", "else:"),
    Plant(
        "one call too many",
        "server_calls",
        "if len(self.open) >= self._calls_max:",
        "if len(self.open) > self._calls_max:",
    ),
    Plant(
        "ids may repeat",
        "server_calls",
        "if stream_id <= self.last_stream_id:",
        "if stream_id < self.last_stream_id:",
    ),
    Plant(
        "an ended call still stops the reading",
        "server_calls",
        "            self.overfull.discard(call)\n\n    def answer_error",
        "\n    def answer_error",
    ),
    Plant(
        "the end of sending is sent twice",
        "client_calls",
        "        call.sending = False",
        "        call.sending = not call.done",
    ),
    Plant(
        "data on a unary call kills the client",
        "client_calls",
        "        if inbox is None:\n",
        "        if inbox is None and call.done:\n",
    ),
    Plant(
        "a refused call burns its id",
        "client_calls",
        '        suffix = b"" if',
        '        self.next_stream_id += 2\n        suffix = b"" if',
    ),
    Plant(
        "an inbox forgets what was taken",
        "inbox",
        "        self.size_bytes -= len(message)\n",
        "        self.size_bytes -= bool(message)\n",
    ),
)


FILES: Final = tuple(f"<planted ttrpc.{name}>" for name in vars(REAL))
"""What the broken modules call themselves, to be watched as the real ones are."""


def planted(plant: Plant) -> SimpleNamespace:
    """The modules with one of them broken.

    Raises:
        ValueError: the line is not there any more: the plant needs a new place.
    """
    original: ModuleType = getattr(REAL, plant.module)
    source = Path(str(original.__file__)).read_text()
    if source.count(plant.right) != 1:
        raise ValueError(
            f"planted bug {plant.name!r}: {plant.right!r} stands {source.count(plant.right)} times in it"
        )
    modules = SimpleNamespace(**vars(REAL))
    setattr(modules, plant.module, _module(original.__name__, source.replace(plant.right, plant.wrong)))
    if plant.module == "inbox":
        for user in ("server_calls", "client_calls"):
            again = _module(f"ttrpc.{user}", Path(str(getattr(REAL, user).__file__)).read_text())
            vars(again)["Inbox"] = modules.inbox.Inbox
            setattr(modules, user, again)
    return modules


def _module(name: str, source: str) -> ModuleType:
    made = ModuleType(f"{name}_planted")
    sys.modules[made.__name__] = made
    code: Any = compile(source, f"<planted {name}>", "exec")
    exec(code, vars(made))  # our own source with one line changed
    return made


def each() -> Iterator[tuple[Plant, SimpleNamespace]]:
    for plant in PLANTS:
        yield plant, planted(plant)
