"""A case for every cell of the contract's table, on every side that it can be met on."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from google.protobuf import any_pb2

from sandshift.conformance.answers import (
    AE,
    FP,
    NO_ANSWER,
    OK,
    UNIMPLEMENTED,
    Answer,
    Broken,
    Skipped,
    hold,
    require,
)
from sandshift.conformance.cases import Case, add
from sandshift.conformance.relay import descriptor_of
from sandshift.conformance.scene import BACK, Scene, here
from sandshift.conformance.shim import RESUME, STOP
from sandshift.conformance.side import Side
from sandshift.conformance.table import CELLS, COLUMNS, STATES, sides_of
from sandshift.wire.migration import options_pb2 as o

CONTAINER: Final = "c1"
REFUSAL_S: Final = 5.0
"""How long a TransferSandbox may take to be refused, or to say that all is over."""
PENDING_S: Final = 0.05
"""A call that has not been answered for so long waits."""
AFTER: Final = {
    "PrepareAndExport": ("SourceExported",),
    "Import": ("DestinationImported",),
    "Task.Create": ("DestinationImported",),
    "PrepareSandbox": ("DestinationPrepared",),
    "CreateDuplicateSocket": ("SocketReady", "Transferring", "TransferCompleted"),
    "Finalize back": ("Finalized", "Idle"),
    "Cancel": ("Cancelled",),
    "Cleanup": ("Idle",),
}
"""Where a `+` leads. A Finalize that ends a session of revision 2691 ends in Idle (contract, 3)."""
BY_RIGHT: Final = {
    ("TransferCompleted", "Finalize back"): OK,
    ("TransferCompleted", "Finalize SRC STOP"): OK,
    ("TransferCompleted", "Finalize DST RESUME"): OK,
    ("Cancelled", "Finalize back"): OK,
    ("Cancelled", "Finalize SRC STOP"): FP,
    ("Cancelled", "Finalize DST RESUME"): FP,
    ("Failed", "Finalize back"): OK,
    ("Failed", "Finalize SRC STOP"): FP,
    ("Failed", "Finalize DST RESUME"): FP,
}
"""What right-to-run.md section 6 makes of it: with a living channel after completion, and broken off before it."""
LETS_GO: Final = (("TransferCompleted", "Finalize SRC STOP"), ("TransferCompleted", "Finalize DST RESUME"))


async def call(scene: Scene, column: str, side: Side) -> Answer:
    """Make the call that a column is about, as a client of revision head would."""
    shim, session = scene.shims[side], scene.session
    match column:
        case "PrepareAndExport":
            return await shim.export(session, scene.options)
        case "Import":
            config = scene.config if scene.config.type_url else await _some_config(scene)
            return await shim.import_(session, config)
        case "Task.Create":
            return await _create_task(scene, side)
        case "PrepareSandbox":
            return await shim.prepare(session)
        case "CreateDuplicateSocket":
            return await _give_socket(scene, side)
        case "Transfer":
            return await shim.transfer(session, within_s=REFUSAL_S)
        case "Finalize back":
            return await shim.finalize(session, BACK[side])
        case "Finalize SRC STOP":
            return await shim.finalize(session, STOP)
        case "Finalize DST RESUME":
            return await shim.finalize(session, RESUME)
        case "Cancel":
            return await shim.cancel(session)
        case "Cleanup":
            return await shim.cleanup(session)
    return await shim.listens(session)


async def _some_config(scene: Scene) -> any_pb2.Any:
    await scene.export()
    return scene.config


async def _give_socket(scene: Scene, side: Side) -> Answer:
    """The end of a connection that is not used otherwise, unless the session still waits for its own."""
    relay = scene.relay or scene.new_relay(flowing=False)
    if relay.ends[side].fileno() < 0:
        relay = scene.new_relay(flowing=False)
    answer = await scene.shims[side].give_socket(scene.session, descriptor_of(relay.ends[side]))
    if answer.code == OK:
        relay.handed(side)
    return answer


async def _create_task(scene: Scene, side: Side) -> Answer:
    """The patch of a container of the source, as it was made on the way here, where it was."""
    answer = await scene.shims[side].tasks.create(scene.containers[CONTAINER], here(CONTAINER))
    if answer.code == UNIMPLEMENTED:
        raise Skipped("the shim serves no containerd.task.v3.Task")
    return answer


async def check(scene: Scene, *, state: str, column: str, side: Side) -> None:
    """Bring the side into the state, make the call, and hold the answer and the state after it against the cell."""
    if column == "Task.Create":
        scene.have_containers(CONTAINER)
    if state == "Cancelling":
        await _check_cancelling(scene, column, side)
        return
    if (state, column) == ("Idle", "Import"):
        await scene.export()  # so that there is something to import
    else:
        await scene.reach(state, side)
    says = CELLS[state][column]
    what = f"{column} in {state} on the {side.value}"
    if column == "Transfer" and says.startswith("+"):
        await _check_transfer(scene, side, what)
        return
    answer = await call(scene, column, side)
    if says == "+ by right to run":
        require(answer, BY_RIGHT[state, column], what=what)
        if (state, column) in LETS_GO and answer.code == OK:
            await _complete(scene, column)
    elif says in ("same", "= same action, else FP"):
        await _check_same_action(scene, column, side, answer, what)
    elif says.startswith("+"):
        require(answer, OK, what=what)
        if column in AFTER:
            await scene.wait_for(side, *AFTER[column])
    elif says.startswith("="):
        require(answer, OK, what=what)
        await _unchanged(scene, state, side, what)
        if says.endswith("else FP"):
            await _check_others(scene, column, answer, what)
    else:
        names = ("no active session",) if state == "Idle" else ()
        require(answer, {"FP": FP, "AE": AE}[says], what=what, names=names)
        await _unchanged(scene, state, side, what)


async def _unchanged(scene: Scene, state: str, side: Side, what: str) -> None:
    now = await scene.shims[side].state()
    hold(now == state, f"{what}: the state is {now} afterwards")


async def _check_transfer(scene: Scene, side: Side, what: str) -> None:
    """The call waits, or joins those that wait; a Cancel ends it for all of them alike."""
    calls = [scene.begin(scene.shims[side].transfer(scene.session)) for _twice in range(2)]
    await asyncio.wait(calls, timeout=PENDING_S, return_when=asyncio.FIRST_COMPLETED)
    for each in calls:
        hold(not each.done(), f"{what}: it was answered at once: {each.result() if each.done() else ''}")
    now = await scene.shims[side].state()
    hold(now in ("SocketWaiting", "SocketReady", "Transferring"), f"{what}: the state is {now} afterwards")
    require(await scene.shims[side].cancel(scene.session), OK, what=f"Cancel after {what}")
    for each in calls:
        require(await each, "CANCELLED", what=f"{what}, then cancelled")


async def _check_same_action(scene: Scene, column: str, side: Side, answer: Answer, what: str) -> None:
    """The session was finalized going back: that again is nothing new, the other way is refused."""
    if column == "Finalize back":
        require(answer, OK, what=what)
        other = await scene.shims[side].finalize(scene.session, STOP if BACK[side] == RESUME else RESUME)
        require(other, FP, what=f"{what}: the other action")
    else:
        require(answer, FP, what=f"{what}, which was finalized going back")
    await _unchanged(scene, "Finalized", side, what)


async def _check_others(scene: Scene, column: str, answer: Answer, what: str) -> None:
    if column == "PrepareAndExport":
        same = answer.response.config.SerializeToString() == scene.config.SerializeToString()
        hold(same, f"{what}: the blob is not that of the first call")
        other = o.InitializeOptions(memory_transport=o.MEMORY_TRANSPORT_TCP, perf_tracing_enabled=True)
        require(await scene.src.export(scene.session, other), FP, what=f"{what} with other options")
    else:
        require(await scene.src.cancel(scene.session), OK, what="Cancel")
        require(await scene.src.cleanup(scene.session), OK, what="Cleanup")
        again = await scene.src.export(scene.session)
        other_config = require(again, OK, what="a second export").response.config
        require(await scene.dst.import_(scene.session, other_config), FP, what=f"{what} with another config")


async def _complete(scene: Scene, column: str) -> None:
    """One side was let go forward: the other follows."""
    if column == "Finalize SRC STOP":
        require(
            await scene.dst.finalize(scene.session, RESUME),
            OK,
            what="RESUME on the DST after STOP on the SRC",
        )
    else:
        require(
            await scene.src.finalize(scene.session, STOP), OK, what="STOP on the SRC after RESUME on the DST"
        )
    states = ((await scene.src.status()).vm_state, (await scene.dst.status()).vm_state)
    hold(states == ("stopped", "running"), f"the VMs are {states}, not stopped and running")


async def _check_cancelling(scene: Scene, column: str, side: Side) -> None:
    """With a cancellation that is held up the row is exact; where it cannot be, a call right behind a Cancel must be
    answered as Cancelling or as Cancelled answers it."""
    await scene.reach("Transferring" if side is Side.SOURCE else "SocketReady", side)
    try:
        async with scene.target.hold_cancel(side):
            cancelling = scene.begin(scene.shims[side].cancel(scene.session))
            await scene.wait_for(side, "Cancelling")
            waits = await _call_while_cancelling(scene, column, side)
    except Skipped:
        await _race_with_cancel(scene, column, side)
        return
    require(await cancelling, OK, what=f"Cancel, with {column} behind it")
    if waits is not None:
        require(await waits, OK, what=f"{column} that waited for a Cancel on the {side.value}")


async def _call_while_cancelling(scene: Scene, column: str, side: Side) -> asyncio.Task[Answer] | None:
    """The task of a call that joins the cancellation; None where it was answered at once, as the cell says."""
    says, what = CELLS["Cancelling"][column], f"{column} in Cancelling on the {side.value}"
    if "joins" in says:
        waits = scene.begin(call(scene, column, side))
        await asyncio.wait([waits], timeout=PENDING_S)
        hold(not waits.done(), f"{what}: it did not wait: {waits.result() if waits.done() else ''}")
        return waits
    waits = scene.begin(call(scene, column, side))
    done, _pending = await asyncio.wait([waits], timeout=PENDING_S * 20)
    answer = waits.result() if done else Answer(NO_ANSWER, "it waits for the Cancel")
    require(answer, OK if says == "+" else FP, what=what)
    return None


async def _race_with_cancel(scene: Scene, column: str, side: Side) -> None:
    allowed = set()
    for state in ("Cancelling", "Cancelled"):
        says = CELLS[state][column]
        allowed.add(BY_RIGHT[state, column] if "by right" in says else FP if says == "FP" else OK)
    cancelling = scene.begin(scene.shims[side].cancel(scene.session))
    await asyncio.sleep(0)  # the Cancel is on its way; one connection keeps the order
    answer = await call(scene, column, side)
    require(await cancelling, OK, what=f"Cancel, with {column} behind it")
    if answer.code not in allowed:
        raise Broken(
            f"{column} right behind a Cancel on the {side.value}: expected {sorted(allowed)}, got {answer}"
        )


def name_of(state: str, column: str, side: Side) -> str:
    return f"cell {state} x {column} ({side.value})"


for _state in STATES:
    for _column in COLUMNS:
        for _side in sides_of(_state, _column):
            add(
                Case(
                    name_of(_state, _column, _side),
                    "3",
                    functools.partial(check, state=_state, column=_column, side=_side),
                    moves=(_state, _column) in LETS_GO,
                )
            )
