"""The saga's steps as calls on the two shims: what each sends, how long it may take, what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

from sandshift.errors import AlreadyThere, Damaged, Defect, IllegalMove, NotFound, SandshiftError, Unavailable
from sandshift.fleet.channel import Channel, describe, make_channel
from sandshift.fleet.host import Host, delete_shim, start_shim
from sandshift.fleet.request import Migration
from sandshift.fleet.saga import Call, Step
from sandshift.fleet.shim_client import Shim, connect, connect_or_revive
from sandshift.fleet.views import EMPTY_STATES
from sandshift.session.options import to_proto
from sandshift.session.states import Side
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2
from sandshift.wire.sandshift import shim_pb2

DESTINATION_ANNOTATION: Final = "io.sandshift.migration.destination"
"""CreateSandbox with it makes a sandbox that may only receive: no VM until PrepareSandbox."""
SOCKET_WAIT_S: Final = 60
"""How long a side may wait for its socket once TransferSandbox is called. Both were handed over before that."""
CREATE_S: Final = 30.0
PENDING_LOOK_S: Final = 0.25
"""How often PrepareSandbox is tried again while containers are being created at the destination."""
BOUNDS_S: Final[Mapping[Call, float]] = MappingProxyType(
    {
        Call.EXPORT: 60.0,
        Call.IMPORT: 30.0,
        Call.PREPARE: 120.0,
        Call.SOCKET: 10.0,
        Call.RESUME: 30.0,
        Call.STOP: 30.0,
        Call.CANCEL: 20.0,
        Call.CLEANUP: 30.0,
        Call.REPORT: 10.0,
        Call.CLOSE: 30.0,
    }
)
"""How long each call may take before its answer counts as lost. Transfers are bounded by the shims themselves."""


class Calls:
    """The two shims of one migration, and what travels between them through the coordinator's hands."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._shims: dict[Side, Shim] = {}
        self._channel: Channel | None = None
        self._config = AnyMessage()
        self._turned_back = asyncio.Event()
        self.reports: dict[Side, dict[str, Any]] = {}
        """What each side reported about the session once it was over (docs/reference/report.md)."""

    def shim(self, side: Side) -> Shim:
        """Raises Unavailable if there is no connection to that side."""
        if side not in self._shims:
            raise Unavailable(f"there is no connection to the shim of {self._migration.where(side)}")
        return self._shims[side]

    async def connect(self, side: Side) -> None:
        """Connect to a shim that must be there. Raises NotFound, Unavailable."""
        migration = self._migration
        await self._replace(
            side, await connect(migration.host(side), migration.namespace, migration.id_on(side))
        )

    async def revive(self, side: Side) -> None:
        """Connect anew; a shim that died is started again on its state directory."""
        migration = self._migration
        shim = await connect_or_revive(migration.host(side), migration.namespace, migration.id_on(side))
        await self._replace(side, shim)

    async def make(self, step: Step, *, receipt: bytes = b"") -> None:
        """Make one call and wait for its answer.

        Args:
            step: what, on which side.
            receipt: the peer's current statement, for a FinalizeSandbox.

        Raises:
            SandshiftError: the class that the answer's status stands for.
        """
        match step.call:
            case Call.OPEN:
                await self._open_destination()
            case Call.EXPORT:
                await self._export()
            case Call.PREPARE:
                await self._prepare(step)
            case Call.CONNECT:
                self._channel = await make_channel(self._migration.source, self._migration.destination)
            case Call.REPORT:
                await self._report(step.side)
            case Call.CLOSE:
                await self._close_shim(step.side)
            case _:
                await self._say(step, receipt)

    async def _say(self, step: Step, receipt: bytes = b"") -> None:
        await self.shim(step.side).said(self._plain(step, receipt))

    def turn_back(self) -> None:
        """The migration is to be undone: wait for nobody any more."""
        self._turned_back.set()

    def let_go_of_channel(self) -> None:
        """Close the coordinator's ends: the shims have their copies."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def close(self) -> None:
        """Let go of everything here. The session, if one is open, stays as it is."""
        self.let_go_of_channel()
        for shim in self._shims.values():
            await shim.close()
        self._shims.clear()

    # What is sent

    def _plain(self, step: Step, receipt: bytes) -> Awaitable[object]:
        client, session = self.shim(step.side).migration, self._migration.session_id
        bound_s = BOUNDS_S.get(step.call)
        match step.call:
            case Call.IMPORT:
                return client.import_sandbox(self._import_request(), timeout_s=bound_s)
            case Call.PREPARE:
                prepare = messages_pb2.PrepareSandboxRequest(session_id=session)
                self._set_options(prepare)
                return client.prepare_sandbox(prepare, timeout_s=bound_s)
            case Call.SOCKET:
                handed = messages_pb2.CreateDuplicateSocketRequest(
                    session_id=session, protocol_info=self._protocol_info(step.side)
                )
                return client.create_duplicate_socket(handed, timeout_s=bound_s)
            case Call.TRANSFER:
                return client.transfer_sandbox(self._transfer_request())
            case Call.RESUME | Call.STOP:
                return client.finalize_sandbox(self._finalize_request(step.call, receipt), timeout_s=bound_s)
            case Call.CANCEL:
                return client.cancel(messages_pb2.CancelRequest(session_id=session), timeout_s=bound_s)
            case Call.CLEANUP:
                return client.cleanup(messages_pb2.CleanupRequest(session_id=session), timeout_s=bound_s)
            case Call.OPEN | Call.EXPORT | Call.CONNECT | Call.REPORT | Call.CLOSE:
                raise Defect(f"{step} is no plain call of the Migration service")

    def _import_request(self) -> messages_pb2.ImportSandboxRequest:
        return messages_pb2.ImportSandboxRequest(
            session_id=self._migration.session_id,
            sandbox_id_or_config=self._migration.id_on(Side.DESTINATION).encode(),
            config=self._config,
        )

    def _transfer_request(self) -> messages_pb2.TransferSandboxRequest:
        request = messages_pb2.TransferSandboxRequest(
            session_id=self._migration.session_id, timeout=Duration(seconds=SOCKET_WAIT_S)
        )
        if self._migration.deadline_s is not None:
            request.deadline.FromMilliseconds(round(self._migration.deadline_s * 1e3))
        return request

    def _finalize_request(self, call: Call, receipt: bytes) -> messages_pb2.FinalizeSandboxRequest:
        action = messages_pb2.FINALIZE_ACTION_STOP
        if call is Call.RESUME:
            action = messages_pb2.FINALIZE_ACTION_RESUME
        return messages_pb2.FinalizeSandboxRequest(
            session_id=self._migration.session_id, action=action, peer_receipt=receipt
        )

    def _set_options(
        self, request: messages_pb2.PrepareAndExportSandboxRequest | messages_pb2.PrepareSandboxRequest
    ) -> None:
        if self._migration.options is not None:
            request.init_options.CopyFrom(to_proto(self._migration.options))

    def _protocol_info(self, side: Side) -> bytes:
        if self._channel is None:
            raise Defect("there is no connection between the hosts to hand over")
        return describe(self._channel.source if side is Side.SOURCE else self._channel.destination)

    # What is more than one call

    async def _export(self) -> None:
        request = messages_pb2.PrepareAndExportSandboxRequest(session_id=self._migration.session_id)
        self._set_options(request)
        shim, bound_s = self.shim(Side.SOURCE), BOUNDS_S[Call.EXPORT]
        answer = await shim.said(shim.migration.prepare_and_export_sandbox(request, timeout_s=bound_s))
        self._config = answer.config

    async def _prepare(self, step: Step) -> None:
        """PrepareSandbox; while containers of the source are not created at the destination, again, for a bounded time.

        Raises:
            IllegalMove: they were not in time, each named; or what else the destination says.
        """
        bound_s = self._migration.containers_wait_s
        deadline_s = time.monotonic() + bound_s
        while True:
            # Looked at before: the last one may be created between the refusal and a look after it.
            pending = (await self.shim(step.side).status()).session.pending_containers
            try:
                return await self._say(step)
            except IllegalMove as error:
                if not pending or self._turned_back.is_set():
                    raise
                if time.monotonic() >= deadline_s:
                    raise IllegalMove(
                        f"containers {', '.join(pending)} of the source were not created on host "
                        f"{self._migration.destination.name} within {bound_s:g} s: let containerd create each there, with "
                        "the annotation io.microsoft.migration.source-container-id, while the migration waits"
                    ) from error
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._turned_back.wait(), PENDING_LOOK_S)

    async def _open_destination(self) -> None:
        """Start the destination's shim and make the sandbox that may only receive. A failure leaves no shim of ours."""
        migration = self._migration
        if migration.destination_id:
            return await self._find_destination()
        host, namespace, sandbox_id = migration.destination, migration.namespace, migration.sandbox_id
        await refuse_if_taken(host, namespace, sandbox_id, awaiting_is_free=True)
        await start_shim(host, namespace, sandbox_id)
        await self.connect(Side.DESTINATION)
        request = sandbox_pb2.CreateSandboxRequest(
            sandbox_id=sandbox_id, annotations={DESTINATION_ANNOTATION: "true"}
        )
        try:
            shim = self.shim(Side.DESTINATION)
            await shim.said(shim.sandbox.create_sandbox(request, timeout_s=CREATE_S))
        except (AlreadyThere, IllegalMove):
            raise  # somebody was faster with the same id: it is not ours to end
        except SandshiftError:
            await self._close_shim(Side.DESTINATION)
            raise

    async def _find_destination(self) -> None:
        """Connect to the sandbox that waits at the destination. Raises IllegalMove if it does not wait."""
        migration = self._migration
        await self.connect(Side.DESTINATION)
        status = await self.shim(Side.DESTINATION).status()
        if status.life != "awaiting":
            raise IllegalMove(
                f"sandbox {migration.destination_id} on host {migration.destination.name} is {status.life or 'of an older release'}: "
                f"make one that waits, with the annotation {DESTINATION_ANNOTATION}=true"
            )

    async def _report(self, side: Side) -> None:
        shim = self.shim(side)
        request = shim_pb2.ReportRequest(session_id=self._migration.session_id)
        answer = await shim.said(shim.shim.report(request, timeout_s=BOUNDS_S[Call.REPORT]))
        try:
            self.reports[side] = json.loads(answer.report)
        except ValueError as error:
            raise Damaged(f"the report of {self._migration.where(side)}, is damaged: {error}") from error

    async def _close_shim(self, side: Side) -> None:
        """End a shim that has no guest, and remove what it leaves. One that ends before it answers has ended too.

        Raises IllegalMove if it has a VM or a session after all: such a shim is never ended from here.
        """
        if side is Side.DESTINATION and self._migration.destination_id:
            return  # Its owner ends it.
        try:
            shim = await self._connected(side)
            status = await shim.status()
        except NotFound:
            return
        except Unavailable:
            # It died. What it left is removed, save for a session: that is brought back.
            host, migration = self._migration.host(side), self._migration
            await delete_shim(host, migration.namespace, migration.id_on(side))
            return
        if status.session.active or status.vm_state not in EMPTY_STATES:
            raise IllegalMove(
                f"{self._migration.where(side)}, has a VM ({status.vm_state}) and is left as it is"
            )
        request = sandbox_pb2.ShutdownSandboxRequest(sandbox_id=self._migration.id_on(side))
        with contextlib.suppress(Unavailable):
            await shim.said(shim.sandbox.shutdown_sandbox(request, timeout_s=BOUNDS_S[Call.CLOSE]))
        await shim.close()
        del self._shims[side]
        await delete_shim(shim.host, shim.namespace, shim.sandbox_id)

    async def _connected(self, side: Side) -> Shim:
        if side not in self._shims:
            await self.connect(side)
        return self._shims[side]

    async def _replace(self, side: Side, shim: Shim) -> None:
        former = self._shims.get(side)
        self._shims[side] = shim
        if former is not None:
            await former.close()


async def refuse_if_taken(
    host: Host, namespace: str, sandbox_id: str, *, awaiting_is_free: bool = False
) -> None:
    """Raises AlreadyThere if `host` has a sandbox of that id.

    A shim without a sandbox is none: a coordinator that was killed left it, and the next one takes it over.

    Args:
        host, namespace, sandbox_id: the place.
        awaiting_is_free: neither is one that waits to receive a sandbox and has no session.
    """
    if not host.has_shim(namespace, sandbox_id):
        return
    try:
        shim = await connect(host, namespace, sandbox_id)
    except Unavailable:
        return
    try:
        status = await shim.status()
    finally:
        await shim.close()
    is_unmade = status.vm_state == "absent" and not status.session.active
    if is_unmade and (awaiting_is_free or not status.HasField("created_at")):
        return
    raise AlreadyThere(
        f"host {host.name} has a sandbox {sandbox_id} already: stop it with 'sandshift stop {sandbox_id}' there, or"
        " choose another id"
    )
