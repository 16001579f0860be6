"""The conversation with one QEMU: qemu.qmp with its edges taken off.

Every command is bounded; whatever ends the conversation becomes Unavailable naming the command; what QEMU refuses stays
apart (QmpRefused), because only the caller knows what a refusal means. Events reach `on_event` in the reader's task,
before the reply to any later command is seen, and are not kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from sandshift.errors import Defect, PeerProtocolError, Unavailable
from sandshift.vmm.machine import MachineEvent
from sandshift.vmm.process import connect_unix

COMMAND_S: Final = 10.0
CLOSE_S: Final = 2.0

# What it logs as errors we raise as errors; twice is noise.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QmpRefused(Defect):
    """QEMU understood a command and refused it. Never leaves vmm/: the Machine says what it means."""

    def __init__(self, command: str, reason: str) -> None:
        self.reason = reason
        super().__init__(f"QEMU refused {command}: {reason}")


class Qmp:
    """One connection. Made by `connect`; `ended` is set when it is over, by either side."""

    def __init__(self, client: QMPClient, name: str, command_s: float, tap: _Tap) -> None:
        self.ended = asyncio.Event()
        self._client = client
        self._name = name
        self._command_s = command_s
        self._tap = tap
        self._fd_turn = asyncio.Lock()
        # Sees the end of the conversation, whoever ends it. Its exceptions are all handled inside.
        self._task_watch = asyncio.create_task(self._watch(), name=f"qmp watch {name}")

    @classmethod
    async def connect(
        cls,
        path: Path,
        name: str,
        on_event: Callable[[MachineEvent], None] = lambda _event: None,
        *,
        timeout_s: float,
        command_s: float = COMMAND_S,
    ) -> Qmp:
        """Connect and agree on capabilities.

        Args:
            path: the QMP socket; it must be listening already.
            name: of the sandbox, for messages.
            on_event: called for each event, in order; must not raise.
            timeout_s: how long QEMU may take to greet us; it greets one client at a time.
            command_s: bound of each later command.

        Raises:
            Unavailable: nobody listens, it hung up, or it did not greet in time.
            PeerProtocolError: what answers is not QMP.
        """
        client = QMPClient()
        # The documented filter is the one place where an event is seen in order and not stored for ever.
        tap = _Tap(on_event)
        client.events.event_filter = tap
        connection = socket.socket(socket.AF_UNIX)
        try:
            connect_unix(connection, path)
            connection.setblocking(False)  # noqa: FBT003
            async with asyncio.timeout(timeout_s):
                await client.connect(connection)
        except BaseException as error:
            connection.close()
            raise _connect_failed(error, name, timeout_s) from error
        return cls(client, name, command_s, tap)

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's, from its greeting."""
        greeting = self._client.greeting
        assert greeting is not None, "connect() returns only after the greeting"
        numbers = greeting.QMP.version["qemu"]
        assert isinstance(numbers, Mapping), "QMP's schema"
        return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])

    def listen(self, on_event: Callable[[MachineEvent], None]) -> None:
        """From now on events go to `on_event`."""
        self._tap.on_event = on_event

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run one command and return its answer.

        Raises:
            QmpRefused: QEMU says no.
            Unavailable: no answer in time, or the conversation ended; it may have happened all the same.
        """
        try:
            async with asyncio.timeout(self._command_s):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpRefused(command, str(error)) from error
        except TimeoutError as error:
            raise Unavailable(
                f"sandbox {self._name}: QEMU did not answer {command} within {self._command_s:g} s"
            ) from error
        except (ExecInterruptedError, StateError, QMPError, OSError, EOFError) as error:
            raise Unavailable(f"sandbox {self._name}: QEMU is gone or hung up during {command}") from error

    async def pass_fd(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of `fd` under `name`, in place of what it had under that name.

        Raises:
            QmpRefused, Unavailable: as `execute`.
        """
        async with self._fd_turn:  # QEMU pairs `getfd` with the last descriptor that came.
            try:
                self._client.send_fd_scm(fd)
            except (AssertionError, QMPError, OSError) as error:
                raise Unavailable(f"sandbox {self._name}: QEMU is gone or hung up during getfd") from error
            await self.execute("getfd", {"fdname": name})

    async def close(self) -> None:
        """Hang up. QEMU goes on, and takes the next connection. Idempotent."""
        self._task_watch.cancel()
        await asyncio.wait([self._task_watch])
        await self._disconnect()
        self.ended.set()

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        self.ended.set()

    async def _disconnect(self) -> None:
        # disconnect() re-raises what ended the conversation, EOFError for a plain end. We know that it ended.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await self._client.disconnect()


class _Tap:
    """An event filter that passes each event on and keeps none."""

    def __init__(self, on_event: Callable[[MachineEvent], None]) -> None:
        self.on_event = on_event

    def __call__(self, message: Message) -> bool:
        self.on_event(parse_event(message))
        return False


def parse_event(message: Mapping[str, object]) -> MachineEvent:
    """QMP's event message. One without a clock (QEMU has none then: seconds is -1) gets 0."""
    stamp = message.get("timestamp")
    at_us = 0
    if isinstance(stamp, Mapping) and int(stamp.get("seconds", -1)) >= 0:
        at_us = int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])
    data = message.get("data")
    return MachineEvent(
        name=str(message["event"]), data=data if isinstance(data, Mapping) else {}, at_us=at_us
    )


def _connect_failed(error: BaseException, name: str, timeout_s: float) -> BaseException:
    if isinstance(error, TimeoutError):
        return Unavailable(f"sandbox {name}: QEMU did not greet us within {timeout_s:g} s")
    if isinstance(error, ConnectError):
        if isinstance(error.exc, (EOFError, OSError)):
            return Unavailable(f"sandbox {name}: QEMU hung up before it greeted us")
        return PeerProtocolError(f"sandbox {name}: what listens on the QMP socket does not speak QMP")
    if isinstance(error, OSError):
        return Unavailable(f"sandbox {name}: nobody listens on the QMP socket: {error.strerror}")
    return error
