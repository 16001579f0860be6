"""Two shims in this process, real on the wire and simple inside: real ttrpc servers on the real places' sockets, a
session of a few words, and a failure wherever a test wants one.

They keep the rules that a coordinator can see (states, cells, receipts); the real protocol is tested in tests/session.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from sandshift.config import parse
from sandshift.errors import Unavailable
from sandshift.fleet import calls, host, launch, sessions, shim_client, visitor
from sandshift.fleet.host import Host
from sandshift.fleet.request import Migration
from sandshift.session.statement import Cell
from sandshift.session.states import Side
from sandshift.wire.containerd import sandbox_pb2, sandbox_ttrpc
from sandshift.wire.migration import messages_pb2, options_pb2, service_ttrpc
from sandshift.wire.sandshift import shim_pb2, shim_ttrpc, state_pb2

SANDBOX = "s-1"
SESSION = "move-1"
BLACKOUT_MS = 31
Failure = ttrpc.StatusError | Callable[[], None]
F = ttrpc.Code


def illegal(message: str) -> ttrpc.StatusError:
    return ttrpc.StatusError(F.FAILED_PRECONDITION, message)


@dataclass
class World:
    """Both hosts, every shim on them, what was called, and what shall fail."""

    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)
    shims: dict[tuple[str, str], FakeShim] = field(default_factory=dict)
    kept: dict[tuple[str, str], shim_pb2.SessionStatus] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    """ "source TransferSandbox" -> what to do instead, once each."""
    gone_hosts: set[str] = field(default_factory=set)
    transfers: asyncio.Event = field(default_factory=asyncio.Event)
    transferring: set[Side] = field(default_factory=set)
    memory_stands_still: bool = False
    both_transfer: asyncio.Event = field(default_factory=asyncio.Event)

    def host(self, name: str) -> Host:
        if name not in self.hosts:
            config = parse(
                {
                    "host": {"name": name},
                    "places": {
                        "run_dir": str(self.folder / name / "run"),
                        "state_dir": str(self.folder / name / "state"),
                    },
                },
                source=name,
            )
            self.hosts[name] = Host(config, None)
        return self.hosts[name]

    def shim(self, name: str) -> FakeShim:
        return self.shims[name, SANDBOX]

    def migration(self, **changes: object) -> Migration:
        given: dict[str, object] = {
            "source": self.host("a"),
            "destination": self.host("b"),
            "sandbox_id": SANDBOX,
            "session_id": SESSION,
        }
        return Migration(**(given | changes))  # type: ignore[arg-type]

    def fail(self, call: str, *failures: Failure) -> None:
        self.failures[call] = list(failures)

    def met(self, call: str) -> None:
        """Note a call, and raise what shall go wrong with it."""
        self.called.append(call)
        if self.failures.get(call):
            failure = self.failures[call].pop(0)
            if isinstance(failure, ttrpc.StatusError):
                raise failure
            failure()

    async def run_sandbox(self, name: str = "a") -> FakeShim:
        await self.start(self.host(name), "default", SANDBOX)
        shim = self.shim(name)
        shim.vm_state, shim.awaiting = "running", False
        return shim

    async def start(self, where: Host, namespace: str, sandbox_id: str) -> str:
        if where.name in self.gone_hosts:
            raise Unavailable(f"host {where.name} is gone")
        key = (where.name, sandbox_id)
        if key not in self.shims:
            self.shims[key] = FakeShim(self, where.name, sandbox_id)
        shim = self.shims[key]
        if not shim.serving:
            path = where.config.shim_socket(namespace, sandbox_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            await shim.serve(path)
            await asyncio.sleep(0)  # its accepting task begins
        return f"unix://{where.config.shim_socket(namespace, sandbox_id)}"

    async def delete(self, where: Host, namespace: str, sandbox_id: str) -> None:
        """As the real one: a shim with an open session is brought back, not removed."""
        if where.name in self.gone_hosts:
            raise Unavailable(f"host {where.name} is gone")
        shim = self.shims.get((where.name, sandbox_id))
        if shim is not None and shim.session.active:
            await self.start(where, namespace, sandbox_id)
            return
        if shim is not None:
            del self.shims[where.name, sandbox_id]
            assert shim.vm_state in ("absent", "stopped"), f"a shim whose VM is {shim.vm_state} was deleted"
            await shim.die()
        shutil.rmtree(where.config.sandbox_run_dir(namespace, sandbox_id), ignore_errors=True)

    async def close(self) -> None:
        for shim in list(self.shims.values()):
            await shim.die()

    @property
    def runners(self) -> list[str]:
        return sorted(where for (where, _id), shim in self.shims.items() if shim.vm_state == "running")


class FakeShim(service_ttrpc.MigrationService, shim_ttrpc.ShimService):
    ttrpc_methods = (*service_ttrpc.MigrationService.ttrpc_methods, *shim_ttrpc.ShimService.ttrpc_methods)

    def __init__(self, world: World, where: str, sandbox_id: str) -> None:
        self.world = world
        self.where = where
        self.sandbox_id = sandbox_id
        self.vm_state = "absent"
        self.awaiting: bool | None = None
        self.session = shim_pb2.SessionStatus(state="Idle")
        self.processes: dict[str, list[str]] = {}
        self.output: dict[str, list[tuple[int, bytes]]] = {}
        self.report_json = b""
        self.preflight_answer = shim_pb2.PreflightResponse()
        self.init_options: options_pb2.InitializeOptions | None = None
        self.cut = False
        self._record: list[messages_pb2.NotificationsResponse] = []
        self._told = asyncio.Event()
        self._channel_fd: int | None = None
        self._server: ttrpc.Server | None = None
        self._task: asyncio.Task[None] | None = None

    # Life

    @property
    def serving(self) -> bool:
        return self._server is not None

    async def serve(self, path: Path) -> None:
        self._server = ttrpc.Server()
        self._server.register(self)
        self._server.register(FakeSandbox(self))
        self._task = asyncio.create_task(self._server.serve(ttrpc.listen(path)))

    async def die(self) -> None:
        """As by SIGKILL: the connections end; what is on disk (the session, the VM) stays."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.shutdown(grace_s=0)
            assert self._task is not None
            await self._task

    def crash_soon(self) -> None:
        """For `World.fail`: the shim dies while it serves the call, and the answer with it."""
        task = asyncio.get_running_loop().create_task(self.die())
        self.world.transfers.set()
        del task
        raise ttrpc.StatusError(F.UNAVAILABLE, "the connection broke")

    # What is asked

    @property
    def side(self) -> Side:
        return Side(self.session.side)

    @property
    def cell(self) -> Cell:
        return Cell(self.session.cell)

    def _meet(self, call: str, session_id: str) -> None:
        side = Side.SOURCE if self.where == "a" else Side.DESTINATION
        self.world.met(f"{side.word} {call}")
        if self.session.active and session_id != self.session.session_id:
            raise ttrpc.StatusError(F.INVALID_ARGUMENT, f"session {self.session.session_id!r} is active")

    def _need(self, call: str, *states: str) -> None:
        if self.session.state not in states:
            raise illegal(f"session is {self.session.state}, which does not take {call}")

    def _begin(self, session_id: str, side: Side, state: str, cell: Cell) -> None:
        self.session = shim_pb2.SessionStatus(
            session_id=session_id, side=side.value, state=state, cell=cell.value, active=True
        )
        self._record.clear()

    def _become(self, state: str = "", cell: Cell | None = None) -> None:
        if state:
            self.session.state = state
        if cell is not None:
            self.session.cell = cell.value

    @property
    def receipt(self) -> bytes:
        return f"{self.where}:{self.cell.name}".encode()

    async def status(
        self, request: shim_pb2.StatusRequest, context: ttrpc.CallContext
    ) -> shim_pb2.StatusResponse:
        response = shim_pb2.StatusResponse(
            sandbox_id=self.sandbox_id,
            vm_state=self.vm_state,
            memory_bytes=256 << 20,
            started_from="template",
            network_cards=[state_pb2.NetworkCard(id="net0", addresses=["10.9.0.50/24"])],
            processes=[
                shim_pb2.ProcessStatus(process_id=name, pid=7, args=args)
                for name, args in self.processes.items()
            ],
        )
        session = self.session
        if request.session_id and not (session.active and session.session_id == request.session_id):
            session = self.world.kept.get((self.where, request.session_id), shim_pb2.SessionStatus())
        if session.session_id:
            response.session.CopyFrom(session)
            response.session.receipt = f"{self.where}:{Cell(session.cell).name}".encode()
        return response

    async def preflight(
        self, request: shim_pb2.PreflightRequest, context: ttrpc.CallContext
    ) -> shim_pb2.PreflightResponse:
        return self.preflight_answer

    async def run_process(
        self, request: shim_pb2.RunProcessRequest, context: ttrpc.CallContext
    ) -> shim_pb2.RunProcessResponse:
        self.world.met(f"{self.where} RunProcess")
        self.processes[request.process_id] = list(request.args)
        return shim_pb2.RunProcessResponse(pid=7)

    async def logs(
        self, request: shim_pb2.LogsRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[shim_pb2.LogsResponse]:
        if request.process_id not in self.processes:
            raise ttrpc.StatusError(F.NOT_FOUND, f"there is no process {request.process_id!r}")
        offset = 0
        for stream, data in self.output.get(request.process_id, []):
            if request.stream in (0, stream):
                yield shim_pb2.LogsResponse(stream=stream, offset=offset, data=data)
            offset += len(data)
        if request.follow:
            yield shim_pb2.LogsResponse(exited=True, exit_code=3)

    async def report(
        self, request: shim_pb2.ReportRequest, context: ttrpc.CallContext
    ) -> shim_pb2.ReportResponse:
        if not self.report_json:
            raise ttrpc.StatusError(F.NOT_FOUND, "there is no report")
        return shim_pb2.ReportResponse(report=self.report_json)

    async def force_resume(
        self, request: shim_pb2.ForceResumeRequest, context: ttrpc.CallContext
    ) -> shim_pb2.ForceResumeResponse:
        self.world.met(f"{self.where} ForceResume {request.confirm} {Cell(request.expected_cell).name}")
        return shim_pb2.ForceResumeResponse()

    # Migration

    async def prepare_and_export_sandbox(
        self, request: messages_pb2.PrepareAndExportSandboxRequest, context: ttrpc.CallContext
    ) -> messages_pb2.PrepareAndExportSandboxResponse:
        self._meet("PrepareAndExportSandbox", request.session_id)
        self._need("PrepareAndExportSandbox", "Idle", "SourceExported")
        self.init_options = request.init_options if request.HasField("init_options") else None
        self._begin(request.session_id, Side.SOURCE, "SourceExported", Cell.OPEN)
        return messages_pb2.PrepareAndExportSandboxResponse(config=AnyMessage(type_url="x/y", value=b"state"))

    async def import_sandbox(
        self, request: messages_pb2.ImportSandboxRequest, context: ttrpc.CallContext
    ) -> messages_pb2.ImportSandboxResponse:
        self._meet("ImportSandbox", request.session_id)
        self._need("ImportSandbox", "Idle", "DestinationImported")
        assert request.config.value == b"state"
        assert request.sandbox_id_or_config == self.sandbox_id.encode()
        self._begin(request.session_id, Side.DESTINATION, "DestinationImported", Cell.NONE)
        return messages_pb2.ImportSandboxResponse()

    async def prepare_sandbox(
        self, request: messages_pb2.PrepareSandboxRequest, context: ttrpc.CallContext
    ) -> messages_pb2.PrepareSandboxResponse:
        self._meet("PrepareSandbox", request.session_id)
        self._need("PrepareSandbox", "DestinationImported", "DestinationPrepared")
        if self.session.pending_containers:
            raise illegal(f"containers {', '.join(self.session.pending_containers)} are pending a patch")
        self._become("DestinationPrepared")
        self.vm_state = "incoming"
        return messages_pb2.PrepareSandboxResponse()

    async def create_duplicate_socket(
        self, request: messages_pb2.CreateDuplicateSocketRequest, context: ttrpc.CallContext
    ) -> messages_pb2.CreateDuplicateSocketResponse:
        self._meet("CreateDuplicateSocket", request.session_id)
        if self._channel_fd is not None:
            raise ttrpc.StatusError(F.ALREADY_EXISTS, "there is a socket already")
        descriptor = messages_pb2.SocketDescriptor.FromString(request.protocol_info)
        assert (descriptor.version, descriptor.pid) == (1, os.getpid())
        self._channel_fd = os.dup(descriptor.fd)
        self._become("SocketReady")
        return messages_pb2.CreateDuplicateSocketResponse()

    async def transfer_sandbox(
        self, request: messages_pb2.TransferSandboxRequest, context: ttrpc.CallContext
    ) -> messages_pb2.TransferSandboxResponse:
        self._meet("TransferSandbox", request.session_id)
        self._need("TransferSandbox", "SocketReady", "Transferring", "TransferCompleted")
        if self.session.state == "SocketReady":
            self._become("Transferring")
        self.world.transferring.add(self.side)
        if len(self.world.transferring) == len(Side):
            self.world.both_transfer.set()
            if not self.world.memory_stands_still:
                self.complete()
        await self.world.transfers.wait()
        if self.session.state != "TransferCompleted":
            raise ttrpc.StatusError(F.CANCELLED, "the transfer was cancelled")
        return messages_pb2.TransferSandboxResponse()

    def complete(self) -> None:
        """Both transfer: everything is over at once."""
        source, destination = self.world.shim("a"), self.world.shim("b")
        source.vm_state = destination.vm_state = "paused"
        source._become("TransferCompleted")
        destination._become("TransferCompleted", Cell.READY)
        progress = options_pb2.TransferProgress(bytes_total=2 << 20, bytes_transferred=1 << 20)
        setattr(progress, "pass", 2)
        source.tell("SETUP_DONE")
        source.tell("TRANSFER_IN_PROGRESS", progress=progress)
        source.tell("BLACKOUT_STARTED")
        source.tell("DONE")
        destination.tell("DONE")
        self.world.transfers.set()

    def tell(
        self, phase: str, *, progress: options_pb2.TransferProgress | None = None, blackout_ms: int = 0
    ) -> None:
        notification = options_pb2.Notification(
            origin=self.session.side,  # type: ignore[arg-type]
            phase=options_pb2.Phase.Value(f"PHASE_{phase}"),
            state=options_pb2.PHASE_STATE_SUCCESS,
            progress=progress,
        )
        if blackout_ms:
            notification.blackout_exited.blackout_duration_milliseconds = blackout_ms
        self._record.append(
            messages_pb2.NotificationsResponse(message_id=len(self._record) + 1, notification=notification)
        )
        self._told.set()
        self._told = asyncio.Event()

    async def notifications(
        self, request: messages_pb2.NotificationsRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[messages_pb2.NotificationsResponse]:
        if not self.session.active:
            raise illegal("no active session")
        at = 0
        while self.session.active or at < len(self._record):
            told = self._told
            if at < len(self._record):
                at += 1
                yield self._record[at - 1]
            else:
                await told.wait()

    async def finalize_sandbox(
        self, request: messages_pb2.FinalizeSandboxRequest, context: ttrpc.CallContext
    ) -> messages_pb2.FinalizeSandboxResponse:
        action = messages_pb2.FinalizeAction.Name(request.action).removeprefix("FINALIZE_ACTION_")
        self._meet(f"FinalizeSandbox({action})", request.session_id)
        if self.session.state == "Finalized" and self.session.action == action.lower():
            return messages_pb2.FinalizeSandboxResponse()
        peer = request.peer_receipt.decode().partition(":")[2] or self._ask_peer()
        rules = {
            (Side.DESTINATION, "RESUME"): self._resume_destination,
            (Side.SOURCE, "STOP"): self._stop_source,
            (Side.SOURCE, "RESUME"): self._resume_source,
            (Side.DESTINATION, "STOP"): self._stop_destination,
        }
        if not self.session.active:
            raise illegal("no active session")
        rules[self.side, action](peer)
        self._become("Finalized")
        self.session.action = action.lower()
        return messages_pb2.FinalizeSandboxResponse()

    def _ask_peer(self) -> str:
        """What the living channel would tell; empty if it is dead."""
        peer = self.world.shims.get(("b" if self.where == "a" else "a", SANDBOX))
        if peer is None or not peer.serving or self.cut or not peer.session.cell:
            return ""
        return peer.cell.name

    def _resume_destination(self, peer: str) -> None:
        if self.cell is Cell.READY:
            if peer == "OPEN" and not self.cut:
                self.world.shim("a")._become(cell=Cell.RELEASED)
            elif peer not in ("RELEASED", "GONE"):
                raise ttrpc.StatusError(F.UNAVAILABLE, f"the source is {peer or 'silent'}")
            self._become(cell=Cell.HELD)
        if self.cell is Cell.HELD:
            self.world.met("destination start")
        if self.cell not in (Cell.HELD, Cell.STARTING, Cell.RUNNING):
            raise illegal(f"the destination is {self.cell.name}")
        self._become(cell=Cell.RUNNING)
        self.vm_state = "running"
        self.tell("BLACKOUT_EXITED", blackout_ms=BLACKOUT_MS)

    def _stop_source(self, peer: str) -> None:
        if peer != "RUNNING":
            raise ttrpc.StatusError(F.UNAVAILABLE, f"the destination is {peer or 'silent'}")
        self._become(cell=Cell.GONE)
        self.vm_state = "stopped"

    def _resume_source(self, peer: str) -> None:
        if self.cell is Cell.RELEASED and peer not in ("REFUSED", "RETURNING"):
            raise ttrpc.StatusError(F.UNAVAILABLE, f"the destination is {peer or 'silent'}")
        if self.cell is Cell.GONE:
            raise illegal("the source gave its VM up")
        self._become(cell=Cell.KEPT)
        self.vm_state = "running"

    def _stop_destination(self, peer: str) -> None:
        if self.cell is Cell.HELD and peer == "RELEASED":
            self._become(cell=Cell.RETURNING)
            raise ttrpc.StatusError(F.UNAVAILABLE, "the source does not answer")
        if self.cell is Cell.RETURNING and peer != "KEPT":
            raise ttrpc.StatusError(F.UNAVAILABLE, "the source does not answer")
        if self.cell in (Cell.HELD, Cell.STARTING, Cell.RUNNING):
            raise illegal(f"the destination is {self.cell.name}")
        self._become(cell=Cell.REFUSED)
        self.vm_state = "stopped"

    async def cancel(
        self, request: messages_pb2.CancelRequest, context: ttrpc.CallContext
    ) -> messages_pb2.CancelResponse:
        self._meet("Cancel", request.session_id)
        if not self.session.active:
            raise illegal("no active session")
        cell = Cell.KEPT if self.side is Side.SOURCE else Cell.REFUSED
        if self.cell in (Cell.OPEN, Cell.NONE, Cell.READY):
            self._become("Cancelled", cell)
        self.world.transfers.set()
        return messages_pb2.CancelResponse()

    async def cleanup(
        self, request: messages_pb2.CleanupRequest, context: ttrpc.CallContext
    ) -> messages_pb2.CleanupResponse:
        self._meet("Cleanup", request.session_id)
        if self.session.active:
            self._need("Cleanup", "Finalized", "Cancelled", "Failed")
            self.session.active = False
            self.session.state = "Idle"
            self.world.kept[self.where, request.session_id] = self.session
            if self._channel_fd is not None:
                os.close(self._channel_fd)
                self._channel_fd = None
        self._told.set()
        return messages_pb2.CleanupResponse()


class FakeSandbox(sandbox_ttrpc.SandboxService):
    def __init__(self, shim: FakeShim) -> None:
        self._shim = shim

    async def create_sandbox(
        self, request: sandbox_pb2.CreateSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.CreateSandboxResponse:
        shim = self._shim
        shim.world.met(f"{shim.where} CreateSandbox")
        shim.awaiting = request.annotations.get(calls.DESTINATION_ANNOTATION) == "true"
        shim.options = shim_pb2.SandboxOptions()
        request.options.Unpack(shim.options)
        return sandbox_pb2.CreateSandboxResponse()

    async def start_sandbox(
        self, request: sandbox_pb2.StartSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.StartSandboxResponse:
        self._shim.world.met(f"{self._shim.where} StartSandbox")
        self._shim.vm_state = "running"
        return sandbox_pb2.StartSandboxResponse(pid=1)

    async def stop_sandbox(
        self, request: sandbox_pb2.StopSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.StopSandboxResponse:
        self._shim.world.met(f"{self._shim.where} StopSandbox {request.timeout_secs}")
        self._shim.vm_state = "stopped"
        return sandbox_pb2.StopSandboxResponse()

    async def shutdown_sandbox(
        self, request: sandbox_pb2.ShutdownSandboxRequest, context: ttrpc.CallContext
    ) -> sandbox_pb2.ShutdownSandboxResponse:
        shim = self._shim
        shim.world.met(f"{shim.where} ShutdownSandbox")
        if shim.session.active:
            raise illegal("a session is open")
        if shim.vm_state == "running":
            shim.vm_state = "stopped"
        return sandbox_pb2.ShutdownSandboxResponse()


def use(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Let every module that starts or deletes shims start and delete these."""
    for module in (host, calls, launch, sessions, shim_client, visitor):
        if hasattr(module, "start_shim"):
            monkeypatch.setattr(module, "start_shim", world.start)
        if hasattr(module, "delete_shim"):
            monkeypatch.setattr(module, "delete_shim", world.delete)
    return world
