"""What users' type checkers see: mypy --strict takes right code and finds wrong code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
RIGHT = """
from collections.abc import AsyncIterator
from typing import assert_type
import ttrpc
from sandshift.wire.migration import messages_pb2
from sandshift.wire.migration.service_ttrpc import MigrationClient, MigrationService
from google.protobuf.wrappers_pb2 import BytesValue

class Mine(MigrationService):
    async def cancel(self, request: messages_pb2.CancelRequest, context: ttrpc.CallContext) -> messages_pb2.CancelResponse:
        assert_type(context.metadata["k"], str)
        assert_type(context.timeout_s, float | None)
        raise ttrpc.StatusError(ttrpc.Code.ABORTED, "no")

    async def notifications(
        self, request: messages_pb2.NotificationsRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[messages_pb2.NotificationsResponse]:
        yield messages_pb2.NotificationsResponse()

async def use() -> None:
    server = ttrpc.Server(allow=ttrpc.PeerPolicy.root(), inbox=ttrpc.InboxLimits(patience_s=None))
    server.register(Mine())
    async with await ttrpc.connect("/s", timeout_s=1) as connection:
        client = MigrationClient(connection)
        assert_type(await client.cancel(messages_pb2.CancelRequest(), timeout_s=1, metadata={"k": "v"}), messages_pb2.CancelResponse)
        async for message in client.notifications(messages_pb2.NotificationsRequest()):
            assert_type(message, messages_pb2.NotificationsResponse)
        chat = ttrpc.Method("s", "Chat", ttrpc.Shape.BIDI, BytesValue, BytesValue)
        async with connection.bidi_stream(chat) as stream:
            await stream.send(BytesValue())
            assert_type(await anext(stream), BytesValue)
        upload = ttrpc.Method("s", "Up", ttrpc.Shape.CLIENT_STREAM, BytesValue, messages_pb2.CancelResponse)
        assert_type(await connection.client_stream(upload).response(), messages_pb2.CancelResponse)
"""
WRONG = {
    "a request of another type": "await client.cancel(messages_pb2.CleanupRequest())",
    "an argument that is not there": "await client.cancel(messages_pb2.CancelRequest(), timeout=1)",
    "a stream awaited": "await client.notifications(messages_pb2.NotificationsRequest())",
    "metadata of bytes": 'await client.cancel(messages_pb2.CancelRequest(), metadata={"k": b"v"})',
    "a message of another type on a stream": "await stream.send(messages_pb2.CancelRequest())",
}
WRONG_BEGINS = """
import ttrpc
from google.protobuf.wrappers_pb2 import BytesValue
from sandshift.wire.migration import messages_pb2
from sandshift.wire.migration.service_ttrpc import MigrationClient

async def use(client: MigrationClient, stream: ttrpc.BidiStream[BytesValue, BytesValue]) -> None:
"""


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """mypy --strict of every program at once, away from our own configuration; complaints by file."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "right.py").write_text(RIGHT)
    for number, line in enumerate(WRONG.values()):
        (folder / f"wrong{number}.py").write_text(f"{WRONG_BEGINS}    {line}\n")
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--follow-imports=silent", "."],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.stderr == ""
    complaints: dict[str, list[str]] = {}
    for line in checked.stdout.splitlines():
        if ": error: " in line:
            complaints.setdefault(line.partition(":")[0], []).append(line)
    return complaints


def test_right_programs_are_clean_under_strict(verdict: dict[str, list[str]]) -> None:
    assert verdict.get("right.py", []) == []


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_programs_are_found(verdict: dict[str, list[str]], what: str) -> None:
    assert len(verdict.get(f"wrong{list(WRONG).index(what)}.py", [])) == 1, verdict


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "ttrpc" / "py.typed").exists()
