"""A shim, spoken to over its socket: the services on it, errors as our own classes, one connection for all calls."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Final, TypeVar

import ttrpc
from sandshift.errors import Defect, IllegalMove, NotFound, SandshiftError, Unavailable
from sandshift.fleet.host import Host, delete_shim, start_shim
from sandshift.status import from_status
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd.sandbox_ttrpc import SandboxClient
from sandshift.wire.migration import messages_pb2
from sandshift.wire.migration.service_ttrpc import MigrationClient
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient

CONNECT_S: Final = 5.0
SHUTDOWN_S: Final = 20.0
STATUS_S: Final = 5.0
"""Status looks at records and asks QEMU at most one question."""

LOG_NAME: Final = "shim.log"
LOG_SHOWN_BYTES: Final = 4096
LINE_SHOWN_CHARACTERS: Final = 200

T = TypeVar("T")


class Shim:
    """One shim. `migration`, `sandbox` and `shim` are its services; `said` goes around their calls."""

    def __init__(self, client: ttrpc.Client, host: Host, namespace: str, sandbox_id: str) -> None:
        self.host = host
        self.namespace = namespace
        self.sandbox_id = sandbox_id
        self.client = client
        self.migration = MigrationClient(client)
        self.sandbox = SandboxClient(client)
        self.shim = ShimClient(client)

    async def said(self, answer: Awaitable[T]) -> T:
        """What the shim answered; a status becomes an error of `sandshift.errors`."""
        try:
            return await answer
        except ttrpc.StatusError as error:
            raise self._error_of(error) from error

    def _error_of(self, status: ttrpc.StatusError) -> SandshiftError:
        error = from_status(status)
        is_lost = isinstance(status, ttrpc.ConnectionClosed)
        if not is_lost and not isinstance(error, Defect):
            return error
        log = self.host.config.sandbox_run_dir(self.namespace, self.sandbox_id) / LOG_NAME
        what = "went away" if is_lost else "met what nobody foresaw"
        lines = last_lines(log)
        last = f" ends with {lines[-1][:LINE_SHOWN_CHARACTERS]!r}, and" if lines else ""
        error = type(error)(
            f"the shim of sandbox {self.sandbox_id} on host {self.host.name} {what} ({error.message}): its log"
            f" {log}{last or ' is empty;'} --verbose shows more"
        )
        error.add_note("\n".join(lines))
        return error

    async def status(self, session_id: str = "") -> shim_pb2.StatusResponse:
        """The sandbox, its VM and its session. With an ended session's id: that one's last statement."""
        request = shim_pb2.StatusRequest(session_id=session_id)
        return await self.said(self.shim.status(request, timeout_s=STATUS_S))

    async def notifications(self, session_id: str) -> AsyncIterator[messages_pb2.NotificationsResponse]:
        """The record of the session and all that follows, until its Cleanup."""
        stream = self.migration.notifications(messages_pb2.NotificationsRequest(session_id=session_id))
        try:
            async for response in stream:
                yield response
        except ttrpc.StatusError as error:
            raise self._error_of(error) from error

    async def close(self) -> None:
        """Let go of the connection. Calls that are under way go on in the shim."""
        await self.client.close()

    async def aclose(self) -> None:
        """`close`, for contextlib.aclosing."""
        await self.close()


def last_lines(log: Path) -> list[str]:
    """The end of a shim's log, which may be gone before a person reads the error; empty if it cannot be read."""
    try:
        end = log.read_bytes()[-LOG_SHOWN_BYTES:]
    except OSError:
        return []
    return [line for line in end.decode(errors="replace").splitlines() if line.strip()]


async def connect(host: Host, namespace: str, sandbox_id: str) -> Shim:
    """Connect to the shim of a sandbox on `host`.

    Raises:
        NotFound: the host has no such sandbox. Unavailable: it has, but its shim does not answer.
    """
    path = host.config.shim_socket(namespace, sandbox_id)
    where = f"sandbox {sandbox_id} on host {host.name}"
    if not host.has_shim(namespace, sandbox_id):
        raise NotFound(f"{where} does not exist; 'sandshift ls' shows those that do")
    try:
        client = await ttrpc.connect(str(path), timeout_s=CONNECT_S)
    except PermissionError as error:
        raise IllegalMove(
            f"{where}: {path} may only be used by root and its owner; run it as root"
        ) from error
    except (OSError, TimeoutError, ttrpc.StatusError) as error:
        raise Unavailable(
            f"the shim of {where} does not answer; 'sandshift session resume {sandbox_id}' starts it again"
        ) from error
    return Shim(client, host, namespace, sandbox_id)


async def connect_or_revive(host: Host, namespace: str, sandbox_id: str) -> Shim:
    """Connect to the shim; one that died is started again on its state directory, and finds its session there.

    Raises:
        Unavailable: it does not answer even then. And what `start_shim` raises.
    """
    try:
        return await connect(host, namespace, sandbox_id)
    except (NotFound, Unavailable):
        await start_shim(host, namespace, sandbox_id)
        return await connect(host, namespace, sandbox_id)


async def end_shim(host: Host, namespace: str, sandbox_id: str) -> None:
    """End a shim and its VM, and remove all that they leave on their host. One with an open session stays.

    It is asked first: a shim that has just been started has not written down yet who it is, so `delete` alone would
    miss it.
    """
    try:
        shim = await connect(host, namespace, sandbox_id)
    except (NotFound, Unavailable):
        await delete_shim(host, namespace, sandbox_id)
        return
    request = sandbox_pb2.ShutdownSandboxRequest(sandbox_id=sandbox_id)
    with contextlib.suppress(SandshiftError):
        await shim.said(shim.sandbox.shutdown_sandbox(request, timeout_s=SHUTDOWN_S))
    await shim.close()
    await delete_shim(host, namespace, sandbox_id)
