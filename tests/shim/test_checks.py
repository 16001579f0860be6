"""What is looked at on a host before anything moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import ttrpc
from sandshift.sandbox.preflight import DestinationFacts
from sandshift.shim.migration import checks
from sandshift.shim.sandbox import LiveSandbox
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.sandshift import shim_pb2
from tests.shim.house import FakeHost, TwoHosts, two_hosts


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path) as both:
        yield both


def sandbox_of(host: FakeHost) -> LiveSandbox:
    assert host.server is not None
    return host.server.sandbox


async def preflight(
    hosts: TwoHosts, options: o.InitializeOptions | None = None
) -> tuple[shim_pb2.PreflightResponse, shim_pb2.PreflightResponse]:
    """The source's answer, and the destination's to the description in it."""
    request = shim_pb2.PreflightRequest()
    if options is not None:
        request.init_options.CopyFrom(options)
    source = await hosts.s.shim.preflight(request, timeout_s=10)
    request.description = source.description
    return source, await hosts.d.shim.preflight(request, timeout_s=10)


def named(response: shim_pb2.PreflightResponse) -> list[str]:
    return [blocker.subject for blocker in response.blockers]


async def test_nothing_stands_in_the_way_of_a_sandbox_that_may_move_and_nothing_has_changed(
    hosts: TwoHosts,
) -> None:
    source, destination = await preflight(hosts)
    assert (named(source), named(destination), list(destination.warnings)) == ([], [], [])
    assert hosts.runners() == ["source"]
    assert not hosts.source.places.journal_file.exists()
    assert not hosts.destination.world.processes


async def test_a_sandbox_that_is_not_running_is_told_to_be_started(hosts: TwoHosts) -> None:
    (blocker,) = await checks.source_blockers(sandbox_of(hosts.destination))
    assert (blocker.subject, blocker.problem) == ("sandbox.state", "it is awaiting")
    hosts.source.process.stop()
    (blocker,) = await checks.source_blockers(sandbox_of(hosts.source))
    assert (blocker.problem, blocker.remedy) == (
        "its VM is paused",
        "resume it first: only a running sandbox moves",
    )
    hosts.source.process.die()
    async with asyncio.timeout(5):
        await sandbox_of(hosts.source).ended.wait()
    (blocker,) = await checks.source_blockers(sandbox_of(hosts.source))
    assert blocker.problem == "it is stopped"


async def test_everything_that_only_the_destination_knows_is_named_at_once(hosts: TwoHosts) -> None:
    def poorer(facts: DestinationFacts) -> DestinationFacts:
        return replace(facts, accelerator="kvm", memory_free_bytes=1, disks={})

    hosts.destination.machines.change_facts = poorer
    source, destination = await preflight(hosts)
    assert named(source) == []
    assert named(destination) == ["device.disk0", "host.memory", "machine.accelerator"]
    assert all(blocker.problem and blocker.remedy for blocker in destination.blockers)
    await hosts.import_config((await hosts.export()).config)
    with pytest.raises(ttrpc.StatusError, match="cannot come to this host") as told:
        await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=hosts.session))
    for subject in named(destination):
        assert subject in told.value.message


async def test_a_source_in_the_clear_does_not_come_to_a_host_that_demands_encryption(hosts: TwoHosts) -> None:
    sandbox = sandbox_of(hosts.source)
    migration = msgspec.structs.replace(sandbox.config.migration, encryption="off")
    sandbox.config = msgspec.structs.replace(sandbox.config, migration=migration)
    _, destination = await preflight(hosts)
    assert named(destination) == ["migration.encryption"]
    assert "this host demands TLS-PSK" in destination.blockers[0].problem


async def test_options_that_cannot_be_honoured_are_a_blocker_on_both_sides(hosts: TwoHosts) -> None:
    source, destination = await preflight(hosts, o.InitializeOptions(prepare_memory_transfer_mode=True))
    assert named(source) == named(destination) == ["init_options"]


async def test_a_host_where_the_sandbox_runs_already_takes_no_second(hosts: TwoHosts) -> None:
    description = (await preflight(hosts))[0].description
    request = shim_pb2.PreflightRequest(description=description)
    answer = await hosts.s.shim.preflight(request, timeout_s=10)
    assert named(answer) == ["sandbox.id"]


@pytest.mark.parametrize(("ahead_s", "words"), [(-3600, "behind the source's"), (86400, "is 86400 s old")])
async def test_clocks_that_differ_are_a_warning(tmp_path: Path, ahead_s: float, words: str) -> None:
    async with two_hosts(tmp_path) as hosts:
        hosts.destination.machines.change_facts = lambda facts: replace(
            facts, now_us=hosts.source.clock_us() + int(ahead_s * 1_000_000)
        )
        _, destination = await preflight(hosts)
        assert named(destination) == []
        assert [words in warning for warning in destination.warnings] == [True]


@pytest.mark.parametrize("description", [b"\xff\xff", b"\x0a\x03abc"])
async def test_what_is_no_description_is_refused(hosts: TwoHosts, description: bytes) -> None:
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.d.shim.preflight(shim_pb2.PreflightRequest(description=description), timeout_s=10)
    assert told.value.code is ttrpc.Code.INVALID_ARGUMENT
