"""The contract's sixteen promises (section 4), as far as they can be seen from outside. One case each, or several."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final

from google.protobuf import any_pb2

from sandshift.conformance.answers import FP, IA, OK, Answer, Broken, Skipped, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.relay import descriptor_of, tcp_pair
from sandshift.conformance.saved_state import altered, payload_of, repacked
from sandshift.conformance.scene import BACK, Scene
from sandshift.conformance.shim import RESUME, STOP, phase_of, phases
from sandshift.conformance.side import Side
from sandshift.wire.migration import options_pb2 as o
from sandshift.wire.sandshift import state_pb2

TCP: Final = o.MEMORY_TRANSPORT_TCP
WSAPROTOCOL_INFO_BYTES: Final = 628
BOTH_WAYS: Final = ("SRC first", "DST first")


# 1. PrepareAndExportSandbox


@case("export of a sandbox that cannot move is refused at once and changes nothing", "4.1")
async def export_refused(scene: Scene) -> None:
    """The destination's shim awaits a sandbox: it has none that could move."""
    answer = await scene.dst.export(scene.session)
    require(answer, FP, what="PrepareAndExportSandbox without a running sandbox")
    hold(await scene.dst.state() == "Idle", "a refused export left a session behind")
    require(await scene.dst.export(scene.session), FP, what="the same again")


# 2. Saved state


@case("a saved state that was damaged is DATA_LOSS", "4.2")
async def damaged_state(scene: Scene) -> None:
    await scene.export()
    envelope = state_pb2.SavedState.FromString(scene.config.value)
    middle = len(envelope.payload) // 2
    flipped = (
        envelope.payload[:middle] + bytes([envelope.payload[middle] ^ 1]) + envelope.payload[middle + 1 :]
    )
    for config in (altered(scene.config, payload=flipped), altered(scene.config, sha256=bytes(32))):
        require(await scene.dst.import_(scene.session, config), "DATA_LOSS", what="ImportSandbox, damaged")
    hold(await scene.dst.state() == "Idle", "a refused import left a session behind")


@case("a saved state of a version that is not read is refused with both ranges", "4.2")
async def other_version(scene: Scene) -> None:
    await scene.export()
    newer = altered(scene.config, schema_version=999, min_reader_version=998)
    require(
        await scene.dst.import_(scene.session, newer),
        FP,
        what="a state from the future",
        names=("999", "998"),
    )


@case("a saved state of a version that old readers may read is read", "4.2")
async def tolerated_version(scene: Scene) -> None:
    await scene.export()
    newer = altered(scene.config, schema_version=999, min_reader_version=1)
    require(
        await scene.dst.import_(scene.session, newer), OK, what="a newer state that readers of 1 may read"
    )


@case("a saved state of another make is refused", "4.2")
async def foreign_state(scene: Scene) -> None:
    await scene.export()
    foreign = any_pb2.Any(type_url="type.microsoft.com/hcsshim.controller.vm.save.v1.Payload", value=b"x")
    require(await scene.dst.import_(scene.session, foreign), IA, what="ImportSandbox, not ours")


# 3. ImportSandbox


@case("import creates nothing on the host", "4.3")
async def import_creates_nothing(scene: Scene) -> None:
    await scene.imported()
    status = await scene.dst.status()
    hold(status.vm_state == "absent" and not status.qemu_pid, f"there is a VM: {status.vm_state}")


@case("import of duplicate container ids is refused", "4.3")
async def duplicate_containers(scene: Scene) -> None:
    await scene.export()
    payload = payload_of(scene.config)
    for _twice in range(2):
        payload.sandbox.containers.add(guest_id="c", container_id="c")
    require(
        await scene.dst.import_(scene.session, repacked(scene.config, payload)), IA, what="a container twice"
    )


@case("import with another sandbox_id than the shim's is refused", "4.3")
async def other_sandbox(scene: Scene) -> None:
    await scene.export()
    answer = await scene.dst.import_(scene.session, scene.config, "another-sandbox")
    require(answer, IA, what="another sandbox_id", names=("another-sandbox", scene.dst.sandbox_id))


@case("import of another session's state is refused", "4.3")
async def other_sessions_state(scene: Scene) -> None:
    await scene.export()
    require(await scene.dst.import_("another-session", scene.config), IA, what="another session's state")


# 5. PrepareSandbox


@case("prepare names every blocker, changes nothing, and can be tried again", "4.5")
async def blockers(scene: Scene) -> None:
    await scene.export()
    payload = payload_of(scene.config)
    payload.machine.machine_type = "pc-q35-99.9"
    payload.machine.memory_bytes = 1 << 60
    require(await scene.dst.import_(scene.session, repacked(scene.config, payload)), OK, what="ImportSandbox")
    for _twice in range(2):
        answer = await scene.dst.prepare(scene.session)
        require(answer, FP, what="PrepareSandbox of what cannot run here", names=("pc-q35-99.9", "memory"))
        hold(await scene.dst.state() == "DestinationImported", "a refused PrepareSandbox changed the state")
    hold((await scene.dst.status()).vm_state == "absent", "a refused PrepareSandbox left a VM behind")


# 6. CreateDuplicateSocket


@case("a socket other than the one described is refused and harms nothing", "4.6")
async def wrong_sockets(scene: Scene) -> None:
    await scene.export()
    end, other = tcp_pair()
    with end, other:
        lies = {
            "cookie": descriptor_of(end, so_cookie=1),
            "family": descriptor_of(end, family=int(socket.AF_INET6)),
            "type": descriptor_of(end, type=int(socket.SOCK_DGRAM)),
            "protocol": descriptor_of(end, protocol=17),
            "version": descriptor_of(end, version=2),
            "fd": descriptor_of(end, fd=other.fileno()),
            "closed fd": descriptor_of(end, fd=1 << 20),
            "a process that is not": descriptor_of(end, pid=1 << 22),
            "nothing": b"",
            "WSAPROTOCOL_INFO": bytes(range(256)) * 2 + bytes(WSAPROTOCOL_INFO_BYTES - 512),
        }
        for lie, protocol_info in lies.items():
            answer = await scene.src.give_socket(scene.session, protocol_info)
            require(answer, IA, what=f"CreateDuplicateSocket with a wrong {lie}")
        hold(await scene.src.state() == "SourceExported", "a refused socket changed the state")
        require(
            await scene.src.give_socket(scene.session, descriptor_of(end)),
            OK,
            what="the right one afterwards",
        )


@case("a socket that is not connected is refused", "4.6")
async def unconnected(scene: Scene) -> None:
    await scene.export()
    with socket.socket() as end:
        require(
            await scene.src.give_socket(scene.session, descriptor_of(end)), FP, what="an unconnected socket"
        )
    hold(await scene.src.state() == "SourceExported", "a refused socket changed the state")


@case("a datagram socket is refused", "4.6")
async def datagrams(scene: Scene) -> None:
    await scene.export()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        described = descriptor_of(one, type=int(socket.SOCK_STREAM))
        require(await scene.src.give_socket(scene.session, described), IA, what="a datagram socket")


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


# 10. Cancel


@case("Cancel is done when it answers, and closes the transport", "4.10")
async def synchronous_cancel(scene: Scene) -> None:
    await scene.reach("Transferring", Side.SOURCE)
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    now = await scene.src.state()
    hold(now == "Cancelled", f"Cancel answered and the state is {now}")
    assert scene.relay is not None
    scene.relay.flow()
    try:
        async with asyncio.timeout(5):
            await scene.relay.ended[Side.SOURCE].wait()
    except TimeoutError:
        raise Broken("Cancel left the transport open while the transfer ran") from None
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


@case("Cancel after everything has arrived wins over the move", "4.10")
async def late_cancel(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.cancel(scene.session), OK, what="Cancel on the SRC in TransferCompleted")
    require(
        await scene.dst.finalize(scene.session, RESUME), FP, what="RESUME on the DST after the SRC's Cancel"
    )
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("Cancel after Finalize is refused and changes nothing", "4.10")
async def cancel_after_finalize(scene: Scene) -> None:
    await scene.reach("Finalized", Side.SOURCE)
    require(await scene.src.cancel(scene.session), FP, what="Cancel in Finalized")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="the same Finalize again")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")


# 11. FinalizeSandbox


@case("Finalize that failed can be tried until it succeeds", "4.11", moves=True)
async def retried_finalize(scene: Scene) -> None:
    """The channel is gone: without the source's word the destination must not run; with its receipt it may."""
    await scene.transferred()
    assert scene.relay is not None
    scene.relay.cut()
    for _twice in range(2):
        require(
            await scene.dst.finalize(scene.session, RESUME), "UNAVAILABLE", what="RESUME without a channel"
        )
    ready = await scene.dst.receipt()
    require(
        await scene.src.finalize(scene.session, STOP, ready), "UNAVAILABLE", what="STOP with READY's receipt"
    )
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()), OK, what="RESUME, receipt"
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()), OK, what="STOP, receipt"
    )
    states = ((await scene.src.status()).vm_state, (await scene.dst.status()).vm_state)
    hold(states == ("stopped", "running"), f"the VMs are {states}, not stopped and running")


@case("Finalize never makes two runners", "4.11", moves=True)
async def one_runner(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.dst.finalize(scene.session, RESUME), OK, what="RESUME on the DST")
    require(await scene.src.finalize(scene.session, RESUME), FP, what="RESUME on the SRC after it")
    hold((await scene.src.status()).vm_state != "running", "both VMs run")
    require(await scene.dst.finalize(scene.session, STOP), FP, what="STOP on a DST that runs")
    require(await scene.src.finalize(scene.session, STOP), OK, what="STOP on the SRC")


@case("Finalize of the destination after the source took the guest back is refused", "4.11")
async def refused_forward(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, RESUME), FP, what="RESUME on the DST after it")
    hold((await scene.dst.status()).vm_state != "running", "both VMs run")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("Finalize without an action, or with an unknown one, is refused", "4.11")
async def no_action(scene: Scene) -> None:
    await scene.export()
    for action in (0, 3, 99):
        require(await scene.src.finalize(scene.session, action), IA, what=f"action {action}")


@case("Finalize with a receipt of another session is refused", "4.11")
async def foreign_receipt(scene: Scene) -> None:
    await scene.transferred()
    for receipt in (b"nonsense", await scene.dst.receipt()):
        require(
            await scene.dst.finalize(scene.session, RESUME, receipt),
            IA,
            what="a receipt that is not the peer's",
        )
    hold((await scene.dst.status()).vm_state != "running", "a forged receipt started the guest")


# 12. Cleanup


@case("Cleanup from Failed runs the guest on the source and discards the destination's", "4.12")
async def cleanup_from_failed(scene: Scene) -> None:
    await scene.connected(flowing=False)
    for side in Side:
        scene.begin(scene.shims[side].transfer(scene.session))
    await scene.drip_until_transferring(Side.DESTINATION)
    assert scene.relay is not None
    scene.relay.cut()
    for side in Side:
        await scene.wait_for(side, "Failed")
        require(await scene.shims[side].cleanup(scene.session), OK, what=f"Cleanup on the {side.value}")
        hold(await scene.shims[side].state() == "Idle", "Cleanup did not end the session")
    states = ((await scene.src.status()).vm_state, (await scene.dst.status()).vm_state)
    hold(states == ("running", "absent"), f"the VMs are {states}, not running and absent")
    require(await scene.src.run_process(f"p-{scene.session[-12:]}"), OK, what="RunProcess afterwards")


@case("Cleanup from Cancelled after completion runs the guest on the source", "4.12")
async def cleanup_from_cancelled(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup without a Finalize")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("what has moved away is told", "4.12", moves=True)
async def moved_away(scene: Scene) -> None:
    await scene.moved()
    answer = require(await scene.src.wait_sandbox(10), OK, what="WaitSandbox on the SRC")
    hold(answer.response.exit_status == 255, f"the SRC's exit code is {answer.response.exit_status}")
    info = (await scene.src.sandbox_status()).info
    hold(
        any(scene.session in value for value in info.values()),
        f"SandboxStatus does not name the session: {dict(info)}",
    )


@case("an aborted import leaves the shim as it was, for another session", "4.12")
async def again_after_abort(scene: Scene) -> None:
    await scene.prepared()
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
        require(await scene.shims[side].cleanup(scene.session), OK, what="Cleanup")
    scene.session += "-again"
    scene.relay = None
    await scene.transferred()
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("the last session's Finalize, Cancel and Cleanup again are no error", "3")
async def remembered(scene: Scene) -> None:
    await scene.export()
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="the same Finalize after the end")
    require(await scene.src.cancel(scene.session), OK, what="the same Cancel after the end")
    require(await scene.src.cleanup(scene.session), OK, what="the same Cleanup after the end")
    require(await scene.src.finalize(scene.session, STOP), FP, what="the other Finalize after the end")
    hold((await scene.src.status()).vm_state == "running", "a late STOP ended the guest")


@case("concurrent duplicates of a call are one call", "3")
async def duplicates(scene: Scene) -> None:
    other = {side: await scene.another(side) for side in Side}

    async def twice(what: str, side: Side, *given: Any) -> list[Answer]:
        both = (scene.shims[side], other[side])
        answers = await asyncio.gather(*(getattr(shim, what)(scene.session, *given) for shim in both))
        return [require(answer, OK, what=f"{what}, called twice at once") for answer in answers]

    one, two = await twice("export", Side.SOURCE)
    scene.config = one.response.config
    hold(one.response == two.response, "two concurrent exports gave two blobs")
    await twice("import_", Side.DESTINATION, scene.config)
    await twice("prepare", Side.DESTINATION)
    for side in Side:
        await scene.give_socket(side, flowing=True)
    await twice("transfer", Side.SOURCE)
    await scene.wait_for(Side.DESTINATION, "TransferCompleted")
    for side in Side:
        await twice("finalize", side, BACK[side])
        await twice("cleanup", side)


# 13. Other calls during a session


@case("what would change the sandbox is refused at once while it moves", "4.13")
async def other_calls(scene: Scene) -> None:
    await scene.reach("Transferring", Side.SOURCE)
    refused: dict[str, Answer] = {
        "StopSandbox": await scene.src.stop_sandbox(),
        "RunProcess": await scene.src.run_process("p"),
    }
    for what, answer in refused.items():
        require(answer, FP, what=f"{what} in Transferring", names=(scene.session,))
    info = (await scene.src.sandbox_status()).info
    told = (info.get("migration.state"), info.get("migration.session"))
    hold(told == ("Transferring", scene.session), f"SandboxStatus says {told}")


# 14. Options


@case("options out of range are refused by name, value and range", "4.14")
async def options_out_of_range(scene: Scene) -> None:
    params = "memory_transfer_throttle_params"
    wrong: dict[str, dict[str, Any]] = {
        "memory_transport": {"memory_transport": 0},
        "throttling_scale": {params: {"throttling_scale": 200.0}},
        "minimum_throttle_percentage": {params: {"minimum_throttle_percentage": 300}},
        "maximum_number_of_brownout_transfer_passes": {
            params: {"maximum_number_of_brownout_transfer_passes": 0}
        },
        "target_blackout_transfer_time": {params: {"target_blackout_transfer_time": 4_000_000_000}},
        "throttle_worker_count": {"compression_settings": {"throttle_worker_count": 0}},
    }
    for name, fields in wrong.items():
        options = o.InitializeOptions(**({"memory_transport": TCP} | fields))
        require(
            await scene.src.export(scene.session, options), IA, what=f"{name} out of range", names=(name,)
        )
    hold(await scene.src.state() == "Idle", "refused options left a session behind")


@case("options in range are taken", "4.14")
async def options_in_range(scene: Scene) -> None:
    scene.options = o.InitializeOptions(memory_transport=TCP, perf_tracing_enabled=True)
    scene.options.memory_transfer_throttle_params.target_blackout_transfer_time = 300
    scene.options.memory_transfer_throttle_params.maximum_number_of_brownout_transfer_passes = 20
    await scene.prepared()


@case("options that must agree and do not are refused, naming both", "4.14")
async def options_disagree(scene: Scene) -> None:
    await scene.imported()
    other = o.InitializeOptions(memory_transport=TCP, checksum_verification=True)
    answer = await scene.dst.prepare(scene.session, other)
    if answer.code == IA:
        raise Skipped(f"checksum_verification cannot be honoured here: {answer.message}")
    require(answer, FP, what="checksum_verification on one side only", names=("true", "false"))


@case("a transfer with checksum verification goes through", "4.14")
async def checksum(scene: Scene) -> None:
    scene.options = o.InitializeOptions(memory_transport=TCP, checksum_verification=True)
    answer = await scene.src.export(scene.session, scene.options)
    if answer.code == IA:
        raise Skipped(f"checksum_verification cannot be honoured here: {answer.message}")
    await scene.transferred()


# 15. State on disk


@case("a session survives both its shims", "4.15", moves=True)
async def restarted(scene: Scene) -> None:
    await scene.transferred()
    before = {side: await scene.shims[side].told(scene.session, "DONE") for side in Side}
    for side in Side:
        await scene.shims[side].close()
        await scene.target.restart(side)
        await scene.reconnect(side)
        now = await scene.shims[side].state()
        hold(now == "TransferCompleted", f"after a restart the {side.value} is {now}")
        told = await scene.shims[side].told(scene.session, "DONE")
        same = [one.SerializeToString() for one in told] == [one.SerializeToString() for one in before[side]]
        hold(same, f"the record of the {side.value} is another after a restart")
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()),
        OK,
        "UNAVAILABLE",
        what="RESUME",
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()),
        OK,
        "UNAVAILABLE",
        what="STOP",
    )
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()),
        OK,
        what="RESUME after all",
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()), OK, what="STOP after all"
    )


# 16. Ids


@case("session ids are checked, and never part of a path", "4.16")
async def session_ids(scene: Scene) -> None:
    for call in (scene.src.cancel, scene.src.listens, scene.src.transfer, scene.src.prepare):
        require(await call(""), IA, what="an empty session_id on a shim without a session")
    for bad in ("", "x" * 257, "a\nb", "a\0b"):
        require(await scene.src.export(bad), IA, what=f"session_id {bad[:8]!r}")
    scene.session = "../../" + "\u00e9" * 10 + f"/{os.getpid()} x"
    await scene.prepared()


@case("another session's id is refused, naming both", "4.16")
async def other_session(scene: Scene) -> None:
    await scene.export()
    calls = {
        "Cancel": scene.src.cancel,
        "Cleanup": scene.src.cleanup,
        "Transfer": scene.src.transfer,
        "Notifications": scene.src.listens,
        "PrepareSandbox": scene.src.prepare,
    }
    for what, call in calls.items():
        answer = await call("another-session")
        require(answer, IA, what=f"{what} of another session", names=("another-session", scene.session))
        require(await call(""), IA, what=f"{what} with an empty session_id")
    require(await scene.src.finalize("another-session", RESUME), IA, what="Finalize of another session")
