"""Against a scripted QMP server: what a real QEMU does not do on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sandshift.errors import PeerProtocolError, Unavailable
from sandshift.vmm.machine import MachineEvent
from sandshift.vmm.process import listen_unix
from sandshift.vmm.qmp import Qmp, QmpRefused, parse_event

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
        "capabilities": ["oob"],
    }
}


def _id(message: dict[str, object]) -> dict[str, object]:
    """The answer names the command it answers; the first command of a conversation has no name."""
    return {"id": message["id"]} if "id" in message else {}


async def _next(reader: asyncio.StreamReader) -> dict[str, object] | None:
    """The next command. A client need not end it with anything."""
    text = b""
    while part := await reader.read(1):
        text += part
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return None


class Server:
    """Answers commands from a table; what is not there gets no answer."""

    def __init__(self, **answers: object) -> None:
        self.answers = {"qmp_capabilities": {"return": {}}, **answers}
        self.greeting: bytes = json.dumps(GREETING).encode() + b"\n"
        self.seen: list[str] = []
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        writer.write(self.greeting)
        while (message := await _next(reader)) is not None:
            command = message["execute"]
            self.seen.append(command)
            if command == "hang up":
                break
            if command in self.answers:
                self.say({**self.answers[command], **_id(message)})
        writer.close()

    def say(self, message: object) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")


@asynccontextmanager
async def talking(
    path: Path, server: Server, events: list[MachineEvent] | None = None, *, command_s: float = 20.0
) -> AsyncIterator[Qmp]:
    async with await asyncio.start_unix_server(server.serve, path):
        heard = events if events is not None else []
        qmp = await Qmp.connect(path, "s-1", heard.append, timeout_s=20.0, command_s=command_s)
        yield qmp
        await qmp.close()


async def test_answers_and_refusals_are_told_apart(tmp_path: Path) -> None:
    server = Server(
        good={"return": {"status": "running"}},
        bad={"error": {"class": "GenericError", "desc": "no such thing"}},
    )
    async with talking(tmp_path / "qmp", server) as qmp:
        assert await qmp.execute("good") == {"status": "running"}
        with pytest.raises(QmpRefused, match="QEMU refused bad: no such thing") as refused:
            await qmp.execute("bad")
        assert refused.value.reason == "no such thing"
        assert qmp.version == (10, 0, 2)


async def test_a_command_without_an_answer_is_named_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    async with talking(tmp_path / "qmp", Server(good={"return": {}}), command_s=0.5) as qmp:
        with pytest.raises(Unavailable, match=r"QEMU did not answer stop within 0\.5 s"):
            await qmp.execute("stop")
        assert await qmp.execute("good") == {}


async def test_the_end_of_the_conversation_ends_every_command(tmp_path: Path) -> None:
    async with talking(tmp_path / "qmp", Server()) as qmp:
        waiting = asyncio.create_task(qmp.execute("stop"))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="QEMU is gone or hung up during hang up"):
            await qmp.execute("hang up")
        with pytest.raises(Unavailable, match="during stop"):
            await waiting
        async with asyncio.timeout(20):
            await qmp.ended.wait()
        with pytest.raises(Unavailable, match="sandbox s-1: QEMU is gone or hung up during cont"):
            await qmp.execute("cont")
        with pytest.raises(Unavailable, match="during getfd"):
            await qmp.pass_fd("name", 0)


async def test_events_come_in_order_and_before_the_answer_that_follows_them(tmp_path: Path) -> None:
    server, heard = Server(good={"return": {}}), []
    async with talking(tmp_path / "qmp", server, heard) as qmp:
        for number in range(3):
            stamp = {"seconds": 100, "microseconds": number}
            server.say({"event": "MIGRATION_PASS", "data": {"pass": number}, "timestamp": stamp})
        await qmp.execute("good")
    assert heard == [MachineEvent("MIGRATION_PASS", {"pass": n}, 100_000_000 + n) for n in range(3)]


async def test_nobody_who_listens_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody listens on the QMP socket"):
        await Qmp.connect(tmp_path / "qmp", "s-1", print, timeout_s=0.2)


async def test_a_qemu_that_does_not_greet_us_is_unavailable(tmp_path: Path) -> None:
    with listen_unix(tmp_path / "qmp"), pytest.raises(Unavailable, match=r"did not greet us within 0\.2 s"):
        await Qmp.connect(tmp_path / "qmp", "s-1", print, timeout_s=0.2)


async def test_a_qemu_that_hangs_up_at_once_is_unavailable(tmp_path: Path) -> None:
    async with await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "qmp"):
        with pytest.raises(Unavailable, match="QEMU hung up before it greeted us"):
            await Qmp.connect(tmp_path / "qmp", "s-1", print, timeout_s=20)


async def test_something_else_on_the_socket_is_not_taken_for_qemu(tmp_path: Path) -> None:
    server = Server()
    server.greeting = b"HTTP/1.1 400 Bad Request\n"
    async with await asyncio.start_unix_server(server.serve, tmp_path / "qmp"):
        with pytest.raises(PeerProtocolError, match="does not speak QMP"):
            await Qmp.connect(tmp_path / "qmp", "s-1", print, timeout_s=20)


async def test_a_descriptor_comes_before_the_command_that_names_it(tmp_path: Path) -> None:
    received: list[int] = []
    with listen_unix(tmp_path / "qmp") as listener:

        def qemu() -> list[dict[str, object]]:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(json.dumps(GREETING).encode() + b"\n")
                connection.settimeout(5.0)
                text, commands = b"", []
                while len(commands) < 2:
                    data, fds, _, _ = socket.recv_fds(connection, 1, 4)
                    received.extend(fds)
                    text += data
                    with contextlib.suppress(ValueError):
                        commands.append(json.loads(text))
                        text = b""
                        connection.sendall(json.dumps({"return": {}, **_id(commands[-1])}).encode() + b"\n")
                return commands

        served = asyncio.create_task(asyncio.to_thread(qemu))
        qmp = await Qmp.connect(tmp_path / "qmp", "s-1", print, timeout_s=20)
        ours, theirs = socket.socketpair()
        await qmp.pass_fd("channel", ours.fileno())
        commands = await served
        await qmp.close()
    assert commands[-1]["arguments"] == {"fdname": "channel"}
    assert len(received) == 1
    socket.socket(fileno=received[0]).send(b"through the duplicate")
    assert theirs.recv(100) == b"through the duplicate"


def test_an_event_without_a_clock_has_no_time() -> None:
    event = {"event": "SHUTDOWN", "timestamp": {"seconds": -1, "microseconds": -1}}
    assert parse_event(event) == MachineEvent("SHUTDOWN", {}, 0)
