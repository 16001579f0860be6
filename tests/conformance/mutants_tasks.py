"""Servers that are wrong about the containers of a sandbox that comes or goes (contract 4.4, 4.12, 4.13)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import msgspec

from sandshift.errors import AlreadyThere, IllegalMove
from sandshift.sandbox.patching import Patching
from sandshift.shim import serve
from sandshift.shim.migration import desk, destination
from sandshift.shim.migration.books import PATCH_NOTE, Books
from sandshift.shim.tasks import container_events, containers, roster
from tests.conformance.mutant import instead, nothing, wrong

IN_ANY_ORDER = "Task.Create with the annotation answers the saved pid, in any order"
AGAIN = "Task.Create again is no error with the same values and ALREADY_EXISTS with others"
CHANGES = "Task calls that would change the sandbox are refused at once while it moves"
ANSWERS = "Task State, Connect, Pids and Wait answer while the sandbox comes"
KILL = "Task.Kill is let through on the source until the blackout starts"
RUNS_S = 40.0
LINE_BYTES = 9
TOLD = "TaskCreate is told when the sandbox runs here and not before, TaskStart never"


@wrong("4.4", "Task.Create answers no pid", IN_ANY_ORDER)
def _no_pid() -> Any:
    async def expect(self: Any, container: Any, patch: Any) -> int:
        await whole(self, container, patch)
        return 0

    whole = roster.Roster.expect
    return instead(roster.Roster, "expect", expect)


@wrong("4.4", "the same Task.Create again is refused", AGAIN)
def _once() -> Any:
    def apply(self: Patching, patch: Any) -> Patching:
        if patch.source_id in self.applied:
            raise AlreadyThere("it is patched")
        return whole(self, patch)

    whole = Patching.apply
    return instead(Patching, "apply", apply)


@wrong("4.4", "the last Task.Create counts", AGAIN)
def _last_counts() -> Any:
    def apply(self: Patching, patch: Any) -> Patching:
        others = {name: one for name, one in self.applied.items() if name != patch.source_id}
        return whole(Patching(self.sandbox, MappingProxyType(others)), patch)

    whole = Patching.apply
    return instead(Patching, "apply", apply)


@wrong(
    "4.4",
    "what is not pending is a wrong state",
    "Task.Create for a container that is not pending is NOT_FOUND",
)
def _wrong_state() -> Any:
    def apply(self: Patching, patch: Any) -> Patching:
        if patch.source_id not in self.pending and patch.source_id not in self.applied:
            raise IllegalMove(f"{patch.source_id} is not pending")
        return whole(self, patch)

    whole = Patching.apply
    return instead(Patching, "apply", apply)


@wrong(
    "4.4",
    "a container of its own is let into an import",
    "Task.Create without the annotation is refused at a destination",
)
@wrong("4.13", "Task calls change a sandbox that moves", CHANGES)
def _changeable() -> Any:
    return instead(desk.Desk, "require_no_session", lambda _self, _what: None)


@wrong(
    "4.4",
    "Task.Start of a patched container is refused",
    "Task.Start of a patched container answers the saved pid and changes nothing",
)
def _no_start() -> Any:
    return instead(desk.Desk, "patched_pid", lambda _self, _container_id: None)


@wrong("4.4", "only version 3 is served", "Task.Create is the same call in version 2 of the service")
def _version_3() -> Any:
    return instead(serve, "TASK_V2", "")


@wrong("4.5", "nothing is pending", "prepare with containers pending is refused, naming them in order")
def _nothing_pending() -> Any:
    return instead(Patching, "require_complete", lambda _self: None)


@wrong(
    "4.5",
    "only the first that is pending is named",
    "prepare with containers pending is refused, naming them in order",
)
def _first_pending() -> Any:
    def require(self: Patching) -> None:
        if self.pending:
            raise IllegalMove(f"containers {self.pending[0]} of the source are pending a patch")

    return instead(Patching, "require_complete", require)


@wrong(
    "4.4",
    "what an earlier import left is taken for this one's",
    "the id of a container that an abandoned import left is taken until it is deleted",
)
def _leftover() -> Any:
    return instead(roster.Roster, "has", lambda _self, _container_id: False)


@wrong("4.15", "patches are not written down", "what was patched survives the destination's shim")
def _unwritten() -> Any:
    async def note(self: Books, name: str, value: bytes) -> None:
        if not name.startswith(PATCH_NOTE):
            await whole(self, name, value)

    whole = Books.note
    return instead(Books, "note", note)


@wrong("4.4", "TaskCreate is told at Task.Create", TOLD)
def _told_early() -> Any:
    async def expect(self: Any, container: Any, patch: Any) -> int:
        pid: int = await whole(self, container, patch)
        container_events.created(self._sandbox.events, self.get(patch.container_id))
        return pid

    whole = roster.Roster.expect
    return instead(roster.Roster, "expect", expect)


@wrong("4.4", "TaskCreate is not told at all", TOLD)
def _untold() -> Any:
    return instead(container_events, "created", lambda _to, _container: None)


@wrong("4.4", "TaskStart is told of what was started elsewhere", TOLD)
def _told_start() -> Any:
    def created(to: Any, container: Any) -> None:
        container_events.started(to, container, container.init)
        whole(to, container)

    whole = container_events.created
    return instead(container_events, "created", created)


@wrong(
    "4.12",
    "containers of an abandoned import run for ever",
    "containers of an import that was abandoned exit with 255 and can be deleted",
)
def _immortal() -> Any:
    return instead(roster.Roster, "end_all", nothing)


@wrong(
    "4.12",
    "containers of an abandoned import exit with 0",
    "containers of an import that was abandoned exit with 255 and can be deleted",
)
def _exit_0() -> Any:
    async def end_all(self: Any, exit_: Any) -> None:
        exit_.code = 0
        await whole(self, exit_)

    whole = roster.Roster.end_all
    return instead(roster.Roster, "end_all", end_all)


@wrong(
    "4.12", "nobody is told of a move", "a sandbox that has moved away is told with session and destination"
)
def _untold_move() -> Any:
    return instead(container_events, "migrated", lambda *_what: None)


@wrong(
    "4.12",
    "the event of a move does not say where to",
    "a sandbox that has moved away is told with session and destination",
)
def _nowhere() -> Any:
    def migrated(to: Any, sandbox_id: str, session_id: str, _destination: str) -> None:
        whole(to, sandbox_id, session_id, "")

    whole = container_events.migrated
    return instead(container_events, "migrated", migrated)


@wrong("4.13", "patched containers are not known before the move is over", ANSWERS)
def _unknown() -> Any:
    async def expect(_self: Any, container: Any, _patch: Any) -> int:
        pid: int = container.pid
        return pid

    return instead(roster.Roster, "expect", expect)


@wrong("4.13", "Kill is refused throughout", KILL)
@wrong(
    "4.13",
    "Kill is refused in a session that is over but for its Cleanup",
    "Task.Kill is let through on a source whose move was cancelled before the blackout",
)
def _no_kill() -> Any:
    return instead(desk.Desk, "require_kill_allowed", lambda self: self.require_no_session("Task.Kill"))


@wrong("4.13", "Kill is let through in the blackout too", KILL)
@contextlib.contextmanager
def _any_kill() -> Iterator[None]:
    with instead(desk.Desk, "require_kill_allowed", lambda _self: None):
        yield


# Containers that run ----------------------------------------------------------------------------------------------------

GOES_ON = "output of a container goes on at the destination, no byte lost and none twice"
SOURCE_ENDS = "containers of a sandbox that has moved away exit with 255 on the source"
BACK = "containers run on after a roll-back, no byte lost and none twice"
BROWNOUT = "a container is killed on the source while memory flows"


@wrong("4.4", "the source says of each stream that all of it is still to come", GOES_ON, case_s=RUNS_S)
def _from_the_start() -> Any:
    def freeze(self: Any) -> dict[tuple[str, int], int]:
        return dict.fromkeys(whole(self), 0)

    whole = roster.Roster.freeze
    return instead(roster.Roster, "freeze", freeze)


@wrong("4.4", "the destination drops a line of each stream", GOES_ON, case_s=RUNS_S)
def _drops() -> Any:
    def adopt(self: Any, containers: Any, patches: Any, offsets: Any) -> Any:
        return whole(self, containers, patches, {at: offset + LINE_BYTES for at, offset in offsets.items()})

    whole = roster.Roster.adopt
    return instead(roster.Roster, "adopt", adopt)


@wrong("4.12", "the source's containers end as if killed", SOURCE_ENDS, case_s=RUNS_S)
def _killed() -> Any:
    async def end_all(self: Any, exit_: Any) -> None:
        exit_.code = 137
        await whole(self, exit_)

    whole = roster.Roster.end_all
    return instead(roster.Roster, "end_all", end_all)


@wrong("4.12", "the source's containers are never told to have ended", SOURCE_ENDS, case_s=RUNS_S)
def _untold_end() -> Any:
    return instead(container_events, "exited", lambda *_what: None)


@wrong("4.12", "output stays frozen after a roll-back", BACK, case_s=RUNS_S)
def _frozen() -> Any:
    return instead(roster.Roster, "thaw", lambda _self: None)


@wrong("4.12", "output is read on from where the source stood when it exported", BACK, case_s=RUNS_S)
def _read_again() -> Any:
    def thaw(self: Any) -> None:
        for process in self.processes():
            process._offsets[1] -= LINE_BYTES
        whole(self)

    whole = roster.Roster.thaw
    return instead(roster.Roster, "thaw", thaw)


@wrong(
    "4.4",
    "a container's files are not compared",
    "a container with other files at the destination is refused, naming both contents",
    case_s=RUNS_S,
)
def _any_files() -> Any:
    def match(container: Any, _shape: Any, plan: Any, folders: Any = ()) -> Any:
        return dict(zip((*container.layers, *container.mounts), (*plan.layers, *folders), strict=False))

    return instead(destination, "match", match)


@wrong("4.13", "Kill is refused while memory flows", BROWNOUT, case_s=RUNS_S)
def _no_kill_in_brownout() -> Any:
    return instead(desk.Desk, "require_kill_allowed", lambda self: self.require_no_session("Task.Kill"))


@wrong("4.13", "Delete is let through while memory flows", BROWNOUT, case_s=RUNS_S)
def _deletable() -> Any:
    return instead(desk.Desk, "require_no_session", lambda _self, _what: None)


@wrong(
    "5",
    "a sandbox may have any number of containers",
    "limit: one Task.Create too many is RESOURCE_EXHAUSTED and harms nothing",
    case_s=RUNS_S,
)
def _any_number() -> Any:
    async def create(self: Any, order: Any) -> int:
        limits = self._sandbox.config.migration.limits
        raised = msgspec.structs.replace(limits, containers_max=1000)
        with instead(type(self._sandbox.config.migration), "limits", raised):
            pid: int = await whole(self, order)
        return pid

    whole = containers.Containers.create
    return instead(containers.Containers, "create", create)
