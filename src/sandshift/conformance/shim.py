"""One connection to one shim, and every call of the contract on it. Answers are data: nothing is raised."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from google.protobuf import any_pb2, duration_pb2

import ttrpc
from sandshift.conformance import revision_2691 as old
from sandshift.conformance.answers import ANSWER_S, OK, Answer, Broken, ask
from sandshift.conformance.tasks import Tasks
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd.sandbox_ttrpc import SandboxClient
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.migration.service_ttrpc import MigrationClient
from sandshift.wire.sandshift import shim_pb2
from sandshift.wire.sandshift.shim_ttrpc import ShimClient

STOP: Final = 1
RESUME: Final = 2
LISTEN_S: Final = 0.1
"""How long a subscriber listens for the end of a record that goes on."""
CONNECT_S: Final = 10.0


def duration(seconds: float) -> duration_pb2.Duration:
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


class Shim:
    """A client of both revisions."""

    def __init__(self, connection: ttrpc.Client, sandbox_id: str) -> None:
        self.connection = connection
        self.sandbox_id = sandbox_id
        self.migration = MigrationClient(connection)
        self._sandbox = SandboxClient(connection)
        self.tasks = Tasks(connection)
        self.own = ShimClient(connection)

    @classmethod
    async def connect(cls, address: str) -> Shim:
        connection = await ttrpc.connect(address, timeout_s=CONNECT_S)
        status = await ShimClient(connection).status(shim_pb2.StatusRequest(), timeout_s=ANSWER_S)
        return cls(connection, status.sandbox_id)

    async def close(self) -> None:
        await self.connection.close()

    # The Migration service, revision head

    async def export(self, session: str, options: o.InitializeOptions | None = None) -> Answer:
        request = m.PrepareAndExportSandboxRequest(session_id=session, init_options=options)
        return await ask(self.migration.prepare_and_export_sandbox(request))

    async def import_(self, session: str, config: any_pb2.Any, sandbox_id: str | None = None) -> Answer:
        named = self.sandbox_id if sandbox_id is None else sandbox_id
        request = m.ImportSandboxRequest(
            session_id=session, sandbox_id_or_config=named.encode(), config=config
        )
        return await ask(self.migration.import_sandbox(request))

    async def prepare(self, session: str, options: o.InitializeOptions | None = None) -> Answer:
        request = m.PrepareSandboxRequest(session_id=session, init_options=options)
        return await ask(self.migration.prepare_sandbox(request))

    async def give_socket(self, session: str, protocol_info: bytes) -> Answer:
        request = m.CreateDuplicateSocketRequest(session_id=session, protocol_info=protocol_info)
        return await ask(self.migration.create_duplicate_socket(request))

    async def transfer(
        self, session: str, *, wait_s: float = 0, deadline_s: float = 0, within_s: float = 120
    ) -> Answer:
        """Unary: to its outcome."""
        request = m.TransferSandboxRequest(session_id=session)
        if wait_s:
            request.timeout.CopyFrom(duration(wait_s))
        if deadline_s:
            request.deadline.CopyFrom(duration(deadline_s))
        return await ask(self.migration.transfer_sandbox(request), within_s)

    async def finalize(self, session: str, action: int, receipt: bytes = b"") -> Answer:
        request = m.FinalizeSandboxRequest(session_id=session, action=action, peer_receipt=receipt)  # type: ignore[arg-type]
        return await ask(self.migration.finalize_sandbox(request), 60)

    async def cancel(self, session: str) -> Answer:
        return await ask(self.migration.cancel(m.CancelRequest(session_id=session)))

    async def cleanup(self, session: str) -> Answer:
        return await ask(self.migration.cleanup(m.CleanupRequest(session_id=session)))

    def subscribe(self, session: str) -> ttrpc.ResponseStream[m.NotificationsResponse]:
        return self.migration.notifications(m.NotificationsRequest(session_id=session))

    async def listens(self, session: str) -> Answer:
        """What a subscription is answered with: OK if it tells something, or waits for something to tell."""
        stream = self.subscribe(session)
        first = asyncio.ensure_future(ask(anext(aiter(stream))))
        try:
            await asyncio.wait([first], timeout=LISTEN_S)
            if not first.done():
                # Asked later: a refusal has come before this is answered, however slow the machine.
                await self.state()
            return first.result() if first.done() else Answer(OK)
        finally:
            first.cancel()
            stream.cancel()

    async def told(
        self, session: str, until: str = "", within_s: float = 30.0
    ) -> list[m.NotificationsResponse]:
        """The record so far; with `until`, up to this phase's first appearance ("END": the end of the stream)."""
        heard: list[m.NotificationsResponse] = []
        stream = self.subscribe(session)
        try:
            async with asyncio.timeout(within_s if until else LISTEN_S * 2):
                async for response in stream:
                    heard.append(response)
                    if until and phase_of(response)[0] == until:
                        return heard
            if until and until != "END":
                raise Broken(f"the notifications ended before {until}: {phases(heard)}")
        except TimeoutError:
            if until:
                raise Broken(f"no {until} within {within_s:g} s: {phases(heard)}") from None
        except ttrpc.StatusError as error:
            raise Broken(f"Notifications: {error}") from None
        finally:
            stream.cancel()
        return heard

    # Revision 2691

    async def export_2691(self, session: str, **options: Any) -> Answer:
        return await ask(
            self.connection.unary(old.EXPORT, _old("PrepareAndExportSandboxRequest", session, options))
        )

    async def import_2691(self, session: str, config: any_pb2.Any) -> Answer:
        request = old.TYPES["ImportSandboxRequest"](session_id=session)
        request.config.ParseFromString(config.SerializeToString())
        return await ask(self.connection.unary(old.IMPORT, request))

    async def prepare_2691(self, session: str, **options: Any) -> Answer:
        return await ask(self.connection.unary(old.PREPARE, _old("PrepareSandboxRequest", session, options)))

    async def give_socket_2691(self, session: str, protocol_info: bytes) -> Answer:
        request = old.TYPES["CreateDuplicateSocketRequest"](session_id=session, protocol_info=protocol_info)
        return await ask(self.connection.unary(old.SOCKET, request))

    async def finalize_2691(self, session: str, action: int) -> Answer:
        request = old.TYPES["FinalizeSandboxRequest"](session_id=session, action=action)
        return await ask(self.connection.unary(old.FINALIZE, request), 60)

    def stream_2691(self, session: str, wait_s: float = 0) -> Any:
        request = old.TYPES["TransferSandboxRequest"](session_id=session)
        if wait_s:
            request.timeout.FromMilliseconds(round(wait_s * 1000))
        return self.connection.server_stream(old.TRANSFER, request)

    async def transfer_2691(self, session: str, wait_s: float = 0, within_s: float = 120) -> Answer:
        """Streamed: the answer's response is the list of what came."""
        heard: list[Any] = []

        async def listen() -> list[Any]:
            async for response in self.stream_2691(session, wait_s):
                heard.append(response)  # noqa: PERF401 - what came before an error counts
            return heard

        answer = await ask(listen(), within_s)
        return Answer(answer.code, answer.message, heard)

    # Around it

    async def status(self) -> shim_pb2.StatusResponse:
        return await self.own.status(shim_pb2.StatusRequest(), timeout_s=ANSWER_S)

    async def sandbox_status(self) -> sandbox_pb2.SandboxStatusResponse:
        request = sandbox_pb2.SandboxStatusRequest(sandbox_id=self.sandbox_id)
        return await self._sandbox.sandbox_status(request, timeout_s=ANSWER_S)

    async def state(self) -> str:
        return (await self.sandbox_status()).info["migration.state"]

    async def receipt(self) -> bytes:
        return (await self.status()).session.receipt

    async def stop_sandbox(self) -> Answer:
        request = sandbox_pb2.StopSandboxRequest(sandbox_id=self.sandbox_id, timeout_secs=1)
        return await ask(self._sandbox.stop_sandbox(request))

    async def wait_sandbox(self, within_s: float) -> Answer:
        request = sandbox_pb2.WaitSandboxRequest(sandbox_id=self.sandbox_id)
        return await ask(self._sandbox.wait_sandbox(request), within_s)

    async def run_process(self, process_id: str) -> Answer:
        request = shim_pb2.RunProcessRequest(process_id=process_id, args=["/bin/true"])
        return await ask(self.own.run_process(request))


def _old(name: str, session: str, options: dict[str, Any]) -> Any:
    request = old.TYPES[name](session_id=session)
    if options:
        data = options.pop("compatibility_data", b"")
        request.init_options.memory_transport = 1
        for field, value in options.items():
            setattr(request.init_options, field, value)
        if data:
            request.init_options.compatibility_data.data = data
    return request


def phase_of(response: m.NotificationsResponse) -> tuple[str, str]:
    """Phase and state, without their prefixes."""
    phase = o.Phase.Name(response.notification.phase).removeprefix("PHASE_")
    return phase, o.PhaseState.Name(response.notification.state).removeprefix("PHASE_STATE_")


def phases(heard: list[m.NotificationsResponse]) -> list[tuple[str, str]]:
    """All but the progress."""
    told = [phase_of(response) for response in heard]
    return [each for each in told if each[0] != "TRANSFER_IN_PROGRESS"]


async def quietly(stream: Any) -> None:
    with contextlib.suppress(ttrpc.StatusError):
        async for _response in stream:
            pass
