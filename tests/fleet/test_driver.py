"""One migration over real ttrpc, against two shims of few words."""

from __future__ import annotations

import asyncio
import socket

import pytest

import ttrpc
from sandshift.errors import AlreadyThere, Cancelled, NotFound, Rejected, Unavailable
from sandshift.fleet import calls as calls_module
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import Host
from sandshift.fleet.result import MigrationResult, Update
from sandshift.fleet.saga import Outcome
from sandshift.fleet.shim_client import Shim
from sandshift.session.options import Options
from sandshift.session.statement import Cell
from tests.fleet.fake_shims import BLACKOUT_MS, SANDBOX, World

UNAVAILABLE = ttrpc.StatusError(ttrpc.Code.UNAVAILABLE, "no answer")
REFUSED = ttrpc.StatusError(ttrpc.Code.FAILED_PRECONDITION, "not now")
MIGRATION_CALLS = [
    "source PrepareAndExportSandbox",
    "destination ImportSandbox",
    "destination PrepareSandbox",
    "destination CreateDuplicateSocket",
    "source CreateDuplicateSocket",
    "destination TransferSandbox",
    "source TransferSandbox",
]


async def test_a_sandbox_moves_and_the_result_has_the_numbers(world: World) -> None:
    await world.run_sandbox()
    updates: list[Update] = []
    result = await migrate(world.migration(), on_update=updates.append)
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]
    assert (result.blackout_ms, result.passes, result.bytes_transferred) == (BLACKOUT_MS, 2, 1 << 20)
    assert result.total_ms is not None
    assert 0 < result.total_ms < 60_000
    assert [update.phase for update in result.phases if update.side.word == "source"] == [
        "SETUP_DONE",
        "BLACKOUT_STARTED",
        "DONE",
    ]
    assert [update.phase for update in result.phases if update.side.word == "destination"] == [
        "DONE",
        "BLACKOUT_EXITED",
    ]
    assert any(update.progress and update.progress.pass_number == 2 for update in updates)
    assert result.reason is None
    assert result.warnings == ()


async def test_after_a_move_the_sources_shim_is_gone_and_its_last_word_is_kept(world: World) -> None:
    await world.run_sandbox()
    await migrate(world.migration())
    assert list(world.shims) == [("b", SANDBOX)]
    assert Cell(world.kept["a", "move-1"].cell) is Cell.GONE
    assert not world.host("a").config.sandbox_run_dir("default", SANDBOX).exists()


async def test_a_source_that_containerd_owns_keeps_its_shim(world: World) -> None:
    await world.run_sandbox()
    await migrate(world.migration(close_source=False))
    assert sorted(world.shims) == [("a", SANDBOX), ("b", SANDBOX)]


async def test_options_reach_both_sides(world: World) -> None:
    shim = await world.run_sandbox()
    await migrate(world.migration(options=Options(maximum_passes=4)))
    assert shim.init_options is not None
    params = shim.init_options.memory_transfer_throttle_params
    assert params.maximum_number_of_brownout_transfer_passes == 4
    assert shim.init_options.memory_transport == 1


async def test_without_options_none_are_sent(world: World) -> None:
    shim = await world.run_sandbox()
    await migrate(world.migration())
    assert shim.init_options is None


@pytest.mark.parametrize("call", MIGRATION_CALLS)
@pytest.mark.parametrize("failure", [UNAVAILABLE, REFUSED], ids=["unavailable", "refused"])
async def test_whatever_call_fails_before_the_resume_the_guest_runs_on_the_source_and_nothing_is_left(
    world: World, call: str, failure: ttrpc.StatusError
) -> None:
    await world.run_sandbox()
    world.fail(call, failure)
    result = await migrate(world.migration())
    assert result.outcome in (Outcome.UNDONE, Outcome.REFUSED)
    assert result.failed_call.replace(" on the ", " ") == " ".join(reversed(call.split()))
    assert result.reason is not None
    assert result.reason.message == failure.message
    assert world.runners == ["a"]
    assert list(world.shims) == [("a", SANDBOX)]
    assert not world.shim("a").session.active
    assert result.warnings == ()


async def pending(world: World, *names: str) -> None:
    """As soon as the destination has imported, these containers are pending there."""
    while ("b", SANDBOX) not in world.shims or world.shim("b").session.state != "DestinationImported":
        await asyncio.sleep(0)
    world.shim("b").session.pending_containers.extend(names)


async def test_containers_that_are_created_at_the_destination_are_waited_for(world: World) -> None:
    await world.run_sandbox()
    moving = asyncio.create_task(migrate(world.migration()))
    await pending(world, "db", "web")
    while world.called.count("destination PrepareSandbox") < 2:
        await asyncio.sleep(0.01)
    del world.shim("b").session.pending_containers[:]
    result = await moving
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]


async def test_a_container_that_is_created_between_the_refusal_and_the_look_at_it_does_not_undo_the_move(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.run_sandbox()
    status = Shim.status

    async def created_meanwhile(shim: Shim, session_id: str = "") -> object:
        if world.called.count("destination PrepareSandbox") == 1:
            del world.shim("b").session.pending_containers[:]
        return await status(shim, session_id)

    monkeypatch.setattr(Shim, "status", created_meanwhile)
    moving = asyncio.create_task(migrate(world.migration()))
    await pending(world, "db")
    result = await moving
    assert result.outcome is Outcome.MOVED
    assert world.called.count("destination PrepareSandbox") == 2


async def test_containers_that_nobody_creates_in_time_undo_the_move_by_name(world: World) -> None:
    await world.run_sandbox()
    moving = asyncio.create_task(migrate(world.migration(containers_wait_s=0.1)))
    await pending(world, "db", "web")
    result = await moving
    assert result.outcome is Outcome.UNDONE
    assert world.runners == ["a"]
    assert result.failed_call == "PrepareSandbox on the destination"
    assert result.reason is not None
    assert result.reason.message.startswith(
        "containers db, web of the source were not created on host b within 0.1 s: let containerd create each there"
    )


async def test_an_interrupt_while_containers_are_waited_for_turns_back_at_once(world: World) -> None:
    await world.run_sandbox()
    moving = asyncio.create_task(migrate(world.migration(containers_wait_s=3600)))
    await pending(world, "db")
    while world.called.count("destination PrepareSandbox") < 1:
        await asyncio.sleep(0.01)
    moving.cancel()
    result = await asyncio.wait_for(moving, 5)
    assert result.outcome is Outcome.UNDONE
    assert world.runners == ["a"]


@pytest.mark.parametrize("call", ["destination FinalizeSandbox(RESUME)", "source FinalizeSandbox(STOP)"])
@pytest.mark.parametrize("failure", [UNAVAILABLE, REFUSED], ids=["unavailable", "refused"])
async def test_a_finalize_that_fails_once_is_recovered_and_there_is_one_runner(
    world: World, call: str, failure: ttrpc.StatusError
) -> None:
    await world.run_sandbox()
    world.fail(call, failure)
    result = await migrate(world.migration())
    assert result.outcome in (Outcome.MOVED, Outcome.UNDONE)
    assert world.runners == ["b" if result.moved else "a"]
    assert len(world.shims) == 1
    assert result.warnings == ()


async def test_a_cleanup_that_fails_is_a_warning_and_leaves_the_shim_for_another_try(world: World) -> None:
    await world.run_sandbox()
    world.fail("source Cleanup", UNAVAILABLE)
    result = await migrate(world.migration())
    assert result.moved
    assert result.warnings == ("Cleanup on the source: no answer",)
    assert ("a", SANDBOX) in world.shims


async def test_a_destination_shim_that_dies_while_memory_flows_leaves_the_guest_on_the_source(
    world: World,
) -> None:
    await world.run_sandbox()
    world.fail("destination TransferSandbox", lambda: world.shim("b").crash_soon())
    result = await migrate(world.migration())
    assert result.outcome is Outcome.UNDONE
    assert world.runners == ["a"]


async def test_a_host_that_is_gone_for_good_leaves_the_guest_on_the_source_with_a_warning(
    world: World,
) -> None:
    await world.run_sandbox()

    def the_host_goes() -> None:
        world.gone_hosts.add("b")
        world.shim("b").crash_soon()

    world.fail("destination TransferSandbox", the_host_goes)
    result = await migrate(world.migration())
    assert result.outcome is Outcome.UNDONE
    assert world.runners == ["a"]
    assert "still has to be cleaned up" in result.warnings[0]


async def test_an_interrupt_while_memory_flows_turns_back(world: World) -> None:
    await world.run_sandbox()
    world.memory_stands_still = True
    task = asyncio.create_task(migrate(world.migration()))
    await world.both_transfer.wait()
    task.cancel()
    result = await task
    assert result.outcome is Outcome.UNDONE
    assert isinstance(result.reason, Cancelled)
    assert world.runners == ["a"]
    assert list(world.shims) == [("a", SANDBOX)]


async def test_an_interrupt_while_the_destination_resumes_is_too_late_and_the_move_is_finished(
    world: World,
) -> None:
    await world.run_sandbox()
    task: asyncio.Task[MigrationResult] | None = None

    def interrupt() -> None:
        assert task is not None
        task.cancel()

    world.fail("destination FinalizeSandbox(RESUME)", interrupt)
    task = asyncio.create_task(migrate(world.migration()))
    result = await task
    assert result.moved
    assert world.runners == ["b"]


async def test_an_id_that_the_destination_has_already_is_refused_and_both_run_on(world: World) -> None:
    await world.run_sandbox("a")
    await world.run_sandbox("b")
    result = await migrate(world.migration())
    assert result.outcome is Outcome.UNDONE
    assert result.warnings == ()
    assert isinstance(result.reason, AlreadyThere)
    assert "host b has a sandbox s-1 already" in result.reason.message
    assert world.runners == ["a", "b"]


async def test_what_a_killed_coordinator_left_on_the_destination_is_taken_over(world: World) -> None:
    await world.run_sandbox("a")
    await world.start(world.host("b"), "default", SANDBOX)
    result = await migrate(world.migration())
    assert result.moved
    assert world.runners == ["b"]


async def test_both_hosts_being_the_same_place_is_refused(world: World) -> None:
    await world.run_sandbox()
    with pytest.raises(Rejected, match=r"give the destination its own places\.run_dir"):
        await migrate(world.migration(destination=world.host("a")))


async def test_a_sandbox_that_is_not_there_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match=r"sandbox s-1 on host a does not exist"):
        await migrate(world.migration())


async def test_a_source_whose_shim_is_dead_is_unavailable_with_what_to_do(world: World) -> None:
    shim = await world.run_sandbox()
    await shim.die()
    path = world.host("a").config.shim_socket("default", SANDBOX)
    with socket.socket(socket.AF_UNIX) as dead:
        path.unlink(missing_ok=True)
        dead.bind(str(path))
    with pytest.raises(Unavailable, match=r"'sandshift session resume s-1' starts it again"):
        await migrate(world.migration())


async def test_the_reports_of_both_sides_complete_the_numbers(world: World) -> None:
    shim = await world.run_sandbox()
    shim.report_json = b'{"passes": [{}, {}, {}], "bytes_transferred": 3000000, "blackout": {"stop_ms": 1.5}}'
    answer = World.start

    async def start(where: Host, namespace: str, sandbox_id: str) -> str:
        address = await answer(world, where, namespace, sandbox_id)
        if where.name == "b":
            world.shim(
                "b"
            ).report_json = b'{"blackout": {"duration_ms": 31.25, "resume_ms": 4.5, "method": "pieces"}}'
        return address

    world_start, calls_module.start_shim = calls_module.start_shim, start
    try:
        result = await migrate(world.migration())
    finally:
        calls_module.start_shim = world_start
    assert (result.passes, result.bytes_transferred, result.blackout_ms) == (3, 3_000_000, 31.25)
    assert result.blackout_parts_ms == {"stop": 1.5, "resume": 4.5}


async def test_a_report_that_cannot_be_read_changes_nothing(world: World) -> None:
    shim = await world.run_sandbox()
    shim.report_json = b"{torn"
    result = await migrate(world.migration())
    assert result.moved
    assert result.warnings == ()
    assert result.passes == 2
