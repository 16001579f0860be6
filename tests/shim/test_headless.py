"""A shim that `delete` brought back ends itself when its session has ended and nothing of the sandbox is left here."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ttrpc
from sandshift.shim import serve
from sandshift.shim.headless import forget, forsaken, unvisited
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import FakeHost, TwoHosts, two_hosts

STOP, RESUME = 1, 2
AFTER_S = 0.3


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


def watch(host: FakeHost, after_s: float = AFTER_S) -> asyncio.Task[None]:
    assert host.server is not None
    return asyncio.create_task(
        forsaken(host.server.sandbox, host.server.desk, after_s=after_s, look_s=AFTER_S / 10)
    )


async def clean_up(hosts: TwoHosts) -> None:
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))


async def stays(task: asyncio.Task[None], for_s: float = 2 * AFTER_S) -> bool:
    done, _ = await asyncio.wait([task], timeout=for_s)
    return not done


async def test_a_source_whose_guest_has_moved_ends_itself_after_its_session(hosts: TwoHosts) -> None:
    await hosts.ready()
    source, destination = watch(hosts.source), watch(hosts.destination)
    assert await stays(source)
    await hosts.d.finalize(hosts.session, RESUME)
    await hosts.s.finalize(hosts.session, STOP)
    assert await stays(source), "its session is open"
    await clean_up(hosts)
    await asyncio.wait_for(source, 20)
    assert await stays(destination), "the guest runs there"
    destination.cancel()


async def test_a_source_whose_guest_stayed_stays_and_its_destination_goes(hosts: TwoHosts) -> None:
    await hosts.ready()
    source, destination = watch(hosts.source), watch(hosts.destination)
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.d.finalize(hosts.session, STOP)
    await clean_up(hosts)
    await asyncio.wait_for(destination, 20)
    assert await stays(source), "the guest runs there"
    source.cancel()


async def test_a_session_that_begins_in_time_keeps_it(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    destination = watch(hosts.destination, after_s=5 * AFTER_S)
    await hosts.import_config(config)
    assert await stays(destination, for_s=6 * AFTER_S)
    destination.cancel()


async def test_it_takes_its_files_along_and_leaves_the_host_s(hosts: TwoHosts) -> None:
    await hosts.ready()
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.d.finalize(hosts.session, STOP)
    await clean_up(hosts)
    places = hosts.destination.places
    forget(places)
    assert not places.run_dir.exists()
    assert not places.state_dir.exists()
    assert list(places.statements_dir.iterdir())
    assert list(places.reports_dir.iterdir())


@pytest.mark.parametrize("headless", [True, False])
async def test_the_server_ends_by_itself_only_if_nobody_else_would_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headless: bool
) -> None:
    async def at_once(*_what: object) -> None:
        await asyncio.sleep(AFTER_S)

    monkeypatch.setattr(serve, "forsaken", at_once)
    host = FakeHost(tmp_path, "alone")
    await host.start()
    assert host.server is not None
    listener = ttrpc.listen(str(tmp_path / "another.sock"))
    running = asyncio.create_task(host.server.run(listener, headless=headless))
    if not headless:
        await asyncio.sleep(2 * AFTER_S)
        host.server.shut_down.set()
    assert await asyncio.wait_for(running, 5) is headless
    host.server = None


@pytest.mark.parametrize("what", ["nobody", "a caller", "a sandbox on disk"])
async def test_a_shim_to_which_nobody_ever_came_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """containerd has gone before it heard what `start` answered."""
    monkeypatch.setattr(serve, "unvisited", functools.partial(unvisited, after_s=AFTER_S))
    host = FakeHost(tmp_path, "alone")
    await host.start()
    assert host.server is not None
    listener = ttrpc.listen(str(tmp_path / "another.sock"))
    running = asyncio.create_task(host.server.run(listener))
    await asyncio.sleep(0)
    if what == "a sandbox on disk":
        host.places.sandbox_file.parent.mkdir(parents=True, exist_ok=True)
        host.places.sandbox_file.touch()
    if what == "a caller":
        await (await host.client()).connection.close()
    if what != "nobody":
        await asyncio.sleep(2 * AFTER_S)
        assert not running.done()
        host.server.shut_down.set()
    assert await asyncio.wait_for(running, 5) is (what == "nobody")
    host.server = None
