"""The example of docs/reference/ttrpc.md runs as it stands, and its numbers are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ttrpc import MESSAGE_BYTES_MAX, InboxLimits
from ttrpc.aio.connection import WRITE_BYTES_HIGH
from ttrpc.aio.server import CONNECTIONS_MAX
from ttrpc.frames import FRAME_BYTES_CUT
from ttrpc.server_calls import CALLS_MAX
from ttrpc.status import STATUS_MESSAGE_CHARACTERS_MAX

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "ttrpc.md").read_text()


def test_the_example_prints_what_it_should() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-c", example.replace("docs-example", f"docs-example-{os.getpid()}")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.stdout, ran.stderr) == (
        "answered /docs.Example/Shout\nHEY?\n['a', 'b', 'c']\nINVALID_ARGUMENT: there is nothing to shout: send a word\n",
        "",
    )


def test_the_limits_on_the_page_are_the_codes() -> None:
    limits = InboxLimits()
    assert (MESSAGE_BYTES_MAX, FRAME_BYTES_CUT, WRITE_BYTES_HIGH) == (4 << 20, 64 << 20, 256 << 10)
    assert (limits.messages_max, limits.bytes_max, limits.patience_s) == (16384, 4 << 20, 0.25)
    assert (CALLS_MAX, CONNECTIONS_MAX, STATUS_MESSAGE_CHARACTERS_MAX) == (1024, 1024, 16384)
    for text in (
        "| 4 MiB, inclusive |",
        "| 64 MiB |",
        "16,384 or 4 MiB",
        "| 256 KiB |",
        "`patience_s` (0.25)",
        "| 16,384 characters |",
    ):
        assert text in PAGE
