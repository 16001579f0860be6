"""Moves of real sandboxes call by call: success, every way back, and what ends one from outside."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

import ttrpc
from sandshift.fleet.launch import run_process
from sandshift.wire.migration import options_pb2 as o
from tests.lab import Lab, open_lab
from tests.needs import needs_root
from tests.system.pair import RESUME, STOP, Pair, code_of, destination_code_of, pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240), needs_root]


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    async with open_lab() as made:
        yield made


async def assert_back_home(hosts: Pair, boot_id: str) -> None:
    """The source runs as before, the destination holds nothing, and the sandbox can move again at once."""
    assert await hosts.runners() == ["source"]
    assert await hosts.boot_id(hosts.s) == boot_id
    assert not (await hosts.s.status()).session.active
    await hosts.ready()
    await hosts.finish()
    assert await hosts.runners() == ["destination"]
    assert await hosts.boot_id(hosts.d) == boot_id


async def test_the_way_back_is_open_from_every_phase_before_the_decision(lab: Lab) -> None:
    async with pair(lab, dirty_mib=30, pause_s=0.2) as hosts:
        boot_id = await hosts.boot_id(hosts.s)
        # exported only
        await hosts.export()
        await hosts.finalize(hosts.s, RESUME)
        await hosts.clean_up(hosts.s)
        assert await hosts.runners() == ["source"]
        # imported
        await hosts.import_config(await hosts.export())
        await hosts.undo()
        assert await hosts.runners() == ["source"]
        # prepared
        await hosts.prepare()
        await hosts.undo()
        assert await hosts.runners() == ["source"]
        # sockets handed over
        await hosts.prepare()
        await hosts.connect()
        await hosts.undo()
        assert await hosts.runners() == ["source"]
        # memory flows
        await hosts.prepare()
        await hosts.connect()
        moving = hosts.transfers()
        await hosts.wait_for_phase(hosts.s, o.PHASE_TRANSFER_IN_PROGRESS)
        await hosts.undo()
        outcomes = await asyncio.gather(*moving, return_exceptions=True)
        assert [code_of(outcome) for outcome in outcomes][1] is ttrpc.Code.CANCELLED
        assert await hosts.runners() == ["source"]
        # everything is there
        await hosts.ready()
        assert await hosts.runners() == []
        await hosts.undo()
        await assert_back_home(hosts, boot_id)


async def test_another_sessions_id_is_refused_and_harms_nothing(lab: Lab) -> None:
    async with pair(lab) as hosts:
        await hosts.prepare()
        with pytest.raises(ttrpc.StatusError) as told:
            await hosts.export(session="another")
        assert told.value.code is ttrpc.Code.INVALID_ARGUMENT
        assert "another" in told.value.message
        assert "s-1" in told.value.message
        await hosts.connect()
        await hosts.complete(hosts.transfers())
        await hosts.finish()
        assert await hosts.runners() == ["destination"]


async def test_a_destination_vm_killed_in_the_transfer_leaves_the_source_untouched(lab: Lab) -> None:
    async with pair(lab, dirty_mib=60) as hosts:
        boot_id = await hosts.boot_id(hosts.s)
        await hosts.prepare()
        await hosts.connect()
        moving = hosts.transfers()
        await hosts.wait_for_phase(hosts.s, o.PHASE_TRANSFER_IN_PROGRESS)
        os.kill((await hosts.d.status()).qemu_pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*moving, return_exceptions=True)
        assert destination_code_of(outcomes[0]) is ttrpc.Code.UNAVAILABLE
        assert code_of(outcomes[1]) is ttrpc.Code.UNAVAILABLE
        assert await hosts.runners() == ["source"]
        await hosts.finalize(hosts.s, RESUME)
        await hosts.finalize(hosts.d, STOP)
        for shim in (hosts.s, hosts.d):
            await hosts.clean_up(shim)
        await assert_back_home(hosts, boot_id)


async def test_a_source_vm_killed_in_the_transfer_is_a_crash_and_nothing_runs_elsewhere(lab: Lab) -> None:
    async with pair(lab, dirty_mib=60) as hosts:
        await hosts.prepare()
        await hosts.connect()
        moving = hosts.transfers()
        await hosts.wait_for_phase(hosts.s, o.PHASE_TRANSFER_IN_PROGRESS)
        os.kill((await hosts.s.status()).qemu_pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*moving, return_exceptions=True)
        assert destination_code_of(outcomes[0]) is ttrpc.Code.UNAVAILABLE
        assert code_of(outcomes[1]) is ttrpc.Code.UNAVAILABLE
        with pytest.raises(ttrpc.StatusError) as told:
            await hosts.finalize(hosts.d, RESUME)
        assert told.value.code is ttrpc.Code.FAILED_PRECONDITION
        assert await hosts.runners() == []


@pytest.mark.parametrize("command", [("reboot", "-f"), ("poweroff", "-f")])
async def test_a_guest_that_ends_itself_while_it_moves_ends_the_move(
    lab: Lab, command: tuple[str, ...]
) -> None:
    async with pair(lab, dirty_mib=60) as hosts:
        await run_process(hosts.s, ("sh", "-c", f"sleep 1.5; busybox {' '.join(command)}"), process_id="end")
        await hosts.prepare()
        await hosts.connect()
        outcomes = await asyncio.gather(*hosts.transfers(), return_exceptions=True)
        assert code_of(outcomes[1]) is ttrpc.Code.ABORTED
        assert destination_code_of(outcomes[0]) is ttrpc.Code.UNAVAILABLE
        await hosts.clean_up(hosts.s)
        await hosts.finalize(hosts.d, STOP)
        await hosts.clean_up(hosts.d)
        assert await hosts.runners() == []


async def test_memory_hashed_on_both_sides_is_the_same() -> None:
    options = o.InitializeOptions(memory_transport=o.MEMORY_TRANSPORT_TCP, checksum_verification=True)
    async with open_lab(overrides={"vm": {"shared_memory": True}}) as made, pair(made, dirty_mib=30) as hosts:
        await hosts.ready(options)
        await hosts.finish()
        assert await hosts.runners() == ["destination"]


async def test_a_guest_that_never_converges_is_brought_over_by_a_rule_that_is_named(lab: Lab) -> None:
    params = o.MemoryTransferThrottleParams(
        maximum_number_of_brownout_transfer_passes=4, skip_throttling=True
    )
    options = o.InitializeOptions(
        memory_transport=o.MEMORY_TRANSPORT_TCP, memory_transfer_throttle_params=params
    )
    async with pair(lab, dirty_mib=100) as hosts:
        await hosts.prepare(options)
        await hosts.connect()
        await hosts.complete(hosts.transfers())
        rules = []
        async with asyncio.timeout(5):
            async for response in hosts.s.notifications("s-1"):
                rules.append(response.notification.progress.rule)
                if response.notification.phase == o.PHASE_DONE:
                    break
        assert "maximum_passes" in rules
        await hosts.finish()
        assert await hosts.runners() == ["destination"]


async def test_a_blackout_that_would_be_too_long_is_called_off_at_the_source(lab: Lab) -> None:
    params = o.MemoryTransferThrottleParams(
        maximum_number_of_brownout_transfer_passes=2,
        skip_throttling=True,
        blackout_time_threshold_for_cancelling_migration=1,
    )
    options = o.InitializeOptions(
        memory_transport=o.MEMORY_TRANSPORT_TCP,
        memory_transfer_throttle_params=params,
        cancel_if_blackout_threshold_exceeds=True,
    )
    async with pair(lab, dirty_mib=100) as hosts:
        boot_id = await hosts.boot_id(hosts.s)
        await hosts.prepare(options)
        await hosts.connect()
        outcomes = await asyncio.gather(*hosts.transfers(), return_exceptions=True)
        assert code_of(outcomes[1]) is ttrpc.Code.ABORTED
        assert await hosts.runners() == ["source"]
        await hosts.finalize(hosts.s, RESUME)
        await hosts.finalize(hosts.d, STOP)
        for shim in (hosts.s, hosts.d):
            await hosts.clean_up(shim)
        assert await hosts.boot_id(hosts.s) == boot_id
