"""The contract's promises 7 to 9 (section 4): the transfer, and what is told of it. One case each, or several."""

from __future__ import annotations

import asyncio
from typing import Final

from sandshift.conformance.answers import OK, Answer, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.scene import Scene
from sandshift.conformance.shim import RESUME, STOP, phase_of, phases
from sandshift.conformance.side import Side
from sandshift.wire.migration import options_pb2 as o

# 7. TransferSandbox


@case("transfer on the source first, then on the destination", "4.7")
async def source_first(scene: Scene) -> None:
    """A real client calls one side after the other: the destination receives without having been called."""
    await scene.connected(flowing=True)
    require(await scene.src.transfer(scene.session), OK, what="TransferSandbox on the SRC alone")
    require(await scene.dst.transfer(scene.session), OK, what="then on the DST")
    await scene.wait_for(Side.DESTINATION, "TransferCompleted")


@case("transfer on the destination first, then on the source", "4.7")
async def destination_first(scene: Scene) -> None:
    await scene.connected(flowing=True)
    require(await scene.dst.transfer(scene.session, within_s=10), OK, what="TransferSandbox on the DST alone")
    require(await scene.src.transfer(scene.session), OK, what="then on the SRC")
    await scene.wait_for(Side.DESTINATION, "TransferCompleted")


@case("transfer of a client that goes away goes on", "4.7")
async def client_goes(scene: Scene) -> None:
    await scene.connected(flowing=False)
    client = await scene.another(Side.SOURCE)
    calling = scene.begin(client.transfer(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")
    await client.close()
    await calling
    assert scene.relay is not None
    scene.relay.flow()
    require(await scene.src.transfer(scene.session), OK, what="TransferSandbox of another client")


@case("transfer whose RPC deadline passes goes on", "4.7")
async def rpc_deadline(scene: Scene) -> None:
    await scene.connected(flowing=False)
    answer = await scene.src.transfer(scene.session, within_s=0.1)
    hold(answer.code != OK, "it was over with nothing transferred")
    hold(await scene.src.state() == "Transferring", "the RPC's deadline ended the transfer")
    assert scene.relay is not None
    scene.relay.flow()
    require(await scene.src.transfer(scene.session), OK, what="TransferSandbox again")


async def _both_transferring(scene: Scene) -> list[asyncio.Task[Answer]]:
    """TransferSandbox on the SRC and the DST, both with the first bytes behind them."""
    calls = [scene.begin(scene.src.transfer(scene.session))]
    await scene.drip_until_transferring(Side.DESTINATION)
    calls.append(scene.begin(scene.dst.transfer(scene.session)))
    await scene.dst.state()
    return calls


@case("transfer that is cancelled answers CANCELLED", "4.7")
async def cancelled_transfer(scene: Scene) -> None:
    await scene.connected(flowing=False)
    calls = await _both_transferring(scene)
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
    require(await calls[0], "CANCELLED", what="TransferSandbox on the SRC")
    answer = await calls[1]
    require(
        answer, "CANCELLED", "UNAVAILABLE", what="TransferSandbox on the DST, whose channel its source closed"
    )


@case("transfer whose channel breaks answers UNAVAILABLE", "4.7")
async def broken_channel(scene: Scene) -> None:
    await scene.connected(flowing=False)
    calls = await _both_transferring(scene)
    assert scene.relay is not None
    scene.relay.cut()
    for side, calling in zip(Side, calls, strict=True):
        require(await calling, "UNAVAILABLE", what=f"TransferSandbox on the {side.value}")
        await scene.wait_for(side, "Failed")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


# 8. Notifications


@case("notifications are recorded from the start and told to whoever comes", "4.8")
async def replayed(scene: Scene) -> None:
    await scene.transferred()
    first = await scene.src.told(scene.session, "DONE")
    await scene.reconnect(Side.SOURCE)
    again = await scene.src.told(scene.session, "DONE")
    hold(
        [one.message_id for one in first] == [one.message_id for one in again], "ids differ after a reconnect"
    )
    begins = (first[0].message_id, phase_of(first[0])[0])
    hold(begins == (1, "SETUP_DONE"), f"the record begins with {begins}")
    hold(phases(first) == phases(again), "another record is told after a reconnect")


@case("notifications have ids that strictly increase, and their times", "4.8")
async def increasing(scene: Scene) -> None:
    await scene.transferred()
    heard = await scene.src.told(scene.session, "DONE")
    ids = [one.message_id for one in heard]
    hold(ids == sorted(set(ids)), f"ids do not increase: {ids}")
    hold(all(one.HasField("update_time") for one in heard), "a notification has no update_time")
    starts = {one.start_time.ToNanoseconds() for one in heard if one.HasField("start_time")}
    hold(len(starts) == 1, f"start_time is not one moment: {starts}")
    origins = {one.notification.origin for one in heard}
    hold(origins == {o.ORIGIN_SOURCE}, f"origins {origins} on the SRC")


@case("notifications tell progress with numbers", "4.8")
async def progress(scene: Scene) -> None:
    await scene.transferred()
    heard = [one.notification for one in await scene.src.told(scene.session, "DONE")]
    told = [one.progress for one in heard if one.HasField("progress")]
    hold(told, "no progress was told")
    hold(len(told) <= PROGRESS_MAX, f"{len(told)} progress entries are kept")
    hold(any(one.bytes_total for one in told), "progress has no bytes_total")
    only = {one.phase for one in heard if one.HasField("progress")}
    hold(only == {o.PHASE_TRANSFER_IN_PROGRESS}, f"progress comes with {only}")


PROGRESS_MAX: Final = 64


@case("notifications before the transfer have no start_time", "4.8")
async def no_start_time(scene: Scene) -> None:
    await scene.export()
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    heard = await scene.src.told(scene.session, "FAILED")
    hold(not any(one.HasField("start_time") for one in heard), "there is a start_time and no transfer")


@case("the stream of notifications ends when Cleanup ends the session", "4.8")
async def stream_ends(scene: Scene) -> None:
    await scene.export()
    listening = asyncio.create_task(scene.src.told(scene.session, "END", 10))
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    await asyncio.sleep(0)
    hold(not listening.done(), "the stream ended before Cleanup")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")
    heard = phases(await listening)
    hold(heard == [("FAILED", "CANCELLED"), ("RECOVERY_DONE", "SUCCESS")], f"the stream told {heard}")


@case("a subscriber that does not read holds up nobody", "4.8")
async def slow_reader(scene: Scene) -> None:
    await scene.export()
    sleeper = await scene.another(Side.SOURCE)
    stream = sleeper.subscribe(scene.session)
    await scene.dst.import_(scene.session, scene.config)
    require(await scene.dst.prepare(scene.session), OK, what="PrepareSandbox")
    for side in Side:
        await scene.give_socket(side, flowing=True)
    require(await scene.src.transfer(scene.session), OK, what="TransferSandbox")
    heard = []
    async for response in stream:
        heard.append(response)
        if phase_of(response)[0] == "DONE":
            break
    stream.cancel()
    awake = await scene.src.told(scene.session, "DONE")
    hold(phases(heard) == phases(awake), f"the slow reader heard {phases(heard)}")


# 9. Phases and outcomes


@case("phases of a success", "4.9", moves=True)
async def success_phases(scene: Scene) -> None:
    await scene.moved()
    source = phases(await scene.src.told(scene.session, "DONE"))
    steps = ["SETUP_DONE", "BLACKOUT_STARTED", "OFFLINE_DONE", "DONE"]
    hold(source == [(step, "SUCCESS") for step in steps], f"the SRC told {source}")
    heard = await scene.dst.told(scene.session, "BLACKOUT_EXITED")
    expected = [("DONE", "SUCCESS"), ("BLACKOUT_EXITED", "SUCCESS")]
    hold(phases(heard) == expected, f"the DST told {phases(heard)}")
    exited = heard[-1].notification.blackout_exited
    hold(exited.HasField("blackout_stop_timestamp"), "BLACKOUT_EXITED has no blackout_stop_timestamp")
    hold(
        exited.blackout_duration_milliseconds < 60_000,
        f"a blackout of {exited.blackout_duration_milliseconds} ms",
    )


@case("phases of a cancellation", "4.9")
async def cancelled_phases(scene: Scene) -> None:
    await scene.prepared()
    await scene.give_socket(Side.SOURCE)
    scene.begin(scene.src.transfer(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
    source = phases(await scene.src.told(scene.session, "FAILED"))
    hold(source[-1] == ("FAILED", "CANCELLED"), f"the SRC told {source}")
    hold(not any("SOURCE_FAILED" in told for told in source), f"a Cancel was told as a failure: {source}")
    destination = phases(await scene.dst.told(scene.session, "DONE"))
    hold(destination == [("DONE", "CANCELLED")], f"the DST told {destination}")


@case("phases of a roll-back", "4.9")
async def rolled_back_phases(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME) on the SRC")
    heard = phases(await scene.src.told(scene.session, "RECOVERY_DONE"))
    hold(heard[-1] == ("RECOVERY_DONE", "SUCCESS"), f"the SRC told {heard}")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="FinalizeSandbox(STOP) on the DST")


@case("phases of a lost peer blame it", "4.9")
async def lost_peer_phases(scene: Scene) -> None:
    await scene.connected(flowing=False)
    for side in Side:
        scene.begin(scene.shims[side].transfer(scene.session))
    await scene.drip_until_transferring(Side.DESTINATION)
    assert scene.relay is not None
    scene.relay.cut()
    source = await scene.src.told(scene.session, "FAILED")
    hold(phase_of(source[-1]) == ("FAILED", "DESTINATION_FAILED"), f"the SRC told {phases(source)}")
    failure = source[-1].notification.failure
    hold(
        (failure.code, bool(failure.message)) == (14, True),
        f"the failure says {failure.code} {failure.message!r}",
    )
    destination = phases(await scene.dst.told(scene.session, "DONE"))
    hold(destination[-1] == ("DONE", "SOURCE_FAILED"), f"the DST told {destination}")
