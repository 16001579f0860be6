"""Events for containerd: in order, through its restarts, and without holding anybody up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ttrpc
from sandshift.shim.tasks import events
from sandshift.shim.tasks.events import Publisher
from sandshift.wire.containerd import task_events_pb2 as pb
from tests.shim.pod import Containerd


def start_of(number: int) -> pb.TaskStart:
    return pb.TaskStart(container_id=f"c{number}", pid=number)


async def test_events_come_in_order_with_namespace_and_time(tmp_path: Path):
    containerd = Containerd(tmp_path / "events.sock")
    await containerd.start()
    publisher = Publisher(f"unix://{containerd.address}", "k8s.io", lambda: 1_500_000_000)
    for number in range(100):
        publisher.publish("/tasks/start", start_of(number))
    await containerd.until("/tasks/start", 100)
    assert [event.pid for _, event in containerd.events()] == list(range(100))
    first = containerd.taken[0]
    assert (first.namespace, first.timestamp.ToNanoseconds()) == ("k8s.io", 1_500_000_000)
    assert first.event.type_url == "containerd.events.TaskStart"
    await publisher.close()
    await containerd.stop()


async def test_events_wait_for_a_containerd_that_is_away(tmp_path: Path):
    containerd = Containerd(tmp_path / "events.sock")
    publisher = Publisher(containerd.address, "default")
    publisher.publish("/tasks/start", start_of(0))
    await asyncio.sleep(0)
    await containerd.start()
    await containerd.until("/tasks/start", 1)
    await containerd.stop()
    for number in range(1, 5):
        publisher.publish("/tasks/start", start_of(number))
    await containerd.start()
    await containerd.until("/tasks/start", 5)
    assert [event.pid for _, event in containerd.events()] == [0, 1, 2, 3, 4]
    await publisher.close()
    await containerd.stop()


async def test_when_there_are_too_many_the_oldest_are_dropped(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(events, "QUEUE_MAX", 3)
    containerd = Containerd(tmp_path / "events.sock")
    publisher = Publisher(containerd.address, "default")
    for number in range(10):
        publisher.publish("/tasks/start", start_of(number))
    await containerd.start()
    await containerd.until("/tasks/start", 3)
    assert [event.pid for _, event in containerd.events()] == [7, 8, 9]
    assert "7 events were dropped" in caplog.text
    await publisher.close()
    await containerd.stop()


async def test_an_event_that_containerd_refuses_holds_up_no_other(tmp_path: Path, monkeypatch):
    containerd = Containerd(tmp_path / "events.sock")
    take = containerd.forward

    async def forward(request, context):
        if request.envelope.topic == "/bad":
            raise ttrpc.StatusError(ttrpc.Code.INVALID_ARGUMENT, "no such topic")
        return await take(request, context)

    monkeypatch.setattr(containerd, "forward", forward)
    await containerd.start()
    publisher = Publisher(containerd.address, "default")
    publisher.publish("/bad", start_of(0))
    publisher.publish("/tasks/start", start_of(1))
    await containerd.until("/tasks/start", 1)
    assert [event.pid for _, event in containerd.events()] == [1]
    await publisher.close()
    await containerd.stop()


async def test_a_shim_that_ends_sends_what_it_has_for_a_bounded_time(tmp_path: Path):
    containerd = Containerd(tmp_path / "events.sock")
    await containerd.start()
    publisher = Publisher(containerd.address, "default")
    publisher.publish("/tasks/start", start_of(1))
    await publisher.close()
    assert containerd.topics == ["/tasks/start"]
    away = Publisher(str(tmp_path / "nobody.sock"), "default")
    away.publish("/tasks/start", start_of(1))
    await asyncio.wait_for(away.close(0.05), 10)
    await containerd.stop()


async def test_without_an_address_nothing_is_published():
    publisher = Publisher("", "default")
    before = asyncio.all_tasks()
    publisher.publish("/tasks/start", start_of(1))
    assert asyncio.all_tasks() == before, "nobody sends"
    await asyncio.wait_for(publisher.close(), 10)
