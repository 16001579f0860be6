from __future__ import annotations

import asyncio
import gc

import pytest

from sandshift.errors import NoRoom
from sandshift.vmm import events
from sandshift.vmm.events import EventFanout
from sandshift.vmm.machine import MachineEvent


def said(name: str) -> MachineEvent:
    return MachineEvent(name, {}, 0)


async def test_listening_begins_with_the_subscription() -> None:
    fanout = EventFanout()
    fanout.emit(said("BEFORE"))
    stream = fanout.subscribe()
    fanout.emit(said("ONE"))
    fanout.finish(said("DEAD"))
    fanout.emit(said("AFTER"))
    assert [event.name async for event in stream] == ["ONE", "DEAD"]


async def test_who_comes_after_the_end_hears_the_end() -> None:
    fanout = EventFanout()
    fanout.finish(said("DEAD"))
    fanout.finish(said("DEAD AGAIN"))
    assert [event.name async for event in fanout.subscribe()] == ["DEAD"]


async def test_a_waiting_listener_is_woken() -> None:
    fanout = EventFanout()
    stream = fanout.subscribe()
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    fanout.emit(said("ONE"))
    assert (await waiting).name == "ONE"


async def test_a_closed_listener_reads_what_was_pending_and_no_more() -> None:
    fanout = EventFanout()
    stream = fanout.subscribe()
    fanout.emit(said("ONE"))
    stream.close()
    fanout.emit(said("TWO"))
    assert [event.name async for event in stream] == ["ONE"]


async def test_a_listener_that_never_reads_costs_bounded_memory_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "PENDING_EVENTS_MAX", 2)
    fanout = EventFanout()
    stream = fanout.subscribe()
    for name in ("ONE", "TWO", "THREE"):
        fanout.emit(said(name))
    with pytest.raises(NoRoom, match="1 events of the VM were not read in time"):
        await anext(stream)


async def test_a_listener_that_nobody_holds_is_forgotten() -> None:
    fanout = EventFanout()
    fanout.subscribe()
    gc.collect()
    assert len(fanout._streams) == 0
