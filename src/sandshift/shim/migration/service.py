"""The Migration service on the wire: messages in, the desk asked, messages out. Both revisions on one server.

What only a session needs is loaded by the first call that needs it: most shims never have one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from sandshift.errors import Defect, Rejected
from sandshift.session.states import Action
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import service_ttrpc
from ttrpc import Code, StatusError

if TYPE_CHECKING:
    import ttrpc
    from sandshift.shim.migration.desk import Desk


class MigrationService(service_ttrpc.MigrationService):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def prepare_and_export_sandbox(
        self, request: m.PrepareAndExportSandboxRequest, context: ttrpc.CallContext
    ) -> m.PrepareAndExportSandboxResponse:
        return m.PrepareAndExportSandboxResponse(config=await self._desk.export(request))

    async def import_sandbox(
        self, request: m.ImportSandboxRequest, context: ttrpc.CallContext
    ) -> m.ImportSandboxResponse:
        await self._desk.import_sandbox(request)
        return m.ImportSandboxResponse()

    async def prepare_sandbox(
        self, request: m.PrepareSandboxRequest, context: ttrpc.CallContext
    ) -> m.PrepareSandboxResponse:
        await self._desk.prepare(request)
        return m.PrepareSandboxResponse()

    async def create_duplicate_socket(
        self, request: m.CreateDuplicateSocketRequest, context: ttrpc.CallContext
    ) -> m.CreateDuplicateSocketResponse:
        from sandshift.session import descriptor as descriptors  # noqa: PLC0415

        peer = context.peer
        described = descriptors.parse(
            request.protocol_info,
            caller_pid=peer.pid if peer else None,
            caller_uid=peer.uid if peer else None,
        )
        await self._desk.give_socket(request.session_id, described)
        return m.CreateDuplicateSocketResponse()

    async def transfer_sandbox(
        self, request: m.TransferSandboxRequest, context: ttrpc.CallContext
    ) -> m.TransferSandboxResponse:
        try:
            await self._desk.transfer(request.session_id, *_bounds(request))
        except Defect as error:
            # Elsewhere what nobody foresaw is UNKNOWN; of a transfer the contract (4.7) says INTERNAL.
            raise StatusError(Code.INTERNAL, error.message) from error
        return m.TransferSandboxResponse()

    async def transfer_sandbox_2691(
        self, request: m.TransferSandboxRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[m.TransferSandboxResponse]:
        """TransferSandbox as revision 2691 calls it: a server stream of what happens."""
        from sandshift.session.record import Stream2691  # noqa: PLC0415

        stream = Stream2691()
        async for entry in self._desk.transfer_2691(request.session_id, *_bounds(request)):
            yield stream.response(entry)
            if stream.ended:
                return

    async def finalize_sandbox(
        self, request: m.FinalizeSandboxRequest, context: ttrpc.CallContext
    ) -> m.FinalizeSandboxResponse:
        try:
            action = Action(request.action)
        except ValueError:
            raise Rejected(
                f"action = {request.action}: it must be FINALIZE_ACTION_STOP (1) or FINALIZE_ACTION_RESUME (2)"
            ) from None
        await self._desk.finalize(request.session_id, action, request.peer_receipt)
        return m.FinalizeSandboxResponse()

    async def notifications(
        self, request: m.NotificationsRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[m.NotificationsResponse]:
        from sandshift.session.record import to_response  # noqa: PLC0415

        async for side, entry in self._desk.notifications(request.session_id):
            yield to_response(entry, side)

    async def cancel(self, request: m.CancelRequest, context: ttrpc.CallContext) -> m.CancelResponse:
        await self._desk.cancel(request.session_id)
        return m.CancelResponse()

    async def cleanup(self, request: m.CleanupRequest, context: ttrpc.CallContext) -> m.CleanupResponse:
        await self._desk.clean_up(request.session_id)
        return m.CleanupResponse()


def _bounds(request: m.TransferSandboxRequest) -> tuple[float, float]:
    """timeout and deadline in seconds; 0 where the host's own holds."""
    from sandshift.session.options import duration_s  # noqa: PLC0415

    return (
        duration_s("timeout", request.timeout if request.HasField("timeout") else None, default_s=0.0),
        duration_s("deadline", request.deadline if request.HasField("deadline") else None, default_s=0.0),
    )
