"""The one place of a shim where calls of the Migration service meet its session: which call is served, and when.

At most one session at a time. Legality is looked up in `session/states.py`; calls that change something are handled one
after another, each in a task of its own, so that a caller who goes away takes nothing with them. TransferSandbox and
Notifications only watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar

from sandshift.errors import IllegalMove, NoRoom, SandshiftError, Unavailable
from sandshift.session.states import Action, Call, Outcome, Side, Standing, State, check
from sandshift.shim.late import load_rest
from sandshift.shim.migration import last

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

    from sandshift.sandbox.patching import Patch
    from sandshift.session.descriptor import Descriptor
    from sandshift.session.record import Entry
    from sandshift.session.statement import Cell
    from sandshift.shim.migration.destination import Destination
    from sandshift.shim.migration.opening import Opening
    from sandshift.shim.migration.source import Source
    from sandshift.shim.sandbox import LiveSandbox
    from sandshift.wire.migration import messages_pb2

log = logging.getLogger(__name__)

T = TypeVar("T")

ARRIVAL_S: Final = 2.0
"""A destination's unary TransferSandbox answers OK if nothing has arrived for this long (contract 4.7)."""
ORPHAN_LOOK_S: Final = 1.0
BACK: Final = {Side.SOURCE: Call.RESUME, Side.DESTINATION: Call.STOP}


def is_source(active: Source | Destination | None) -> TypeGuard[Source]:
    return active is not None and active.session.side is Side.SOURCE


def is_destination(active: Source | Destination | None) -> TypeGuard[Destination]:
    return active is not None and active.session.side is Side.DESTINATION


class Desk:
    def __init__(self, sandbox: LiveSandbox) -> None:
        self.sandbox = sandbox
        self.active: Source | Destination | None = None
        self.last = last.LastSession()
        self._turn = asyncio.Lock()
        self._beginning = ""
        """The call that is about to begin a session, if one is."""
        self._changes: set[asyncio.Task[Any]] = set()
        """What changes the sandbox just now, outside any session."""
        self._subscribers = 0
        self._calls = 0
        self._quiet_since_s = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._task_orphan: asyncio.Task[None] | None = None

    @functools.cached_property
    def _opening(self) -> Opening:
        """What a session is made with: loaded when there is one, since most shims never have any. With it all that the shim
        may need until its end: nothing is looked for on disk once a guest waits for us.
        """
        load_rest()
        from sandshift.shim.migration.opening import Opening  # noqa: PLC0415

        return Opening(self.sandbox)

    # What everybody may ask

    @property
    def standing(self) -> Standing:
        """The active session's; in Idle the last ended one's."""
        return self.active.session.standing if self.active is not None else self.last.standing

    def require_no_session(self, what: str) -> None:
        """Refuse at once what would change the sandbox while it moves (contract 4.13)."""
        if self.active is not None:
            standing = self.standing
            raise IllegalMove(
                f"{what}: sandbox {self.sandbox.sandbox_id} is in migration session {standing.session_id!r} "
                f"({standing.state.value}); repeat when the session has ended"
            )
        if self._beginning:
            raise IllegalMove(
                f"{what}: a migration session of sandbox {self.sandbox.sandbox_id} is about to begin "
                f"({self._beginning}); repeat when the session has ended"
            )

    def require_kill_allowed(self) -> None:
        """Task.Kill is let through on the source until the blackout starts: the guest runs there until then (contract 4.13)."""
        if is_source(self.active) and not self._beginning and self.active.guest_is_here:
            return
        self.require_no_session("Task.Kill")

    def require_guest_here(self, what: str) -> None:
        """Refuse at once what asks the guest while it is on its way, or not here yet."""
        if is_source(self.active) and self.active.guest_is_here:
            return
        self.require_no_session(what)

    async def change(self, what: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do `work`, which changes the sandbox, to its end whatever becomes of the caller; refused at once in a session.

        A session that is to begin waits for it, so that what it saves is all there is.
        """
        self.require_no_session(what)
        task = asyncio.create_task(work(), name=what)
        self._changes.add(task)
        task.add_done_callback(self._change_ended)
        return await asyncio.shield(task)

    def _change_ended(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # Told to the caller, if they are still there.

    @contextlib.asynccontextmanager
    async def _unchanging(self, call: Call) -> AsyncIterator[None]:
        """No change is under way and none begins: a session may.

        Raises:
            Unavailable: one goes on for longer than the guest's agent may take to answer.
        """
        bound_s = self.sandbox.config.migration.limits.agent_reply_s
        self._beginning = call.value
        try:
            if self._changes:
                _, left = await asyncio.wait(set(self._changes), timeout=bound_s)
                if left:
                    names = ", ".join(sorted(task.get_name() for task in left))
                    raise Unavailable(
                        f"{call.value}: {names} of sandbox {self.sandbox.sandbox_id} goes on for more than {bound_s:g} s: "
                        "repeat when it has ended"
                    )
            yield
        finally:
            self._beginning = ""

    def require_active(self) -> Source | Destination:
        assert self.active is not None, "legality was looked up: there is a session"
        return self.active

    # Calls, one at a time

    async def _in_turn(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` when those before it are done, to its end whatever becomes of the caller."""

        async def take_turn() -> T:
            async with self._turn:
                return await work

        self._calls += 1
        task = asyncio.create_task(take_turn(), name="migration call")
        self._tasks.add(task)
        task.add_done_callback(self._call_ended)
        return await asyncio.shield(task)

    def _call_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._calls -= 1
        self._quiet_since_s = time.monotonic()
        if not task.cancelled():
            task.exception()  # Told to the caller; if they have gone, it is not an unheard error.

    def _refuse_while_cancelling(self, call: Call, session_id: str | None) -> None:
        """What a cancellation under way does not take is refused at once; the rest waits for its end (contract 3)."""
        if self.standing.state is State.CANCELLING:
            check(call, self.standing, session_id)

    async def export(self, request: messages_pb2.PrepareAndExportSandboxRequest) -> AnyMessage:
        self._refuse_while_cancelling(Call.PREPARE_AND_EXPORT, request.session_id)
        return await self._in_turn(self._export(request))

    async def _export(self, request: messages_pb2.PrepareAndExportSandboxRequest) -> AnyMessage:
        outcome = check(Call.PREPARE_AND_EXPORT, self.standing, request.session_id)
        if outcome is Outcome.SAME_EXPORT:
            return self._opening.exported_again(request, self.require_active())
        async with self._unchanging(Call.PREPARE_AND_EXPORT):
            source, config = await self._opening.export(request)
            self._begin(source)
        return config

    async def import_sandbox(self, request: messages_pb2.ImportSandboxRequest) -> None:
        self._refuse_while_cancelling(Call.IMPORT, request.session_id)
        await self._in_turn(self._import(request))

    async def _import(self, request: messages_pb2.ImportSandboxRequest) -> None:
        outcome = check(Call.IMPORT, self.standing, request.session_id)
        if outcome is Outcome.SAME_IMPORT:
            self._opening.imported_again(request, self.require_active())
            return
        async with self._unchanging(Call.IMPORT):
            self._begin(await self._opening.import_sandbox(request))

    async def prepare(self, request: messages_pb2.PrepareSandboxRequest) -> None:
        self._refuse_while_cancelling(Call.PREPARE, request.session_id)
        await self._in_turn(self._prepare(request))

    async def _prepare(self, request: messages_pb2.PrepareSandboxRequest) -> None:
        if check(Call.PREPARE, self.standing, request.session_id) is Outcome.NO_EFFECT:
            return
        active = self.require_active()
        assert is_destination(active)
        await self._opening.prepare(request, active)

    async def create_task(self, patch: Patch) -> int:
        """Task.Create with the annotation that names a container of the source (contract 4.4). Answers its saved pid."""
        self._refuse_while_cancelling(Call.CREATE_TASK, None)
        return await self._in_turn(self._create_task(patch))

    async def _create_task(self, patch: Patch) -> int:
        check(Call.CREATE_TASK, self.standing, None)
        active = self.require_active()
        assert is_destination(active)
        return await active.patch(patch)

    def patched_pid(self, container_id: str) -> int | None:
        """The saved pid of a container that was created here for one of the source; None if this session has none such."""
        active = self.active
        if not is_destination(active):
            return None
        patch = active.patching.patched_as(container_id)
        return active.patching.pid_of(patch.source_id) if patch is not None else None

    async def give_socket(self, session_id: str, descriptor: Descriptor) -> None:
        self._refuse_while_cancelling(Call.CREATE_DUPLICATE_SOCKET, session_id)
        await self._in_turn(self._give_socket(session_id, descriptor))

    async def _give_socket(self, session_id: str, descriptor: Descriptor) -> None:
        check(Call.CREATE_DUPLICATE_SOCKET, self.standing, session_id)
        active = self.require_active()
        waiting = active.session.state is State.SOCKET_WAITING
        await active.give_socket(descriptor)
        if is_destination(active) and not waiting:
            # It receives from the moment that it is prepared and has the socket, whoever calls what (contract 4.7).
            active.begin_transfer(active.bounds.socket_wait_s)

    # The transfer, watched

    async def begin_transfer(self, session_id: str, timeout_s: float, deadline_s: float) -> None:
        """Start the transfer, or join the one that goes on."""
        self._refuse_while_cancelling(Call.TRANSFER, session_id)
        await self._in_turn(self._begin_transfer(session_id, timeout_s, deadline_s))

    async def _begin_transfer(self, session_id: str, timeout_s: float, deadline_s: float) -> None:
        outcome = check(Call.TRANSFER, self.standing, session_id)
        if outcome is Outcome.NO_EFFECT:
            return
        active = self.require_active()
        await active.transfer_called(
            timeout_s or active.bounds.socket_wait_s, deadline_s or active.bounds.transfer_deadline_s
        )

    async def transfer(self, session_id: str, timeout_s: float, deadline_s: float) -> None:
        """Returns when the transfer has succeeded; raises what it ended with. A caller who goes away changes nothing."""
        await self.begin_transfer(session_id, timeout_s, deadline_s)
        active = self.require_active()
        active.head_was_seen()
        transfer = active.session.transfer
        if is_destination(active) and not transfer.arrived.is_set():
            await self._wait_for_arrival(active)
            if not transfer.arrived.is_set() and not transfer.done.done():
                return
        error = await asyncio.shield(transfer.done)
        if error is not None:
            raise error

    async def _wait_for_arrival(self, active: Destination) -> None:
        """Until the first bytes are here or the transfer has ended; once there is a socket, for `ARRIVAL_S` at most."""
        transfer = active.session.transfer
        arrived: asyncio.Future[Any] = asyncio.ensure_future(transfer.arrived.wait())
        has_socket: asyncio.Future[Any] = asyncio.ensure_future(active.socket_given.wait())
        done: asyncio.Future[Any] = transfer.done
        try:
            await asyncio.wait([has_socket, done], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([arrived, done], timeout=ARRIVAL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
            has_socket.cancel()

    # The end

    async def finalize(self, session_id: str, action: Action, receipt: bytes) -> None:
        self._refuse_while_cancelling(_finalize_call(action), session_id)
        if action is Action.RESUME and is_destination(self.active) and session_id == self.standing.session_id:
            await self.active.catch_up()
        await self._in_turn(self._finalize(session_id, action, receipt))

    async def _finalize(self, session_id: str, action: Action, receipt: bytes) -> None:
        call = _finalize_call(action)
        if check(call, self.standing, session_id) is Outcome.NO_EFFECT:
            return
        active = self.require_active()
        await self._decide(active, call, receipt)
        if not active.session.used_head_only_calls:
            await self._clean_up(active)

    async def _decide(self, active: Source | Destination, call: Call, receipt: bytes = b"") -> None:
        """RESUME, STOP or CLEANUP, and what belongs to a roll-back."""
        side = active.session.side
        going_back = side is Side.SOURCE and call is not Call.STOP
        try:
            await active.session.call(call, receipt)
        except SandshiftError:
            if going_back and active.sandbox.machine is not None and not active.sandbox.machine.alive:
                await active.rolled_back(succeeded=False)
            raise
        if call is BACK[side]:
            active.end_as_cancelled()
        if going_back and active.session.standing.action is Action.RESUME:
            await active.rolled_back(succeeded=True)

    async def force_resume(self, session_id: str, expected: Cell) -> None:
        """An operator's decision where the protocol cannot decide (right-to-run.md, section 9)."""
        await self._in_turn(self._force_resume(session_id, expected))

    async def _force_resume(self, session_id: str, expected: Cell) -> None:
        check(Call.NOTIFICATIONS, self.standing, session_id)
        active = self.require_active()
        log.warning("session %s: an operator forces the right to run, from %s", session_id, expected.name)
        await active.session.force(expected)

    async def cancel(self, session_id: str) -> None:
        self._refuse_while_cancelling(Call.CANCEL, session_id)
        bound_s = self.sandbox.config.migration.limits.cancel_s
        try:
            async with asyncio.timeout(bound_s):
                await self._in_turn(self._cancel(session_id))
        except TimeoutError as error:
            raise Unavailable(
                f"session {session_id!r}: Cancel goes on and its outcome is not known after {bound_s:g} s: repeat it"
            ) from error

    async def _cancel(self, session_id: str) -> None:
        if check(Call.CANCEL, self.standing, session_id) is Outcome.NO_EFFECT:
            return
        active = self.require_active()
        active.head_was_seen()
        await active.session.call(Call.CANCEL)
        active.end_as_cancelled()

    async def clean_up(self, session_id: str) -> None:
        self._refuse_while_cancelling(Call.CLEANUP, session_id)
        await self._in_turn(self._cleanup_called(session_id))

    async def _cleanup_called(self, session_id: str) -> None:
        if check(Call.CLEANUP, self.standing, session_id) is Outcome.NO_EFFECT:
            return
        await self._clean_up(self.require_active())

    async def _clean_up(self, active: Source | Destination) -> None:
        await active.settled()
        await self._decide(active, Call.CLEANUP)
        session = active.session
        self.last = await last.keep_end(self.sandbox.disk, self.sandbox.places.last_session_file, session)
        self.active = None
        self.sandbox.on_vm_death = None
        await active.close()
        if self._task_orphan is not None and self._task_orphan is not asyncio.current_task():
            self._task_orphan.cancel()

    # Notifications

    async def notifications(self, session_id: str) -> AsyncIterator[tuple[Side, Entry]]:
        """With the side that told them: a slow reader may outlive the session."""
        check(Call.NOTIFICATIONS, self.standing, session_id)
        active = self.require_active()
        active.head_was_seen()
        async for entry in self._subscribed(active.session.entries()):
            yield active.session.side, entry

    async def transfer_2691(
        self, session_id: str, timeout_s: float, deadline_s: float
    ) -> AsyncIterator[Entry]:
        """The record again, as the stream of revision 2691 wants it: from the start, whoever called before."""
        await self.begin_transfer(session_id, timeout_s, deadline_s)
        async for entry in self._subscribed(self.require_active().session.entries()):
            yield entry

    async def _subscribed(self, entries: AsyncIterator[Entry]) -> AsyncIterator[Entry]:
        most = self.sandbox.config.migration.limits.subscribers_max
        if self._subscribers >= most:
            raise NoRoom(f"{most} subscribers listen to this session already: close one")
        self._subscribers += 1
        try:
            async for entry in entries:
                yield entry
        finally:
            self._subscribers -= 1
            self._quiet_since_s = time.monotonic()

    async def let_go(self) -> None:
        """This shim ends; the session stays on disk, for another shim to take up."""
        if self._task_orphan is not None:
            self._task_orphan.cancel()
        if self.active is not None:
            await self.active.let_go()

    # A session that everybody has forgotten

    def remember(self) -> None:
        """How the last session ended, under whatever shim. Blocks."""
        self.last = last.read(self.sandbox.places.last_session_file)

    def take_up(self, active: Source | Destination) -> None:
        """Go on with a session that an earlier shim left."""
        self._begin(active)

    def _begin(self, active: Source | Destination) -> None:
        self.active = active
        self.sandbox.on_vm_death = active.vm_died
        self._quiet_since_s = time.monotonic()
        self._task_orphan = asyncio.create_task(self._watch_for_orphan(active), name="orphan")

    async def _watch_for_orphan(self, active: Source | Destination) -> None:
        """No call, no subscriber, no transfer for long: before the blackout the session ends by itself (contract 5).

        One that was finalized does so too: all that it still has to do is to let the sandbox go.
        """
        while self.active is active:
            await asyncio.sleep(ORPHAN_LOOK_S)
            quiet_s = time.monotonic() - self._quiet_since_s
            busy = (
                self._calls
                or self._subscribers
                or active.session.state in (State.TRANSFERRING, State.SOCKET_WAITING)
            )
            if busy or quiet_s < active.bounds.orphan_s or self._waits_for_decision(active):
                continue
            log.warning(
                "session %s: nobody has asked for %.0f s: it ends by itself",
                active.session.session_id,
                quiet_s,
            )
            try:
                await self._in_turn(self._abandon(active))
            except SandshiftError as error:
                log.warning("session %s could not be ended: %s", active.session.session_id, error)

    def _waits_for_decision(self, active: Source | Destination) -> bool:
        """The memory is complete, and nobody but an orchestrator knows where the guest is wanted."""
        return active.session.party.complete and active.session.state is not State.FINALIZED

    async def _abandon(self, active: Source | Destination) -> None:
        if self.active is active and not self._waits_for_decision(active):
            active.session.warnings.append("nobody asked for this session any more: it ended by itself")
            if active.session.state not in (State.FAILED, State.CANCELLED, State.FINALIZED):
                await active.session.call(Call.CANCEL)
                active.end_as_cancelled()
            await self._clean_up(active)


def _finalize_call(action: Action) -> Call:
    return Call.RESUME if action is Action.RESUME else Call.STOP
