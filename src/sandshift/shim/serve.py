"""The serving process of a shim: made by `start`, one per sandbox. The composition root: here the real parts meet."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, cast

import ttrpc
from sandshift.config import Config, load
from sandshift.errors import SandshiftError
from sandshift.shim.arguments import Arguments
from sandshift.shim.durable import make_folder, write_atomically
from sandshift.shim.headless import forget, forsaken, unvisited
from sandshift.shim.identity import started_ticks_of
from sandshift.shim.late import load_rest, register_late
from sandshift.shim.log import begin as log_begin
from sandshift.shim.migration.desk import Desk
from sandshift.shim.own_socket import bound, withdraw
from sandshift.shim.parts import LateParts, Parts
from sandshift.shim.places import Places
from sandshift.shim.sandbox import LiveSandbox
from sandshift.shim.tasks.events import Publisher
from sandshift.status import to_status
from sandshift.wire.containerd.sandbox_ttrpc import SandboxService as SandboxMethods
from sandshift.wire.containerd.task_ttrpc import TaskService as TaskMethods
from sandshift.wire.migration import messages_pb2
from sandshift.wire.migration.service_ttrpc import MigrationService as MigrationMethods
from sandshift.wire.sandshift.shim_ttrpc import ShimService as ShimMethods

if TYPE_CHECKING:
    from sandshift.shim.migration.service import MigrationService

log = logging.getLogger("sandshift.shim")

DRAIN_S: Final = 2.0
TASK_V2: Final = "containerd.task.v2.Task"
"""Before containerd 2.0; the messages are the same."""


def refusal(error: SandshiftError | ttrpc.StatusError, context: ttrpc.CallContext) -> ttrpc.StatusError:
    """What the caller is told, and the log with it: one line, whatever text of the caller's is in it."""
    status = to_status(error)
    who = f"process {context.peer.pid} of user {context.peer.uid}" if context.peer else "somebody"
    log.info("%s of %s: %s", context.method.name, who, " ".join(str(status).splitlines()))
    return status


async def translate(request: Any, context: ttrpc.CallContext, proceed: ttrpc.UnaryNext) -> Any:
    """Our errors become statuses; anything else is our defect: its traceback is logged, and the client told so."""
    try:
        return await proceed(request, context)
    except (SandshiftError, ttrpc.StatusError) as error:
        raise refusal(error, context) from error
    except Exception as error:
        log.exception("%s met a defect", context.method.name)
        raise to_status(error) from error


async def translate_stream(
    request: Any, context: ttrpc.CallContext, proceed: ttrpc.StreamNext
) -> AsyncIterator[Any]:
    """`translate`, for handlers that stream."""
    try:
        async for response in proceed(request, context):
            yield response
    except (SandshiftError, ttrpc.StatusError) as error:
        raise refusal(error, context) from error
    except Exception as error:
        log.exception("%s met a defect", context.method.name)
        raise to_status(error) from error


class ShimServer:
    """All services of one shim on one ttrpc server."""

    def __init__(
        self,
        config: Config,
        places: Places,
        parts: Parts,
        namespace: str,
        sandbox_id: str,
        events: Publisher | None = None,
    ) -> None:
        self.sandbox = LiveSandbox(config, places, parts, namespace, sandbox_id, events)
        self.desk = Desk(self.sandbox)
        self.shut_down = asyncio.Event()
        self.server = ttrpc.Server(unary_interceptors=(translate,), stream_interceptors=(translate_stream,))
        register_late(self.server, MigrationMethods, lambda: self._migration)
        self.server.add_method(
            "Migration",
            "TransferSandbox",
            ttrpc.Shape.SERVER_STREAM,
            messages_pb2.TransferSandboxRequest,
            messages_pb2.TransferSandboxResponse,
            self._transfer_sandbox_2691,
        )
        register_late(self.server, SandboxMethods, self._sandbox_service)
        register_late(self.server, TaskMethods, self._task_service, also_as=TASK_V2)
        register_late(self.server, ShimMethods, self._shim_service)

    # ruff's PLC0415 in these four: see late.py

    @functools.cached_property
    def _migration(self) -> MigrationService:
        from sandshift.shim.migration.service import MigrationService  # noqa: PLC0415

        return MigrationService(self.desk)

    def _transfer_sandbox_2691(
        self, request: messages_pb2.TransferSandboxRequest, context: ttrpc.CallContext
    ) -> AsyncIterator[messages_pb2.TransferSandboxResponse]:
        return self._migration.transfer_sandbox_2691(request, context)

    def _sandbox_service(self) -> ttrpc.Service:
        from sandshift.shim.sandbox_service import SandboxService  # noqa: PLC0415

        return SandboxService(self.sandbox, self.desk, self.shut_down.set)

    def _task_service(self) -> ttrpc.Service:
        from sandshift.shim.tasks.task_service import TaskService  # noqa: PLC0415

        return TaskService(self.sandbox, self.desk, self.shut_down.set, os.getpid())

    def _shim_service(self) -> ttrpc.Service:
        from sandshift.shim.shim_service import ShimService  # noqa: PLC0415

        return ShimService(self.sandbox, self.desk, os.getpid())

    async def restore(self) -> None:
        """Go on with what an earlier shim of this sandbox left; callers wait in the socket's queue meanwhile."""
        if not self.sandbox.places.sandbox_file.exists():
            return
        # A fresh shim has nothing to go on with.
        from sandshift.shim.migration.restoring import restore_session  # noqa: PLC0415
        from sandshift.shim.restore import (  # noqa: PLC0415
            drop_unused_disks,
            follow_again,
            restore_sandbox,
            runs,
            without_session,
        )

        if not await restore_sandbox(self.sandbox):
            return
        load_rest()
        active = await restore_session(self.sandbox)
        await self.sandbox.disk.run(self.desk.remember)
        if active is not None:
            self.desk.take_up(active)
        else:
            await without_session(self.sandbox)
        if self.sandbox.machine is not None and await runs(self.sandbox.machine):
            await follow_again(self.sandbox)
            if active is None:
                await drop_unused_disks(self.sandbox)

    async def run(self, listener: socket.socket, *, headless: bool = False) -> bool:
        """Serve until ShutdownSandbox or a signal, or until there is nothing to do here, which it answers: for a `headless` shim
        nothing any more; for another nobody ever came."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.shut_down.set)
        await self.restore()
        serving = asyncio.create_task(self.server.serve(listener), name="serve")
        nothing_left = await self._until_shut_down(headless=headless)
        await self.server.shutdown(grace_s=DRAIN_S)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await self.let_go()
        return nothing_left

    async def _until_shut_down(self, *, headless: bool) -> bool:
        """Whether there is nothing to do here."""
        useless = forsaken(self.sandbox, self.desk) if headless else unvisited(self.server, self.sandbox)
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(self.shut_down.wait(), name="shut down"),
            asyncio.create_task(useless, name="useless"),
        ]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return not self.shut_down.is_set()

    async def let_go(self) -> None:
        """End this shim and nothing else: VM and session go on, for another shim to find."""
        await self.desk.let_go()
        await self.sandbox.let_go()


def serve_from_start(arguments: Arguments, descriptor: int) -> None:
    """Run the shim on the listening socket `descriptor`, which becomes ours. Blocks."""
    serve(arguments, load(), socket.socket(fileno=descriptor))


def settle() -> None:
    """All that was loaded stays: the collector, which the start did without, need not look at it again.

    The program's own: a process that has many shims, as tests do, would keep all that was theirs for ever.
    """
    gc.freeze()
    gc.enable()


def serve(arguments: Arguments, config: Config, listener: socket.socket) -> None:
    """Run the shim to its end. Blocks."""
    log_begin(debug=arguments.debug)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    places = Places.of(config, arguments.namespace, arguments.id)
    make_folder(places.run_dir)
    record = {"pid": os.getpid(), "started_ticks": started_ticks_of(os.getpid())}
    write_atomically(places.shim_pid_file, json.dumps(record).encode())
    asyncio.run(_serve(arguments, config, places, listener))


def events_address(places: Places) -> str:
    """Where containerd takes events: what `start` was told, else what an earlier shim of this sandbox was. Blocks."""
    told = os.environ.get("TTRPC_ADDRESS", "")
    if told:
        write_atomically(places.events_file, told.encode())
        return told
    try:
        return places.events_file.read_text()
    except FileNotFoundError:
        return ""


async def _serve(arguments: Arguments, config: Config, places: Places, listener: socket.socket) -> None:
    def load_parts() -> Parts:
        from sandshift.shim.real_parts import real_parts  # noqa: PLC0415 - QEMU's driver and all it needs

        return real_parts(config, arguments.namespace)

    parts = cast("Parts", LateParts(load_parts))
    events = Publisher(events_address(places), arguments.namespace)
    server = ShimServer(config, places, parts, arguments.namespace, arguments.id, events)
    settle()
    address = config.shim_socket(arguments.namespace, arguments.id)
    ours = bound(address)
    nothing_left = await server.run(listener, headless=arguments.headless)
    if nothing_left:
        log.info("nothing of sandbox %s is here and nobody asks for it: this shim ends itself", arguments.id)
    drop = functools.partial(forget, places) if nothing_left else None
    if not await asyncio.to_thread(withdraw, address, places.shim_pid_file, ours, drop):
        log.info("another shim of sandbox %s has begun: all is left to it", arguments.id)
