"""`migrate --session` again: another coordinator, who knows the session's id and both hosts."""

from __future__ import annotations

import asyncio

import pytest

import ttrpc
from sandshift.errors import NotFound
from sandshift.fleet.driver import migrate
from sandshift.fleet.resume import migrate_or_resume
from sandshift.fleet.saga import Outcome
from sandshift.fleet.views import side_view
from sandshift.session.statement import Cell
from sandshift.session.states import Side
from sandshift.wire.sandshift import shim_pb2
from tests.fleet.fake_shims import SANDBOX, World

DEAD = ttrpc.StatusError(ttrpc.Code.FAILED_PRECONDITION, "the VM is dead")
CALLS = [
    "source PrepareAndExportSandbox",
    "destination ImportSandbox",
    "destination PrepareSandbox",
    "destination CreateDuplicateSocket",
    "source CreateDuplicateSocket",
    "destination FinalizeSandbox(RESUME)",
    "source FinalizeSandbox(STOP)",
    "source Cleanup",
    "destination Cleanup",
]


@pytest.mark.parametrize("call", CALLS)
async def test_a_coordinator_that_died_anywhere_is_followed_by_one_that_ends_the_session(
    world: World, call: str
) -> None:
    await world.run_sandbox()
    world.fail(call, ttrpc.StatusError(ttrpc.Code.UNAVAILABLE, "its caller is gone"))
    first = await migrate(world.migration())
    second = await migrate_or_resume(world.migration())
    assert second.outcome in (Outcome.MOVED, Outcome.UNDONE), (first, second)
    assert len(world.runners) == 1
    assert len(world.shims) == 1
    assert not any(shim.session.active for shim in world.shims.values())


async def open_session(world: World, source: str, destination: str, cells: tuple[Cell, Cell]) -> None:
    """Both sides as a coordinator that died has left them, its TCP connection closed."""
    await world.run_sandbox("a")
    await world.start(world.host("b"), "default", SANDBOX)
    a, b = world.shim("a"), world.shim("b")
    b.awaiting = True
    a._begin("move-1", side_of("a"), source, cells[0])
    if destination:
        b._begin("move-1", side_of("b"), destination, cells[1])
        b.vm_state = "incoming" if destination != "DestinationImported" else "absent"


def side_of(name: str) -> Side:
    return Side.SOURCE if name == "a" else Side.DESTINATION


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("SourceExported", ""),
        ("SourceExported", "DestinationImported"),
        ("SourceExported", "DestinationPrepared"),
        ("SocketReady", "SocketReady"),
        ("Transferring", "Transferring"),
    ],
)
async def test_a_move_whose_way_is_open_goes_on_to_its_success(
    world: World, source: str, destination: str
) -> None:
    await open_session(world, source, destination, (Cell.OPEN, Cell.NONE))
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]
    assert list(world.shims) == [("b", SANDBOX)]


async def test_a_destination_that_was_never_opened_is_opened(world: World) -> None:
    shim = await world.run_sandbox("a")
    shim._begin("move-1", side_of("a"), "SourceExported", Cell.OPEN)
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.called[0] == "b ShutdownSandbox"  # the visitor that was asked first
    assert "b CreateSandbox" in world.called


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("SocketReady", "DestinationPrepared"),
        ("SourceExported", "SocketReady"),
        ("Transferring", "SocketWaiting"),
    ],
)
async def test_sides_that_can_no_longer_be_paired_are_wound_back(
    world: World, source: str, destination: str
) -> None:
    await open_session(world, source, destination, (Cell.OPEN, Cell.NONE))
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.UNDONE
    assert world.runners == ["a"]
    assert list(world.shims) == [("a", SANDBOX)]


@pytest.mark.parametrize(
    ("cells", "outcome"),
    [
        ((Cell.OPEN, Cell.READY), Outcome.UNDONE),
        ((Cell.RELEASED, Cell.READY), Outcome.MOVED),
        ((Cell.RELEASED, Cell.HELD), Outcome.MOVED),
        ((Cell.RELEASED, Cell.RUNNING), Outcome.MOVED),
        ((Cell.GONE, Cell.RUNNING), Outcome.MOVED),
        ((Cell.RELEASED, Cell.REFUSED), Outcome.UNDONE),
        ((Cell.RELEASED, Cell.RETURNING), Outcome.UNDONE),
        ((Cell.KEPT, Cell.READY), Outcome.UNDONE),
    ],
)
async def test_over_a_dead_channel_receipts_are_carried_to_one_runner(
    world: World, cells: tuple[Cell, Cell], outcome: Outcome
) -> None:
    await open_session(world, "Failed", "Failed", cells)
    for shim in world.shims.values():
        shim.vm_state = "paused"
        shim.cut = True
    if cells[1] is Cell.RUNNING:
        world.shim("b").vm_state = "running"
    result = await migrate_or_resume(world.migration())
    assert result.outcome is outcome
    assert world.runners == ["b" if outcome is Outcome.MOVED else "a"]
    assert len(world.shims) == 1


async def test_a_destination_whose_vm_died_at_the_start_is_left_to_a_person(world: World) -> None:
    await open_session(world, "TransferCompleted", "TransferCompleted", (Cell.RELEASED, Cell.LOST))
    world.shim("a").vm_state, world.shim("b").vm_state = "paused", "dead"
    for shim in world.shims.values():
        shim.cut = True
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.UNDECIDED
    assert result.reason is not None
    assert "nobody can know whether it ran: force RESUME on the source" in result.reason.message
    assert world.runners == []


async def test_a_released_source_whose_peers_host_is_gone_is_left_to_a_person(world: World) -> None:
    await open_session(world, "TransferCompleted", "TransferCompleted", (Cell.RELEASED, Cell.READY))
    world.shim("a").vm_state = "paused"
    world.gone_hosts.add("b")
    await world.shim("b").die()
    world.host("b").config.shim_socket("default", SANDBOX).unlink(missing_ok=True)
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.UNDECIDED
    assert result.reason is not None
    assert "prove that host off, then force RESUME on the source" in result.reason.message


async def test_a_shim_that_died_is_started_again_and_the_move_is_finished(world: World) -> None:
    await open_session(world, "TransferCompleted", "TransferCompleted", (Cell.RELEASED, Cell.HELD))
    world.shim("a").vm_state = world.shim("b").vm_state = "paused"
    await world.shim("b").die()
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]


async def test_a_move_that_has_ended_is_only_told_again(world: World) -> None:
    await world.run_sandbox()
    await migrate(world.migration())
    world.called.clear()
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]
    assert list(world.shims) == [("b", SANDBOX)]
    assert [call for call in world.called if "Finalize" in call or "Cancel" in call] == []


async def test_an_old_session_told_again_never_ends_a_sandbox_that_came_back(world: World) -> None:
    await world.run_sandbox()
    await migrate(world.migration())
    back = world.shims["a", SANDBOX] = world.shims.pop(("b", SANDBOX))  # by another session
    await back.die()
    back.where = "a"
    world.host("b").config.shim_socket("default", SANDBOX).unlink(missing_ok=True)
    await world.start(world.host("a"), "default", SANDBOX)
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["a"]
    assert list(world.shims) == [("a", SANDBOX)]


async def test_an_id_that_was_used_the_other_way_is_another_session(world: World) -> None:
    await world.run_sandbox("b")
    for where, side, cell in (("b", Side.DESTINATION, Cell.RUNNING), ("a", Side.SOURCE, Cell.GONE)):
        world.kept[where, "move-1"] = shim_pb2.SessionStatus(
            session_id="move-1", side=side.value, state="Idle", cell=cell.value
        )
    views = [
        side_view(
            shim_pb2.StatusResponse(vm_state="running", session=world.kept[where, "move-1"]), "move-1", side
        )
        for where, side in (("b", Side.SOURCE), ("a", Side.DESTINATION))
    ]
    assert [view.known for view in views] == [False, False]


async def test_an_id_that_nobody_knows_is_a_new_move(world: World) -> None:
    await world.run_sandbox()
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.MOVED
    assert world.runners == ["b"]


async def test_an_unknown_id_for_a_sandbox_that_is_not_there_is_not_found_and_leaves_nothing(
    world: World,
) -> None:
    with pytest.raises(NotFound, match=r"known on neither host, and host a has no sandbox s-1 to move"):
        await migrate_or_resume(world.migration())
    assert world.shims == {}


async def test_two_coordinators_at_once_end_with_one_runner(world: World) -> None:
    await open_session(world, "SocketReady", "SocketReady", (Cell.OPEN, Cell.NONE))
    first, second = await asyncio.gather(
        migrate_or_resume(world.migration()), migrate_or_resume(world.migration()), return_exceptions=True
    )
    assert world.runners == ["b"]
    outcomes = {getattr(each, "outcome", each) for each in (first, second)}
    assert Outcome.MOVED in outcomes
    assert Outcome.UNDONE not in outcomes


async def test_a_guest_that_crashed_on_the_source_is_cleaned_up_on_both(world: World) -> None:
    await open_session(world, "Failed", "Failed", (Cell.KEPT, Cell.NONE))
    world.shim("a").vm_state = "dead"
    world.fail("source FinalizeSandbox(RESUME)", *[DEAD] * 9)
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.CRASHED
    assert result.reason is not None
    assert result.reason.message == "the source's VM died where it had the right to run"
    assert not world.shim("a").session.active
    assert list(world.shims) == [("a", SANDBOX)]


async def test_a_guest_that_crashed_on_the_destination_is_cleaned_up_on_both(world: World) -> None:
    await open_session(world, "TransferCompleted", "TransferCompleted", (Cell.RELEASED, Cell.RUNNING))
    world.shim("a").vm_state, world.shim("b").vm_state = "paused", "dead"
    world.fail("destination FinalizeSandbox(RESUME)", *[DEAD] * 9)
    world.shim("b").session.state = "Finalized"
    result = await migrate_or_resume(world.migration())
    assert result.outcome is Outcome.CRASHED
    assert list(world.shims) == [("b", SANDBOX)]
    assert not world.shim("b").session.active


@pytest.mark.parametrize("where", ["a", "b"])
async def test_a_session_told_again_says_that_its_guest_runs_nowhere_any_more(
    world: World, where: str
) -> None:
    """It ended well; since then the guest's VM has ended where it was left, and the sandbox is still known there."""
    await world.run_sandbox()
    moved = await migrate(world.migration(close_source=False))
    assert moved.outcome is Outcome.MOVED
    if where == "a":
        for name, cell in (("a", Cell.KEPT), ("b", Cell.REFUSED)):
            world.kept[name, "move-1"].cell = cell.value
            world.kept[name, "move-1"].action = ""
        world.shim("b").vm_state = "absent"
    world.shim(where).vm_state = "stopped"
    again = await migrate_or_resume(world.migration(close_source=False))
    assert again.outcome is Outcome.CRASHED
    assert again.reason is not None
    side = "source" if where == "a" else "destination"
    assert f"with the guest on the {side}, and its VM there has ended too" in again.reason.message
    assert world.runners == []
