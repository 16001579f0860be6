"""Servers that are wrong about guests that end themselves, about progress without end, or about a bound."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

from sandshift.sandbox.model import Sandbox, check_room
from sandshift.session import record
from sandshift.session.phases import Outcome
from sandshift.session.states import Call
from sandshift.shim.migration import desk, opening, session
from sandshift.shim.migration.source import Source
from sandshift.vmm.fake import FakeMachine
from tests.conformance.mutant import instead, wrong
from tests.shim.fake_agent import FakeGuest

LONG_S = 20.0


@wrong(
    "4.1",
    "the annotation that forbids a move is not looked at",
    "export of a sandbox whose annotation forbids it is refused",
)
def _allowed() -> Any:
    return mock.patch.object(Sandbox, "may_migrate", mock.PropertyMock(return_value=True))


@wrong(
    "4.9",
    "a guest that ended itself is told as a failure of the source",
    "a guest that reboots while it moves ends the transfer",
)
def _blamed_source() -> Any:
    return instead(Source, "_why_dead", lambda _self: (Outcome.OWN_VM_FAILED, "the VM process has died"))


@wrong(
    "4.7",
    "a guest that powered itself off is waited for",
    "a guest that powers itself off while it moves ends the transfer",
)
def _waited_for() -> Any:
    async def never(_self: Any) -> None:
        await asyncio.Event().wait()

    async def deaf(self: Any, machine: Any, pacer: Any, events: Any, event: Any) -> None:
        if event is None or event.name != "DEAD":
            await whole(self, machine, pacer, events, event)

    whole = Source._on_event
    return mock.patch.multiple(Source, _on_event=deaf, vm_died=never)


@wrong(
    "4.8",
    "progress is told as often as there is any",
    "notifications tell progress at most four times in a second",
)
def _talkative() -> Any:
    return instead(record.Record, "_due", lambda _self, _numbers, _now_s: True)


@wrong(
    "4.8",
    "all progress is kept",
    "notifications keep the newest 64 of progress, and every phase",
    case_s=90.0,
)
def _hoarder() -> Any:
    return instead(record, "PROGRESS_KEPT_MAX", 10**6)


@wrong(
    "4.8",
    "the oldest progress is kept",
    "notifications keep the newest 64 of progress, and every phase",
    case_s=90.0,
)
def _old_news() -> Any:
    def oldest(entries: Any) -> list[Any]:
        everything = list(entries)
        kept = [entry.message_id for entry in everything if entry.progress][: record.PROGRESS_KEPT_MAX]
        return [entry for entry in everything if not entry.progress or entry.message_id in kept]

    return instead(record, "thinned", oldest)


@wrong(
    "5",
    "a Cancel is waited for without end",
    "limit: a Cancel whose outcome does not come is UNAVAILABLE and can be repeated",
    case_s=LONG_S,
)
def _patient_cancel() -> Any:
    async def cancel(self: desk.Desk, session_id: str) -> None:
        await self._in_turn(self._cancel(session_id))

    return instead(desk.Desk, "cancel", cancel)


@wrong(
    "5",
    "a VM is waited for without end",
    "limit: a VM that does not answer is UNAVAILABLE, by name",
    case_s=LONG_S,
)
def _patient_with_vm() -> Any:
    whole = FakeMachine._answer

    async def answer(self: FakeMachine, command: str) -> None:
        while self.faults.hang and self.alive:
            await asyncio.sleep(0.01)
        await whole(self, command)

    return instead(FakeMachine, "_answer", answer)


@wrong(
    "5",
    "an agent is waited for without end",
    "limit: a guest's agent that does not answer is UNAVAILABLE, by name",
    case_s=LONG_S,
)
def _patient_with_agent() -> Any:
    async def runs(self: FakeGuest) -> None:
        while self._process.faults.hang:
            await asyncio.sleep(0.01)

    return instead(FakeGuest, "_runs", runs)


@wrong(
    "5",
    "a peer is waited for without end",
    "limit: a peer that does not answer is UNAVAILABLE, and nothing is lost",
    case_s=LONG_S,
)
def _patient_with_peer() -> Any:
    async def answered(self: session.Session, event: Any) -> None:
        answer = self._answer = asyncio.get_running_loop().create_future()
        await self.feed(event)
        refusal = await answer
        if refusal is not None:
            raise refusal.error()

    return instead(session.Session, "_answered", answered)


@wrong("5", "any number of disks may come", "limit: one disk too many is RESOURCE_EXHAUSTED")
def _any_disks() -> Any:
    def containers_alone(model: Any, _shape: Any, limits: Any) -> None:
        check_room(model, disks=0, containers_max=limits.containers_max, disks_max=limits.disks_max)

    return instead(opening, "require_room", containers_alone)


@wrong(
    "5",
    "a session that waits for its decision is given up",
    "limit: a session whose memory is complete is not ended for want of calls",
    case_s=LONG_S,
)
def _impatient() -> Any:
    async def watch(self: desk.Desk, active: Any) -> None:
        await asyncio.sleep(active.bounds.orphan_s)
        if self.active is active:
            await active.session.call(Call.CANCEL)
            await self._clean_up(active)

    return instead(desk.Desk, "_watch_for_orphan", watch)
