"""Revision 2691: a client that knows neither Notifications nor Cancel nor Cleanup gets through, and out again."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from sandshift.conformance.answers import FP, IA, OK, Broken, hold, require
from sandshift.conformance.cases import Case, add, case
from sandshift.conformance.relay import descriptor_of
from sandshift.conformance.scene import BACK, FORWARD, Scene
from sandshift.conformance.shim import RESUME, STOP
from sandshift.conformance.side import Side

R2691: Final = "2691"
ABORTS: Final = (
    ("SourceExported", Side.SOURCE),
    ("DestinationImported", Side.DESTINATION),
    ("DestinationPrepared", Side.DESTINATION),
    ("SocketWaiting", Side.SOURCE),
    ("SocketWaiting", Side.DESTINATION),
    ("SocketReady", Side.SOURCE),
    ("SocketReady", Side.DESTINATION),
    ("Transferring", Side.SOURCE),
    ("Transferring", Side.DESTINATION),
    ("TransferCompleted", Side.SOURCE),
    ("TransferCompleted", Side.DESTINATION),
)


async def export(scene: Scene) -> None:
    answer = require(await scene.src.export_2691(scene.session), OK, what="PrepareAndExportSandbox (2691)")
    scene.config.ParseFromString(answer.response.config.SerializeToString())


async def imported(scene: Scene) -> None:
    await export(scene)
    require(
        await scene.dst.import_2691(scene.session, scene.config),
        OK,
        what="ImportSandbox with config in field 2",
    )


async def prepared(scene: Scene) -> None:
    await imported(scene)
    require(await scene.dst.prepare_2691(scene.session), OK, what="PrepareSandbox (2691)")


async def give_socket(scene: Scene, side: Side, *, flowing: bool) -> None:
    relay = scene.relay or scene.new_relay(flowing=flowing)
    answer = await scene.shims[side].give_socket_2691(scene.session, descriptor_of(relay.ends[side]))
    require(answer, OK, what=f"CreateDuplicateSocket on the {side.value}")
    relay.handed(side)


async def reach(scene: Scene, state: str, side: Side) -> None:
    """As `Scene.reach`, with 2691's calls alone."""
    if state == "SourceExported":
        await export(scene)
    elif state == "DestinationImported":
        await imported(scene)
    else:
        whole = state in ("Transferring", "TransferCompleted")
        await (prepared(scene) if whole or side is Side.DESTINATION else export(scene))
        if state != "SocketWaiting" and not whole and state != "DestinationPrepared":
            await give_socket(scene, side, flowing=False)
        if whole:
            for each in Side:
                await give_socket(scene, each, flowing=state == "TransferCompleted")
                scene.begin(scene.shims[each].transfer_2691(scene.session))
        if state == "SocketWaiting":
            scene.begin(scene.shims[side].transfer_2691(scene.session))
        if state == "Transferring":
            await scene.drip_until_transferring(side)
    await scene.wait_for(side, state)


async def abort(scene: Scene, *, state: str, side: Side) -> None:
    await reach(scene, state, side)
    for each in (side, side.peer):
        shim = scene.shims[each]
        if await shim.state() == "Idle":
            continue
        require(
            await shim.finalize_2691(scene.session, BACK[each]),
            OK,
            what=f"Finalize going back on the {each.value}",
        )
        now = await shim.state()
        hold(
            now == "Idle",
            f"the {each.value} is {now} after its Finalize: a 2691 client has no Cleanup to call",
        )
    require(
        await scene.src.run_process(f"after-{scene.session[-12:]}"),
        OK,
        what="RunProcess on the SRC afterwards",
    )
    require(await scene.src.cleanup(scene.session), OK, what="a head client's Cleanup afterwards")


for _state, _side in ABORTS:
    add(
        Case(
            f"2691 abort from {_state} ({_side.value})",
            "3",
            functools.partial(abort, state=_state, side=_side),
            revision=R2691,
        )
    )


@case("2691 a whole move", "3", moves=True, revision=R2691)
async def whole_move(scene: Scene) -> None:
    await _whole_move(scene, (Side.DESTINATION, Side.SOURCE))


@case("2691 a whole move, the source finalized first", "3", moves=True, revision=R2691)
async def source_finalized_first(scene: Scene) -> None:
    await _whole_move(scene, (Side.SOURCE, Side.DESTINATION))


async def _whole_move(scene: Scene, order: tuple[Side, Side]) -> None:
    await prepared(scene)
    for side in Side:
        await give_socket(scene, side, flowing=True)
    answers = await asyncio.gather(*(scene.shims[side].transfer_2691(scene.session) for side in Side))
    for side, answer in zip(Side, answers, strict=True):
        require(answer, OK, what=f"the TransferSandbox stream on the {side.value}")
        _check_stream(answer.response, side)
    for side in order:
        answer = await scene.shims[side].finalize_2691(scene.session, FORWARD[side])
        require(answer, OK, what=f"FinalizeSandbox going forward on the {side.value}")
        now = await scene.shims[side].state()
        hold(
            now == "Idle",
            f"the {side.value} is {now} after its Finalize: a 2691 client has no Cleanup to call",
        )
    require(await scene.dst.run_process("after"), OK, what="RunProcess on the DST afterwards")


def _check_stream(heard: list[object], side: Side) -> None:
    events = [response.event for response in heard]  # type: ignore[attr-defined]
    ids = [response.message_id for response in heard]  # type: ignore[attr-defined]
    hold(events and events[-1] == "DONE", f"the stream of the {side.value} does not end with DONE: {events}")
    hold(not any(event.startswith("PHASE_") for event in events), f"events have a prefix: {events}")
    hold(ids[0] == 1 and ids == sorted(set(ids)), f"message_id does not begin with 1 and increase: {ids}")
    if side is Side.SOURCE:
        expected = ["SETUP_DONE", "BLACKOUT_STARTED", "OFFLINE_DONE", "DONE"]
        told = [event for event in events if event != "TRANSFER_IN_PROGRESS"]
        hold(told == expected, f"the stream of the SRC tells {told}, not {expected}")
    hold(not any(response.error for response in heard), "the stream of a success tells an error")  # type: ignore[attr-defined]


@case("2691 a repeated TransferSandbox stream starts from 1 again", "4.7", revision=R2691)
async def repeated_stream(scene: Scene) -> None:
    await reach(scene, "TransferCompleted", Side.SOURCE)
    first = require(await scene.src.transfer_2691(scene.session), OK, what="TransferSandbox again").response
    second = require(
        await scene.src.transfer_2691(scene.session), OK, what="TransferSandbox a third time"
    ).response
    hold(
        [one.message_id for one in first] == [one.message_id for one in second],
        "the streams count differently",
    )
    _check_stream(second, Side.SOURCE)


@case("2691 the stream of a failed transfer tells the error and ends OK", "4.7", revision=R2691)
async def failed_stream(scene: Scene) -> None:
    await export(scene)
    await give_socket(scene, Side.SOURCE, flowing=False)
    stream = scene.begin(scene.src.transfer_2691(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")
    assert scene.relay is not None
    scene.relay.cut()
    heard = require(await stream, OK, what="the stream of a transfer whose channel broke").response
    last = heard[-1] if heard else None
    hold(last is not None and last.event == "FAILED" and last.error, f"it ends with {last}")


@case("2691 a socket that never comes is TIMEOUT", "4.7", revision=R2691)
async def timed_out_stream(scene: Scene) -> None:
    await export(scene)
    answer = require(
        await scene.src.transfer_2691(scene.session, 0.2), OK, what="the stream without a socket"
    )
    hold([one.event for one in answer.response] == ["TIMEOUT"], f"it tells {answer.response}")
    hold(answer.response[0].error, "it tells no error")


@case("2691 compatibility_data is the blob's own or refused", "4.14", revision=R2691)
async def compatibility_data(scene: Scene) -> None:
    await imported(scene)
    foreign = await scene.dst.prepare_2691(scene.session, compatibility_data=b"something else")
    require(foreign, IA, what="foreign compatibility_data", names=("compatibility_data",))
    own = await scene.dst.prepare_2691(scene.session, compatibility_data=scene.config.value)
    require(own, OK, what="the blob's own compatibility_data")


@case("2691 field 2 that is no config is refused", "1", revision=R2691)
async def no_config(scene: Scene) -> None:
    await export(scene)
    scene.config.type_url = ""
    require(await scene.dst.import_2691(scene.session, scene.config), IA, what="an Any without a type_url")


@case("2691 and head work on one shim at the same time", "1", moves=True, revision=R2691)
async def both_revisions(scene: Scene) -> None:
    await scene.connected(flowing=True)
    calls = []
    for side in Side:
        shim, other = scene.shims[side], await scene.another(side)
        calls += [shim.transfer(scene.session), other.transfer_2691(scene.session)]
    for answer in await asyncio.gather(*calls):
        require(answer, OK, what="TransferSandbox, unary and streamed at once")
    require(await scene.dst.finalize_2691(scene.session, RESUME), OK, what="2691's Finalize")
    require(await scene.src.finalize(scene.session, STOP), OK, what="head's Finalize")
    for side in Side:
        now = await scene.shims[side].state()
        hold(
            now == "Finalized", f"the {side.value} is {now}: head was seen, so only Cleanup ends the session"
        )
        require(await scene.shims[side].cleanup(scene.session), OK, what="Cleanup")


@case("2691 a STOP on the source before the transfer is refused", "3", revision=R2691)
async def early_stop(scene: Scene) -> None:
    await export(scene)
    require(
        await scene.src.finalize_2691(scene.session, STOP), FP, what="FinalizeSandbox(STOP) in SourceExported"
    )
    if await scene.src.state() != "SourceExported":
        raise Broken("a refused STOP changed the session")
