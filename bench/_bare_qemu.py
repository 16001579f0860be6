"""The peer of bench migration: one live migration between two bare QEMUs, as good as a script over QMP can do it.

No library and no checks: the sockets are spoken to directly, every command that can be sent ahead is sent ahead, and the
destination is continued the moment its `completed` arrives. Same guest, same kind of socket, same encryption, TCP_NODELAY,
same downtime limit and bandwidth as ours.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_S = 120.0
UNLIMITED_BYTES_PER_S = 1 << 40
USER_NAME = "bare"


@dataclass(frozen=True, slots=True)
class BareMove:
    total_ms: float
    """From `migrate` to the destination's RESUME."""
    blackout_ms: float
    """From the source's STOP to the destination's RESUME, both as their events are stamped."""
    passes: int
    bytes_transferred: int


async def move(
    source_dir: Path,
    destination_dir: Path,
    channel: tuple[socket.socket, socket.socket],
    *,
    psk: bytes,
    downtime_limit_ms: int,
    bandwidth_bytes_per_s: int = 0,
) -> BareMove:
    """Move the guest of the QEMU in `source_dir` to the one that waits (`-incoming defer -S`) in `destination_dir`.

    Args:
        source_dir: holds the socket "qmp" with nobody connected to it (after `Machine.detach`).
        destination_dir: the same, for the destination.
        channel: the source's and the destination's end of a connected socket. Left open.
        psk: the key; empty: in the clear.
        downtime_limit_ms: QEMU's downtime-limit.
        bandwidth_bytes_per_s: 0: unlimited.

    Raises:
        RuntimeError: QEMU refused or failed; with its words.
    """
    source, destination = await Conversation.open(source_dir), await Conversation.open(destination_dir)
    try:
        bandwidth = bandwidth_bytes_per_s or UNLIMITED_BYTES_PER_S
        limits: dict[str, object] = {"max-bandwidth": bandwidth, "downtime-limit": downtime_limit_ms}
        await _arm(destination, channel[1], psk, limits={}, sending=False)
        await _arm(source, channel[0], psk, limits=limits, sending=True)
        await destination.execute("migrate-incoming", uri="fd:channel")
        began_us = time.time_ns() // 1000
        await source.execute("migrate", uri="fd:channel")
        await _completed(destination)
        destination.send("cont")  # One write away from `completed`; its answer is read with RESUME.
        resumed_us = _stamp_us(await destination.event("RESUME"))
        stopped_us = _stamp_us(await source.event("STOP"))
        await _completed(source)
        ram = (await source.execute("query-migrate"))["ram"]
        return BareMove(
            total_ms=(resumed_us - began_us) / 1000,
            blackout_ms=(resumed_us - stopped_us) / 1000,
            passes=int(ram["dirty-sync-count"]),
            bytes_transferred=int(ram["transferred"]),
        )
    finally:
        for conversation in (source, destination):
            conversation.close()
        for folder in (source_dir, destination_dir):
            shutil.rmtree(folder / "bare-keys", ignore_errors=True)


class Conversation:
    """QMP, spoken as plainly as possible. Events are kept until they are asked for."""

    def __init__(
        self,
        folder: Path,
        connection: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.folder = folder
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []

    @classmethod
    async def open(cls, folder: Path) -> Conversation:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(folder / "qmp"))
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 24)
        conversation = cls(folder, connection, reader, writer)
        await conversation._read()
        await conversation.execute("qmp_capabilities")
        return conversation

    def send(self, command: str, **arguments: object) -> None:
        """Without waiting for the answer."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode())

    async def execute(self, command: str, **arguments: object) -> Any:
        self.send(command, **arguments)
        return await self._answer(command)

    async def pass_fd(self, fd: int) -> None:
        """The descriptor goes with its command, in one call."""
        command = json.dumps({"execute": "getfd", "arguments": {"fdname": "channel"}}).encode()
        socket.send_fds(self._connection, [command], [fd])
        await self._answer("getfd")

    async def event(
        self, name: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> dict[str, Any]:
        """The first event of that name that was not taken yet."""
        async with asyncio.timeout(STEP_S):
            while True:
                for event in self._events:
                    if event["event"] == name and matches(event.get("data", {})):
                        self._events.remove(event)
                        return event
                self._keep(await self._read())

    def close(self) -> None:
        self._writer.close()

    async def _answer(self, command: str) -> Any:
        async with asyncio.timeout(STEP_S):
            while True:
                message = await self._read()
                if "error" in message:
                    raise RuntimeError(f"{command}: {message['error']['desc']}")
                if "return" in message:
                    return message["return"]
                self._keep(message)

    def _keep(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._events.append(message)
        elif "error" in message:
            raise RuntimeError(str(message["error"]["desc"]))

    async def _read(self) -> dict[str, Any]:
        if not (line := await self._reader.readline()):
            raise RuntimeError("QEMU hung up")
        message: dict[str, Any] = json.loads(line)
        return message


async def _arm(
    qemu: Conversation, channel: socket.socket, psk: bytes, *, limits: dict[str, object], sending: bool
) -> None:
    capabilities = [{"capability": name, "state": True} for name in ("events", "return-path")]
    await qemu.execute("migrate-set-capabilities", capabilities=capabilities)
    if channel.family in (socket.AF_INET, socket.AF_INET6):
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if psk:
        limits = {**limits, "tls-creds": await _credentials(qemu, psk, sending=sending)}
    if limits:
        await qemu.execute("migrate-set-parameters", **limits)
    await qemu.pass_fd(channel.fileno())


async def _credentials(qemu: Conversation, psk: bytes, *, sending: bool) -> str:
    folder = qemu.folder / "bare-keys"
    folder.mkdir(mode=0o700)
    (folder / "keys.psk").write_text(f"{USER_NAME}:{psk.hex()}\n")
    user = {"username": USER_NAME} if sending else {}
    await qemu.execute(
        "object-add",
        **{"qom-type": "tls-creds-psk", "id": "bare", "dir": str(folder)},
        endpoint="client" if sending else "server",
        **user,
    )
    return "bare"


async def _completed(qemu: Conversation) -> None:
    ended = await qemu.event("MIGRATION", lambda data: data["status"] in ("completed", "failed", "cancelled"))
    if ended["data"]["status"] != "completed":
        raise RuntimeError(f"the bare migration {ended['data']['status']}")


def _stamp_us(event: dict[str, Any]) -> int:
    return int(event["timestamp"]["seconds"]) * 1_000_000 + int(event["timestamp"]["microseconds"])
